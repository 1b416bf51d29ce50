"""Captions joined from notes: what the language model reads, and of which clips."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mico_chat.errors import ConfigError, ModelError
from mico_corpus.describing.base import Annotation
from tests.evaluation.models.openai_endpoint import answering, text
from tests.mico_corpus.describing.drawn import drawn, made


def note(role: Any, medium: Any, said: str) -> Annotation:
    return Annotation("x", "1", role, medium, said)


SEEN = note("caption", "video", "A dog runs\non grass.")
NOTES = [
    note("text", "video", "PARK"),
    note("speech", "audio", "Good"),
    note("caption", "image", "A brown dog."),
    SEEN,
    note("speech", "audio", "boy!"),
    note("tag", "image", "dog"),
    note("depth", "image", ""),
    note("caption", "audio", "A dog barks."),
    note("text", "video", "No entry"),
    note("caption", "image", "A brown dog."),
]


def fused(answer: Any, clips: Any, **options: Any) -> tuple[list[list[Annotation]], list[Any]]:
    with (
        answering(answer) as (url, requests),
        closing(made("fuse", url=url, model="m", **options)) as one,
    ):
        return one(clips), requests


def test_one_caption_of_all_notes() -> None:
    whole, lone = drawn(said=NOTES), drawn(said=[SEEN, note("tag", "image", "dog")])
    ((said,), nothing), (request,) = fused(lambda _: (200, "A man praises a dog."), [whole, lone])
    assert (said.annotator, said.role, said.medium) == ("fuse", "caption", "video")
    assert said.text == "A man praises a dog."
    assert nothing == [], "of one kind of note there is nothing to join"
    prompt, _, notes = text(request).partition("\n\n")
    assert "one caption" in prompt
    assert notes.splitlines() == [
        "Seen: A dog runs on grass. A brown dog.",
        "Heard: A dog barks.",
        "Said: Good boy!",
        "Written: PARK; No entry",
    ]


def test_its_options() -> None:
    (said,), (request,) = fused(
        lambda _: (200, "Dog."), [drawn(said=[SEEN])], kinds=1, prompt="Join.", max_tokens=9
    )
    assert [one.text for one in said] == ["Dog."]
    assert text(request) == "Join.\n\nSeen: A dog runs on grass."
    assert request["max_tokens"] == 9
    _, (request,) = fused(
        lambda _: (200, ""), [drawn(said=[note("speech", "audio", "la " * 9999)])], kinds=1
    )
    assert len(text(request).partition("Said: ")[2]) == 1500
    assert fused(lambda _: (400, "too long"), [drawn(said=NOTES)])[0] == [[]]
    with pytest.raises(ModelError, match="does not answer"):
        fused(lambda _: (404, "no model"), [drawn(said=NOTES)])
    with pytest.raises(ConfigError, match="fuse: kinds: expected 1 to 4, got 5"):
        made("fuse", kinds=5)
    with pytest.raises(ConfigError, match="fuse: frames: extra inputs are not permitted"):
        made("fuse", frames=5)


def test_by_a_model_in_this_process(tiny_chat: Path) -> None:
    how = {"model": str(tiny_chat), "engine": "transformers", "max_tokens": 4, "prompt": "Join."}
    notes = [SEEN, note("text", "video", "a")]
    with closing(made("fuse", **how)) as fusion:
        assert len(fusion([drawn(said=notes), drawn()])) == 2
