"""How long ``mico-chat ask --image`` takes from cold, and where the time goes.

The command runs in new processes, its files in the page cache after a first run that is not
counted. The command shows its stages on a
terminal, which is its standard error here. Processor time is that of all its processes; on a busy
machine it says more than the clock.
"""

import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, medians, turns

IMAGE = Path(__file__).parents[2] / "ui/mico_ui/examples/sheep.jpg"
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


def measure(image: Path = IMAGE, repeats: int = 5) -> Report:
    command = [sys.executable, "-m", "mico_chat.cli", "ask", "--image", str(image), QUESTION]
    (runs,) = turns({"": lambda: measured(command)}, repeats).values()
    ends = {"start": 0.0} | medians({name: [run[name] for run in runs] for name in runs[0]})
    names = ["start", *(name for name in STAGES if name in ends)]
    values = {
        "stages": [[STAGES[b], f"{ends[b] - ends[a]:.2f}"] for a, b in pairwise(names)],
        "imported": [[name, f"{seconds:.2f}"] for name, seconds in imports().items()],
        "question": QUESTION,
    }
    return Report({**values, "end": ends["end"], "cpu": ends["cpu"]})


def measured(command: list[str]) -> dict[str, float]:
    """One run of the command, its standard error a terminal.

    Returns:
        the seconds after which each stage had ended, and under ``cpu`` its processor time.
    """
    ends, shown = dict[str, float](), b""
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)

    def follow() -> None:
        nonlocal shown
        with suppress(OSError):  # the command has ended
            while True:
                shown += os.read(ours, 4096)
                for name in STAGES:
                    if name.encode() in shown:
                        ends.setdefault(name, time.perf_counter() - start)

    follower = threading.Thread(target=follow)
    follower.start()
    answer: Any = process.stdout
    first = answer.read(1)
    ends["first word"] = time.perf_counter() - start
    answer.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    ends["end"] = time.perf_counter() - start
    follower.join()
    answer.close()
    os.close(ours)
    if process.returncode != 0 or not first:
        raise RuntimeError(f"{' '.join(command)}: {shown.decode(errors='replace')}")
    return ends | {"cpu": usage.ru_utime + usage.ru_stime}


def imports() -> dict[str, float]:
    """Seconds of the command's imports by package, as ``-X importtime`` counts them: more than they
    take without it."""
    modules = ["cli.main", "cli.ask", "checkpoints.load", "encode", "engine.batching"]
    modules += ["engine.llamacpp", "engine.llamacpp_export"]
    code = "import " + ", ".join(f"mico_chat.{module}" for module in modules)
    command = [sys.executable, "-X", "importtime", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found: Counter[str] = Counter()
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", said):
        package = module.split(".")[0]
        found[package if package in PACKAGES else "other packages"] += int(own)
    return {name: us / 1e6 for name, us in found.most_common()}
