"""Hostile media for a running service: files that are each damaged in a way of their own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
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
from tests.server.echo import decoding_assistant
from tests.server.hostile_seeds import ACCEPTED, Good, good_files
from tests.server.running import running, wait_until_ready

MAX_MESSAGE = 300
"""Characters that a person may be asked to read."""


# --- ways to damage a good file ---

ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0xFF_FFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
"""What headers do not expect in fields of one to four bytes."""

Mutated = tuple[Kind, bytes, bool]
Mutation = Callable[[Good, Random], Mutated]


def _truncated(good: Good, random: Random) -> Mutated:
    return good.kind, good.data[: random.randrange(1, len(good.data))], False


def _flipped(reach: Callable[[int], range]) -> Mutation:
    """One to 64 bits of the bytes within reach."""

    def flip(good: Good, random: Random) -> Mutated:
        data = bytearray(good.data)
        for _ in range(2 ** random.randrange(7)):
            data[random.choice(reach(len(data)))] ^= 1 << random.randrange(8)
        return good.kind, bytes(data), False

    return flip


def _absurd_numbers(good: Good, random: Random) -> Mutated:
    """One to four fields, most often near the file's start, where headers are."""
    data = bytearray(good.data)
    for _ in range(random.randint(1, 4)):
        width = random.choice((1, 2, 4))
        at = random.randrange(min(len(data), random.choice((64, 600, len(data)))))
        value = random.choice(ABSURD) % 256**width
        data[at : at + width] = value.to_bytes(width, random.choice(("little", "big")))
    return good.kind, bytes(data), False


def _filled(good: Good, random: Random) -> Mutated:
    start, end = sorted(random.sample(range(len(good.data) + 1), 2))
    filling = random.choice((b"\x00", b"\xff")) * (end - start)
    return good.kind, good.data[:start] + filling + good.data[end:], False


def _repeated(good: Good, random: Random) -> Mutated:
    start, end = sorted(random.sample(range(len(good.data) + 1), 2))
    times = random.choice((2, 10, 100))
    return good.kind, good.data[:start] + good.data[start:end] * times + good.data[end:], False


def _spliced(good: Good, random: Random) -> Mutated:
    """The head of one file and the tail of another of its family."""
    others = [other for other in good_files() if other.family == good.family]
    other, cut = random.choice(others), random.random()
    head, tail = good.data[: int(len(good.data) * cut)], other.data[int(len(other.data) * cut) :]
    return good.kind, head + tail, False


def _wrong_type(good: Good, random: Random) -> Mutated:
    """A good file, said to be what it is not."""
    kinds = [kind for kind, families in ACCEPTED.items() if good.family not in families]
    return random.choice(kinds), good.data, True


MUTATIONS: dict[str, Mutation] = {
    "truncated": _truncated,
    "bits": _flipped(range),
    "header_bits": _flipped(lambda n: range(min(n, 200))),
    "absurd_numbers": _absurd_numbers,
    "filled": _filled,
    "repeated": _repeated,
    "spliced": _spliced,
    "wrong_type": _wrong_type,
}


# --- cases and what the service answers to them ---

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


def send(client: httpx.Client, case: Case) -> Outcome:
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
    return [
        Case(f"good-{number}.{good.extension}", "good", good.kind, good.data, must_fail=False)
        for number, good in enumerate(good_files())
    ]


def resident_mb(pid: int | str = "self") -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@contextmanager
def service(decoder: MediaDecoder, data_dir: Path) -> Iterator[httpx.Client]:
    settings = ServerSettings(data_dir=data_dir)
    with running(lambda: decoding_assistant(decoder), settings) as client:
        wait_until_ready(client)
        yield client
