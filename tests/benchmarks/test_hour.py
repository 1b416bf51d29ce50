"""The verdict over an hour of load is that of a line, with the scatter taken into account."""

import numpy as np
import pytest

from benchmarks.service.users import MAY_RISE, Seen, by_minute, drift, lines_of

TIMES = [float(minute) for minute in range(60)]


def scattered(rise: float, scatter: float) -> list[float]:
    """About 100, with a rise of ``rise`` in all."""
    noise = np.random.default_rng(0).normal(0, scatter, len(TIMES))
    return [100 + 100 * rise * (t / 59 - 0.5) + e for t, e in zip(TIMES, noise, strict=True)]


@pytest.mark.parametrize(
    ("rise", "scatter", "verdict"),
    [
        (0.0, 1.0, "does not rise"),
        (0.02, 1.0, "does not rise"),
        (-0.3, 1.0, "does not rise"),
        (0.2, 1.0, "rises"),
        (0.2, 0.0, "rises"),
        (-0.2, 30.0, "cannot be told"),
        (0.05, 30.0, "cannot be told"),
    ],
)
def test_the_verdict(rise: float, scatter: float, verdict: str) -> None:
    line = drift(TIMES, scattered(rise, scatter))
    assert line.verdict(0.05) == verdict
    if not scatter:
        assert line.rise == pytest.approx(rise)


def test_the_time_in_which_caches_fill_does_not_count() -> None:
    warming = [50.0] * 6 + [100.0] * 54
    found = {"minute": TIMES, **dict.fromkeys(MAY_RISE, warming)}
    rows, ratios = lines_of(found, 6.0)
    assert [row[-1] for row in rows] == ["does not rise"] * 3
    assert [one.holds for one in ratios] == [True] * 3
    rows, ratios = lines_of(found, 0.0)
    assert [row[-1] for row in rows] == ["rises"] * 3
    assert [one.holds for one in ratios] == [False] * 3


def test_each_minute_has_its_own_memory_and_latency() -> None:
    seen = Seen(seconds=1800.0)
    seen.answers = [(10.0, 0.1, 1.0, 8), (20.0, 0.1, 3.0, 8), (70.0, 0.1, 5.0, 8)]
    seen.memory = [(5.0, 1e9), (50.0, 2e9), (65.0, 3e9), (130.0, 9e9)]
    found = by_minute(seen)
    assert found["minute"] == [0.5, 1.5]  # nobody answered in the third
    assert found["memory, MB"] == [2000.0, 3000.0]
    assert found["p50, s"] == [2.0, 5.0]
