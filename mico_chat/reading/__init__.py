"""Reads the text in pictures and listens to the speech in recordings.

Both stand beside the context tokens: they are for every model and engine, and no model was trained
to do them. The recognisers are packages of the extra ``reads``; they load when they are first
needed. Each computes on one thread, so that the encoder and the language model go on beside it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mico_chat.engine.cpu import usable_cores
from mico_chat.errors import MissingExtraError, ModelError
from mico_chat.media.file import MediaFile
from mico_chat.media.medium import (
    Audio,
    Image,
    Medium,
    Pages,
    SpokenText,
    Video,
    Words,
    WrittenText,
)
from mico_chat.reading import speech
from mico_chat.reading.pictures import PictureReader
from mico_chat.reading.pictures import installed as can_read
from mico_chat.reading.speech import Listener
from mico_chat.settings import Settings

logger = logging.getLogger(__name__)

EXTRA = "reads"
FRAMES = 3  # of a video are read: its first, its last and the one between them
MAX_CHARACTERS = 2000
"""A medium's text has at most these characters, and its speech as many: about 500 tokens each."""
MAX_WIDTH = 2000.0
"""The lines of a picture that are recognised have at most this width together, at a height of 1:
8 s on a core. 150 lines of the least width have 1,000, and as many characters another 1,000."""


class Reader(Protocol):
    """Recognises words in decoded media. Threads may share it."""

    @property
    def listener(self) -> Listener | None: ...

    def read(self, medium: Medium, stop: threading.Event) -> Words:
        """The words in a medium. If ``stop`` is set, the words so far are enough."""
        ...

    def close(self) -> None:
        """Stop what was begun and is not needed."""
        ...


class _Stop(threading.Event):
    """It is also set if that of the request is, once one waits."""

    request: threading.Event | None = None

    def is_set(self) -> bool:
        return super().is_set() or (self.request is not None and self.request.is_set())


@dataclass(frozen=True)
class MediaReader:
    """Reads with ``pictures`` and listens with ``listener``, so far as they are there."""

    pictures: PictureReader | None = None
    listener: Listener | None = None
    _begun: dict[int, tuple[Image, _Stop, Future[Words]]] = field(default_factory=dict, init=False)

    def begin(self, media: Iterable[MediaFile | Medium]) -> None:
        """Read the pictures among ``media`` from now on, in threads: :meth:`read` waits for them.

        What fails is raised by :meth:`read`. The caller closes the reader.
        """
        pool = ThreadPoolExecutor(usable_cores(), "mico-begun")
        for medium in media:
            if isinstance(medium, Image) and medium.report.written is None:
                stop = _Stop()
                words = pool.submit(self._read, medium, stop)
                self._begun[id(medium.pixels)] = medium, stop, words
        pool.shutdown(wait=False)

    def close(self) -> None:
        for _, stop, _ in self._begun.values():
            stop.set()

    def read(self, medium: Medium, stop: threading.Event) -> Words:
        begun = self._begun.pop(id(medium.pixels), None) if isinstance(medium, Image) else None
        if begun is None:
            return self._read(medium, stop)
        begun[1].request = stop
        return begun[2].result()

    def _read(self, medium: Medium, stop: threading.Event) -> Words:
        match medium:
            case Image():
                return self._written([(medium.pixels, {})], stop)
            case Pages():
                unread = medium.unread.items()
                found = self._written([(one.pixels, {"page": n}) for n, one in unread], stop)
                lines = (*(medium.report.written or ()), *(found.written or ()))
                in_order = tuple(sorted(lines, key=lambda one: one.page or 0))
                return replace(found, written=in_order or found.written)
            case Audio():
                return self._spoken(medium, stop)
            case Video():
                places = np.linspace(0, len(medium.frames) - 1, FRAMES).round().astype(int)
                frames = [
                    (medium.frames[at], {"time": float(medium.times[at])})
                    for at in dict.fromkeys(places)
                ]
                written = self._written(frames, stop)
                track = Words() if medium.audio is None else self._spoken(medium.audio, stop)
                return Words(written.written, track.spoken, (*written.cut, *track.cut))
        return Words()

    def _written(
        self, pictures: Sequence[tuple[NDArray[np.uint8], dict[str, Any]]], stop: threading.Event
    ) -> Words:
        """The text in pictures, each with the fields that say where its text stands."""
        if self.pictures is None or stop.is_set():
            return Words()
        # A text of several frames counts once, that of several pages on each.
        lines: dict[tuple[int | None, str], WrittenText] = {}
        full, page = False, None

        def enough(texts: list[str], width: float) -> bool:
            nonlocal full
            keys = dict.fromkeys([*lines, *((page, text) for text in texts)])
            known = [text for _, text in keys]
            full |= width > MAX_WIDTH or _within_budget(known) < len(known)
            return full or stop.is_set()

        for pixels, where in pictures:
            page = where.get("page")
            for line in self.pictures.read(pixels, enough):
                lines.setdefault((page, line.text), line.model_copy(update=where))
            if enough([], 0):
                break
        kept = _within_budget([text for _, text in lines])
        cut = f"only the first {kept} lines of text are used"
        return Words(tuple(lines.values())[:kept], cut=(cut,) if full else ())

    def _spoken(self, sound: Audio, stop: threading.Event) -> Words:
        if self.listener is None or stop.is_set():
            return Words()
        said: list[SpokenText] = []
        end = min(sound.seconds, speech.LISTENED_S)
        for one in self.listener.listen(sound.samples[: int(end * sound.sample_rate)]):
            if stop.is_set():
                break
            said.append(one)
            if _within_budget([spoken.text for spoken in said]) < len(said):
                end = said.pop().start
                break
        cut = f"only the first {end:.0f} s were listened to for speech"
        return Words(spoken=tuple(said), cut=() if end == sound.seconds else (cut,))


def _within_budget(texts: list[str]) -> int:
    """How many of the texts, from the first, have at most ``MAX_CHARACTERS`` together."""
    lengths = np.cumsum([len(text) + 1 for text in texts])
    return int((lengths <= MAX_CHARACTERS).sum())


def installed_reader(wanted: bool | None = None) -> MediaReader | None:
    """What can be recognised on this machine; None where nothing can be, or nothing is wanted.

    ``wanted`` is the setting ``MICO_READS``, where it is not given.

    Raises:
        MissingExtraError: it is wanted, but a package is missing.
        ModelError: it is wanted, but ``mico-chat setup`` has not fetched the weights.
    """
    wanted = Settings().reads if wanted is None else wanted
    reads, listens = can_read(), speech.installed() and speech.folder().is_dir()
    if wanted and not (reads and speech.installed()):
        raise MissingExtraError("recognising text and speech (MICO_READS)", EXTRA)
    if wanted and not listens:
        raise ModelError(why_not_listening())
    if wanted is False or not (reads or listens):
        return None
    logger.info("reads pictures: %s; listens to recordings: %s", reads, listens)
    return MediaReader(PictureReader() if reads else None, Listener() if listens else None)


def why_not_listening() -> str:
    if Settings().reads is False:
        return "speech is not recognised here: MICO_READS turns it off"
    if not speech.installed():
        return str(MissingExtraError("recognising speech", EXTRA))
    return f"no weights for speech in {speech.folder()}: run `mico-chat setup`"
