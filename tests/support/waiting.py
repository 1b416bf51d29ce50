"""Tests wait for progress, not for a time: a busy machine may be ten times slower than an idle."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

PATIENCE_S = 900
"""Seconds after which a wait for what never comes fails; no step takes nearly as long."""

Found = TypeVar("Found")


def until(
    look: Callable[[], Found], alive: Callable[[], object] = lambda: True, pause_s: float = 0.01
) -> Found:
    """Look until something true is found; give up at once when what makes it is not alive."""
    ends = time.monotonic() + PATIENCE_S
    while not (found := look()):
        _go_on(ends, alive)
        time.sleep(pause_s)
    return found


async def until_it(
    look: Callable[[], Found], alive: Callable[[], object] = lambda: True, pause_s: float = 0.005
) -> Found:
    """:func:`until`, while the event loop goes on."""
    ends = time.monotonic() + PATIENCE_S
    while not (found := look()):
        _go_on(ends, alive)
        await asyncio.sleep(pause_s)
    return found


class Jumping(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer when all tasks wait. No thread may be at work."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        timers = [t.when() for t in self._scheduled if not t.cancelled()]  # type: ignore[attr-defined]
        if timers and not self._ready:  # type: ignore[attr-defined]
            self.now = max(self.now, min(timers))
        super()._run_once()  # type: ignore[misc]


def jumped(work: Coroutine[Any, Any, Found]) -> tuple[Found, float]:
    """What the work returns, and the seconds that it would take; they are not waited for."""
    with asyncio.Runner(loop_factory=Jumping) as runner:
        found = runner.run(work)
        return found, runner.get_loop().time()


def _go_on(ends: float, alive: Callable[[], object]) -> None:
    if not alive():
        pytest.fail("what should have made it has ended")
    if time.monotonic() > ends:
        pytest.fail(f"it has not come within {PATIENCE_S} s")
