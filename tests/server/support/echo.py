"""A language model that says what it was asked and shown, so that any mix-up of requests shows.

Its answer to ``q000017`` in a conversation of three questions is ``q000017 n3 c1f2e3d4c
s+12,-7,+140,+3 ......``: the last question, how many there were and the checksum of all of them,
sums of the numbers of all context tokens, and dots, of which some answers have more than others.
"""

import functools
import re
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.assistant import Assistant
from mico_chat.encode import MediaEncoder
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.scheduler import Chunk
from mico_chat.media import MediaFile
from mico_chat.media.decoder import Decoder
from mico_chat.model.config import MicoChatConfig
from tests.engine.fake_model import END, FIRST_LETTER, FakeModel, Held, ids, joined_letters
from tests.support.tiny import chat_model, processor_for

START = 2
"""``<|im_start|>`` of the tokenizer of letters."""

SUMS = 4
"""Numbers of each context token that are summed up."""

SCALE = 1e4
"""What a sum is multiplied by before it is rounded: tokens of two media differ by thousandths."""

TOLERANCE = 3
"""By which the same sum may differ, rounded, as media are encoded alone or in a batch."""

_QUESTION = re.compile(r"q\d{6}")
_ANSWER = re.compile(r"(q\d{6} n\d+ c[0-9a-f]{8}) s([-+\d,]+) (\.+)")


def question(number: int) -> str:
    return f"q{number:06d}"


def echo(questions: Sequence[str], sums: Sequence[float]) -> str:
    checksum = zlib.crc32(" ".join(questions).encode())
    rounded = ",".join(f"{round(SCALE * value):+d}" for value in sums)
    dots = "." * (1 + checksum % 24)
    return f"{questions[-1]} n{len(questions)} c{checksum:08x} s{rounded} {dots}"


def agree(said: str, expected: str) -> bool:
    one, other = _ANSWER.fullmatch(said), _ANSWER.fullmatch(expected)
    if one is None or other is None or (one[1], one[3]) != (other[1], other[3]):
        return False
    pairs = zip(one[2].split(","), other[2].split(","), strict=True)
    return all(abs(int(a) - int(b)) <= TOLERANCE for a, b in pairs)


def rule(held: Held) -> int:
    """The next token after all that a slot of the fake model holds."""
    start = len(held) - held[::-1].index(START)  # behind it: who speaks, and what was said so far
    said = len(held) - start - len("assistant\n")
    tokens = _answer(tuple(held[:start]))
    return tokens[said] if said < len(tokens) else END


@functools.lru_cache(maxsize=256)
def _answer(prompt: tuple[object, ...]) -> tuple[int, ...]:
    turns = "".join(_letter(token) for token in prompt).split("\0")
    asked = [_QUESTION.findall(turn)[-1] for turn in turns if turn.startswith("user\n")]
    return ids(echo(asked, _sums(token for token in prompt if isinstance(token, tuple))))


def _letter(token: object) -> str:
    if token == START:
        return "\0"
    return chr(token - FIRST_LETTER + 32) if isinstance(token, int) and token < 99 else "\n"


def _sums(rows: Iterable[tuple[float, ...]]) -> list[float]:
    columns = list(zip(*(row[:SUMS] for row in rows), strict=True)) or [()] * SUMS
    return [float(sum(column)) for column in columns]


async def sums_of(encoder: MediaEncoder, part: MediaFile) -> list[float]:
    (encoded,) = await encoder.encode([part])
    return _sums(tuple(row) for one in encoded.parts for row in one.encoded.tokens.tolist())


def echoing_assistant(decoder: Decoder, *, pause_s: float = 0.0) -> Assistant:
    """An assistant whose words alone are not real; a step takes ``pause_s`` longer."""
    room: dict[str, Any] = {"n_slots": 20, "n_cells": 60_000, "max_position": 8_000}
    return _assistant(decoder, lambda batch: time.sleep(pause_s), rule=rule, **room)


def decoding_assistant(decoder: Decoder, config: MicoChatConfig | None = None) -> Assistant:
    """An assistant that says anything; it fails on context tokens that are no numbers."""

    def check(batch: Sequence[Chunk]) -> None:
        if not all(bool(t.isfinite().all()) for chunk in batch for t in chunk.context):
            raise ValueError("context tokens that are no finite numbers")

    return _assistant(decoder, check, config, n_cells=4_000, max_position=1_000)


def _assistant(
    decoder: Decoder,
    check: Callable[[Sequence[Chunk]], None],
    config: MicoChatConfig | None = None,
    **options: Any,
) -> Assistant:
    def before(batch: Sequence[Chunk]) -> None:
        model.batches.clear()  # kept for other tests
        check(batch)

    config = config or MicoChatConfig.tiny()
    processor = processor_for(config)
    model = FakeModel(before=before, max_batch=256, **options)
    engine = BatchingEngine(model, joined_letters(), (END,), name="fake")
    encoder = MediaEncoder(MicoAdapter(chat_model(config), processor), decoder, cache_bytes=1 << 20)
    return Assistant(engine, encoder, name="tiny")
