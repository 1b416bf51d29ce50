"""Texts read aloud: what is said of them, sentence by sentence, and the sound files of it."""

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from mico_chat import speech
from mico_chat.errors import MissingExtraError, RequestError
from mico_chat.speech import LanguageError, Voice, Voices, check_language
from mico_chat.speech.sound import SoundFormat, encoded
from mico_chat.speech.speakable import LONGEST, Sentences, speakable

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")

ANSWER = """# The **answer**

Dr. Smith walks at 5 km/h, e.g. at 3.5 km. It is *warm*! See [the docs](https://example.org/a).

```python
print("never. said")
```
1. Take `x`
| a | b |
|---|---|
| 1 GB | 20% |
The end"""


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voices().get()


@pytest.mark.parametrize("size", [1, 7, len(ANSWER)])
def test_an_answer_in_pieces_has_the_same_sentences(size: int) -> None:
    taken = Sentences()
    found = [
        one for at in range(0, len(ANSWER), size) for one in taken.feed(ANSWER[at : at + size])
    ]
    found += taken.end()
    assert "".join(one.text for one in found) == ANSWER
    assert [one.spoken for one in found if one.spoken] == [
        "The answer",
        "Dr. Smith walks at five kilometers per hour, e.g. at three point five kilometers.",
        "It is warm!",
        "See the docs.",
        "one: Take x",
        "a, b",
        "one gigabyte, twenty percent",
        "The end",
    ]


def test_a_sentence_without_an_end_is_cut() -> None:
    taken = Sentences()
    found = [*taken.feed("word, " * 200), *taken.end()]
    assert "".join(one.text for one in found) == "word, " * 200
    assert max(len(one.text) for one in found) <= LONGEST
    assert len([*Sentences().feed("x" * 10_000)]) == 10_000 // LONGEST


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-5 °C", "minus five degrees Celsius"),
        ("1 km, 2 km", "one kilometer, two kilometers"),
        ("in 1999", "in nineteen ninety-nine"),
        (
            "1,999 of 2500000",
            "one thousand, nine hundred and ninety-nine of two million, five hundred thousand",
        ),
        ("007", "zero zero seven"),
        ("9" * 20, ", ".join(["nine nine nine nine"] * 5)),
        ("at 12:30 on 2026-12-01, v1.2.3, $3.50", "at 12:30 on 2026-12-01, v1.2.3, $3.50"),
        ("https://www.example.org/a?b=c.", "example dot org."),
        ("me@example.org", "me at example dot org"),
        ("a ≈ b & c", "a about b and c"),
        ("snake_case and 2*3", "snake case and two three"),
        ("😀 <b>Hm</b>", "Hm"),
        ("---", ""),
        ("- [x] ~~done~~", "done"),
        ("", ""),
    ],
)
def test_what_is_said(text: str, said: str) -> None:
    assert speakable(text) == said


def test_numbers_of_another_language() -> None:
    assert speakable("21 Katzen, 5 km", "de") == "einundzwanzig Katzen, fünf km"


def test_a_voice_speaks_sentence_by_sentence(voice: Voice) -> None:
    first, second = voice.say("Good morning. How are you today?")
    assert (voice.sample_rate, str(first.dtype), first.ndim) == (24_000, "float32", 1)
    assert 0.5 < len(first) / 24_000 < 2
    assert 0.05 < np.abs(first).max() <= 1
    assert np.array_equal(first, next(iter(voice.say("Good morning."))))
    (slow,) = voice.say("Good morning.", 0.5)
    assert 1.6 < len(slow) / len(first) < 2.4
    assert list(voice.say("```\ncode\n```\n---\n")) == []
    assert len(second) > len(first)


@pytest.mark.parametrize("speed", [0.1, 9.0, float("nan")])
def test_a_speed_out_of_bounds_is_refused(voice: Voice, speed: float) -> None:
    with pytest.raises(RequestError, match=r"expected 0\.25 to 4"):
        next(iter(voice.say("Hello.", speed)))


def test_languages_without_a_voice_are_refused(voice: Voice) -> None:
    check_language(voice, "Hello.", "en-GB")
    check_language(voice, "It says 'Привет'.")
    check_language(voice, "12:30")
    with pytest.raises(LanguageError, match="no voice here speaks 'de'; heart speaks 'en'"):
        check_language(voice, "Guten Tag.", "de")
    with pytest.raises(LanguageError, match="most of its letters are Cyrillic"):
        check_language(voice, "Привет, Ana")


def test_voices_that_are_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HIBARI_HOME", str(tmp_path))
    with pytest.raises(RequestError, match=r"emma is not on this machine; .*--voice emma"):
        Voices().get("emma")
    with pytest.raises(RequestError, match="no voice '/etc/passwd' here; known are heart"):
        Voices().get("/etc/passwd")
    monkeypatch.setattr(speech, "installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'mico-chat\[speech\]'"):
        Voices().get()


@pytest.mark.parametrize("form", ["mp3", "opus", "aac", "flac", "wav"])
def test_a_file_is_written_while_it_is_spoken(form: SoundFormat) -> None:
    tone = 0.5 * np.sin(np.arange(24_000) * 0.05, dtype=np.float32)
    taken: list[int] = []

    def chunks() -> object:
        for number in range(4):
            taken.append(number)
            yield tone

    file = encoded(chunks(), 24_000, form)  # type: ignore[arg-type]
    pieces = [next(file)]
    assert (taken, bool(pieces[0])) == ([0], True)
    pieces += file
    with av.open(io.BytesIO(b"".join(pieces)), "r") as container:
        frames = list(container.decode(audio=0))
    samples = np.concatenate([one.to_ndarray().mean(axis=0) for one in frames])
    assert len(samples) / frames[0].sample_rate == pytest.approx(4, abs=0.15)


def test_raw_samples() -> None:
    chunk = np.array([0.0, 1.0, -2.0], np.float32)
    assert b"".join(encoded([chunk], 24_000, "pcm")) == b"\x00\x00\xff\x7f\x01\x80"


def test_voices_are_imported_when_they_speak() -> None:
    code = "import sys, mico_chat.speech; print({'av', 'hibari', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_long_sentence_leaves_no_memory() -> None:
    code = """
import psutil
from mico_chat.speech import Voices
from mico_chat.system import give_back_memory

voice = Voices().get()
used = []
for n_words in (2, 60, 2):
    list(voice.say("bird " * n_words))
    give_back_memory()
    used.append(psutil.Process().memory_info().rss)
print(used[2] - used[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30 << 20
