"""What a metric says of a set of items: one figure, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from typing import Self

from mico_chat.errors import DataError


@dataclass(frozen=True)
class Score:
    """``mean`` over items, and ``each`` item's own figure by its id, in the order they came."""

    mean: float
    each: dict[str, float]

    @classmethod
    def over(cls, each: Mapping[str, float], what: str) -> Self:
        """The score of these items.

        Raises:
            DataError: there are none; ``what`` names what should have been scored.
        """
        if not each:
            raise DataError(what, None, "no item to score")
        return cls(fsum(each.values()) / len(each), dict(each))
