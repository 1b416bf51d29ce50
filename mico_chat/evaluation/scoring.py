"""Is a free answer right? Whole words, whatever stands around them."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SPELLINGS = {"gray": "grey", "nearer": "closer", "further": "farther", "color": "colour"}
"""Words that say the same; both sides of a comparison are brought to one form."""


def words(text: str) -> list[str]:
    """Lower-case words, numbers spelled out, one spelling: ``"2 Gray cats!"`` -> two grey cats."""
    found = re.findall(r"[a-z]+|\d+", text.lower())
    spelled = [NUMBERS[int(w)] if w.isdigit() and int(w) <= 10 else w for w in found]
    return [SPELLINGS.get(word, word) for word in spelled]


def singular(word: str) -> str:
    """A word without its plural ending, so that "dogs" says "dog"."""
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def position(answer: str, phrase: str) -> int | None:
    """Where ``answer`` says ``phrase`` as whole words, singular or plural; None if it does not."""
    said, sought = [singular(w) for w in words(answer)], [singular(w) for w in words(phrase)]
    for start in range(len(said) - len(sought) + 1):
        if sought and said[start : start + len(sought)] == sought:
            return start
    return None


def is_right(answer: str, accept: Sequence[str], choices: Sequence[str] = ()) -> bool:
    """Whether an answer says something accepted, and before any choice that is not."""
    places = [place for text in accept if (place := position(answer, text)) is not None]
    if not places:
        return False
    wrong = [text for text in choices if text not in accept]
    return not any(
        (place := position(answer, text)) is not None and place < min(places) for text in wrong
    )
