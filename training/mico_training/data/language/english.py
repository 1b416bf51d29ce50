"""English nouns: articles and plurals, numbers and lists. ``nouns.yaml`` holds the words."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mico_training.data.table import Table

T = TypeVar("T")
Rng = np.random.Generator


class Nouns(Table):
    numbers: tuple[str, ...]
    colours: frozenset[str]
    singular_in_s: frozenset[str]
    mass: frozenset[str]
    plurals: dict[str, str]


nouns = Nouns.reader(Path(__file__).with_name("nouns.yaml"))


def number_word(n: int) -> str:
    return nouns().numbers[n]


def counts(most: int) -> tuple[str, ...]:
    """The choices of a question that asks how many: "one" to ``most``."""
    return nouns().numbers[1 : most + 1]


def _head(name: str) -> str:
    """The noun that decides between singular and plural: "cup of coffee" -> "cup"."""
    return name.partition(" of ")[0].split()[-1]


def is_plural(name: str) -> bool:
    """Whether ``name`` takes "are" and no article ("scissors")."""
    noun = _head(name)
    singular = noun.endswith(("ss", "us", "is")) or noun in nouns().singular_in_s
    return noun.endswith("s") and not singular


def countable(name: str) -> bool:
    """Whether "three NAMEs" is English: ``name`` is no mass noun and no plural."""
    return _head(name) not in nouns().mass and not is_plural(name)


def article(phrase: str) -> str:
    """``phrase`` with its indefinite article: "an apple", "a red apple", "scissors", "bread"."""
    if not countable(phrase):
        return phrase
    first = phrase.split()[0].lower()
    silent_h = r"hour|honest|heir"
    spoken_with_y_or_w = r"uni|eu|ukulele|uten|usb|one|ufo"
    vowel = re.match(rf"{silent_h}|(?!{spoken_with_y_or_w})[aeiou]", first)
    return f"{'an' if vowel else 'a'} {phrase}"


def plural(name: str) -> str:
    """The plural of a noun phrase: "toy car" -> "toy cars"."""
    if is_plural(name):
        return name
    if " of " in name:  # "cups of coffee"
        counted, _, rest = name.partition(" of ")
        return f"{plural(counted)} of {rest}"
    *before, noun = name.split()
    if noun in nouns().plurals:
        many = nouns().plurals[noun]
    elif noun.endswith("fish"):
        many = noun
    elif noun.endswith("man") and noun not in ("human", "caiman", "walkman"):
        many = noun[:-3] + "men"
    elif re.search(r"(s|x|z|ch|sh)$", noun):
        many = noun + "es"
    elif re.search(r"[^aeiou]y$", noun):
        many = noun[:-1] + "ies"
    else:
        many = noun + "s"
    return " ".join([*before, many])


def agreement(subject: str) -> dict[str, str]:
    """The words of a template that depend on the number of ``subject``."""
    if is_plural(subject):
        return {"is": "are", "does": "do", "it": "they", "its": "their", "this": "these", "s": ""}
    return {word: word for word in ("is", "does", "it", "its", "this", "s")}


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def answer_of(name: str) -> str:
    """What something is, as an answer: "A pear."; a name with a capital is one's own: "Bella."."""
    return sentence(name if name[:1].isupper() else article(name))


def listed(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if phrases[1:] else phrases)


def pick(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def shuffled(rng: Rng, *options: str) -> tuple[str, ...]:
    return tuple(options[int(i)] for i in rng.permutation(len(options)))
