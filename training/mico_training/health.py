"""What keeps a run from harm: steps that are not finite, losses out of range, a full disk, signals.

A step whose loss or gradient is not finite moves no weight and no optimizer state. All processes
decide alike, without a message of their own: :func:`only_finite` spoils the gradient of such a
loss, the processes add up their gradients, and each finds the same norm. A device is not waited
for: its optimizer leaves the step out by itself, and a step's norm is read while the next one runs.
"""

import errno
import math
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from mico_chat.errors import TrainingError

IN_A_ROW = 10
"""A run ends after so many steps in a row that are not finite."""

INTERVALS, TIMES, MARGIN = 5, 5.0, 5.0
"""A run ends when so many logged losses in a row are above ``TIMES`` the best plus ``MARGIN``. The
best is the loss at the start, or the lowest mean of so many logged losses in a row."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("No space left", "File too large", "quota exceeded", "unexpected pos", "StreamWriter")
"""safetensors and PyTorch write through libraries that keep only words of the system's error."""


def only_finite(loss: Tensor) -> Tensor:
    """The same loss; where it is not finite, its gradient is not finite either."""
    own = loss.detach()
    return loss * (own - own + 1)


class Health:
    """Of a run that has logged ``history``: the steps that were left out, and the losses' range.

    ``at``: the last step whose norm was read. ``in_a_row``: how many steps up to it were left out.
    """

    def __init__(self, history: Iterable[Mapping[str, float]] = ()) -> None:
        self.skipped = self.in_a_row = self.at = 0
        self.norm = math.nan
        self.best = math.inf
        self._unread: tuple[int, Any] | None = None
        self._losses: deque[float] = deque(maxlen=INTERVALS)
        for entry in history:
            self.skipped = int(entry.get("skipped_steps", self.skipped))
            self.note(entry)

    def guard(self, step: int, norm: Any, optimizer: Any, model: nn.Module) -> None:
        """Before the optimizer's step, with the norm of the gradients: leave it out if need be."""
        self.read()
        self._unread = step, norm
        own = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(norm, Tensor):  # DeepSpeed has left it out already
            self.read()
        elif getattr(own, "_step_supports_amp_scaling", False):
            own.found_inf = (~norm.isfinite()).to(norm.dtype)
        else:
            self.read()
            if self.in_a_row:
                model.zero_grad()  # an optimizer leaves out what has no gradient

    def read(self) -> None:
        """Count the last step; waits for its norm."""
        if self._unread is not None:
            (self.at, norm), self._unread = self._unread, None
            self.norm = float(norm)
            self.in_a_row = 0 if math.isfinite(self.norm) else self.in_a_row + 1
            self.skipped += self.in_a_row > 0

    def note(self, entry: Mapping[str, float]) -> None:
        """Take in a logged loss. That of a policy gradient measures nothing, so it has no range."""
        loss = entry.get("loss", math.nan)
        self.best = min(self.best, entry.get("loss_at_start", math.inf))
        if math.isfinite(loss) and "reward" not in entry:
            self._losses.append(loss)
            if len(self._losses) == INTERVALS:
                self.best = min(self.best, fmean(self._losses))

    @property
    def limit(self) -> float:
        return TIMES * max(self.best, 0.0) + MARGIN

    @property
    def high(self) -> bool:
        """Whether the last logged loss is out of range."""
        return bool(self._losses) and self._losses[-1] > self.limit

    @property
    def astray(self) -> bool:
        """Whether so many logged losses are that nothing better can be expected."""
        return len(self._losses) == INTERVALS and min(self._losses) > self.limit


@contextmanager
def room(folder: Path, needed: int, onward: Callable[[], str]) -> Iterator[None]:
    """Write ``needed`` bytes or more below a folder; a TrainingError if its disk is full."""

    def full(free: int) -> TrainingError:
        asked = f"{needed:,} bytes are needed, and {free:,} are free"
        todo = f"make room, and the same command {onward()}"
        return TrainingError(f"{folder}: the disk is full: {asked}; {todo}")

    if (free := free_bytes(folder)) < needed:
        raise full(free)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) in FULL or any(w in str(error) for w in FULL_WORDS):
            raise full(free_bytes(folder)) from error
        raise


def free_bytes(folder: Path) -> int:
    """Of the disk of a folder, which need not be there yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The signals that ask this process to stop, as they come; a second Ctrl-C ends it at once."""
    asked: list[int] = []
    owner = os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() == owner:  # the processes that load data inherit this function
            if number == signal.SIGINT and number in asked:
                raise KeyboardInterrupt
            asked.append(number)

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
