"""The whole examination: starts the probes, looks at the machine meanwhile, writes the report."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass

from mico_chat import __version__
from mico_chat.cli.doctor.children import Children, Outcome
from mico_chat.cli.doctor.engines import (
    bitsandbytes_finding,
    is_installed,
    llamacpp_finding,
    postgres_finding,
    torch_finding,
    transformers_finding,
    vllm_finding,
)
from mico_chat.cli.doctor.environment import (
    LIBRARY,
    Source,
    folder_finding,
    port_finding,
    shm_finding,
    variable_findings,
)
from mico_chat.cli.doctor.finding import Finding, Report, Section
from mico_chat.cli.doctor.gpu import gpu_findings
from mico_chat.cli.doctor.machine import Machine, machine_findings
from mico_chat.cli.doctor.media import media_findings
from mico_chat.cli.doctor.packages import package_findings
from mico_chat.load import BITSANDBYTES, EngineOptions

PROBE_S = 90.0
VLLM_S = 180.0
"""Seconds that importing may take on a cold disk and a busy machine."""


@dataclass(frozen=True)
class Service:
    """What the server and the page would listen on, and the server's database.

    ``sources`` are settings beside the library's own.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    ui_port: int = 7860
    database_url: str | None = None
    sources: tuple[Source, ...] = ()


def examine(
    model: str,
    options: EngineOptions,
    service: Service,
    machine: Machine,
    *,
    environment: Mapping[str, str] | None = None,
    variables: Iterable[str] = (),
) -> Report:
    """Look at everything.

    Args:
        model: ``mini``, a folder or a hub name.
        options: how it would be run.
        service: where it would listen.
        machine: what there is.
        environment: the variables; default: the process's.
        variables: variables that something reads beside the settings.
    """
    given = os.environ if environment is None else environment
    installed = {name: is_installed(name) for name in ("llama_cpp", "vllm", "bitsandbytes")}
    asked = {
        "model": model,
        "options": asdict(options),
        "memory": {
            "free": machine.memory_free,
            "most": machine.memory_limit or machine.memory,
        },
        "disk_free": machine.disk_free,
        "offline": any(given.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")),
    }
    with Children() as children:
        # One after another what needs torch, whose import takes longest.
        with_torch = ["torch", "transformers", "model"]
        if installed["bitsandbytes"]:
            with_torch.append("bitsandbytes")
        started = [children.start(with_torch, asked, PROBE_S)]
        if installed["vllm"]:
            started.append(children.start(["vllm"], asked, VLLM_S))
        if installed["llama_cpp"]:
            started.append(children.start(["llamacpp"], asked, PROBE_S))
        started.append(children.start(["codecs", "decoder"], asked, PROBE_S))
        packages = package_findings()
        surroundings = _surroundings(service, machine, given, variables, installed["vllm"])
        outcomes = _gathered(started)
    torch = outcomes["torch"]
    found = outcomes["model"].facts
    media = media_findings(outcomes["codecs"], outcomes["decoder"])
    sections = [
        Section("Machine", [*machine_findings(machine), *gpu_findings(machine, torch.facts)]),
        Section("Packages", packages),
        Section("Engines", _engines(outcomes, machine, options)),
        Section("Service", [*media, *surroundings]),
        Section("Model", _model(model, outcomes["model"])),
    ]
    return Report(__version__, model, None if found is None else found["engine"], sections)


def _gathered(started: Sequence[Future[dict[str, Outcome]]]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for future in started:
        outcomes |= future.result()
    return outcomes


def _engines(
    outcomes: Mapping[str, Outcome], machine: Machine, options: EngineOptions
) -> list[Finding]:
    return [
        torch_finding(outcomes["torch"], machine.usable_cores),
        transformers_finding(outcomes["transformers"]),
        llamacpp_finding(
            outcomes.get("llamacpp"), options.engine == "llamacpp", machine.instructions
        ),
        vllm_finding(outcomes.get("vllm"), options.engine == "vllm"),
        bitsandbytes_finding(outcomes.get("bitsandbytes"), options.quantization in BITSANDBYTES),
    ]


def _surroundings(
    service: Service,
    machine: Machine,
    environment: Mapping[str, str],
    variables: Iterable[str],
    vllm: bool,
) -> list[Finding]:
    sources = (*LIBRARY, *service.sources)
    shm = shm_finding(machine.shm, vllm or is_installed("webdataset"))
    return [
        folder_finding(machine.cache),
        *variable_findings(environment, sources, variables),
        port_finding(
            "API port",
            service.host,
            service.port,
            f"mico-chat serve --port {service.port + 1}, or end the program that listens there",
        ),
        port_finding(
            "page's port",
            "127.0.0.1",
            service.ui_port,
            f"mico-chat ui --port {service.ui_port + 1}, or end the program that listens there",
        ),
        postgres_finding((service.database_url or "").startswith("postgres")),
        *([] if shm is None else [shm]),
    ]


def _model(name: str, outcome: Outcome) -> list[Finding]:
    if outcome.facts is not None:
        return [Finding.of(record) for record in outcome.facts["findings"]]
    if (outcome.error or "").startswith("not tried"):
        return [Finding("model", "problem", f"{name}: {outcome.error}", "repair that first")]
    return [Finding("model", "problem", f"{name}: {outcome.error}")]
