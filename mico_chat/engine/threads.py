"""How many threads compute a step: as many as have a core of their own just now.

The threads of llama.cpp wait for each other some hundred times a step, and spin meanwhile. Where
another program takes a core from one of them, all wait for its turn: beside one busy program, two
threads on two cores need seconds for a step that takes 8 ms. One thread waits for nobody. So the
number follows what other programs leave free, and a step that lasts much longer than such steps
usually do is given up and computed with fewer threads.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mico_chat.engine.cores import FreeCores, free_cores


class Threads:
    """The number of threads for each step of a model.

    Args:
        fixed: a number that never changes.
        free: cores that other programs leave free.
        clock: seconds.
    """

    SLOW = 3.0
    """A step of several threads may last so many times its usual time."""

    SLACK_S = 0.01
    """And so much longer: one turn of another program."""

    FORGET = 0.99
    """What is left of the usual time of more threads, after each step with fewer."""

    HOLD_S = (0.1, 16.0)
    """Seconds for which fewer threads are used after a step was given up: the first time, and at
    the most. They double each time, until more threads have computed ``WELL`` steps to the end."""

    WELL = 30

    def __init__(
        self,
        fixed: int | None = None,
        *,
        free: FreeCores | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = fixed
        self._free = free or free_cores()
        self._clock = clock
        self._usual: dict[tuple[int, int], float] = {}  # seconds by size and threads
        self._held_at = 1
        self._held_until = -float("inf")
        self._hold_s = self.HOLD_S[0] / 2
        self._well = 0

    def number(self, tokens: int) -> int:
        """Threads for a step of so many tokens."""
        if self._fixed is not None:
            return self._fixed
        most = self._free()
        if self._clock() < self._held_until:
            most = min(most, self._held_at)
        usual = {n: s for (size, n), s in self._usual.items() if size == _size(tokens)}
        faster = [n for n, s in usual.items() if n < most and s < usual.get(most, 0.0)]
        return min(faster, key=usual.__getitem__, default=most)

    def limit(self, tokens: int, threads: int) -> float | None:
        """Seconds after which a step is to be given up; None for one that must run to its end."""
        if threads in (1, self._fixed):
            return None
        size = _size(tokens)
        usual = self._usual.get((size, threads))
        # Not seen yet: no longer than fewer threads take, or than a step of another size, scaled.
        if usual is None:
            bounds = [
                seconds * max(1.0, tokens / 2**other)
                for (other, n), seconds in self._usual.items()
                if n <= threads
            ]
            usual = min(bounds, default=float("inf"))
        return self.SLOW * usual + self.SLACK_S

    def observe(self, tokens: int, threads: int, seconds: float, *, given_up: bool = False) -> None:
        """A step lasted so long; if it was given up, fewer threads are used for a while."""
        size = _size(tokens)
        usual = self._usual.get((size, threads), seconds)
        self._usual[size, threads] = 0.7 * usual + 0.3 * seconds
        # More threads may be faster again: the slower they were, the later they are tried.
        for (other, n), slower in self._usual.items():
            if other == size and n > threads:
                best = seconds * threads / n
                self._usual[other, n] = max(self.FORGET * slower, min(slower, best))
        if given_up:
            first, most = self.HOLD_S
            self._hold_s = first if self._well >= self.WELL else min(2 * self._hold_s, most)
            self._held_at, self._held_until = threads // 2, self._clock() + self._hold_s
            self._well = 0
        elif threads > self._held_at:
            self._well += 1


def _size(tokens: int) -> int:
    """Steps of one size take about as long: 1, 2 and 3, 4 to 7 tokens and so on."""
    return tokens.bit_length() - 1


class Alarm:
    """Ends a computation of llama.cpp that lasts too long.

    llama.cpp asks a C function between two operations. A Python function would wait for the
    interpreter's lock each time; C's own ``strlen`` reads one byte, which a thread here sets.
    """

    TICK_S = 0.01
    REST_S = 1.0
    """The thread sleeps until it is needed, once this long nothing had a limit."""

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)  # empty, or "!" to end the computation
        self._lock = threading.Lock()
        self._limit: float | None = None
        self._needed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="mico-alarm", daemon=True)
        self._thread.start()

    @property
    def callback(self) -> tuple[int, int]:
        """Addresses of a C function, ``bool (*)(void *)``, and of what it is to be given."""
        function = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value
        assert function is not None
        return function, ctypes.addressof(self._text)

    @contextmanager
    def after(self, seconds: float | None) -> Iterator[None]:
        """Ring as soon as the block has lasted so long; None: never."""
        self._set(None if seconds is None else time.monotonic() + seconds)
        if seconds is not None and not self._needed.is_set():
            self._needed.set()
        try:
            yield
        finally:
            self._set(None)

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._needed.set()
        self._thread.join()

    def _set(self, limit: float | None) -> None:
        with self._lock:
            self._limit = limit
            self._text.value = b""

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed:
            time.sleep(self.TICK_S)
            now = time.monotonic()
            with self._lock:
                if self._limit is not None:
                    last = now
                    if now > self._limit:
                        self._text.value = b"!"
                elif now - last > self.REST_S and not self._closed:
                    self._needed.clear()
            self._needed.wait()
