"""Somebody speaking: recorded words in many languages, and sentences of a speech synthesiser.

A speaker is an identity; what is said does not matter, only that somebody speaks.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np

from mico_training.world import synth
from mico_training.world.sources import source
from mico_training.world.synth import Signal

_PER_SPEAKER = 14
_SECONDS = 5.0
_SENTENCES = {
    "en-us": "The weather is fine today, so we went for a walk in the park.",
    "en": "Could you please tell me where the station is?",
    "de": "Guten Morgen, wie geht es Ihnen heute? Das Wetter ist sehr schön.",
    "fr": "Bonjour, je voudrais un café et deux croissants, s'il vous plaît.",
    "es": "Buenos días, mi hermana vive en una casa cerca del mar.",
    "it": "Buongiorno, domani andiamo insieme al mercato della città.",
    "pl": "Dzień dobry, proszę powiedzieć, która jest godzina.",
    "pt": "Bom dia, o meu irmão trabalha numa escola pequena.",
    "ru": "Доброе утро, сегодня очень хорошая погода.",
    "sv": "God morgon, hur mår du idag? Det är vackert väder.",
    "nl": "Goedemorgen, vandaag is het mooi weer in de stad.",
    "cmn": "你好,今天天气很好。",
}
_VARIANTS = ("", "+f2", "+m3", "+f4")
_RETRIEVAL = 1  # AUDIO_OUTPUT_RETRIEVAL
_UTF8 = 1


def voices() -> Iterator[tuple[str, str, Callable[[], Signal]]]:
    """(identity, source, loader) of every spoken clip."""
    yield from _recorded("tuxpaint-stamps-default", "*_desc*.ogg", _language)
    yield from _recorded("ktuberling-data", "*.ogg", lambda path: path.parent.name)
    for language, sentence in _SENTENCES.items():
        for variant in _VARIANTS:
            voice = language + variant
            load = partial(_synthesised, voice, sentence)
            yield f"espeakng-loader:{voice}", "espeakng-loader", load


def _language(path: Path) -> str:
    return path.stem.split("_desc", 1)[1] or "_en"


def _recorded(
    package: str, pattern: str, speaker: Callable[[Path], str]
) -> Iterator[tuple[str, str, Callable[[], Signal]]]:
    speakers: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(source(package).rglob(pattern)):
        speakers[speaker(path)].append(path)
    for name, paths in sorted(speakers.items()):
        for path in paths[:: max(1, len(paths) // _PER_SPEAKER)][:_PER_SPEAKER]:
            yield f"{package}:{name}", package, partial(_decode, path)


def _decode(path: Path) -> Signal:
    return synth.decode(path.read_bytes(), _SECONDS)


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    """The speech synthesiser and its sample rate. Raises OSError where it does not load."""
    folder = source("espeakng-loader") / "espeakng_loader"
    library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
    rate = int(library.espeak_Initialize(_RETRIEVAL, 0, str(folder).encode(), 0))
    if rate <= 0:
        raise OSError(f"espeak-ng found no voices in {folder}")
    return library, rate


def _synthesised(voice: str, sentence: str) -> Signal:
    library, rate = _espeak()
    parts: list[Signal] = []

    def collect(wave: ctypes._Pointer[ctypes.c_short], n: int, _events: object) -> int:
        if wave and n > 0:
            parts.append(np.ctypeslib.as_array(wave, (n,)).astype(np.float32) / np.float32(32768))
        return 0

    callback = _Callback(collect)
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise OSError(f"espeak-ng has no voice {voice!r}")
    text = sentence.encode()
    library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    if not parts:
        raise OSError(f"espeak-ng said nothing with the voice {voice!r}")
    signal = np.concatenate(parts)
    positions = np.arange(int(len(signal) * synth.SAMPLE_RATE / rate)) * rate / synth.SAMPLE_RATE
    out: Signal = np.interp(positions, np.arange(len(signal)), signal).astype(np.float32)
    return out[: round(_SECONDS * synth.SAMPLE_RATE)]
