"""What can be set of an answer: the server's generation options, by their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from mico_ui.calls import Question
from mico_ui.client import ApiError

SETTINGS = {
    "max_tokens": "longest answer, in tokens",
    "temperature": "0: always the likeliest word; higher: more surprising ones",
    "top_p": "sample from tokens that have this probability together",
    "top_k": "sample from this many likeliest tokens; 0: all",
    "min_p": "leave out tokens below this share of the likeliest's probability",
    "seed": "makes a sampled answer repeatable",
    "repetition_penalty": "above 1: fewer repetitions",
    "presence_penalty": "above 0: more new words",
    "frequency_penalty": "above 0: the same words less often",
    "stop": 'end the answer before this text; several as ["a", "b"]',
    "json_schema": "answer with JSON of this schema",
    "depth_scale": "metres for one unit of a 16-bit depth map",
}
"""Names and meanings; the server checks the values."""


def setting(name: str, text: str) -> Any:
    """The value that is written as ``text``: lists and objects are JSON, the rest is as it is.

    Raises:
        ApiError: if there is no setting of this name.
    """
    if name not in SETTINGS:
        close = get_close_matches(name, SETTINGS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(SETTINGS)}"
        raise ApiError(f"no setting {name!r}; {meant}")
    if text[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def applied(settings: Mapping[str, Any], question: Question) -> Question:
    """The question, to be answered with these settings."""
    options = {name: value for name, value in settings.items() if name != "depth_scale"}
    return replace(question, options=options, depth_scale=settings.get("depth_scale"))
