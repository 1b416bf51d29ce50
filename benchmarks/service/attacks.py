"""Does a small request stop the service? It is attacked while a neighbour asks.

    python -m benchmarks attacks --output benchmarks/results
    python -m benchmarks attacks --only unicode stop --seconds 10

A real ``mico-chat serve`` with the mini, with keys and then without, gets one attack after the
other. A second tenant asks for one token again and again, and a third program looks at
``/health/live``. Where a goal does not hold, a new service gets the next attack.
"""

import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Annotated

import httpx

from benchmarks.harness import Ratio, Report
from benchmarks.processes import END_S, family, memory, program
from benchmarks.service.attack_requests import ATTACKS, WANTS, Shot, Target, warm
from mico_chat.errors import ConfigError

CLI = ("-m", "mico_chat.cli")
STEP_S = 0.25
"""Seconds that are taken for a step of the mini where several tenants ask: 64 tokens of a prompt of
1,500, at 260 a second."""
TIMES, MOST_LIVE_S, MOST_BYTES, MOST_END_S = 2, 0.2, 300e6, END_S
"""The goals: the neighbour's wait in times of its wait alone, and bounds."""
ASK_S, LIVE_S, WATCH_S = 0.3, 0.05, 3.0
PATIENCE_S = 30.0
ENDED_BESIDE = ("connection: 400 that dribble a header", "fair: 16 long prompts")
LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Service:
    target: Target
    processes: Sequence[subprocess.Popen[str]]


