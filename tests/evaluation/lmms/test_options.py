"""Generation options of lmms-eval's tasks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import RequestError
from mico_chat.evaluation.lmms.requests import options_of


@pytest.mark.parametrize(
    ("given", "differs"),
    yaml.safe_load(Path(__file__).with_name("options.yaml").read_text(encoding="utf-8")),
)
def test_options(given: dict[str, Any], differs: dict[str, Any]) -> None:
    assert options_of(given) == GenerationOptions.of({"max_tokens": 1024, **differs})


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
