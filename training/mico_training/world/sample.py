"""One omni-modal training sample: media of one scene, its captions, and questions with exact truth.

A sample is what a shard holds and what every generator of the data engine returns. Media are
already encoded (JPEG, PNG, FLAC, MP4), so that a shard is a plain tar that any tool can open.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Turn:
    """A question about some of the sample's media and its true answer.

    ``media`` names members of ``Sample.files`` in the order in which they are shown. ``skill``
    groups questions for evaluation ("name", "count", "colour", "position", "nearer", "motion",
    "sound", "belong", ...). ``choices`` are the possible answers where the question is closed;
    ``accept`` are the words one of which a right free answer contains.
    """

    question: str
    answer: str
    skill: str
    media: tuple[str, ...]
    choices: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Media of one scene with captions and questions.

    ``files`` maps a member name to encoded bytes; the part before the first dot, digits
    stripped, is the kind ("image.jpg", "image2.jpg", "audio.flac", "video.mp4", "depth.png",
    "normal.png"). ``captions`` maps a member name to sentences that describe it. ``concepts``
    maps a member name to the plain name of the one main thing in it, where there is one.
    """

    id: str
    split: Split
    files: dict[str, bytes]
    captions: dict[str, tuple[str, ...]]
    turns: tuple[Turn, ...]
    concepts: dict[str, str] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)

    def record(self) -> str:
        """The sample's JSON member: all but the media bytes."""
        data = asdict(self)
        data["files"] = list(self.files)
        return json.dumps(data, ensure_ascii=False)


def kind_of(member: str) -> str:
    """The media kind of a member name: ``"image2.jpg"`` -> ``"image"``."""
    return member.split(".", 1)[0].rstrip("0123456789")
