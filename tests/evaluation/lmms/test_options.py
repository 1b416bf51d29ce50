"""Generation options of lmms-eval's tasks."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import RequestError
from mico_chat.evaluation.lmms.requests import options_of

GREEDY = GenerationOptions(max_tokens=1024)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, GREEDY),
        ({"until": ["\n\n"], "max_new_tokens": 16}, {"max_tokens": 16, "stop": ("\n\n",)}),
        ({"until": "ASSISTANT:"}, {"stop": ("ASSISTANT:",)}),
        ({"until": None}, {}),
        ({"until": ["", "a"]}, {"stop": ("a",)}),
        # As most tasks have it: what only sampling knows is left out, whatever it says.
        ({"temperature": 0, "top_p": 0, "top_k": None, "num_beams": 1, "do_sample": False}, {}),
        ({"temperature": 0.2, "top_p": 1.0, "do_sample": False}, {}),
        ({"temperature": 0.2, "top_p": 0.9}, {"temperature": 0.2, "top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {}),
        ({"temperature": 1, "seed": 3, "top_k": 5}, {"temperature": 1.0, "seed": 3, "top_k": 5}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_options(given: dict[str, Any], expected: dict[str, Any] | GenerationOptions) -> None:
    if isinstance(expected, dict):
        expected = GREEDY.model_copy(update=expected)
    assert options_of(given) == expected


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "n", "best_of"])
def test_beams_and_several_answers_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name}: got 5, but a request gets one answer"):
        options_of({name: 5})


def test_what_no_engine_has_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        options_of({"image_aspect_ratio_of_a_test": "pad"})
        options_of({"image_aspect_ratio_of_a_test": "pad"})
    assert [record.getMessage() for record in caplog.records] == [
        "the generation option 'image_aspect_ratio_of_a_test' is ignored: no engine supports it"
    ]
