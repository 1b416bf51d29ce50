"""Schemathesis over the whole description of a running service: every operation, good data and bad.

``python -m tests.server.schema_check --examples 200`` checks a service of tiny random models, whose
media layer, encoder and stores are real; with ``--url`` (and ``--key``) one that runs already.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

from mico_chat.assistant import Assistant
from mico_chat.media import MediaDecoder, MediaLimits
from mico_chat.model.config import MicoConfig
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.similarity import Similarity
from mico_server.http.auth import SCOPES
from mico_server.settings import ServerSettings
from tests.server.decoding_assistant import decoding_assistant
from tests.server.running import new_key, running, wait_until_ready
from tests.server.served import environment
from tests.tiny import letters

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_headers_conformance", "response_schema_conformance"),
)


@contextmanager
def tiny_service(folder: Path) -> Iterator[httpx.Client]:
    """A service of random models: only its words have no sense."""
    with MediaDecoder(MediaLimits(timeout_s=20)) as decoder:

        def load() -> Assistant:
            assistant = decoding_assistant(decoder)
            torch.manual_seed(0)
            branch = MicoForPretraining(MicoConfig.tiny(), assistant.encoder.model)
            branch.train(False)
            assistant.similarity = Similarity(branch, letters(), assistant.processor, decoder)
            return assistant

        with running(load, ServerSettings(data_dir=folder)) as client:
            wait_until_ready(client)
            key = new_key(folder, "schemathesis", scopes=tuple(SCOPES))
            client.headers["authorization"] = f"Bearer {key}"
            yield client


def described(client: httpx.Client) -> Any:
    """The service's description, in which ``model`` is the served one.

    Of a hundred thousand random names none is a model's, and a request for another model is
    refused before anything else of it is looked at.
    """
    (model,) = client.get("/v1/models").json()["data"]
    description = client.get("/openapi.json").json()
    for schema in _schemas(description):
        if str(schema.get("title")).endswith("Request"):
            schema["properties"]["model"] = {"type": "string", "enum": [model["id"]]}
    return description


def _schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON document."""
    if isinstance(node, dict):
        yield node
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _schemas(child)


@dataclass(frozen=True)
class Checked:
    """What schemathesis says, whether it is content, and how many answers of which status."""

    said: str
    passed: bool
    cases: int
    statuses: dict[str, Counter[str]]


def check(client: httpx.Client, folder: Path, *, examples: int, seed: int | None = None) -> Checked:
    """Try every operation.

    ``examples`` is how many random requests each gets at most, beside those at the edges of every
    field; without a ``seed`` they are always the same. The service itself counts its answers.
    """
    file = folder / "openapi.json"
    file.write_text(json.dumps(described(client)))
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(file)]
    command += ["--url", str(client.base_url), "--checks", ",".join(CHECKS), "--no-color"]
    command.append(f"--max-examples={examples}")
    command.append("--generation-deterministic" if seed is None else f"--seed={seed}")
    command += ["--workers=1", "--request-timeout=60", "--suppress-health-check=all"]
    command += ["--continue-on-failure"]
    if "authorization" in client.headers:
        command += ["--header", f"Authorization: {client.headers['authorization']}"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    counted = re.search(r"(\d+) generated", done.stdout)
    return Checked(
        said=done.stdout + done.stderr,
        passed=done.returncode == 0,
        cases=0 if counted is None else int(counted[1]),
        statuses=_statuses(client.get("/metrics").text),
    )


def _statuses(metrics: str) -> dict[str, Counter[str]]:
    """Answers by route and method, and by status."""
    found: dict[str, Counter[str]] = {}
    line = r'mico_requests_total\{method="(\w+)",route="([^"]+)",status="(\d+)"\} (\S+)'
    for method, route, status, number in re.findall(line, metrics):
        found.setdefault(f"{method} {route}", Counter())[status] = int(float(number))
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="random ones an operation")
    parser.add_argument("--seed", type=int, help="always the same requests without")
    parser.add_argument("--url", help="of a running service; a tiny one is started without")
    parser.add_argument("--key", help="of that service")
    asked = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if asked.url is None:
            client = stack.enter_context(tiny_service(folder / "data"))
        else:
            headers = {} if asked.key is None else {"authorization": f"Bearer {asked.key}"}
            client = stack.enter_context(
                httpx.Client(base_url=asked.url, headers=headers, trust_env=False)
            )
        checked = check(client, folder, examples=asked.examples, seed=asked.seed)
    print(checked.said)
    for operation, statuses in sorted(checked.statuses.items()):
        if set(statuses) != {"405"}:
            print(operation, dict(statuses))
    print(f"{checked.cases} cases: {'all passed' if checked.passed else 'some failed'}")
    sys.exit(not checked.passed)


if __name__ == "__main__":
    main()
