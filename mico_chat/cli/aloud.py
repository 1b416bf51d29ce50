"""``mico-chat say`` and ``mico-chat listen``: a text to a sound file, and a recording to a text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from mico_chat.errors import ModelError, RequestError
from mico_chat.media import Audio, MediaDecoder, MediaFile, MediaLimits
from mico_chat.reading import speech, why_not_listening
from mico_chat.reading.speech import Listening
from mico_chat.speech import Voices, check_language
from mico_chat.speech.sound import TYPES, SoundFormat, encoded


def say(text: str, output: Path | None, voice: str | None, speed: float) -> None:
    """Write the sound of a text ("-": standard input) to a file, or as WAV to standard output."""
    form: SoundFormat = "wav"
    if output is not None:
        named = output.suffix.lower().removeprefix(".").replace("ogg", "opus")
        found = next((known for known in TYPES if known == named), None)
        if found is None:
            raise RequestError(f"{output}: its name must end with one of .{', .'.join(TYPES)}")
        form = found
    elif sys.stdout.isatty():
        raise RequestError("say where the sound goes: --output hello.wav, or a pipe to a player")
    text = sys.stdin.read() if text == "-" else text
    speaker = Voices().get(voice)
    check_language(speaker, text)
    spoken = speaker.say(text, speed)
    if (first := next(spoken, None)) is None:
        raise RequestError("nothing in this text can be read aloud")
    pieces = encoded(chain([first], spoken), speaker.sample_rate, form)
    if output is None:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        return
    with output.open("wb") as file:
        file.writelines(pieces)


def listen(file: Path, language: str | None) -> Iterator[str]:
    """The sentences of a recording, as they are written down."""
    if not (speech.installed() and speech.folder().is_dir()):
        raise ModelError(why_not_listening())
    listener = speech.Listener()
    if language is not None and language not in listener.languages:
        known = ", ".join(sorted(listener.languages))
        raise RequestError(f"--language {language}: it is none of {known}")
    with MediaDecoder(MediaLimits()) as decoder:
        sound = decoder.decode(MediaFile("audio", file))
    assert isinstance(sound, Audio)
    for line in sound.report.cut:
        print(f"note: {line}", file=sys.stderr)
    for segment in listener.segments(sound.samples, Listening(language))[0]:
        yield segment.text.strip()
