"""Captions of what is seen or heard, by any model that reads pictures, clips or sounds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from mico_chat.errors import ConfigError
from mico_chat.evaluation.task import Reply
from mico_chat.media import Image
from mico_chat.media.medium import Medium
from mico_chat.messages import Message
from mico_corpus.describing.asking import Asking, asker
from mico_corpus.describing.base import Annotation, Clip, Shown

OF_THE_MINI: dict[Shown, str] = {
    "image": "Describe the picture.",
    "video": "Describe the video.",
    "audio": "What do you hear?",
}
"""The mini was trained on these questions."""

DETAILED: dict[Shown, str] = {
    "image": (
        "Write one caption for this picture, of one or two plain sentences: who or what is there, "
        "what they do, how they look, and where it is. Say only what can be seen. Do not begin "
        "with 'The picture shows'."
    ),
    "video": (
        "This is one video clip; if you see several pictures, they are its frames in order of "
        "time. Write one caption for the clip, of one or two plain sentences: who or what is "
        "there, what happens from beginning to end, and where. Say only what can be seen. Do not "
        "mention frames, and do not begin with 'The video shows'."
    ),
    "audio": (
        "Write one caption for this sound, of one plain sentence: what makes the sounds, how they "
        "sound and how they follow each other. If someone speaks, say so and how, but do not "
        "write down the words."
    ),
}

_NO_ANSWER = re.compile(
    r"(i'?m sorry|sorry,|i am sorry|i can(no|')t |i am unable|i'?m unable|as an ai\b)", re.I
)
_SENTENCE = re.compile(r".*[.!?](?=\s|$)", re.S)


class Captions:
    """Captions of the clip's middle frame ("image"), its frames ("video") or its sound ("audio").

    ``medium`` is one of them or a list, for a caption of each; ``prompt`` is one question, or one
    for each medium. ``frames`` of a clip are shown, no side longer than ``side`` pixels. Answers
    whose confidence is below ``least`` are left out; a model that gives none is believed.
    ``asking`` are the fields of
    :class:`~mico_corpus.describing.asking.Asking`.
    """

    name = "caption"

    def __init__(
        self,
        medium: Shown | Sequence[Shown] = "video",
        prompt: str | Mapping[Shown, str] | None = None,
        frames: int = 8,
        side: int = 448,
        least: float = 0.0,
        **asking: Any,
    ) -> None:
        media: Sequence[Shown] = (medium,) if isinstance(medium, str) else medium
        if not media or not set(media) <= set(get_args(Shown)):
            raise ConfigError(f"caption: medium: expected {_or(get_args(Shown))}, got {medium!r}")
        how = Asking.of(self.name, asking)
        if frames < 1:
            raise ConfigError(f"caption: frames: expected at least 1, got {frames}")
        self._model = asker(how)
        for one in media:
            if one not in self._model.reads:
                reads = _or(self._model.reads) or "texts"
                raise ConfigError(f"caption: medium: {how.model} reads {reads}, not {one}")
        usual = OF_THE_MINI if self._model.is_mini else DETAILED
        own = dict.fromkeys(media, prompt) if isinstance(prompt, str) else prompt or {}
        self._prompts = {one: own.get(one, usual[one]) for one in media}
        self._frames, self._side, self._least = frames, side, least
        self.version = self._model.version(
            prompts=self._prompts, frames=frames, side=side, least=least
        )

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        shown: list[tuple[int, str]] = []
        asked: list[list[Message]] = []
        for place, clip in enumerate(clips):
            for kind, prompt in self._prompts.items():
                for name, medium in shown_of(clip, kind, self._frames, self._side).items():
                    shown.append((place, name))
                    asked.append([Message.user(medium, prompt)])
        found: list[list[Annotation]] = [[] for _ in clips]
        for (place, name), reply in zip(shown, self._model.ask(asked), strict=True):
            text = caption_in(reply)
            score = float("nan") if reply.confidence is None else round(reply.confidence, 4)
            if text and not score < self._least:
                said = Annotation(self.name, self.version, "caption", name, text, score)
                found[place].append(said)
        return found

    def close(self) -> None:
        self._model.close()


def shown_of(clip: Clip, kind: Shown, frames: int, side: int) -> dict[str, Medium]:
    """What a model is shown of a clip, by name; nothing for no sound."""
    if kind == "image":
        return {name: Image(pixels) for name, pixels in clip.stills(side).items()}
    medium = clip.sound if kind == "audio" else clip.frames(frames, side)
    return {} if medium is None else {kind: medium}


def caption_in(reply: Reply) -> str:
    """The caption in a reply, on one line; empty for a refusal, and for no whole sentence."""
    text = " ".join(reply.text.split()).strip('"“”').strip()
    if reply.kind != "answer" or _NO_ANSWER.match(text):
        return ""
    if reply.cut:  # at the limit of its tokens: the whole sentences before it
        whole = _SENTENCE.match(text)
        return whole[0] if whole else ""
    return text


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)
