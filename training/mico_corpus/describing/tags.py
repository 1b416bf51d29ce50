"""Tags: the words of a list that are nearest to a medium in the encoder's contrastive space.

The best tag becomes the concept of the sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from mico_chat.checkpoints.folders import model_name
from mico_chat.checkpoints.load import load_encoder, load_pretraining
from mico_chat.errors import ConfigError
from mico_chat.evaluation.endpoint import Endpoint, key_of
from mico_chat.evaluation.task import fingerprint
from mico_chat.media import MediaDecoder
from mico_chat.media.medium import Medium
from mico_chat.similarity import Similarity
from mico_corpus.describing.base import Annotation, Clip, Shown
from mico_corpus.describing.captions import shown_of
from mico_corpus.describing.naming import version_of

Vectors = NDArray[np.float32]


class Tags:
    """The ``top`` tags of each clip among ``words``, a list or a file with one word a line.

    Without words they are the names that the model's concepts have, if it runs here. ``medium`` is
    what they are compared with; ``template`` makes a text of a word. ``score`` is the
    cosine, and tags below ``least`` are left out. ``model`` is a chat model of this project with
    its text branch, here or behind ``url``, whose ``/v1/embeddings`` takes media.
    """

    name = "tags"

    def __init__(
        self,
        words: Sequence[str] | str | Path | None = None,
        medium: Shown = "image",
        template: str = "{}",
        top: int = 1,
        least: float = -1.0,
        frames: int = 8,
        side: int = 448,
        model: str = "mini",
        url: str | None = None,
        api_key_env: str | None = None,
        revision: str = "",
        device: str | None = None,
    ) -> None:
        listed = None if words is None else words_of(self.name, words)
        if medium not in get_args(Shown):
            known = ", ".join(get_args(Shown))
            raise ConfigError(f"tags: medium: expected one of {known}, got {medium!r}")
        if "{}" not in template:
            raise ConfigError(f"tags: template: expected a text with {{}}, got {template!r}")
        if top < 1 or frames < 1:
            raise ConfigError(f"tags: top and frames must be at least 1, got {top} and {frames}")
        self._medium: Shown = medium
        self._top, self._least, self._frames, self._side = top, least, frames, side
        self._space = (
            OwnSpace(model, device)
            if url is None
            else SpaceAtUrl(model, url, api_key_env, revision)
        )
        self._words = self._space.names(medium) if listed is None else listed
        if not self._words:
            raise ConfigError(f"tags: words: {model} names nothing here, so list the words")
        self._known = self._space.vectors([template.format(word) for word in self._words])
        shown = {"medium": medium, "template": template, "frames": frames, "side": side}
        chosen = {"words": self._words, "top": top, "least": least}
        self.version = self._space.version(**shown, **chosen)

    def __call__(self, clips: Sequence[Clip]) -> list[list[Annotation]]:
        shown = (shown_of(clip, self._medium, self._frames, self._side) for clip in clips)
        media = {(n, name): m for n, own in enumerate(shown) for name, m in own.items()}
        found: list[list[Annotation]] = [[] for _ in clips]
        if not media:
            return found
        cosines = self._space.vectors(list(media.values())) @ self._known.T  # (clips, words)
        for (place, name), row in zip(media, cosines, strict=True):
            for best in np.argsort(-row, kind="stable")[: self._top]:
                if row[best] >= self._least:
                    word, score = self._words[best], round(float(row[best]), 4)
                    said = Annotation(self.name, self.version, "tag", name, word, score)
                    found[place].append(said)
        return found

    def close(self) -> None:
        self._space.close()


class OwnSpace:
    """The space of a chat model in this process, where texts and media have vectors of unit length.

    Its language model is not loaded.
    """

    def __init__(self, model: str, device: str | None = None) -> None:
        self._name = model_name(model)
        with ExitStack() as opened:
            decoder = opened.enter_context(MediaDecoder())
            chat, processor = load_encoder(model, device=device)
            branch, tokenizer = load_pretraining(model, chat)
            self._space = Similarity(lambda: (branch, tokenizer), processor, decoder, cache_bytes=0)
            opened.callback(self._space.close)
            self._open = opened.pop_all()
        self._weights = fingerprint(branch)
        self._concepts = chat.config.concept_config

    def names(self, medium: Shown) -> list[str]:
        concepts = self._concepts
        if concepts is None:
            return []
        seen, heard = concepts.visual_names or [], concepts.sound_names or []
        plain = concepts.plain_names or [*seen, *heard]
        return sorted(set(plain[len(seen) :] if medium == "audio" else plain[: len(seen)]))

    def version(self, **settings: Any) -> str:
        return version_of(self._name, self._weights, **settings)

    def vectors(self, items: Sequence[str | Medium]) -> Vectors:
        if all(isinstance(item, str) for item in items):
            return asyncio.run(self._space.embed(items)).vectors
        # Media one by one: the last bits of a batch depend on what else is in it.
        return np.concatenate([asyncio.run(self._space.embed([item])).vectors for item in items])

    def close(self) -> None:
        self._open.close()


class SpaceAtUrl:
    def __init__(self, model: str, url: str, api_key_env: str | None, revision: str) -> None:
        self._model, self._revision = model, revision
        self._endpoint = Endpoint(model, url, key_of(api_key_env, "api_key_env"))

    def names(self, medium: Shown) -> list[str]:
        return []

    def version(self, **settings: Any) -> str:
        return version_of(self._model, self._revision or "url", **settings)

    def vectors(self, items: Sequence[str | Medium]) -> Vectors:
        return np.asarray(self._endpoint.embed(items), np.float32)

    def close(self) -> None:
        self._endpoint.close()


def words_of(annotator: str, given: Sequence[str] | str | Path) -> list[str]:
    """The words of a list, or of a file with one a line, without repetitions."""
    if isinstance(given, str | Path):
        try:
            given = Path(given).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{annotator}: words: {given} cannot be read: {error}") from error
    words = list(dict.fromkeys(word.strip() for word in map(str, given) if word.strip()))
    if not words:
        raise ConfigError(f"{annotator}: words: expected at least one word")
    return words
