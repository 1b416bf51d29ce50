"""Text is given out once, when no later token can change it; the pieces join to the whole text."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mico_chat.engine.request import Detokenizer
from tests.support.tiny import byte_level
from tests.support.vicuna import write_tokenizer

TEXTS = ["plain", "Käse, the cat", "猫と犬", "a🐈b", "👩‍👩‍👧", " leading and trailing ", "\n\n", ""]


@pytest.fixture(scope="module")
def bytes_and_merges() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="module")
def sentence_piece() -> PreTrainedTokenizerFast:
    """As Llama 2's: words that begin with a mark for a space, and single bytes for other text."""
    words = ["<unk>", "</s>", "▁", "▁Hello", "▁world", "lo", "!"]
    words += [f"<0x{n:02X}>" for n in range(256)]
    vocabulary = {word: n for n, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int], *stop: str) -> list[str]:
    detokenizer = Detokenizer(tokenizer, stop)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def single_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    alphabet, vocabulary = bytes_to_unicode(), tokenizer.get_vocab()
    return [vocabulary[alphabet[byte]] for byte in text.encode()]


@pytest.mark.parametrize("text", TEXTS)
def test_no_half_characters(bytes_and_merges: PreTrainedTokenizerFast, text: str) -> None:
    for ids in (encode(bytes_and_merges, text), single_bytes(bytes_and_merges, text)):
        given = pieces(bytes_and_merges, ids)
        assert "".join(given) == text
        assert all("\ufffd" not in piece for piece in given)


@pytest.mark.parametrize(
    ("text", "last", "stop", "expected"),
    [
        ("a猫b", None, (), ["a", "", "", "猫", "b", ""]),
        ("a猫", -1, (), ["a", "", "", "\ufffd"]),  # the last byte is missing
        ("xENxENE", None, ("END", ""), ["x", "", "", "ENx", "", "", "EN", "E"]),
        ("a\nUser: b", None, ("User:", "\n"), ["a", *[""] * 9]),
        ("a猫", -1, ("\ufffd",), ["a", "", "", ""]),  # finish gives out a stop text
    ],
)
def test_text_is_given_out_as_soon_as_it_is_certain(
    bytes_and_merges: PreTrainedTokenizerFast,
    text: str,
    last: int | None,
    stop: tuple[str, ...],
    expected: list[str],
) -> None:
    ids = single_bytes(bytes_and_merges, text)[:last]
    assert pieces(bytes_and_merges, ids, *stop) == expected


def test_pieces_of_any_tokens_join_to_the_decoded_text(
    bytes_and_merges: PreTrainedTokenizerFast,
) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(bytes_and_merges)) for _ in range(rng.randrange(30))]
        whole = bytes_and_merges.backend_tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces(bytes_and_merges, ids)) == whole


def test_spaces_between_words(sentence_piece: PreTrainedTokenizerFast) -> None:
    cat = [7 + byte for byte in "猫".encode()]
    ids = [3, 4, 2, *cat, 4, 6, 1]
    given = pieces(sentence_piece, ids)
    assert given == ["Hello", " world", " ", "", "", "猫", " world", "!", "", ""]
    assert "".join(given) == sentence_piece.decode(ids, skip_special_tokens=True)
    given = pieces(sentence_piece, [3, *cat[:2]])
    assert "".join(given) == sentence_piece.decode([3, *cat[:2]])


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", "END", "one "),
        ("one EN two", "END", "one EN two"),
        ("one EN", "END", "one EN"),
        ("ENEND", "END", "EN"),
        ("END", "END", ""),
        ("the cat and the dog", "and the", "the cat "),
        ("猫と犬", "と犬", "猫"),
        ("aab", "ab", "a"),
    ],
)
def test_a_stop_text_never_shows(
    bytes_and_merges: PreTrainedTokenizerFast, text: str, stop: str, expected: str
) -> None:
    for ids in (encode(bytes_and_merges, text), single_bytes(bytes_and_merges, text)):
        detokenizer = Detokenizer(bytes_and_merges, (stop,))
        given = [*(detokenizer.add(token) for token in ids), detokenizer.finish()]
        assert "".join(given) == expected
        assert detokenizer.stopped == (stop if stop in text else None)
        assert detokenizer.add(ids[0]) == detokenizer.finish() == "" or not detokenizer.stopped


def test_a_tokens_own_text_keeps_its_space(sentence_piece: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(sentence_piece)
    ids = [3, 4, 2, 4, 6, 5]
    texts, given = [], []
    for token in ids:
        texts.append(detokenizer.of_token(token))
        given.append(detokenizer.add(token))
    assert texts == given == ["Hello", " world", " ", " world", "!", "lo"]
    assert detokenizer.of_token(1) == "</s>"
    assert detokenizer.of_token(7 + ord("\n")) == "\n"


def test_a_tokens_own_text_of_bytes(bytes_and_merges: PreTrainedTokenizerFast) -> None:
    detokenizer = Detokenizer(bytes_and_merges)
    for token in range(len(bytes_and_merges)):
        assert detokenizer.of_token(token) == bytes_and_merges.decode([token])
        detokenizer.add(token)


@pytest.mark.parametrize("legacy", [True, False])
def test_llamas_tokenizer_streams_what_it_decodes(tmp_path: Path, legacy: bool) -> None:
    write_tokenizer(tmp_path, legacy)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    texts = [*TEXTS, "a  b   c", "▁", "1\n\n2", "USER: hi</s>", "  two"]
    ids = [encode(tokenizer, text) for text in texts]
    ids += [row[1:] for row in ids] + [[*row, tokenizer.eos_token_id] for row in ids]
    for row in ids:
        assert "".join(pieces(tokenizer, row)) == tokenizer.decode(row, skip_special_tokens=True)


class CountedStop(str):
    """A stop text that counts how often it is compared with the end of an answer."""

    compared = 0

    def startswith(self, *given: Any) -> bool:
        CountedStop.compared += 1
        return super().startswith(*given)


def test_the_work_of_stop_texts_does_not_grow_with_their_length(
    bytes_and_merges: PreTrainedTokenizerFast,
) -> None:
    """The answer nearly is a stop text all the time."""

    def compared(length: int) -> int:
        stop = [CountedStop(f"{'a' * (length - 2)}{n:02}") for n in range(16)]
        detokenizer, CountedStop.compared = Detokenizer(bytes_and_merges, stop), 0
        for token in encode(bytes_and_merges, "a" * 300):
            detokenizer.add(token)
        return CountedStop.compared

    assert 0 < compared(1000) <= 1.1 * compared(400)
