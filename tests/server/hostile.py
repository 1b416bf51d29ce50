"""Hostile media for a running service: files that are each damaged in a way of their own."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from threading import Lock

import httpx

from mico_chat.media import MediaDecoder
from mico_chat.media.kinds import Kind
from mico_server.settings import ServerSettings
from tests.server.bombs import BOMBS
from tests.server.decoding_assistant import decoding_assistant
from tests.server.hostile_seeds import good_files
from tests.server.mutations import MUTATIONS
from tests.server.running import running, wait_until_ready

MAX_MESSAGE = 300
"""Characters that a person may be asked to read."""


# A decoder's words, the server's paths, addresses of memory, and what no terminal should be sent.
_LEAKS = re.compile(
    r"avcodec|avformat|ffmpeg|libav|\bav\.|\bPIL\b|numpy|zipfile|Traceback|Error\b|Errno|0x[0-9a-f]"
    r"|/(usr|tmp|home|root|var|opt|work|proc|etc)\b|[\x00-\x1f\x7f-\x9f]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Case:
    """A file to send as ``kind``; ``must_fail``: no reading of it makes sense."""

    name: str
    mutation: str
    kind: Kind
    data: bytes
    must_fail: bool


@dataclass(frozen=True)
class Outcome:
    """What the service said of a case (without its data). ``status`` is 0 where it said nothing."""

    case: Case
    status: int
    seconds: float
    message: str

    @property
    def complaint(self) -> str | None:
        """What is wrong with the answer, if anything is."""
        if self.status == 200:
            return "answered, but it must be refused" if self.case.must_fail else None
        if not 400 <= self.status < 500:
            return f"status {self.status}"
        if leak := _LEAKS.search(self.message):
            return f"leaks {leak.group()!r}"
        if not self.message.startswith(f"{self.case.name}: "):
            return "does not name the file"
        if len(self.message) > MAX_MESSAGE:
            return f"a message of {len(self.message)} characters, more than {MAX_MESSAGE}"
        return None


def mutated(n: int, seed: int) -> Iterator[Case]:
    """``n`` cases, the same for the same seed: two in three are mutations, one is a bomb."""
    random = Random(seed)
    shift = random.randrange(len(BOMBS))
    for number in range(n):
        own = Random(f"{seed} {number}")
        if number % 3 == 0:
            bomb = BOMBS[(number // 3 + shift) % len(BOMBS)]
            name = f"{number:04}-{bomb.name}.{bomb.extension}"
            yield Case(name, bomb.name, bomb.kind, bomb.make(own), bomb.must_fail)
            continue
        good = own.choice(good_files())
        mutation = own.choice(list(MUTATIONS))
        name = f"{number:04}-{mutation}.{good.extension}"
        kind, data, must_fail = MUTATIONS[mutation](good, own)
        yield Case(name, mutation, kind, data, must_fail)


# --- sending --------------------------------------------------------------------------------------


def send(client: httpx.Client, case: Case) -> Outcome:
    """Ask about one file."""
    sent = replace(case, data=b"")
    started = time.perf_counter()
    try:
        response = client.post(
            "/v1/chat",
            data={"message": "What is it?", "max_tokens": "1"},
            files={case.kind: (case.name, case.data)},
        )
        said = response.json()
        message = "" if response.status_code == 200 else str(said["error"]["message"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return Outcome(sent, 0, time.perf_counter() - started, repr(error))
    return Outcome(sent, response.status_code, time.perf_counter() - started, message)


def send_all(client: httpx.Client, cases: Iterable[Case], concurrency: int = 4) -> list[Outcome]:
    """Ask about all, ``concurrency`` at a time, holding no more of them in memory."""
    remaining, lock = iter(cases), Lock()
    outcomes: list[Outcome] = []

    def work() -> None:
        while True:
            with lock:
                case = next(remaining, None)
            if case is None:
                return
            outcomes.append(send(client, case))

    with ThreadPoolExecutor(concurrency) as threads:
        for worker in [threads.submit(work) for _ in range(concurrency)]:
            worker.result()
    return outcomes


def unharmed() -> list[Case]:
    """Every good file as it is."""
    return [
        Case(f"good-{number}.{good.extension}", "good", good.kind, good.data, must_fail=False)
        for number, good in enumerate(good_files())
    ]


def resident_mb(pid: int | str = "self") -> float:
    """Memory that a process holds, in MiB (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def service(decoder: MediaDecoder, data_dir: Path) -> Iterator[httpx.Client]:
    """The real service over a tiny model, in this process; what it keeps is in ``data_dir``."""
    settings = ServerSettings(data_dir=data_dir)
    with running(lambda: decoding_assistant(decoder), settings) as client:
        wait_until_ready(client)
        yield client


def report(outcomes: Sequence[Outcome]) -> str:
    """Tables: mutations by status, the messages, the complaints."""
    statuses = sorted({outcome.status for outcome in outcomes})
    lines = [f"{'mutation':36}" + "".join(f"{status:>7}" for status in statuses)]
    for mutation in sorted({outcome.case.mutation for outcome in outcomes}):
        counts = Counter(o.status for o in outcomes if o.case.mutation == mutation)
        lines.append(f"{mutation:36}" + "".join(f"{counts[status]:>7}" for status in statuses))
    total = Counter(outcome.status for outcome in outcomes)
    lines.append(f"{'all':36}" + "".join(f"{total[status]:>7}" for status in statuses))
    lines += ["", "messages"]
    said = Counter(
        re.sub(r"\d[\d,.]*", "#", outcome.message.removeprefix(f"{outcome.case.name}: "))
        for outcome in outcomes
        if outcome.message
    )
    lines += [f"{count:6}  {message}" for message, count in said.most_common()]
    wrong = [outcome for outcome in outcomes if outcome.complaint is not None]
    lines += ["", f"{len(wrong)} wrong answers"]
    lines += [f"{o.case.name}: {o.complaint}: {o.message[:400]}" for o in wrong]
    return "\n".join(lines)
