"""Which answers about media are unsure: those of a low confidence, for each kind of answer.

A model is surer of "Yes." than of a name without being right more often, so one mark for all says
little. The words of an answer tell its kind.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from mico_chat.errors import RequestError

NAMES = ""
"""The kind of an answer that is none of the others: its pattern fits every text."""
KINDS = {
    "yes": r"^yes\b",
    "no": r"^no\b",
    "number": r"^(i see |there (is|are) )?(\d+|one|two|three|four|five|six|seven|eight|nine|ten)\b",
    "colour": r"\b(red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ea]y)\W*$",
    "place": r"\b(left|right|above|below|top|bottom|middle|up|down|nearer|farther)\b",
    "name": NAMES,
}
"""Kinds of answers, by a pattern of theirs: the first that an answer has is its kind."""


@dataclass(frozen=True)
class Marks:
    """``below``: pattern -> the confidence below which an answer that has it is unsure."""

    below: Mapping[str, float]

    @classmethod
    def read(cls, value: Any) -> Self:
        """From ``unsure_below``: a confidence for all answers, or one for each pattern.

        Raises:
            RequestError: it is neither, or a pattern is no regular expression.
        """
        below = value if isinstance(value, dict) else {NAMES: value}
        for pattern, least in below.items():
            if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least <= 1:
                said = f"expected a confidence of 0 to 1, got {least!r}"
                raise RequestError.at("unsure_below", f"{pattern}: {said}" if pattern else said)
            try:
                re.compile(pattern)
            except re.error as error:
                said = f"{pattern!r} is no regular expression: {error}"
                raise RequestError.at("unsure_below", said) from error
        return cls({pattern: float(least) for pattern, least in below.items()})

    def unsure(self, answer: str, confidence: float) -> bool:
        """Whether an answer is below the mark of its kind; one of no kind is not."""
        pattern = kind_of(answer, self.below)
        return pattern is not None and confidence < self.below[pattern]


def kind_of(answer: str, patterns: Iterable[str]) -> str | None:
    """The first of the patterns that an answer has."""
    said = answer.strip()
    return next((p for p in patterns if re.search(p, said, re.IGNORECASE)), None)