@dataclass
class Seen:
    """Waits and answers of the neighbour and of ``/health/live``, and bytes of all processes."""

    asks: list[tuple[float, str]] = field(default_factory=list)
    live: list[tuple[float, str]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


@contextmanager
def _served(keys: bool, page: bool) -> Iterator[Service]:
    with TemporaryDirectory(ignore_cleanup_errors=True) as data, ExitStack() as stack:

        def headers(name: str) -> dict[str, str]:
            if not keys:
                return {"x-mico-user": name}
            command = [sys.executable, *CLI, "keys", "create", name, "--data-dir", data]
            made = subprocess.check_output(command, text=True)
            return {"authorization": f"Bearer {made.strip()}"}

        target = Target("", headers("attacker"), headers("neighbour"))
        flags = ("--port", "0", "--data-dir", data, "--shutdown-timeout-s", "5")
        server, url = stack.enter_context(program(*CLI, "serve", *flags))
        processes = [server]
        if page:
            ui = stack.enter_context(program(*CLI, "ui", "--port", "0", "--api", url))
            processes.append(ui[0])
            target = replace(target, page=ui[1])
        service = Service(replace(target, url=url), processes)
        _seen(service, [warm(service.target)], PATIENCE_S)
        yield service


def _watch(service: Service, pipe: Connection) -> None:
    """Run in a process of its own, which the attacker's work does not hold up."""
    seen, ended = Seen(), threading.Event()
    target = service.target
    ask = replace(target, attacker=target.neighbour).ask()

    def probe(shot: Shot, pause_s: float, into: list[tuple[float, str]]) -> None:
        while not ended.is_set():
            began = time.perf_counter()
            said = shot(began + PATIENCE_S)
            into.append((took := time.perf_counter() - began, said))
            ended.wait(max(0.0, pause_s - took))

    with ThreadPoolExecutor(2) as threads:
        threads.submit(probe, ask, ASK_S, seen.asks)
        threads.submit(probe, target.raw(lambda: [LIVE]), LIVE_S, seen.live)
        while not pipe.poll(0.1):
            # What the processes hold alone; files' pages do not count.
            held = [one.pid for one in family(one.pid for one in service.processes)]
            seen.memory.append(sum(memory(["RssAnon", "VmSwap"], pid) for pid in held))
        ended.set()
    pipe.send(seen)


def _seen(service: Service, shots: Sequence[Shot], seconds: float) -> tuple[Seen, list[str]]:
    """What is seen while the shots are fired, and how each of them ended."""
    ours, its = get_context("fork").Pipe()
    watcher = get_context("fork").Process(target=_watch, args=(service, its))
    watcher.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(len(shots) or 1) as threads:
        said = list(threads.map(lambda shot: shot(began + seconds), shots))
    time.sleep(max(0.0, began + WATCH_S - time.perf_counter()))
    ours.send("end")
    seen: Seen = ours.recv()
    watcher.join()
    return seen, said


def _attacked(service: Service, name: str, seconds: float) -> tuple[list[str], bool]:
    """A row of the table, and whether the goals hold."""
    alone, _ = _seen(service, (), 0)
    try:
        shots = ATTACKS[name](service.target)
    except (httpx.HTTPError, KeyError, ValueError) as error:
        return [name, f"not begun: {type(error).__name__}", *["-"] * 5, "**no**"], False
    began = time.perf_counter()
    seen, said = _seen(service, shots, seconds)
    took = time.perf_counter() - began
    quiet, wait, live = (max(probe)[0] for probe in (alone.asks, seen.asks, seen.live))
    failed = sum(word != "200" for _, word in seen.asks)
    memory = (max(seen.memory) - max(alone.memory)) / len(shots)
    wanted = WANTS.get(name.split(":")[0], r"(?!500).*")
    wrong = {
        "wait": wait > TIMES * quiet + STEP_S,
        f"{failed} not answered": failed > 0,
        "live": live > MOST_LIVE_S or any(word != "200" for _, word in seen.live),
        "memory": memory > MOST_BYTES,
        "answer": not all(re.fullmatch(wanted, word) for word in said),
    }
    ended = ", ".join(f"{n} x {word}" if n > 1 else word for word, n in Counter(said).items())
    faults = ", ".join(fault for fault, found in wrong.items() if found)
    figures = [f"{wait:.2f}", f"{quiet:.2f}", f"{wait / quiet:.1f}", f"{live:.2f}"]
    row = [name, f"{ended} ({took:.0f} s)", *figures, f"{memory / 1e6:.0f}"]
    return [*row, f"**no**: {faults}" if faults else "yes"], not faults


def _all(names: Sequence[str], keys: bool, seconds: float) -> tuple[list[list[str]], int]:
    """The rows of the table, and how many hold."""
    rows, held, left = list[list[str]](), 0, list(names)
    while left:
        group, as_before = left[0].split(":")[0], True
        with _served(keys, group == "page") as service:
            while as_before and left and left[0].split(":")[0] == group:
                row, as_before = _attacked(service, left.pop(0), seconds)
                rows.append(row)
                held += as_before
                print(" | ".join(row), flush=True)
    for name in [one for one in ENDED_BESIDE if one in names]:
        with _served(keys, False) as service:
            server, until = service.processes[0], time.perf_counter() + seconds
            shots = ATTACKS[name](service.target)
            with ThreadPoolExecutor(len(shots)) as threads:
                for shot in shots:
                    threads.submit(shot, until)
                time.sleep(2.0)
                server.terminate()
                began = time.perf_counter()
                with suppress(subprocess.TimeoutExpired):
                    server.wait(PATIENCE_S)
                took = time.perf_counter() - began
        held += (holds := took <= MOST_END_S)
        ended = f"ended after {took:.1f} s" if server.returncode != -signal.SIGKILL else "killed"
        rows.append([f"SIGTERM beside {name}", ended, *["-"] * 5, "yes" if holds else "**no**"])
        print(" | ".join(rows[-1]), flush=True)
    return rows, held


def measure(
    only: Annotated[list[str] | None, "how the attacks' names begin"] = None,
    seconds: Annotated[float, "the longest for an attack"] = 20.0,
) -> Report:
    names = [name for name in ATTACKS if name.startswith(tuple(only or [""]))]
    if not names:
        raise ConfigError(f"no attack begins so; the names are {'; '.join(ATTACKS)}")
    parts, ratios = dict[str, list[list[str]]](), []
    for keys, title in ((True, "with keys"), (False, "without keys")):
        rows, held = _all(names, keys, seconds)
        parts[title.capitalize()] = rows
        measure = f"attacks beside which the goals hold, {title}"
        ratios.append(Ratio.beside_of(measure, held, "", f"of {len(rows)}", len(rows), 1.0))
    bounds = {"times": TIMES, "live_s": MOST_LIVE_S, "most_bytes": MOST_BYTES, "end_s": MOST_END_S}
    return Report({"parts": parts, "ask_s": ASK_S, "step_s": STEP_S, **bounds}, ratios)
