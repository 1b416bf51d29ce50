"""The doctor's probes: checks that may crash, hang or take long run in a process of their own.

A library that was compiled for another processor ends its process, and vLLM takes seconds to
import. The process writes a line of JSON after each probe, so its parent knows in which probe it
died.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import psutil

from mico_chat.engine.cpu import ControlGroups

Mark = Literal["ok", "note", "warning", "problem"]
"""``note``: information. ``warning``: works, but not as well as it could. ``problem``: the default
way to use mico-chat, or the way that the user asked for, fails."""


ROOM = "MICO_CACHE_DIR=/a/larger/disk, or make room there"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    ``fix``: the command that solves the problem, or advice. ``facts``: the finding for programs:
    bytes, counts, names.
    """

    name: str
    mark: Mark
    text: str
    fix: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def gigabytes(n_bytes: float) -> str:
    """``"13.5 GB"``, ``"98 MB"``, ``"512 KB"``: decimal, as disks and pages of models have them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if n_bytes >= size * 0.9995:
            n = n_bytes / size
            return f"{n:.1f} {unit}" if n < 100 and unit == "GB" else f"{n:.0f} {unit}"
    return f"{n_bytes:.0f} bytes"


def memory(groups: ControlGroups | None = None) -> tuple[int, int]:
    """Free bytes of memory, and all bytes that this process may use."""
    machine, groups = psutil.virtual_memory(), groups or ControlGroups()
    limit, within = groups.memory_limit(), groups.memory_free()
    free = machine.available if within is None else min(machine.available, within)
    return free, machine.total if limit is None else min(machine.total, limit)


def disk_free(folder: Path) -> int:
    """Free bytes where a folder is, or will be made."""
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


@dataclass(frozen=True)
class Outcome:
    """The facts that a probe found, or why it failed."""

    facts: Mapping[str, Any] | None = None
    error: str | None = None


_COMMAND = ("-m", "mico_chat.cli.probes")


def run_probes(
    names: Sequence[str], model: str, options: Mapping[str, Any], seconds: float
) -> dict[str, Outcome]:
    """The outcomes, by name, of probes that run one after another in one process.

    A process that takes longer than ``seconds`` is killed, with the processes that it started.
    """
    quiet = {
        **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},  # probes fetch nothing
        **{"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"},
        "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
    }
    process = subprocess.Popen(
        [sys.executable, *_COMMAND, json.dumps([names, model, options])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | quiet,
        start_new_session=True,
    )
    death = None
    try:
        answers, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        death = f"no answer within {seconds:.0f} s"
        os.killpg(process.pid, signal.SIGKILL)
        answers, complaints = process.communicate()
    finally:
        if process.poll() is None:  # the user interrupts
            os.killpg(process.pid, signal.SIGKILL)
    if death is None and process.returncode < 0:
        death = f"killed by {signal.Signals(-process.returncode).name}"
    last = complaints.strip().splitlines()[-1:] or ["it printed nothing"]
    outcomes = [Outcome(**json.loads(line)) for line in answers.splitlines()]
    found = dict(zip(names, outcomes, strict=False))
    for name in names[len(outcomes) :]:
        found[name] = Outcome(error=death or f"ended with status {process.returncode}: {last[0]}")
        death = f"not tried: {name} ended the process"
    return found


def main(names: list[str], model: str, options: dict[str, Any]) -> None:
    """Run probes and report each on the parent's pipe, where no library can print into it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for name in names:
        try:
            outcome = Outcome(probe(name, model, options))
        except Exception as error:  # a library may raise anything: the parent reports it
            lines = str(error).strip().splitlines() or [""]
            outcome = Outcome(error=f"{type(error).__name__}: {lines[0]}".removesuffix(": "))
        print(json.dumps(asdict(outcome)), file=answers, flush=True)


def probe(name: str, model: str = "", options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts of one probe; ``text`` is for people. A package without a probe is imported."""
    if name == "torch":
        return _probe_torch()
    if name == "llamacpp":
        import llama_cpp

        llama_cpp.llama_backend_init()
        return {"text": f"{llama_cpp.__version__} starts on this processor"}
    if name == "decoder":
        from PIL import Image

        from mico_chat.media import MediaDecoder, MediaFile, MediaLimits

        picture = io.BytesIO()
        Image.new("RGB", (32, 32)).save(picture, "png")
        with MediaDecoder(MediaLimits()) as decoder:
            decoder.decode(MediaFile("image", picture.getvalue(), "made.png"))
        return {"text": "its process starts and decodes a picture"}
    if name == "model":
        from mico_chat.cli.model_check import model_findings
        from mico_chat.load import EngineOptions

        findings = model_findings(model, EngineOptions(**(options or {})))
        return {"findings": [asdict(finding) for finding in findings]}
    return {"text": f"{import_module(name).__version__} can be imported"}


def _probe_torch() -> dict[str, Any]:
    """The devices that torch was built for and finds; each card computes once."""
    import torch

    gpus: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count()):
        gpus.append({"name": torch.cuda.get_device_name(number), "error": None})
        try:
            gpus[-1]["free"], gpus[-1]["total"] = torch.cuda.mem_get_info(number)
            torch.ones(8, device=f"cuda:{number}").sum().item()
        except RuntimeError as error:
            gpus[-1]["error"] = str(error).splitlines()[0]
    return {
        "text": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "build": f"CUDA {torch.version.cuda}" if torch.version.cuda else None,
        "mps": torch.backends.mps.is_available(),
        "gpus": gpus,
    }


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
