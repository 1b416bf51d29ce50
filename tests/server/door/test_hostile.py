"""The service survives hostile media: each costs its sender one clear answer, and nobody else.

A third of the files are bombs (``bombs.py``); the others are good files that are damaged.
"""

import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import httpx
import pytest

from mico_chat.media import MediaDecoder, MediaLimits
from mico_chat.media.kinds import Kind
from tests.server.conftest import Start
from tests.server.support.bombs import BOMBS
from tests.server.support.echo import decoding_assistant
from tests.server.support.hostile_seeds import ACCEPTED, good_files

COUNT = int(os.environ.get("MICO_TEST_HOSTILE_COUNT", "500"))
"""Files of the test; the documentation of a release may ask for thousands."""

SEED = int(os.environ.get("MICO_TEST_HOSTILE_SEED", "0"))
WARM_UP = 200
TIMEOUT_S = 10.0
MAX_MESSAGE = 300
"""Characters that a person may be asked to read."""


# --- ways to damage a good file ---

ABSURD = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0xFF_FFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)
"""What headers do not expect in fields of one to four bytes."""

Mutation = Callable[[bytes, Random], bytes]


def _truncated(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(1, len(data))]


def _flipped(reach: Callable[[int], range]) -> Mutation:
    """One to 64 bits of the bytes within reach."""

    def flip(data: bytes, random: Random) -> bytes:
        flipped = bytearray(data)
        for _ in range(2 ** random.randrange(7)):
            flipped[random.choice(reach(len(data)))] ^= 1 << random.randrange(8)
        return bytes(flipped)

    return flip


def _absurd_numbers(data: bytes, random: Random) -> bytes:
    """One to four fields, most often near the file's start, where headers are."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        width = random.choice((1, 2, 4))
        at = random.randrange(min(len(data), random.choice((64, 600, len(data)))))
        value = random.choice(ABSURD) % 256**width
        changed[at : at + width] = value.to_bytes(width, random.choice(("little", "big")))
    return bytes(changed)


def _filled(data: bytes, random: Random) -> bytes:
    start, end = sorted(random.sample(range(len(data) + 1), 2))
    return data[:start] + random.choice((b"\x00", b"\xff")) * (end - start) + data[end:]


def _repeated(data: bytes, random: Random) -> bytes:
    start, end = sorted(random.sample(range(len(data) + 1), 2))
    return data[:start] + data[start:end] * random.choice((2, 10, 100)) + data[end:]


def _spliced(data: bytes, random: Random) -> bytes:
    """The head of one file and the tail of another of its family."""
    family = next(good.family for good in good_files() if good.data == data)
    other = random.choice([other.data for other in good_files() if other.family == family])
    cut = random.random()
    return data[: int(len(data) * cut)] + other[int(len(other) * cut) :]


MUTATIONS: dict[str, Mutation] = {
    "truncated": _truncated,
    "bits": _flipped(range),
    "header_bits": _flipped(lambda n: range(min(n, 200))),
    "absurd_numbers": _absurd_numbers,
    "filled": _filled,
    "repeated": _repeated,
    "spliced": _spliced,
    "wrong_type": lambda data, random: data,  # sent as a kind that it is not
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


def case(number: int) -> Case:
    own = Random(f"{SEED} {number}")
    if number % 3 == 0:
        bomb = BOMBS[(number // 3 + SEED) % len(BOMBS)]
        name = f"{number:04}-{bomb.name}.{bomb.extension}"
        return Case(name, bomb.name, bomb.kind, bomb.make(own), bomb.must_fail)
    good = own.choice(good_files())
    mutation = own.choice(list(MUTATIONS))
    wrong = mutation == "wrong_type"
    others = [kind for kind, families in ACCEPTED.items() if good.family not in families]
    kind = own.choice(others) if wrong else good.kind
    name = f"{number:04}-{mutation}.{good.extension}"
    return Case(name, mutation, kind, MUTATIONS[mutation](good.data, own), must_fail=wrong)


def unharmed(number: int) -> Case:
    good = good_files()[number]
    return Case(f"good-{number}.{good.extension}", "good", good.kind, good.data, must_fail=False)


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


def send_all(
    client: httpx.Client, make: Callable[[int], Case], numbers: Iterable[int]
) -> list[Outcome]:
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(lambda number: send(client, make(number)), numbers))


def resident_mb(pid: int | str = "self") -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_media(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    caplog.set_level(logging.DEBUG, "mico_chat.media.decoder")
    every = range(len(good_files()))
    with MediaDecoder(MediaLimits(timeout_s=TIMEOUT_S), workers=2) as decoder:
        client = start(decoding_assistant(decoder))
        before = send_all(client, unharmed, every)
        outcomes = send_all(client, case, range(WARM_UP))
        memory, files = resident_mb(), len(os.listdir("/proc/self/fd"))
        outcomes += send_all(client, case, range(WARM_UP, COUNT))
        after = send_all(client, unharmed, every)

        assert [(o.case.name, o.message) for o in (*before, *after) if o.status != 200] == []
        assert [(o.case.name, o.complaint, o.message) for o in outcomes if o.complaint] == []
        assert max(outcome.seconds for outcome in outcomes) < TIMEOUT_S + 5

        assert resident_mb() - memory < 100
        assert len(os.listdir("/proc/self/fd")) <= files + 4
        assert list(tmp_path.glob("mico-*")) == []
        assert list((tmp_path / "data" / "media" / "tmp").iterdir()) == []  # of uploads
        starts = [r for r in caplog.records if r.msg == "decoder process %d started"]
        assert 1 <= len(starts) <= 2 + COUNT // 200
        assert len(decoder.pids()) <= 2
        assert all(resident_mb(pid) < decoder.limits.memory_mb for pid in decoder.pids())
    assert list(Path("/tmp").glob("owned*")) == []  # what pickles and paths of archives ask for


def test_every_mutation_and_every_bomb_comes_up() -> None:
    seen = {case(number).mutation for number in range(max(WARM_UP, 3 * len(BOMBS)))}
    assert seen == {*MUTATIONS, *(bomb.name for bomb in BOMBS)}
