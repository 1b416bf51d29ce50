"""Text is given out once nothing can change it, and never twice."""

from __future__ import annotations

import pytest

from mico_chat.engine.detokenize import Detokenizer


class Utf8Tokenizer:
    """One token a byte, as in byte-level vocabularies."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


def pieces_of(text: str, *stop: str) -> tuple[list[str], Detokenizer]:
    ids = list(text.encode())
    detokenizer = Detokenizer(Utf8Tokenizer(), stop)
    pieces = [detokenizer.update(ids[: n + 1]) for n in range(len(ids))]
    pieces.append(detokenizer.update(ids, final=True))
    return pieces, detokenizer


@pytest.mark.parametrize("text", ["plain", "Käse", "猫と犬", "a🐈b"])
def test_no_half_characters(text: str) -> None:
    pieces, _ = pieces_of(text)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_broken_bytes_come_at_the_end() -> None:
    detokenizer = Detokenizer(Utf8Tokenizer())
    assert detokenizer.update([0x61, 0xF0]) == "a"
    assert detokenizer.update([0x61, 0xF0], final=True) == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", "END", "one "),
        ("one EN two", "END", "one EN two"),
        ("one EN", "END", "one EN"),
        ("ENEND", "END", "EN"),
        ("END", "END", ""),
    ],
)
def test_stop_text_never_shows(text: str, stop: str, expected: str) -> None:
    pieces, detokenizer = pieces_of(text, stop)
    assert "".join(pieces) == detokenizer.text == expected
    assert detokenizer.stopped == (stop in text)


def test_first_of_several_stop_texts_counts() -> None:
    _, detokenizer = pieces_of("a\nUser: b", "User:", "\n")
    assert detokenizer.text == "a"
