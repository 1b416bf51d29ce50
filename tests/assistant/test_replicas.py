"""Each replica loads by the Auto classes, answers the same twice, and heeds its media."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support import replicas

N_TOKENS = 12


@pytest.fixture(scope="module", params=replicas.NAMES)
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    try:
        return replicas.build(name, tmp_path_factory.mktemp("replicas") / name)
    except ImportError as error:  # SmolVLM's processor says with num2words how many frames it has.
        pytest.skip(str(error).strip())


def pixels(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def medium(kind: str, seed: int) -> dict[str, Any]:
    """A part of a message; another seed is another content of the same size."""
    if kind == "image":
        return {"type": kind, "image": Image.fromarray(pixels(seed, 48, 80))}
    if kind == "audio":
        time = np.arange(16_000) / 16_000
        sound = (0.5 * np.sin(2 * np.pi * (200 + 300 * seed) * time)).astype(np.float32)
        return {"type": kind, "audio": sound}
    return {"type": kind, "video": pixels(seed, 4, 40, 56), "times": [0.0, 0.5, 1.0, 1.5]}


def user(*content: dict[str, Any] | str) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def prompts(name: str) -> list[dict[str, Any]]:
    """A text, each kind of medium by itself, and all kinds together where they go together."""
    media = [medium(kind, seed=5) for kind in replicas.reads(name)]
    alone = [user(part, "Describe it.") for part in media]
    together = [user(*media, "What is this?")] if replicas.mixes(name) else []
    return [user("What is new?"), *alone, *together]


def test_it_is_small_and_says_what_it_reads(replica: Path) -> None:
    model, processor = replicas.load(replica)
    assert sum(weight.numel() for weight in model.parameters()) < 300_000
    assert len(processor.tokenizer) <= 600
    assert set(replicas.reads(replica.name)) >= set(model.input_modalities) - {"text"}


def test_it_answers_the_same_twice_and_not_at_once_with_the_end(replica: Path) -> None:
    for prompt in prompts(replica.name):
        first = replicas.reference(replica, [prompt], N_TOKENS)
        assert first == replicas.reference(replica, [prompt], N_TOKENS)
        assert len(set(first)) > 3
        assert len(first) == N_TOKENS


def test_an_answer_has_no_markup(replica: Path) -> None:
    _, processor = replicas.load(replica)
    for prompt in prompts(replica.name):
        ids = replicas.reference(replica, [prompt], 3 * N_TOKENS)
        markup = {
            i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special
        }
        assert not markup & set(ids[:-1])


def test_another_medium_changes_the_answer(replica: Path) -> None:
    for kind in replicas.reads(replica.name):
        answers = [
            tuple(replicas.reference(replica, [user(medium(kind, seed), "Describe it.")], N_TOKENS))
            for seed in range(4)
        ]
        assert len(set(answers)) == 4, kind


def test_a_medium_of_an_earlier_turn_still_counts(replica: Path) -> None:
    for kind in replicas.reads(replica.name):
        answers = [
            replicas.reference(
                replica,
                [
                    {"role": "system", "content": "Be brief."},
                    user(medium(kind, seed), "Look."),
                    {"role": "assistant", "content": "Yes."},
                    {"role": "user", "content": "And now?"},
                ],
                N_TOKENS,
            )
            for seed in (1, 2)
        ]
        assert answers[0] != answers[1], kind


def test_hostile_text_comes_back_as_it_was(replica: Path) -> None:
    _, processor = replicas.load(replica)
    text = "naïve 猫 🎉\x00\u202e </s> <|im_end|> <image> <end_of_turn>"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_vl"])
def test_tools_are_told_and_calls_are_told_again(name: str, tmp_path: Path) -> None:
    _, processor = replicas.load(replicas.build(name, tmp_path / name))
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}}
    text = processor.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            user("Look."),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "a cat"},
            {"role": "tool", "content": "a dog"},
        ],
        tools=[tool],
        add_generation_prompt=True,
    )
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    assert '<tools>\n{"type": "function", "function": {"name": "look"' in text
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\na cat\n</tool_response>\n<tool_response>\na dog\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
