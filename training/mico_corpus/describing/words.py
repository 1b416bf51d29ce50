"""What is said and what is written in a clip, by the recognisers that the chat uses too."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mico_chat.errors import ConfigError, MissingExtraError, ModelError
from mico_chat.reading import EXTRA, pictures, speech
from mico_corpus.describing.base import Annotation, Clip
from mico_corpus.describing.naming import version_of


class Speech:
    """The sentences that Whisper hears in the sound track, with their times.

    Sentences below the confidence ``least`` are left out.
    """

    name = "speech"

    def __init__(self, least: float = 0.0) -> None:
        if not speech.installed():
            raise MissingExtraError("the annotator 'speech'", EXTRA)
        if not speech.folder().is_dir():
            raise ModelError(f"no weights for speech in {speech.folder()}: run `mico-chat setup`")
        self._least = least
        self._listener = speech.Listener()
        limits = (speech.LEAST_LOGPROB, speech.MOST_NO_SPEECH, speech.MOST_COMPRESSION)
        settings = {"voices": speech.VOICES, "limits": limits, "least": least}
        self.version = version_of(speech.NAME, speech.FILES["model.bin"][:12], **settings)

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        return [self._of(clip) for clip in clips]

    def _of(self, clip: Clip) -> list[Annotation]:
        if clip.sound is None:
            return []
        return [
            Annotation(
                self.name,
                self.version,
                "speech",
                "audio",
                one.text,
                one.confidence,
                start=one.start,
                end=one.end,
            )
            for one in self._listener.listen(clip.sound.samples)
            if one.confidence >= self._least
        ]


class Text:
    """The lines that PP-OCRv6 reads in ``frames`` frames of the clip.

    A line of several frames counts once, from the first of them to the last; ``score`` is the
    highest confidence.
    """

    name = "text"

    def __init__(self, frames: int = 4, side: int = pictures.SIDES[1], least: float = 0.0) -> None:
        if frames < 1:
            raise ConfigError(f"text: frames: expected at least 1, got {frames}")
        if (models := pictures.models()) is None:
            raise MissingExtraError("the annotator 'text'", EXTRA)
        self._frames, self._side, self._least = frames, side, least
        self._reader = pictures.PictureReader()
        weights = hashlib.sha256(b"".join(file.read_bytes() for file in models)).hexdigest()[:12]
        settings = {"frames": frames, "side": side, "sure": pictures.SURE, "least": least}
        self.version = version_of(models[0].stem.removesuffix("_det_small"), weights, **settings)

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        return [self._of(clip) for clip in clips]

    def _of(self, clip: Clip) -> list[Annotation]:
        shown = clip.frames(self._frames, self._side)
        seen: dict[str, list[tuple[float, float]]] = {}  # of each line its times and confidences
        # The frame that is shown as the clip begins may have appeared before.
        for pixels, time in zip(shown.frames, shown.times, strict=True):
            for line in self._reader.read(np.ascontiguousarray(pixels)):
                seen.setdefault(line.text, []).append((max(0.0, float(time)), line.confidence))
        return [
            Annotation(
                self.name,
                self.version,
                "text",
                "video",
                text,
                score,
                start=found[0][0],
                end=found[-1][0],
            )
            for text, found in seen.items()
            if (score := max(confidence for _, confidence in found)) >= self._least
        ]
