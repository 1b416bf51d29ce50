"""What is said and what is written: once, with its time, and by whom."""

import importlib.util
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL import ImageDraw, ImageFont
from scipy.io import wavfile

from mico_chat.errors import MissingExtraError, ModelError
from mico_chat.media.medium import WrittenText
from mico_chat.reading import pictures, speech
from mico_corpus.describing.base import Annotation
from tests.mico_corpus.describing.drawn import drawn, made, plain

written = pytest.mark.skipif(not pictures.installed(), reason="rapidocr is not installed")


def sign(*texts: str) -> np.ndarray:
    frames = []
    for text in texts:
        board = PIL.Image.new("RGB", (480, 160), "white")
        ImageDraw.Draw(board).text((30, 50), text, "black", ImageFont.load_default(size=48))
        frames.append(np.asarray(board))
    return np.stack(frames)


@written
def test_a_line_of_several_frames_counts_once_with_its_times() -> None:
    reader = made("text", frames=4)
    clip = drawn(sign("OPEN NOW", "OPEN NOW", "OPEN NOW", "Exit 7"), seconds=8.0)
    first, last = reader([clip])[0]
    assert (first.text, first.start, first.end) == ("OPEN NOW", 1.0, 5.0)
    assert (last.text, last.start, last.end) == ("Exit 7", 7.0, 7.0)
    assert (first.annotator, first.role, first.medium) == ("text", "text", "video")
    assert 0.9 < first.score <= 1
    assert reader([drawn(plain(200))]) == [[]]
    assert reader.version.startswith("PP-OCRv6@")
    assert reader.version != made("text", frames=3).version


class Unsteady:
    """Reads the same in each frame, with another confidence."""

    def __init__(self) -> None:
        self.sure = iter((0.7, 0.9, 0.8))

    def read(self, pixels: object) -> list[WrittenText]:
        return [WrittenText(text="EXIT", box=(0, 0, 1, 1), confidence=next(self.sure))]


@written
def test_the_surest_frame_gives_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PictureReader", Unsteady)
    ((said,),) = made("text", frames=3)([drawn(plain(1, 2, 3))])
    assert said.score == 0.9


def test_what_is_said_has_its_times(talk: Path) -> None:
    rate, samples = wavfile.read(talk)
    assert rate == 16_000
    silence = np.zeros(16_000, np.float32)
    clip = drawn(None, np.concatenate([silence, samples.astype(np.float32) / 32768]))
    listener = made("speech")
    found: list[list[Annotation]] = listener([clip, drawn(), drawn(None, silence)])
    (said, *_), *nothing = found
    assert nothing == [[], []]
    assert "window" in said.text.lower()
    assert (said.annotator, said.role, said.medium) == ("speech", "speech", "audio")
    assert 0.5 < said.start < said.end < 6
    assert 0 < said.score <= 1
    assert listener.version.startswith(f"whisper-base@{speech.FILES['model.bin'][:12]}+")
    strict = made("speech", least=1.0)
    assert strict([clip]) == [[]]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    gone = ("faster_whisper", "rapidocr")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, p=None: None if n in gone else find(n, p)
    )
    for use in ("speech", "text"):
        with pytest.raises(MissingExtraError, match=rf"'{use}' needs the extra 'reads'"):
            made(use)


def test_speech_without_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "installed", lambda: True)
    with pytest.raises(ModelError, match=r"no weights for speech in .*: run `mico-chat setup`"):
        made("speech")
