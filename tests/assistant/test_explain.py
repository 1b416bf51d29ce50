"""What an answer rests on: every part is left out, and effects are what the model itself says."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import RequestError
from mico_chat.explain import blanked, n_prompts, parts_of, score
from mico_chat.media.medium import (
    Audio,
    Depth,
    Image,
    Medium,
    Normal,
    SpokenText,
    Video,
    Words,
    WrittenText,
)
from mico_chat.messages import Message
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.wire import Explanation
from tests.assistant.test_assistant import StubEngine, sharp_chat, tiny_assistant
from tests.support.tiny import clip, one_of_each, picture, run, shown

EXPLAIN = GenerationOptions(max_tokens=8, explain=True)
rng = np.random.default_rng(0)
WRITTEN = Words(written=(WrittenText(text="EXIT", box=(0, 0, 1, 1), confidence=1.0),))
VALUES = np.linspace(1, 9, 64, dtype=np.float32).reshape(8, 8)
SPOKEN = Words(spoken=(SpokenText(text="Hello.", start=0, end=1, confidence=1.0),))


def image(side: int = 40) -> Image:
    return Image(rng.integers(0, 256, (side, side + 8, 3), dtype=np.uint8))


def sound(seconds: float = 2.0) -> Audio:
    return Audio(rng.uniform(-0.5, 0.5, int(16_000 * seconds)).astype(np.float32))


def video(n: int, track: Audio | None) -> Video:
    frames = rng.integers(0, 256, (n, 24, 32, 3), dtype=np.uint8)
    return Video(frames, np.arange(n) / 4, track)


@pytest.mark.parametrize(
    ("medium", "words", "expected"),
    [
        (image(), WRITTEN, {"": 1, "words": 1, "tile": 16}),
        (Image(image().pixels[:1, :2]), Words(), {"": 1, "tile": 2}),
        (Normal(image().pixels), Words(), {"": 1, "tile": 16}),
        (Depth(VALUES), Words(), {"": 1, "tile": 16}),
        (sound(), SPOKEN, {"": 1, "words": 1, "stretch": 8}),
        (video(5, None), Words(), {"": 1, "frame": 5, "order": 1}),
        (video(40, sound()), Words(), {"": 1, "frame": 16, "order": 1, "sound track": 1}),
        (video(1, None), Words(), {"": 1, "frame": 1}),
        (video(3, Audio(np.zeros(100, np.float32))), Words(), {"": 1, "frame": 3, "order": 1}),
    ],
)
def test_parts_cover_a_medium_and_each_changes_its_own_alone(
    medium: Medium, words: Words, expected: dict[str, int]
) -> None:
    parts = list(parts_of(0, medium, words))
    assert {what: sum(part.what == what for part in parts) for what in expected} == expected
    assert len(parts) == sum(expected.values())
    name = next(n for n in ("pixels", "samples", "frames", "values") if hasattr(medium, n))
    whole, empty = getattr(medium, name), getattr(blanked(medium), name)
    assert empty.shape == whole.shape
    changed = np.zeros(whole.shape[: 1 if name in ("samples", "frames") else 2], int)
    for part in parts:
        if part.blank is None or part.what in ("", "order", "sound track"):
            continue
        differs = getattr(part.blank, name) != whole
        changed += differs.reshape(*changed.shape, -1).any(-1)
        if part.box is not None:
            height, width = whole.shape[:2]
            inside = np.zeros((height, width), bool)
            left, top, right, bottom = part.box
            rows = slice(round(top * height), round(bottom * height))
            inside[rows, round(left * width) : round(right * width)] = True
            assert not differs.reshape(height, width, -1).any(-1)[~inside].any()
    # Every place is left out once, but where it was blank before.
    same = (whole == empty).reshape(*changed.shape, -1).all(-1)
    np.testing.assert_array_equal(changed, ~same)


@pytest.fixture(scope="module")
def assistant(processor: MicoChatProcessor) -> Iterator[Assistant]:
    with closing(tiny_assistant(sharp_chat(), processor)) as made:
        yield made


def explained(assistant: Assistant, *parts: Any, **options: Any) -> tuple[Answer, Explanation]:
    asked = EXPLAIN.model_copy(update={"logprobs": 0, **options})
    answer = run(assistant.answer(Ask([shown(*parts)], asked)))
    assert answer.explanation is not None
    return answer, answer.explanation


def test_effects_are_what_the_model_says_without_a_medium(assistant: Assistant) -> None:
    first, second = picture(1), clip(2, track=True)
    answer, found = explained(assistant, first, second, "What?")
    tokens = [one.token_id for one in answer.choices[0].logprobs]
    assert found.logprob == pytest.approx(
        sum(one.logprob for one in answer.choices[0].logprobs), abs=1e-3
    )
    assert "".join(word.text for word in found.words) == answer.text
    assert sum(word.logprob for word in found.words) == pytest.approx(found.logprob, abs=1e-3)
    for number, medium in enumerate(found.media):
        by_words = sum(word.effects[number] for word in found.words)
        assert medium.effect == pytest.approx(by_words, abs=1e-3)
        stood: list[Medium] = [blanked((first, second)[number])]
        if number == 1:
            stood.append(replace(second, frames=second.frames[::-1].copy()))
        effects = []
        for other in stood:
            media: list[Medium] = [first, second]
            media[number] = other
            prompt, _ = run(assistant.prepare(Ask([shown(*media, "What?")])))
            scored = run(score(assistant.engine, prompt.with_answer(tokens)))
            effects.append(found.logprob - sum(one.logprob for one in scored))
        assert medium.effect == pytest.approx(max(effects), abs=1e-3)
        if number == 1:
            (order,) = (part for part in medium.parts if part.what == "order")
            assert order.effect == pytest.approx(effects[1], abs=1e-3)
    above = [medium for medium in found.media if medium.share]
    assert sum(medium.share for medium in above) == pytest.approx(1 if above else 0)


def test_what_the_estimate_says_is_what_is_scored(assistant: Assistant) -> None:
    asked = [shown(*one_of_each(), "And these?")]
    counted = run(assistant.estimate(Ask(asked, EXPLAIN))).explain_prompts
    before = assistant.engine.stats().prompt_tokens
    answer = run(assistant.answer(Ask(asked, EXPLAIN)))
    assert answer.explanation is not None
    parts = sum(1 + len(medium.parts) for medium in answer.explanation.media)
    assert counted == parts + 2 == n_prompts(answer.media)
    more = assistant.engine.stats().prompt_tokens - before
    assert more == pytest.approx((1 + counted) * answer.usage.prompt_tokens, rel=0.2)
    assert run(assistant.estimate(Ask(asked, GenerationOptions()))).explain_prompts is None


def test_an_answer_is_the_same_with_and_without_an_explanation(assistant: Assistant) -> None:
    for parts in ((picture(3), "a"), (clip(4), "b"), ("no", picture(5), "c")):
        plain = run(assistant.answer(Ask([shown(*parts)], GenerationOptions(max_tokens=8))))
        assert explained(assistant, *parts)[0].text == plain.text
        assert plain.explanation is None


def test_what_cannot_be_explained_is_refused_before_the_answer(assistant: Assistant) -> None:
    with pytest.raises(RequestError, match="explain: no medium, on which an answer could rest"):
        run(assistant.answer(Ask([Message.user("hi")], EXPLAIN)))
    with pytest.raises(RequestError, match="explain: expected one answer, got n=2"):
        explained(assistant, picture(), "What?", n=2)
    stub = Assistant(StubEngine(), assistant.encoder, name="stub")
    with pytest.raises(RequestError, match="explain: the fake engine cannot; llamacpp and transf"):
        explained(stub, picture(), "What?")
