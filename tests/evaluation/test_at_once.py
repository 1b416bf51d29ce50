"""Requests side by side: nothing that came back is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from mico_chat.evaluation.at_once import at_once


def test_what_was_under_way_is_given_before_a_failure() -> None:
    failed = threading.Event()

    def ask(number: int) -> int:
        if number == 3:
            failed.set()
            raise ValueError("no more")
        if number == 2:  # still under way when its neighbour fails
            assert failed.wait(10)
        return number * number

    kept: list[tuple[str, int]] = []
    with pytest.raises(ValueError, match="no more"):
        kept.extend(at_once(ask, ((f"n{n}", n) for n in range(100)), 2))
    assert sorted(kept) == [("n0", 0), ("n1", 1), ("n2", 4)]


def test_no_more_than_so_many_are_taken_at_a_time() -> None:
    taken = []

    def numbered() -> Iterator[tuple[int, int]]:
        for n in range(20):
            taken.append(n)
            yield n, n

    for done, _ in enumerate(at_once(lambda n: n, numbered(), 4), 1):
        assert len(taken) - done < 4
    assert len(taken) == 20
