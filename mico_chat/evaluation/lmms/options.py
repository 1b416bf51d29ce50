"""The ``generation_kwargs`` of an lmms-eval task as options of our engines."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import RequestError

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""Where a task does not say; lmms-eval's clients of served models take the same."""

_ALWAYS = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_SAMPLING = ("top_p", "top_k", "min_p", "seed")
_ANSWERS = ("num_beams", "num_return_sequences", "n", "best_of")
_KNOWN = {"max_new_tokens", "until", "temperature", "do_sample", *_ALWAYS, *_SAMPLING, *_ANSWERS}


def options_of(given: Mapping[str, Any]) -> GenerationOptions:
    """What a task asks for. ``until`` are stop texts, which are no part of the answer.

    As in transformers, an answer is greedy where ``do_sample`` is false, whatever the temperature.
    Keys that mean nothing here (``image_aspect_ratio`` is LLaVA's) are named once in the log.

    Raises:
        RequestError: for beam search or several answers, or a value that makes no sense.
    """
    for name in _ANSWERS:
        if given.get(name) not in (None, 1):
            raise RequestError.at(
                name,
                f"got {given[name]!r}, but a request gets one answer, without beam search; set "
                "it to 1",
            )
    temperature = given.get("temperature")
    if temperature is None:
        temperature = 1.0 if given.get("do_sample") else 0.0
    if given.get("do_sample") is False:
        temperature = 0.0
    until = given.get("until") or ()
    values = {
        "max_tokens": given.get("max_new_tokens") or MAX_NEW_TOKENS,
        "temperature": temperature,
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
    }
    for name in (*_ALWAYS, *(_SAMPLING if float(temperature) > 0 else ())):
        if given.get(name) is not None:
            values[name] = given[name]
    _tell_unknown(frozenset(given) - _KNOWN)
    return GenerationOptions.of(values)


_told: set[str] = set()


def _tell_unknown(names: frozenset[str]) -> None:
    for name in sorted(names - _told):
        logger.warning("the generation option %r is ignored: no engine supports it", name)
    _told.update(names)
