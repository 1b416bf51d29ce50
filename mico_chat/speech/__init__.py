"""Voices: text to sound, sentence by sentence.

A :class:`Voice` reads a text aloud. The one that comes with the extra ``speech`` is hibari's
(Apache-2.0, 7.9 MB, English), which speaks a hundred times faster than anybody listens. What a
voice cannot read as it is written, :mod:`mico_chat.speech.speakable` puts into words.
"""

from __future__ import annotations

import importlib.util
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mico_chat.checkpoints.folders import built_once, local_folder, whole_folder
from mico_chat.engine.cpu import free_cores
from mico_chat.errors import MissingExtraError, ModelError, RequestError
from mico_chat.reading.speech import place_of
from mico_chat.settings import Settings
from mico_chat.speech.speakable import sentences

EXTRA = "speech"
SLOWEST, FASTEST = 0.25, 4.0
"""The bounds of a speed, OpenAI's; 1 is the voice's own."""


class LanguageError(RequestError):
    """No voice speaks the language of a text."""


class Voice(Protocol):
    """Reads texts aloud. Threads may share it.

    ``sample_rate`` is in Hz, ``language`` a code of ISO 639-1 such as "en".
    """

    name: str
    sample_rate: int
    language: str

    def say(self, text: str, speed: float = 1.0) -> Iterator[NDArray[np.float32]]:
        """Each sentence of a text as samples (n,) in [-1, 1]; none where nothing can be said."""
        ...


class HibariVoice:
    """A voice of the package ``hibari``. The same text always sounds the same."""

    language = "en"

    def __init__(self, name: str, weights: Path) -> None:
        from hibari import Hibari
        from hibari.voices import VOICES

        self.name = name
        sounds = next((one for one in (name, weights.stem) if one in VOICES), "heart")
        try:
            self._tts: Any = Hibari(sounds, model=str(weights))
            # With hibari's options onnxruntime keeps what its longest sentence took: 80 MB.
            session = self._tts.sess
            options = session.get_session_options()
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            self._tts.sess = type(session)(str(weights), options, providers=session.get_providers())
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise ModelError(f"{weights}: no voice of hibari: {error}") from error
        if (takes := {one.name for one in self._tts.sess.get_inputs()}) != {"ids", "speed"}:
            reason = f"it takes {', '.join(sorted(takes))}, but hibari gives ids, speed"
            raise ModelError(f"{weights}: no voice of hibari: {reason}")
        self._tts.g2p  # noqa: B018 - its tables load now, not during the first sentence
        self.sample_rate = int(self._tts.sample_rate)

    def say(self, text: str, speed: float = 1.0) -> Iterator[NDArray[np.float32]]:
        if not SLOWEST <= speed <= FASTEST:
            raise RequestError.at("speed", f"{speed:g}; expected {SLOWEST:g} to {FASTEST:g}")
        for sentence in sentences(text, self.language):
            with free_cores().take(1):
                pieces = list(self._tts.stream(sentence.spoken, speed, seed=0))
            if pieces and (said := np.concatenate(pieces)).size:
                yield np.clip(said, -1.0, 1.0)


def installed() -> bool:
    return importlib.util.find_spec("hibari") is not None


class Voices:
    """The voices of this machine; each is loaded when it is first wanted. Threads may share it."""

    def __init__(self) -> None:
        self._loaded: dict[str, Voice] = {}
        self._lock = threading.Lock()

    def get(self, name: str | None = None) -> Voice:
        """The voice of a name; without one ``MICO_VOICE``, or else ``heart``.

        Raises:
            MissingExtraError: the extra ``speech`` is not installed.
            RequestError: this machine has no such voice.
            ModelError: the file is no voice of hibari.
        """
        name = name or Settings().voice
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = HibariVoice(name, _weights(name))
            return self._loaded[name]

    def close(self) -> None:
        """Forget the loaded ones (about 90 MB each); one that is wanted again is loaded again."""
        with self._lock:
            self._loaded.clear()


def _known() -> dict[str, Any]:
    if not installed():
        raise MissingExtraError("speaking", EXTRA)
    from hibari.voices import VOICES

    return dict(VOICES)


def _weights_of(name: str) -> Path:
    from hibari.voices import ASSETS, VOICES, cache_dir

    voice = VOICES[name]
    return Path(ASSETS if voice.get("bundled") else cache_dir(), voice["file"])


def fetch() -> Path | None:
    """Fetch the voice of the hub that ``MICO_VOICE`` names, unless it is there, and give its file;
    None if it names none of the hub."""
    name = Settings().voice
    place, _, wanted = name.partition(":")
    if "/" not in place or Path(name).expanduser().exists() or Path(place).expanduser().is_dir():
        return None

    def download(target: Path) -> None:
        with whole_folder(target) as written:
            local_folder(place, f"*{wanted}.onnx", local_dir=str(written))
            _file_in(written, name)

    return _file_in(built_once(place_of(name), download), name)


def _file_in(folder: Path, name: str) -> Path:
    """The ONNX file in a folder that ``name`` means: of several the one behind its colon."""
    place, _, wanted = name.partition(":")
    found = {file.stem: file for file in sorted(folder.rglob("*.onnx"))}
    if wanted in found or (not wanted and len(found) == 1):
        return found[wanted or next(iter(found))]
    there = f"it has {', '.join(found)}" if found else "it has no ONNX file"
    how = f"; name one of them: {place}:{next(iter(found))}" if found else ""
    raise ModelError(f"MICO_VOICE: {name}: {there}{how}")


def _weights(name: str) -> Path:
    """The file of a voice: a known one's, or the one that ``MICO_VOICE`` itself names."""
    known = _known()
    if name in known:
        if not (path := _weights_of(name)).is_file():  # nothing is fetched unasked
            how = f"hibari --voice {name} --output /dev/null hello"
            raise RequestError.at("voice", f"{name} is not on this machine; `{how}` fetches it")
        return path
    if name == Settings().voice:
        if (path := Path(name).expanduser()).is_file():
            return path
        for place in (Path(name.partition(":")[0]).expanduser(), place_of(name)):
            if place.is_dir():
                return _file_in(place, name)
        if "/" in name:
            raise RequestError.at(
                "voice", f"{name[:64]} is not on this machine; `mico-chat setup` fetches it"
            )
    raise RequestError.at("voice", f"no voice {name[:64]!r} here; known are {', '.join(known)}")


def check_language(voice: Voice, text: str, language: str | None = None) -> None:
    """Refuse a text that ``voice`` cannot read, by its ``language`` if known, and by its letters.

    Raises:
        LanguageError: it is of another language, or most letters are of another script.
    """
    if language is not None and language.lower().partition("-")[0] != voice.language:
        reason = f"no voice here speaks {language[:16]!r}; {voice.name} speaks {voice.language!r}"
        raise LanguageError.at("language", reason)
    letters = [unicodedata.name(one, "").split(" ")[0] for one in text if one.isalpha()]
    foreign = [script for script in letters if script != "LATIN"]
    if 2 * len(foreign) > len(letters):
        script = max(set(foreign), key=foreign.count).title()
        reason = f"most of its letters are {script}; the voice {voice.name} speaks "
        raise LanguageError.at("input", f"{reason}{voice.language!r} alone")
