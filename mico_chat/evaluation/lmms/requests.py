"""lmms-eval's requests as ours: the question of a document, and the options of a task.

Its chat format is read by :mod:`mico_chat.chats`.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mico_chat.chats import medium_of
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import RequestError
from mico_chat.media.file import MediaLimits
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.messages import Message

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""The limit for a task without a limit, as in lmms-eval's clients of served models."""

_ALWAYS = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_SAMPLING = ("top_p", "top_k", "min_p", "seed")
_ANSWERS = ("num_beams", "num_return_sequences", "n", "best_of")
_KNOWN = {"max_new_tokens", "until", "temperature", "do_sample", *_ALWAYS, *_SAMPLING, *_ANSWERS}
_warned: set[str] = set()


def question(visuals: Sequence[Any], text: str, limits: MediaLimits) -> list[Message]:
    """A question of the simple interface: the media from ``doc_to_visual``, then the text."""
    parts = []
    for number, visual in enumerate(visuals):
        # As in lmms-eval's chat format, a visual that names no kind is a clip.
        kind: Kind = "image" if isinstance(visual, Image.Image) else "video"
        if isinstance(visual, Mapping) and visual.get("type") in KINDS:
            kind = visual["type"]
        parts.append(medium_of(f"visual {number}", kind, visual, limits))
    return [Message.user(*parts, text)]


def options_of(given: Mapping[str, Any]) -> GenerationOptions:
    """The ``generation_kwargs`` of a task as options of our engines.

    As in transformers, an answer is greedy if ``do_sample`` is false, at any temperature. A key
    that our engines do not know, such as LLaVA's ``image_aspect_ratio``, is logged once.
    """
    for name in _ANSWERS:
        if given.get(name) not in (None, 1):
            why = "but a request gets one answer, without beam search; set it to 1"
            raise RequestError.at(name, f"got {given[name]!r}, {why}")
    sampled, temperature = given.get("do_sample"), given.get("temperature")
    if temperature is None or sampled is False:
        temperature = 1.0 if sampled else 0.0
    until = given.get("until") or ()
    values = {
        "max_tokens": given.get("max_new_tokens") or MAX_NEW_TOKENS,
        "temperature": temperature,
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
    }
    for name in (*_ALWAYS, *(_SAMPLING if float(temperature) > 0 else ())):
        if given.get(name) is not None:
            values[name] = given[name]
    for name in sorted(frozenset(given) - _KNOWN - _warned):
        logger.warning("the generation option %r is ignored: no engine supports it", name)
        _warned.add(name)
    return GenerationOptions.of(values)
