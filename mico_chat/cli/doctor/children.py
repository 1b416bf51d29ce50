"""Runs probes in processes, several at once, each with a limit of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# As the media decoder's worker: with this process's import path, and without its main module.
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mico_chat.cli.doctor.probe import main; "
    "main(json.loads(sys.argv[2]), json.loads(sys.argv[3]))"
)

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
}
"""Nothing is fetched, and standard error holds what matters."""


@dataclass(frozen=True)
class Outcome:
    """What a probe found: its facts, or why it failed."""

    facts: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def signal(self) -> str | None:
        """``"SIGILL"`` where the process was killed by it."""
        words = (self.error or "").split()
        return next((word for word in words if word.startswith("SIG")), None)


class Children:
    """Starts processes of probes; those that still run end with the ``with`` block."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=8)
        self._processes: list[subprocess.Popen[str]] = []

    def start(
        self, names: Sequence[str], asked: Mapping[str, Any], seconds: float
    ) -> Future[dict[str, Outcome]]:
        """Run probes one after another in one process; their outcomes by name."""
        path = [str(Path(entry).absolute()) for entry in sys.path]
        arguments = [json.dumps(value) for value in (path, list(names), dict(asked))]
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,
        )
        self._processes.append(process)
        return self._pool.submit(_outcomes, process, list(names), seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            _end(process)
        self._pool.shutdown()


def _outcomes(
    process: subprocess.Popen[str], names: Sequence[str], seconds: float
) -> dict[str, Outcome]:
    late = False
    try:
        said, complained = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        _end(process)
        said, complained = process.communicate()
    found: dict[str, Outcome] = {}
    running = names[0]
    for line in said.splitlines():
        record = json.loads(line)
        if "begin" in record:
            running = record["begin"]
        else:
            found[record["end"]] = Outcome(record.get("facts"), record.get("error"))
    if running not in found:
        found[running] = Outcome(None, _death(process, complained, seconds if late else None))
    for name in names:
        found.setdefault(name, Outcome(None, f"not tried: {running} ended the process"))
    return found


def _death(process: subprocess.Popen[str], complained: str, late: float | None) -> str:
    if late is not None:
        return f"no answer within {late:.0f} s"
    code = process.returncode
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    last = complained.strip().splitlines()[-1:] or ["it said nothing"]
    return f"ended with status {code}: {last[0]}"


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process and what it started, if it still runs."""
    with suppress(ProcessLookupError):  # it may end at this very moment
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
