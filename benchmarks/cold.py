"""How long ``mico-chat ask --image`` takes from cold, and where the time goes.

``python -m benchmarks.cold --output benchmarks/results`` runs the command in new processes, its
files in the page cache after a first run that is not counted. The stages are those that the command
itself shows on a terminal, which is what its standard error gets here. Processor time is that of
all its processes; on a busy machine it says more than the clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import pty
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from mico_chat.engine.cores import processor, usable_cores

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "ui/mico_ui/examples/sheep.jpg"
QUESTION = "What is in the picture?"
STAGES = {
    "looking at": "command line",
    "loading the model": "decoding, beside it torch's import",
    "answering": "loading",
    "first word": "media and prompt, up to the first word",
    "end": "the rest of the answer, and the end",
}
"""What the command shows at the end of each stage, and the stage."""

PACKAGES = ("torch", "torchvision", "timm", "transformers", "huggingface_hub", "numpy", "pydantic")
"""Imports that are counted by themselves."""


@dataclass
class Run:
    """Seconds since the start at which each stage ended; ``cpu`` is processor time."""

    ends: dict[str, float] = field(default_factory=dict)
    cpu: float = 0.0

    @property
    def stages(self) -> dict[str, float]:
        """The seconds of each stage."""
        before, found = 0.0, {}
        for name, stage in STAGES.items():
            if name in self.ends:
                found[stage] = self.ends[name] - before
                before = self.ends[name]
        return found


def main() -> None:
    """Measure, print, and write ``cold.md``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold", description=__doc__)
    parser.add_argument("--image", type=Path, default=IMAGE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for cold.md")
    options = parser.parse_args()
    command = [sys.executable, "-m", "mico_chat.cli", "ask", "--image", str(options.image)]
    command += [QUESTION]
    measured(command)
    runs = [measured(command) for _ in range(options.repeats)]
    text = report(runs, imports(), options)
    print(text, end="")
    if options.output is not None:
        (options.output / "cold.md").write_text(text, encoding="utf-8")


def measured(command: list[str]) -> Run:
    """One run of the command, its standard error a terminal.

    Raises:
        RuntimeError: if it fails.
    """
    run, shown = Run(), b""
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)

    def follow() -> None:
        nonlocal shown
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # the other end is closed
                return
            shown += piece
            for name in STAGES:
                if name.encode() in shown:
                    run.ends.setdefault(name, time.perf_counter() - start)

    follower = threading.Thread(target=follow)
    follower.start()
    assert process.stdout is not None
    first = process.stdout.read(1)
    run.ends["first word"] = time.perf_counter() - start
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    run.ends["end"] = time.perf_counter() - start
    run.cpu = usage.ru_utime + usage.ru_stime
    follower.join()
    process.stdout.close()
    os.close(ours)
    if process.returncode != 0 or not first:
        raise RuntimeError(f"{' '.join(command)}: {shown.decode(errors='replace')}")
    return run


def imports() -> dict[str, float]:
    """Seconds of what the command imports, by package, as ``-X importtime`` counts them: more than
    they take without it."""
    modules = ["cli.main", "cli.ask", "checkpoints.load", "encode", "engine.batching"]
    modules += ["engine.llamacpp", "checkpoints.gguf_export"]
    code = "import " + ", ".join(f"mico_chat.{module}" for module in modules)
    command = [sys.executable, "-X", "importtime", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found: Counter[str] = Counter()
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", said):
        package = module.split(".")[0]
        found[package if package in PACKAGES else "other packages"] += int(own)
    return {name: us / 1e6 for name, us in found.most_common()}


def report(runs: list[Run], imported: dict[str, float], options: argparse.Namespace) -> str:
    """The tables, as Markdown."""
    whole = statistics.median(run.ends["end"] for run in runs)
    cpu = statistics.median(run.cpu for run in runs)
    packages = ("torch", "transformers", "timm", "llama-cpp-python")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines = [
        f"# `mico-chat ask --image` from cold, {datetime.now(UTC).date()}",
        "",
        f"{processor()[0]}, {usable_cores()} cores, Python {platform.python_version()}, "
        f"{versions}. "
        f'{options.image.name}, "{QUESTION}"; medians of {len(runs)} new processes, files in the '
        "page cache. Made by `python -m benchmarks.cold`.",
        "",
        f"**{whole:.2f} s** until the process ends, {cpu:.2f} s of processor time.",
        "",
        "| stage | s |",
        "|---|---|",
    ]
    for stage in STAGES.values():
        took = [run.stages[stage] for run in runs if stage in run.stages]
        if took:
            lines.append(f"| {stage} | {statistics.median(took):.2f} |")
    lines += ["", "| imported package | s, with `-X importtime` |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in imported.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
