"""How long commands take from cold, and where the time of ``mico-chat ask --image`` goes.

The commands run in new processes and in turns, their files in the page cache and their modules
compiled, after a first round that is not counted. ``ask`` shows its stages on a terminal, which is
its standard error here. Processor time is that of all processes of a command; on a busy machine it
says more than the clock.
"""

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from benchmarks.harness import Ratio, Report, medians, turns
from benchmarks.processes import two_free_ports

IMAGE = Path(__file__).parents[2] / "tests/support/media/sheep.jpg"
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


WAYS = {"ask --image": ("ask", "--image", str(IMAGE), QUESTION), "ask": ("ask", "Who are you?")}
WAYS |= {"--help": ("--help",), "ui": ("ui",)}
GOALS = {
    "ask --image: end": 4.0,
    **dict.fromkeys(("ask: end", "--help: end", "ui: page")),
    "ui: page and model": 6.0,
    "ui: first answer, from then on": 1.0,
    **{f"{way}: cpu": None for way in WAYS},
}
"""The figures in seconds, and the most that each is to be."""


def measure(repeats: int = 5) -> Report:
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, "-m", "mico_chat.cli"]
        ways = {
            way: partial(measured, [*command, *words], environment) for way, words in WAYS.items()
        }
        ways["ui"] = partial(served, [*command, "ui", "--data-dir", folder], environment)
        runs, imported = turns(ways, repeats), imports(environment)
    found = {
        f"{way}: {end}": seconds
        for way, of_way in runs.items()
        for end, seconds in medians({end: [r[end] for r in of_way] for end in of_way[0]}).items()
    }
    ratios = [
        Ratio(measure=name, value=found[name], unit="s", goal=most, at_most=True)
        for name, most in GOALS.items()
    ]
    ends = {"start": 0.0} | {name: found.get(f"ask --image: {name}", 0.0) for name in STAGES}
    names = ["start", *(name for name in STAGES if ends[name])]
    values = {
        "rows": [[one.measure, f"{one.value:.2f}", one.wanted] for one in ratios],
        "stages": [[STAGES[b], f"{ends[b] - ends[a]:.2f}"] for a, b in pairwise(names)],
        "imported": [[name, f"{seconds:.2f}"] for name, seconds in imported.items()],
        "command": f"{IMAGE.name} {QUESTION!r}",
    }
    return Report(values, ratios)


def served(command: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    """One run of ``mico-chat ui`` until its first answer: seconds by their names in ``GOALS``."""
    ports = two_free_ports()
    command = [*command, *"--log-level warning --port {} --api-port {}".format(*ports).split()]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    ends = until_model(process, *ports, start)
    ready = time.perf_counter()
    asked = {"model": "mini", "input": "Hello", "max_output_tokens": 16}
    url = f"http://127.0.0.1:{ports[1]}/v1/responses"
    httpx.post(url, json=asked, timeout=60, trust_env=False).raise_for_status()
    ends["first answer, from then on"] = time.perf_counter() - ready
    process.terminate()
    _, _, usage = os.wait4(process.pid, 0)
    return ends | {"cpu": usage.ru_utime + usage.ru_stime}


def until_model(
    process: subprocess.Popen[bytes], port: int, api_port: int, start: float
) -> dict[str, float]:
    """The seconds from ``start`` on until the page is there, and until the model is."""
    ends: dict[str, float] = {}
    with httpx.Client(timeout=60, trust_env=False) as client:
        for end, way in (("page", f"{port}"), ("page and model", f"{api_port}/health/ready")):
            while end not in ends:
                if process.poll() is not None:
                    raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
                with suppress(httpx.TransportError):
                    if client.get(f"http://127.0.0.1:{way}").is_success:
                        ends[end] = time.perf_counter() - start
                time.sleep(0.02)
    return ends


COMPILERS = (
    "*gcc*",
    "*g++*",
    "cc",
    "c++",
    "c[89]9*",
    "clang*",
    "cmake*",
    "ninja*",
    "as",
    "ld",
    "ld.*",
)
"""What a machine without a compiler lacks, on ``PATH``."""

NEW = {"page": 90.0, "page and model": None, "first answer": 90.0}
"""The figures of a new machine in seconds, and the most that each is to be."""


def new_machine(clone_of: str = str(Path(__file__).parents[2])) -> Report:
    """``make run`` on a new clone with empty caches, with a compiler and without: all that a
    newcomer waits for until a photograph is answered."""
    rows, ratios = list[list[str]](), list[Ratio]()
    for compiler in (True, False):
        way = f"{'with' if compiler else 'without'} a compiler"
        found, received = from_nothing(clone_of, compiler)
        rows += [[way, *(f"{found[end]:.1f}" for end in NEW), f"{received / 1e6:.0f}"]]
        ratios += [
            Ratio(measure=f"{way}: {end}", value=found[end], unit="s", goal=most, at_most=True)
            for end, most in NEW.items()
        ]
    return Report({"rows": rows}, ratios)


def from_nothing(clone_of: str, compiler: bool) -> tuple[dict[str, float], int]:
    """A new clone's seconds by their names in ``NEW``, and the bytes that it received."""

    def received() -> int:
        links = psutil.net_io_counters(pernic=True).items()
        return sum(link.bytes_recv for name, link in links if name != "lo")

    ports = two_free_ports()
    with TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"}
        environment["MICO_CACHE_DIR"] = f"{folder}/cache/mico-chat"
        tools = Path(folder, "tools")
        tools.mkdir()
        for place in os.get_exec_path():
            for tool in Path(place).glob("*") if not compiler else ():
                if not any(tool.match(pattern) for pattern in COMPILERS):
                    with suppress(FileExistsError):
                        (tools / tool.name).symlink_to(tool)
        if not compiler:
            environment["PATH"] = str(tools)
        before, start = received(), time.perf_counter()
        clone = ["git", "clone", "--quiet", "--depth", "1", f"file://{clone_of}", f"{folder}/new"]
        subprocess.run(clone, check=True)
        words = f"PYTHON={sys.base_prefix}/bin/python3 PORT={ports[0]} API_PORT={ports[1]}"
        command = ["make", "--directory", f"{folder}/new", "run", *words.split()]
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            ends = until_model(process, *ports, start)
            with IMAGE.open("rb") as image:
                url = f"http://127.0.0.1:{ports[1]}/v1/chat"
                how: Any = {"files": {"image": image}, "timeout": 60, "trust_env": False}
                httpx.post(url, data={"message": QUESTION}, **how).raise_for_status()
            ends["first answer"] = time.perf_counter() - start
            return ends, received() - before
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def measured(command: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    """One run of the command, its standard error a terminal.

    Returns:
        the seconds after which each stage had ended, and under ``cpu`` its processor time.
    """
    ends, shown = dict[str, float](), b""
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs)
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


def imports(environment: Mapping[str, str]) -> dict[str, float]:
    """Seconds of the command's imports by package, as ``-X importtime`` counts them: more than they
    take without it."""
    modules = ["cli.main", "cli.ask", "checkpoints.load", "encode", "engine.batching"]
    modules += ["engine.llamacpp", "engine.llamacpp_export"]
    code = "import " + ", ".join(f"mico_chat.{module}" for module in modules)
    command = [sys.executable, "-X", "importtime", "-c", code]
    how: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "check": True}
    said = subprocess.run(command, **how).stderr
    found: Counter[str] = Counter()
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", said):
        package = module.split(".")[0]
        found[package if package in PACKAGES else "other packages"] += int(own)
    return {name: us / 1e6 for name, us in found.most_common()}
