"""How unsafe a clip is: what a classifier of pictures says, and words that the user lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageClassification

from mico_chat.errors import ConfigError
from mico_corpus.describing.base import Annotation, Clip
from mico_corpus.describing.naming import version_of
from mico_corpus.describing.tags import words_of
from mico_corpus.describing.vision import VisionModel


class Safety:
    """A score of 0 to 1 by an image classifier of transformers, by listed words, or both.

    ``model`` looks at ``frames`` frames; the score is the highest sum of its ``unsafe`` labels'
    probabilities. ``words``, a list or a file with one a line, are looked for in all texts of the
    clip, whole words in any case: a hit scores 1. The annotation's text says what was found.
    """

    name = "safety"

    def __init__(
        self,
        model: str | None = "Falconsai/nsfw_image_detection",
        unsafe: Sequence[str] = ("nsfw",),
        words: Sequence[str] | str | Path | None = None,
        frames: int = 4,
        side: int = 448,
        revision: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        at_once: int | None = None,
    ) -> None:
        if model is None and words is None:
            raise ConfigError("safety: expected a model, words, or both; got neither")
        if frames < 1:
            raise ConfigError(f"safety: frames: expected at least 1, got {frames}")
        listed = [] if words is None else words_of(self.name, words)
        self._words = _pattern(listed)
        self._frames, self._side = frames, side
        self._model: VisionModel | None = None
        if model is None:
            self.version = version_of("words", "1", words=listed)
            return
        loading: dict[str, Any] = {"revision": revision, "device": device, "dtype": dtype}
        auto = AutoModelForImageClassification
        self._model = VisionModel(self.name, auto, model, at_once=at_once, **loading)
        labels = {str(label): i for i, label in self._model.model.config.id2label.items()}
        if not unsafe or not labels.keys() >= set(unsafe):
            raise ConfigError(
                f"safety: unsafe: {model} has the labels {', '.join(sorted(labels))}; got "
                f"{', '.join(unsafe) or 'none'}"
            )
        self._unsafe = [labels[label] for label in unsafe]
        settings = {"unsafe": list(unsafe), "words": listed, "frames": frames, "side": side}
        self.version = self._model.version(**settings)

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        seen = [0.0] * len(clips) if self._model is None else self._seen(self._model, clips)
        found = []
        for clip, score in zip(clips, seen, strict=True):
            hits = self._hits(clip)
            text = f"words: {', '.join(hits)}" if hits else ""
            score = 1.0 if hits else round(score, 4)
            found.append([Annotation(self.name, self.version, "safety", "video", text, score)])
        return found

    def _seen(self, model: VisionModel, clips: Sequence[Clip]) -> list[float]:
        shown = [clip.frames(self._frames, self._side).frames for clip in clips]
        owner = [place for place, frames in enumerate(shown) for _ in frames]
        scores = [0.0] * len(clips)
        pictures = [frame for frames in shown for frame in frames]
        for places, outputs, _ in model.outputs(pictures):
            unsafe = outputs.logits.float().softmax(-1)[:, self._unsafe].sum(-1).tolist()
            for place, score in zip(places, unsafe, strict=True):
                scores[owner[place]] = max(scores[owner[place]], score)
        return scores

    def _hits(self, clip: Clip) -> list[str]:
        if self._words is None:
            return []
        texts = [str(clip.row.get("text") or ""), *(one.text for one in clip.annotations)]
        hits = (hit[0].casefold() for text in texts for hit in self._words.finditer(text))
        return sorted(set(hits))


def _pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    if not words:
        return None
    any_of = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<!\w)({any_of})(?!\w)", re.IGNORECASE)
