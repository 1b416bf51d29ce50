"""The options of a request, and the parts of a prompt."""

import pytest
import torch

from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.errors import RequestError
from mico_chat.media.medium import ContextBlock
from mico_chat.model.splice import PLACEHOLDER


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_tokens": 0}, "max_tokens: .*got 0"),
        ({"temperature": "warm"}, "temperature: .*got 'warm'"),
        ({"temperature": "nan"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 17}, "n: .*got 17"),
        ({"seed": -1}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"json_schema": "{}"}, "json_schema"),
        ({"max_token": 3}, "max_token"),
        ({"stop": ["a", 3]}, r"stop\[1\]: .*got 3"),
    ],
)
def test_bad_options_are_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=rf"^{said}") as caught:
        GenerationOptions.of(values)
    assert str(caught.value).startswith(f"{caught.value.param}: ")


def test_numbers_may_be_text() -> None:
    given = GenerationOptions.of({"max_tokens": "7", "temperature": "0.5", "stop": ["a"]})
    assert given == GenerationOptions(max_tokens=7, temperature=0.5, stop=("a",))


def test_the_options_of_a_checkpoint() -> None:
    said = {"repetition_penalty": 1.1, "max_new_tokens": 60, "temperature": 0.9, "eos_token_id": 2}
    greedy = GenerationOptions.of_checkpoint(said)
    assert greedy == GenerationOptions(repetition_penalty=1.1, max_tokens=60)
    sampled = GenerationOptions.of_checkpoint({**said, "do_sample": True, "top_p": None})
    assert sampled == GenerationOptions(repetition_penalty=1.1, max_tokens=60, temperature=0.9)
    assert GenerationOptions.of_checkpoint({}).max_tokens == 256


def test_a_request_goes_before_its_checkpoint() -> None:
    defaults = GenerationOptions(repetition_penalty=1.1, max_tokens=60)
    asked = GenerationOptions(repetition_penalty=1.0, seed=3)
    assert asked.over(defaults) == GenerationOptions(repetition_penalty=1.0, max_tokens=60, seed=3)


def test_a_long_value_is_not_said_in_full() -> None:
    with pytest.raises(RequestError) as caught:
        GenerationOptions.of({"top_k": "x" * 10_000})
    assert len(str(caught.value)) < 200


def test_a_part_of_a_prompt() -> None:
    block = ContextBlock(torch.arange(12.0).view(4, 3), b"key")
    prompt = Prompt(((1, 2, 3), block, (4,)))
    assert (len(prompt), prompt.media_tokens) == (8, 4)
    assert prompt.identities == (1, 2, 3, *((b"key", place) for place in range(4)), 4)
    ids, (whole,) = prompt.tokens(2, 8)
    assert ids == [3, *[PLACEHOLDER] * 4, 4]
    assert torch.equal(whole, block.tokens)
    ids, (some,) = prompt.tokens(4, 6)
    assert ids == [PLACEHOLDER] * 2
    assert torch.equal(some, block.tokens[1:3])
    assert prompt.tokens(8, 8) == ([], [])
