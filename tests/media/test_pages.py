"""A kind that is made of pictures: its pages pass the pipe, are encoded and are explained."""

import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mico_chat.adapters.mico import MicoAdapter
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.encode import MediaEncoder
from mico_chat.explain import n_prompts, parts_of
from mico_chat.media import Audio, Image, MediaReport, Medium, Pages, worker
from mico_chat.media.kinds import TABLE
from mico_chat.media.medium import Words, WrittenText
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.reading import MediaReader
from mico_chat.reading.pictures import PictureReader
from tests.support.fakes import FakeDecoder
from tests.support.tiny import picture, run, shown

TEXT = tuple(
    WrittenText(text=text, box=(0, 0, 1, 1), confidence=1.0, page=page)
    for page, text in [(1, "Invoice"), (1, 'of "x"'), (2, "Sum\nText on page 3: 9")]
)


@pytest.fixture(autouse=True)
def made_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For these tests, the kind "normal" is no map but pages."""
    row = replace(
        TABLE["normal"],
        made_of=("image",),
        is_map=False,
        label="Pages: ",
        noun="scan",
        piece="page",
    )
    monkeypatch.setitem(TABLE, "normal", row)


def pages(n: int = 2) -> Pages:
    report = MediaReport(name="a.pdf", kind="normal", frames_used=n, frames_total=9, written=TEXT)
    return Pages("normal", tuple(picture(seed) for seed in range(n)), report=report)


@pytest.fixture
def encoder(
    chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> Iterator[MediaEncoder]:
    made = MediaEncoder(MicoAdapter(chat, processor), FakeDecoder())
    yield made
    made.close()


def received(medium: Medium, **header: object) -> Medium:
    pipe = io.BytesIO()
    worker.write_medium(pipe, medium, large=False)
    pipe.seek(0)
    return worker.read_medium(pipe, worker.read_header(pipe) | header, 1 << 20)


def test_pages_pass_the_pipe() -> None:
    sent = pages(3)
    found = received(sent)
    assert isinstance(found, Pages)
    assert (found.kind, found.report) == ("normal", sent.report)
    for mine, theirs in zip(found.all_arrays, sent.all_arrays, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("medium", [pages(1), picture(), Audio(np.zeros(4, np.float32))])
def test_a_medium_with_other_media_in_it_than_its_kind_has_is_refused(medium: Medium) -> None:
    inner = worker.described(Audio(np.zeros(0, np.float32)))
    with pytest.raises((ValueError, EOFError)):
        received(medium, inner=[inner])


def test_all_arrays_of_an_answer_together_are_bounded() -> None:
    pipe = io.BytesIO()
    worker.write_medium(pipe, pages(3), large=False)
    size = picture().pixels.nbytes
    for most, fits in ((3 * size, True), (3 * size - 1, False)):
        pipe.seek(0)
        header = worker.read_header(pipe)
        if fits:
            worker.read_medium(pipe, header, most)
        else:
            with pytest.raises(ValueError, match="more than"):
                worker.read_medium(pipe, header, most)


def test_each_page_is_encoded_and_the_report_says_how_many(
    encoder: MediaEncoder, processor: MicoChatProcessor
) -> None:
    (measured,) = run(encoder.measure([pages()]))
    (whole,) = run(encoder.encode([pages()]))
    (single,) = run(encoder.encode([picture(1)]))
    assert [part.kind for part in whole.parts] == ["image", "image"]
    torch.testing.assert_close(whole.parts[1].encoded.tokens, single.encoded.tokens)
    assert whole.all_tokens == measured.all_tokens == 2 * single.all_tokens
    report = whole.report
    assert (report.kind, report.frames_used, report.frames_total) == ("normal", 2, 9)
    assert (report.tokens, report.written) == (whole.all_tokens, TEXT)
    ids, _ = processor.tokenize([shown(pages(), "What?")], True, [whole])
    places = processor.context_token_id
    words = ["*" if i == places else processor.tokenizer.convert_ids_to_tokens(i) for i in ids]
    prompt, picture_of = "".join(words), "*" * single.all_tokens
    one, two = ('Invoice\nof "x"', "Sum\nText on page 3: 9")
    expected = f"Page 1: {picture_of}\nText on page 1:\n```\n{one}\n```\n"
    expected += f"Page 2: {picture_of}\nText on page 2:\n```\n{two}\n```\n"
    assert f"Pages: a.pdf\n{expected}What?" in prompt


class Sign(PictureReader):
    """Reads a line in every picture."""

    def read(self, pixels: NDArray[np.uint8], enough: Any = None) -> list[WrittenText]:
        return [WrittenText(text="EXIT", box=(0, 0, 1, 1), confidence=0.97)]


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (TEXT, [(1, "Invoice"), (1, 'of "x"'), (2, TEXT[2].text)]),
        (TEXT[2:], [(1, "EXIT"), (2, TEXT[2].text)]),
        (None, [(1, "EXIT"), (2, "EXIT")]),
    ],
)
def test_pages_without_text_of_their_own_are_read(
    encoder: MediaEncoder, written: tuple[WrittenText, ...] | None, found: list[tuple[int, str]]
) -> None:
    medium = pages()
    medium = replace(medium, report=medium.report.model_copy(update={"written": written}))
    encoder.reader = MediaReader(pictures=Sign())
    (whole,) = run(encoder.encode([medium]))
    assert [(one.page, one.text) for one in whole.report.written or ()] == found
    assert MediaReader().read(medium, threading.Event()).written == written


def test_each_page_is_left_out_in_turn() -> None:
    medium = pages(3)
    parts = list(parts_of(0, medium, Words(TEXT)))
    assert [part.what for part in parts] == ["", "words", "page 1", "page 2", "page 3"]
    assert n_prompts([medium.report.model_copy(update={"frames_used": 3})]) == 2 + len(parts)
    blank = parts[3].blank
    assert isinstance(blank, Pages)
    changed = [
        not np.array_equal(mine.pixels, theirs.pixels)
        for mine, theirs in zip(blank.pages, medium.pages, strict=True)
    ]
    assert changed == [False, True, False]
    assert isinstance(blank.pages[1], Image)
    assert [part.page for part in parts] == [None, None, 1, 2, 3]
    assert Words(TEXT).without_page(1).written == TEXT[2:]
    assert Words(TEXT).without_page(None).written == TEXT
