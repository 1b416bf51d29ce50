"""Tags by the encoder's contrastive space, here and behind a URL; how unsafe a clip is."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from mico_chat.errors import ConfigError, ModelError
from mico_corpus.describing.base import Annotation
from mico_corpus.describing.tags import OwnSpace
from tests.evaluation.models.openai_endpoint import answering
from tests.mico_corpus.clips import Scene
from tests.mico_corpus.describing.drawn import drawn, made, plain

WORDS = ["cat", "dog", "tree"]
ANGLES = {"a cat": 0.0, "a dog": 40.0, "a tree": 90.0}
"""Degrees in a plane of vectors; a picture is at 10."""


def embedded(request: dict[str, Any]) -> tuple[int, bytes]:
    angles = [ANGLES[one] if isinstance(one, str) else 10.0 for one in request["input"]]
    vectors = [[np.cos(np.radians(angle)), np.sin(np.radians(angle))] for angle in angles]
    data = [{"object": "embedding", "index": n, "embedding": v} for n, v in enumerate(vectors)]
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    return 200, json.dumps({"object": "list", "data": data, "model": "m", "usage": usage}).encode()


def tags(clips: Any, answer: Any = embedded, **options: Any) -> Any:
    given: dict[str, Any] = {"words": WORDS, "template": "a {}", "model": "m"}
    options = given | options
    with answering(answer) as (url, requests), closing(made("tags", url=url, **options)) as one:
        return one(clips), requests


def test_the_nearest_words_come_first() -> None:
    found, (texts, media) = tags([drawn(plain(1)), drawn(plain(2))], top=2)
    assert texts["input"] == ["a cat", "a dog", "a tree"]
    assert [[part["type"] for part in item] for item in media["input"]] == [["image_url"]] * 2
    assert media["path"] == "/v1/embeddings"
    for first, second in found:
        assert (first.role, first.medium, first.text) == ("tag", "image", "cat")
        assert first.score == pytest.approx(np.cos(np.radians(10)), abs=1e-4)
        assert (second.text, second.score) == (
            "dog",
            pytest.approx(np.cos(np.radians(30)), abs=1e-4),
        )


def test_what_is_too_far_away_is_no_tag() -> None:
    found, _ = tags([drawn(plain(1))], least=0.99)
    assert found == [[]]
    found, (_, asked) = tags([drawn(plain(1, 2, 3))], medium="video", frames=3)
    assert len(asked["input"]) == 1
    assert [part["type"] for part in asked["input"][0]] == ["image_url"] * 3
    found, requests = tags([drawn(plain(1))], medium="audio")
    assert (found, len(requests)) == ([[]], 1), "a clip without sound is not asked about"


def test_a_server_that_embeds_no_media() -> None:
    def texts_alone(request: dict[str, Any]) -> tuple[int, str | bytes]:
        media = any(not isinstance(one, str) for one in request["input"])
        return (422, "no media") if media else embedded(request)

    with pytest.raises(ModelError, match=r"'m' at http.* does not answer: .*no media"):
        tags([drawn(plain(1))], texts_alone)


def test_words_of_a_file_and_bad_ones(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("cat\n\n dog \ncat\ntree\n")
    _, (texts, *_) = tags([], words=str(tmp_path / "words.txt"))
    assert texts["input"] == ["a cat", "a dog", "a tree"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"words": None}, "words: m names nothing here, so list the words"),
        ({"words": []}, "words: expected at least one word"),
        ({"words": "no/such.txt"}, "words: no/such.txt cannot be read"),
        ({"medium": "depth"}, "medium: expected one of image, video, audio, got 'depth'"),
        ({"template": "a"}, "template: expected a text with"),
        ({"top": 0}, "must be at least 1"),
    ]
    for options, reason in wrong:
        with pytest.raises(ConfigError, match=reason):
            tags([], **options)


@pytest.mark.slow
def test_tags_of_the_mini(base_llm_folder: Path) -> None:
    moving = np.stack(Scene(1).frames(4, (64, 48)))
    with closing(made("tags", words=WORDS)) as mini:
        clips = [drawn(moving), drawn(plain(255))]
        found = mini(clips)
        assert [len(one) for one in found] == [1, 1]
        assert mini(clips[1:]) == found[1:]
        assert mini.version.startswith("mini@")
    with closing(OwnSpace("mini")) as space:
        vectors = space.vectors(["a cat", "a dog"])
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
        assert "lion" in space.names("image")
        assert "applause" in space.names("audio")
        assert "applause" not in space.names("image")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The brighter a picture, the surer its label is "nsfw"; a third label has a little of it."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        id2label={0: "normal", 1: "nsfw", 2: "gore"},
        label2id={"normal": 0, "nsfw": 1, "gore": 2},
    )
    folder = tmp_path_factory.mktemp("models") / "classifier"
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def test_the_most_unsafe_frame_counts(classifier: str) -> None:
    frames = np.stack(Scene(5).frames(4, (64, 48)) + Scene(6).frames(4, (64, 48)))
    one = made("safety", model=classifier, frames=8)

    def score(pictures: Any, **options: Any) -> float:
        which = made("safety", model=classifier, **options) if options else one
        ((said,),) = which([drawn(pictures)])
        assert (said.role, said.medium) == ("safety", "video")
        return float(said.score)

    alone = [score(frames[n : n + 1], frames=1) for n in range(8)]
    assert max(alone) > min(alone)
    assert score(frames) == max(alone)
    whole = score(frames, unsafe=["normal", "nsfw", "gore"])
    assert whole == pytest.approx(1, abs=1e-3)
    together: list[list[Annotation]] = one([drawn(frames[:1]), drawn(frames)])
    assert together[1][0].score == max(alone)


def test_words_in_any_text_of_the_clip() -> None:
    words = made("safety", model=None, words=["Bad", "worse thing"])
    said = [Annotation("c", "1", "caption", "video", "A WORSE THING, and a bad one")]
    clips = [drawn(said=said), drawn(text="bad."), drawn(text="badly, worse things")]
    found = [(one.score, one.text) for (one,) in words(clips)]
    assert found == [(1.0, "words: bad, worse thing"), (1.0, "words: bad"), (0.0, "")]
    other = made("safety", model=None, words=["bad"])
    assert words.version != other.version
    assert "Bad" not in words.version


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": None}, "safety: expected a model, words, or both; got neither"),
        ({"unsafe": ["porn"]}, "has the labels gore, normal, nsfw; got porn"),
        ({"unsafe": []}, "has the labels gore, normal, nsfw; got none"),
        ({"frames": 0}, "frames: expected at least 1, got 0"),
    ],
)
def test_bad_options(classifier: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        made("safety", **{"model": classifier} | options)
