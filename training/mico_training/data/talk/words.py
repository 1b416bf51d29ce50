"""Drawn words in pictures, clips and sounds, and conversations about them.

Real texts and speech are recognised, and stand in the prompt behind their medium. The language
model has to learn to repeat them exactly, for which drawn words are enough: the medium itself
need not hold them. ``words.yaml`` has the words and the conversations.
"""

import re
from collections.abc import Callable
from pathlib import Path
from string import capwords
from typing import Any, Literal

import numpy as np
import yaml

from mico_chat.media import Kind
from mico_chat.media.medium import SpokenText, Words, WrittenText
from mico_training.data.language.english import Rng, article, countable, is_plural, pick, plural
from mico_training.data.language.plain import TABLE as PLAIN_NAMES

Way = Literal["written", "spoken"]

WAYS: dict[Kind, Way] = {"image": "written", "audio": "spoken", "video": "written"}
"""It says how a medium holds words. The data engine's clips have no sound track."""

CASES, SHARES = ("asked", "nothing", "heard", "own"), (0.55, 0.15, 0.1, 0.2)
"""The user asks for the words; asks, but there are none; asks what there is to hear, if the words
are spoken (otherwise for the words); the example's own turns, which the words do not change."""

MOST_SPOKEN = 25  # words
CASINGS: tuple[Callable[[str], str], ...] = (str.upper, str.upper, capwords, str.lower, str)
NOTE_SHARE = 0.2  # of what is written; the rest are signs
MISREAD = 0.15  # of the lines

TEXT_TURNS = Path(__file__).parents[1] / "language/text_turns.yaml"


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


PROMPTS = _read(Path(__file__).with_name("words.yaml"))


def _text_words() -> dict[str, list[str]]:
    """The texts of each gap, with nouns and other words that the data engine has already."""
    turns = _read(TEXT_TURNS)
    nouns = [
        noun
        for noun in dict.fromkeys([*turns["thing"], *_read(PLAIN_NAMES)])
        if not is_plural(noun)
    ]
    text: dict[str, list[str]] = PROMPTS["text"]
    return {
        **turns,
        "other": turns["thing"],
        "one": [article(thing) for thing in turns["thing"]],
        "noun": nouns,
        "nouns": [plural(noun) for noun in nouns if countable(noun)],
        "request": [*turns["templates"], *turns["plain"]],
        "a": text["count"],
        "b": text["count"],
        **text,
    }


TEXT = _text_words()


def drawn_text(gap: str, generator: Rng) -> str:
    """A text for a gap of the templates, with its own gaps filled; a capital asks for one."""
    name = gap[0].lower() + gap[1:]
    template = pick(generator, TEXT[name])
    text = re.sub(r"\{(\w+)\}", lambda found: drawn_text(found[1], generator), template)
    return text if gap == name else text[0].upper() + text[1:]


def written_lines(generator: Rng, time: float | None) -> tuple[WrittenText, ...]:
    """One to three lines of a sign, or the lines of a note, one below the other."""
    if generator.random() < NOTE_SHARE:
        words = f"{drawn_text('sentence', generator)} {drawn_text('sentence', generator)}".split()
        width = int(generator.integers(3, 7))
        lines = [" ".join(words[at : at + width]) for at in range(0, min(len(words), 20), width)]
    else:
        shaped = pick(generator, CASINGS)
        n_lines = pick(generator, (1, 1, 1, 1, 2, 2, 3))
        lines = [shaped(drawn_text("sign", generator)) for _ in range(n_lines)]
    edges = np.linspace(0.2, 0.8, len(lines) + 1).round(4).tolist()
    return tuple(
        WrittenText(
            text=_misread(line, generator) if generator.random() < MISREAD else line,
            box=(0.2, top, 0.8, bottom),
            confidence=0.98,
            time=time,
        )
        for line, top, bottom in zip(lines, edges[:-1], edges[1:], strict=True)
    )


LOOK_ALIKE = {
    **{"o": "0", "O": "0", "0": "O", "l": "I", "I": "l", "1": "l", "S": "5", "5": "S", "s": "5"},
    **{"B": "8", "8": "B", "Z": "2", "2": "Z", "G": "6", "D": "0", "e": "c", "c": "e", "u": "v"},
    **{"v": "u", "n": "h", "h": "n", "i": "j", "t": "f"},
}


def _misread(line: str, generator: Rng) -> str:
    """The line as a recogniser reads it wrongly: a space or a letter is lost or is another."""
    at = int(generator.integers(len(line)))
    other = LOOK_ALIKE.get(line[at], "")
    return " ".join(f"{line[:at]}{other}{line[at + 1 :]}".split()) or line


def spoken_sentences(generator: Rng) -> tuple[SpokenText, ...]:
    """One to three sentences, of at most 25 words together if there are several."""
    said: list[SpokenText] = []
    start = 0.5
    n_words = 0
    for _ in range(pick(generator, (1, 1, 1, 2, 3))):
        text = drawn_text("sentence", generator)
        n_words += len(text.split())
        if said and n_words > MOST_SPOKEN:
            break
        end = round(start + 0.4 * len(text.split()), 2)
        said.append(SpokenText(text=text, start=start, end=end, confidence=0.8))
        start = end
    return tuple(said)


def drawn_words(generator: Rng, way: Way, kind: Kind) -> Words:
    if way == "written":
        return Words(written=written_lines(generator, 0.0 if kind == "video" else None))
    return Words(spoken=spoken_sentences(generator))


def words_turn(
    generator: Rng, sort: str, kind: Kind, words: Words, which: str = ""
) -> tuple[str, str]:
    """A question about the words in a medium, ``which`` is "" or "first ", and the answer."""
    said = " ".join(one.text for one in (words.written or ()) + (words.spoken or ()))
    prompts = PROMPTS[sort]
    named = which + pick(generator, PROMPTS["media"][kind])
    gaps = {"medium": named, "said": f'"{said}"'}
    question = pick(generator, prompts["questions"]).format(**gaps)
    answer = pick(generator, prompts["answers" if said else "nothing"]).format(**gaps)
    if said.endswith((".", "!", "?")):
        answer = answer.removesuffix(".")  # one full stop is enough
    return question, answer
