"""``mico-chat serve`` with the shipped mini, in a process of its own, for clients of every sort."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import PATIENCE_S

# What the clients' own settings could change.
_FOREIGN = ("MICO_SERVER_", "MICO_MODEL", "OPENAI_", "LLM_", "LITELLM_")


@dataclass(frozen=True)
class Served:
    url: str
    data_dir: Path
    key: str
    pid: int

    def new_key(self, name: str, *flags: str) -> str:
        return _cli("keys", "create", name, "--data-dir", str(self.data_dir), *flags)


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without what is meant for other services, and offline."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith(_FOREIGN)}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "", **variables}


_COMMAND = [sys.executable, "-m", "mico_chat.cli"]


def _cli(*arguments: str) -> str:
    done = subprocess.run(
        [*_COMMAND, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextmanager
def served(data_dir: Path, *flags: str) -> Iterator[Served]:
    scopes = ["--scope", "chat", "--scope", "metrics"]
    key = _cli("keys", "create", "tests", *scopes, "--data-dir", str(data_dir))
    log = data_dir / "log"
    command = [*_COMMAND, "serve", "--port", "0", "--data-dir", str(data_dir), *flags]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # ends with the process too
        assert "ready at http" in line, log.read_text()
        yield Served(line.split()[-1], data_dir, key, process.pid)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
