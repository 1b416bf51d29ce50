"""Ways to damage a good file."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from mico_chat.media.kinds import Kind
from tests.server.hostile_seeds import ACCEPTED, Good, good_files

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
    """A stretch of zeros or ones."""
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
