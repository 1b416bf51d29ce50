"""Texts as a voice reads them: by the sentence, without markup, numbers and units in words.

Answers of models are Markdown. Read aloud as it stands, a voice would say "asterisk asterisk".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from typing import NamedTuple

LONGEST = 300
"""Most characters of a sentence: a longer one is cut at a comma or a space, so that its sound can
begin before all of it has been made."""

_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*_]*(?=\s)|[\u3002\uff01\uff1f]|\n")
_SHORT = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Z]|\d{1,2}|[Dd]r|[Mm]rs?|Ms|Prof|St|[Nn]o|vs|etc|approx|e\.g|i\.e|cf|Fig)\.$"
)
"""Beginnings of sentences that end with a full stop and go on: a title, an initial, a number of a
list."""
_FENCE = re.compile(r"\s*(```+|~~~+)")


class Sentence(NamedTuple):
    """A sentence as it was written, with what stands around it, and what a voice says of it."""

    text: str
    spoken: str


class Sentences:
    """Takes an answer in pieces; gives each sentence as soon as it is whole.

    Code blocks are not read aloud: they are sentences of which nothing is spoken. The texts of all
    sentences together are the answer.
    """

    def __init__(self, language: str = "en") -> None:
        self._language, self._text = language, ""

    def feed(self, piece: str) -> Iterator[Sentence]:
        self._text += piece
        while end := self._whole():
            yield self._cut(end)

    def end(self) -> Iterator[Sentence]:
        """The last sentence, which nothing follows."""
        if self._text:
            yield self._cut(len(self._text))

    def _cut(self, end: int) -> Sentence:
        text, self._text = self._text[:end], self._text[end:]
        return Sentence(text, "" if _FENCE.match(text) else speakable(text, self._language))

    def _whole(self) -> int:
        """Where the first sentence ends, 0 while that is unknown."""
        text = self._text
        if fence := _FENCE.match(text):
            closing = re.compile(rf"\n\s*{re.escape(fence[1])}[ \t]*\n").search(text, fence.end())
            return closing.end() if closing else 0
        for found in _END.finditer(text, len(text) - len(text.lstrip())):
            if found.end() > LONGEST:
                break
            if found[0] == "\n" or not _SHORT.search(text[: found.end()]):
                return found.end()
        if len(text) <= LONGEST:
            return 0
        cut = max(text.rfind(mark, 0, LONGEST) for mark in (", ", "; ", ": "))
        cut = cut if cut > LONGEST // 4 else text.rfind(" ", 0, LONGEST)
        return cut + 1 if cut > 0 else LONGEST


def sentences(text: str, language: str = "en") -> Iterator[Sentence]:
    """The sentences of a whole text of which something is spoken."""
    found = Sentences(language)
    yield from (one for part in (found.feed(text), found.end()) for one in part if one.spoken)


# --- The words of a sentence ---

_MARKUP: tuple[tuple[str, str], ...] = (
    (r"^\s*\|?[\s:|-]*-{3,}[\s:|-]*$", ""),  # a rule, or the line below a table's head
    (r"^\s*(?:[*_]\s*){3,}$", ""),
    (r"!?\[([^\]]*)\]\([^)\s]*(?:\s[^)]*)?\)", r"\1"),  # a picture's or link's own words
    (r"</?[A-Za-z][^<>]*>", " "),
    (r"^\s*(?:>\s?)+", ""),
    (r"^\s*#{1,6}\s+", ""),
    (r"^\s*[-*+\u2022]\s+(?:\[[ xX]\]\s+)?", ""),
    (r"^\s*(\d{1,3})[.)]\s+", r"\1: "),
    (r"`+([^`]*)`+", r"\1"),
    (r"(\*\*\*|\*\*|\*|~~)(?=\S)(.+?)(?<=\S)\1", r"\2"),
    (r"(?<!\w)(__|_)(?=\S)(.+?)(?<=\S)\1(?!\w)", r"\2"),
)
_PATTERNS = [(re.compile(pattern), put) for pattern, put in _MARKUP]
_TABLE = re.compile(r"^\s*\|(.*)\|\s*$")
_ADDRESS = re.compile(
    r"(?:https?://|www\.)([\w-]+(?:\.[\w-]+)*)[^\s)>\"']*(?<![.,;:!?])|[\w.+-]+@[\w-]+(?:\.\w+)+"
)

_SYMBOLS = {
    **{"\u2248": "about", "\u2264": "at most", "\u2265": "at least", "\u00d7": "times"},
    **{"\u00f7": "divided by", "\u00b1": "plus or minus", "\u2192": "to", "\u2260": "is not"},
    **{"&": "and", "=": "equals"},
}
_UNITS = {
    **{"km": "kilometer", "cm": "centimeter", "mm": "millimeter", "m": "meter"},
    **{"kg": "kilogram", "mg": "milligram", "g": "gram", "lb": "pound", "ml": "milliliter"},
    **{"L": "liter", "l": "liter", "ms": "millisecond", "s": "second", "min": "minute"},
    **{"h": "hour", "TB": "terabyte", "GB": "gigabyte", "MB": "megabyte", "kB": "kilobyte"},
    **{"KB": "kilobyte", "GiB": "gibibyte", "MiB": "mebibyte", "W": "watt", "kW": "kilowatt"},
    **{"V": "volt", "mA": "milliampere", "px": "pixel", "dB": "decibel", "GHz": "gigahertz"},
    **{"MHz": "megahertz", "kHz": "kilohertz", "Hz": "hertz", "kWh": "kilowatt hour"},
    **{"fps": "frame per second", "mph": "mile per hour", "km/h": "kilometer per hour"},
    **{"m/s": "meter per second", "Mbit/s": "megabit per second", "m\u00b2": "square meter"},
    **{"GB/s": "gigabyte per second", "MB/s": "megabyte per second", "m\u00b3": "cubic meter"},
    **{"\u00b0C": "degree Celsius", "\u00b0F": "degree Fahrenheit", "\u00b0": "degree"},
    **{"%": "percent"},
}
_UNCHANGED = ("hertz", "percent")  # in the plural
_NUMBER = re.compile(
    r"(?<![\w.,:/$\u00a3\u20ac\u00a5+-])([-\u2212]?)(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?"
    rf"(?:\s?({'|'.join(sorted(map(re.escape, _UNITS), key=len, reverse=True))}))?"
    r"(?!\w|[:/.,-]\d|\.\w|\s?\u00b0)"
)
"""Dates, times, sums of money and versions are left as they are: voices read them."""
LONGEST_NUMBER = 15  # digits; one that is longer is read digit by digit


def speakable(text: str, language: str = "en") -> str:
    """What a voice says of one line of Markdown; empty where nothing can be said.

    Numbers are put into the words of ``language``; units and signs into English ones alone.
    """
    if row := _TABLE.match(text):
        text = (
            row[1] if set(row[1]) <= set(" :|-") else ", ".join(map(str.strip, row[1].split("|")))
        )
    for pattern, put in _PATTERNS:
        text = pattern.sub(put, text)
    text = _ADDRESS.sub(lambda found: _address(found[1] or found[0]), text)
    text = _NUMBER.sub(lambda found: _number(found, language), text)
    if language == "en":
        text = "".join(f" {_SYMBOLS[one]} " if one in _SYMBOLS else one for one in text)
    text = "".join(one for one in text if unicodedata.category(one) not in ("So", "Sk", "Cs", "Co"))
    text = re.sub(r"[*_~#|<>{}\\^\[\]`]+|\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?])", r"\1", text).strip()
    return text if any(one.isalnum() for one in text) else ""


def _address(name: str) -> str:
    return name.removeprefix("www.").replace("@", " at ").replace(".", " dot ")


def _number(found: re.Match[str], language: str) -> str:
    from num2words import num2words

    sign, whole, decimals, unit = found.groups()
    digits = whole.replace(",", "")
    value = Decimal(f"{'-' if sign else ''}{digits}{decimals or ''}")
    try:
        if len(digits) > LONGEST_NUMBER or (len(digits) > 1 and digits[0] == "0"):
            words = [num2words(int(digit), lang=language) for digit in digits]
            said = ", ".join(" ".join(words[at : at + 4]) for at in range(0, len(words), 4))
        elif not (sign or decimals or unit) and len(whole) == 4 and 1100 <= value < 2100:
            said = num2words(int(value), to="year", lang=language)
        else:
            said = num2words(value if decimals else int(value), lang=language)
    except NotImplementedError:  # it does not know the language: the voice may
        return found[0]
    if unit is None or language != "en":
        return said + ("" if unit is None else f" {unit}")
    return f"{said} {_UNITS[unit] if abs(value) == 1 else _plural(_UNITS[unit])}"


def _plural(unit: str) -> str:
    if unit.endswith(_UNCHANGED):
        return unit
    first, space, rest = unit.partition(" ")
    return f"{first}s{space}{rest}" if rest.startswith(("per", "C", "F")) else f"{unit}s"
