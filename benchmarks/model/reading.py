"""How well printed words and speech are recognised, and repeated by the model.

Signs of one to three words, of the real items' names, are drawn in several sizes and colours;
espeak-ng says plain questions. No training text is among them.
"""

import random
import tempfile
import wave
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.harness import Report
from mico_chat.engine.base import GenerationOptions
from mico_chat.evaluation.metrics.answers import normal_words
from mico_chat.evaluation.task import read_items
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.messages import Message
from mico_world.sounds.recordings import _speak

SIGNS, SENTENCES = 100, 30
VOICES = ("en-us", "en-us+f3", "en-us+m3")
CASES = (str.upper, str.title, str.lower)


def draw(rng: random.Random, text: str, path: Path) -> None:
    """A sign, one or two lines, somewhere in a picture of one colour."""
    ground = tuple(rng.randint(0, 255) for _ in range(3))
    ink = "white" if sum(ground) < 380 else "black"
    picture = Image.new("RGB", (640, 480), ground)
    words = text.split()
    shown = text if len(words) < 3 else " ".join(words[:2]) + "\n" + " ".join(words[2:])
    font = ImageFont.load_default(rng.randint(28, 60))
    written = ImageDraw.Draw(picture)
    size = written.multiline_textbbox((0, 0), shown, font=font)
    place = (rng.randint(5, max(5, 630 - int(size[2]))), rng.randint(5, 470 - int(size[3])))
    written.multiline_text(place, shown, fill=ink, font=font)
    picture.save(path)


def say(text: str, voice: str, path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((_speak(voice, text) * 32_000).astype(np.int16).tobytes())


def word_errors(said: str, heard: str) -> int:
    """The least number of words to insert, leave out or replace (Levenshtein)."""
    a, b = normal_words(said), normal_words(heard)
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def measure(
    model: str = "mini",
    items: Path = Path("data/real/items.jsonl"),
    questions: Path = Path("mico_chat/evaluation/text.jsonl"),
) -> Report:
    rng = random.Random(0)
    names = [item.answers[0] for item in read_items(items) if item.skill == "real photographs"]
    names = list(dict.fromkeys(names))
    printed = [
        rng.choice(CASES)(" ".join(rng.sample(names, rng.randint(1, 3)))) for _ in range(SIGNS)
    ]
    spoken = [item.question for item in read_items(questions)][:SENTENCES]
    options = GenerationOptions.of({"max_tokens": 48, "temperature": 0})
    with (
        tempfile.TemporaryDirectory() as folder,
        MediaDecoder() as decoder,
        closing(load_assistant(model, decoder, EngineOptions())) as assistant,
    ):
        asked = []
        for number, text in enumerate(printed):
            draw(rng, text, Path(folder) / f"{number}.png")
            sign = MediaFile("image", f"{folder}/{number}.png")
            asked.append([Message.user(sign, "What does the sign say?")])
        for number, text in enumerate(spoken):
            say(text, VOICES[number % len(VOICES)], Path(folder) / f"{number}.wav")
            voice = MediaFile("audio", f"{folder}/{number}.wav")
            asked.append([Message.user(voice, "What is said?")])
        answers = assistant.answer_all(asked, options)
    n = len(printed)
    replies = [answer.text for answer in answers]
    found = [
        " ".join(one.text.strip() for report in answer.media for one in report.written or ())
        for answer in answers[:n]
    ]
    heard = [
        " ".join(one.text for report in answer.media for one in report.spoken or ())
        for answer in answers[n:]
    ]
    exact = sum(a == b for a, b in zip(printed, found, strict=True))
    repeated = sum(a in b for a, b in zip(printed, replies, strict=False))
    words = sum(len(normal_words(text)) for text in spoken)
    errors = sum(map(word_errors, spoken, heard))
    said = sum(
        " ".join(normal_words(a)) in " ".join(normal_words(b))
        for a, b in zip(heard, replies[n:], strict=True)
    )
    rows = [
        ["signs recognised exactly", f"{exact} of {len(printed)}"],
        ["signs repeated exactly", f"{repeated} of {len(printed)}"],
        ["word error of speech", f"{errors / words:.1%} ({errors} of {words})"],
        ["recognised speech repeated", f"{said} of {len(spoken)}"],
    ]
    return Report({"rows": rows})
