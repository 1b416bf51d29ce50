"""The media decoder: has PyAV the usual codecs, and does the decoder's process decode?"""

from __future__ import annotations

import io
import time
import wave
from collections.abc import Mapping
from typing import Any

from mico_chat.cli.doctor.children import Outcome
from mico_chat.cli.doctor.finding import Finding

CODECS = {
    "h264": "H.264",
    "hevc": "H.265",
    "vp9": "VP9",
    "av1": "AV1",
    "aac": "AAC",
    "mp3": "MP3",
    "opus": "Opus",
    "vorbis": "Vorbis",
    "flac": "FLAC",
}
"""Decoders by FFmpeg's names: those of phones, browsers and music."""

SIDE, RATE, SECONDS = 32, 16_000, 0.25


def probe_codecs(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Which of the usual decoders FFmpeg's libraries inside PyAV have."""
    import av
    from av.codec.codec import UnknownCodecError

    missing = []
    for name, shown in CODECS.items():
        try:
            av.Codec(name, "r")
        except UnknownCodecError:
            missing.append(shown)
    return {"version": av.__version__, "missing": missing}


def probe_decoder(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A made picture and a made sound through the decoder's own process, within its limits."""
    import numpy as np
    from PIL import Image as Pillow

    from mico_chat.media import Audio, Image, MediaDecoder, MediaFile, MediaLimits

    started = time.perf_counter()
    pixels = np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)
    picture, sound = io.BytesIO(), io.BytesIO()
    Pillow.fromarray(pixels).save(picture, "png")
    samples = (np.sin(np.arange(int(RATE * SECONDS)) / 6) * 20_000).astype("<i2")
    with wave.open(sound, "wb") as writer:
        writer.setparams((1, 2, RATE, 0, "NONE", ""))
        writer.writeframes(samples.tobytes())
    with MediaDecoder(MediaLimits()) as decoder:
        seen = decoder.decode(MediaFile("image", picture.getvalue(), "made.png"))
        heard = decoder.decode(MediaFile("audio", sound.getvalue(), "made.wav"))
    if not isinstance(seen, Image) or not np.array_equal(seen.pixels, pixels):
        raise ArithmeticError("a PNG's pixels come out otherwise than they went in")
    if not isinstance(heard, Audio) or abs(len(heard.samples) - len(samples)) > RATE // 100:
        raise ArithmeticError("a WAV's samples come out in another number than they went in")
    return {"seconds": time.perf_counter() - started}


def media_findings(codecs: Outcome, decoder: Outcome) -> list[Finding]:
    """What can be shown to the model; without the decoder's process nothing can."""
    return [_codecs(codecs), _decoder(decoder)]


def _codecs(outcome: Outcome) -> Finding:
    mend = "pip install --force-reinstall av"
    if outcome.facts is None:
        return Finding("codecs", "problem", f"PyAV does not work: {outcome.error}", mend)
    facts = outcome.facts
    missing = facts["missing"]
    there = [shown for shown in CODECS.values() if shown not in missing]
    text = f"PyAV {facts['version']} has {', '.join(there)}"
    if missing:
        text += f"; not {', '.join(missing)}: its FFmpeg was built without"
        return Finding("codecs", "warning", text, f"{mend}   # its wheel has them all", facts)
    return Finding("codecs", "ok", text, facts=facts)


def _decoder(outcome: Outcome) -> Finding:
    if outcome.facts is None:
        text = f"the decoder process does not work: {outcome.error}"
        mend = "see the variables MICO_MEDIA_*; MICO_MEDIA_MEMORY_MB bounds its memory"
        return Finding("decoder", "problem", text, mend)
    text = f"starts, and decodes a picture and a sound, in {outcome.facts['seconds']:.1f} s"
    return Finding("decoder", "ok", text, facts=outcome.facts)
