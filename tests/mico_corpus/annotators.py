"""Annotators for tests: they answer from the clip alone, and write down what they were asked."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_chat.errors import MediaError
from mico_corpus.describing.base import Annotation, Clip


class Told:
    """A caption, a tag, words and a depth map for each clip.

    ``calls``: a file to which each clip's id is appended when it is asked about. ``damaged``: the
    clips of files with this in their names cannot be decoded; ``unsafe``: those are unsafe.
    """

    name = "told"
    version = "1"

    def __init__(self, calls: str = "", damaged: str = "!", unsafe: str = "!") -> None:
        self.calls = calls
        self.damaged, self.unsafe = damaged, unsafe

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        if any(self.damaged in clip.row["address"] for clip in clips):
            raise MediaError("a clip", "its frames cannot be decoded")
        if self.calls:
            with Path(self.calls).open("a") as file:
                file.writelines(f"{clip.id}\n" for clip in clips)
        return [self._say(clip) for clip in clips]

    def _say(self, clip: Clip) -> list[Annotation]:
        number = int(hashlib.sha256(clip.id.encode()).hexdigest()[:4], 16)
        depth = Image.fromarray(np.full((6, 8), 1000 + number % 1000, np.uint16))
        file = io.BytesIO()
        depth.save(file, "PNG")
        unsafe = 0.9 if self.unsafe in clip.row["address"] else 0.1
        return [
            Annotation(self.name, self.version, "caption", "video", f"clip number {number}"),
            Annotation(self.name, self.version, "caption", "image", f"picture {number}", 0.5),
            Annotation(self.name, self.version, "tag", "image", "blocks", 0.4),
            Annotation(self.name, self.version, "tag", "image", "colours", 0.8),
            Annotation(self.name, self.version, "speech", "audio", "world", start=1.0, end=2.0),
            Annotation(self.name, self.version, "speech", "audio", "hello", start=0.0, end=1.0),
            Annotation(self.name, self.version, "depth", "image", data=file.getvalue()),
            Annotation(self.name, self.version, "safety", "video", score=unsafe),
        ]


class Seen:
    """A caption, a depth and a normal map of each picture."""

    name = "seen"
    version = "1"

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        return [
            [said for name, pixels in clip.stills(32).items() for said in self._say(name, pixels)]
            for clip in clips
        ]

    def _say(self, name: str, pixels: NDArray[np.uint8]) -> list[Annotation]:
        about = (self.name, self.version)
        return [
            Annotation(*about, "caption", name, f"a grey of {pixels.mean():.0f}"),
            Annotation(*about, "depth", name, data=b"depth"),
            Annotation(*about, "normal", name, data=b"normal"),
        ]


class Silent:
    """Says nothing of any clip."""

    name = "silent"
    version = "1"

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        return [[] for _ in clips]


class Forgetful:
    """Forgets the last clip of a batch."""

    name = "forgetful"
    version = "1"

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        return [[] for _ in clips[1:]]
