"""A thread that notices a process which does not come on, and renews or ends it.

Three things are watched: the event loop, the steps of the models (of the engine and of the media
encoder), and the end after SIGTERM. None of them can be interrupted from Python: a step is a call
of another library. So the requests of a step that does not end get an error, and the process is
started anew.
"""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from collections.abc import Callable

from mico_server.models import Models

logger = logging.getLogger(__name__)

LOOP_S = 60.0
"""Seconds for which the event loop may stand still. Its longest work takes some tenths of one."""

TICK_S = 0.5
ANSWER_S = 2.0  # for the errors of the requests that are given up to be sent


class Watchdog:
    """``renew`` starts the process anew, for a reason; ``end`` ends it at once."""

    def __init__(
        self,
        models: Models,
        *,
        max_step_s: float,
        renew: Callable[[str], None],
        end: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models, self._max_step_s = models, max_step_s
        self._renew, self._end, self._clock = renew, end, clock
        self._deadline: float | None = None
        self._beat: float | None = None  # none before the first one: starting may take long

    def start(self) -> None:
        threading.Thread(target=self._watch, name="mico-watchdog", daemon=True).start()

    def beat(self) -> None:
        """The event loop works."""
        self._beat = self._clock()

    def end_within(self, seconds: float) -> None:
        """The process was asked to end: whatever runs, it ends in this time."""
        self._deadline = self._clock() + seconds

    def _watch(self) -> None:
        while True:
            time.sleep(TICK_S)
            self.look()

    def look(self) -> None:
        if self._deadline is not None:
            if self._clock() > self._deadline:
                logger.critical("the service does not end by itself: it is ended now")
                self._end()
            return
        late = 0.0 if self._beat is None else self._clock() - self._beat
        if late > LOOP_S:
            # After a sleep of the machine the loop needs a moment, too.
            beat = self._beat
            time.sleep(ANSWER_S)
            if self._beat == beat:
                faulthandler.dump_traceback()
                self._renew(f"the event loop has stood still for {late:.0f} s")
            return
        for host in self._models.hosts:
            seconds = host.step_s
            if seconds > 2 * self._max_step_s:
                reason = f"{host.name}: a step has lasted {seconds:.0f} s and is given up"
                faulthandler.dump_traceback()
                host.give_up(reason)
                time.sleep(ANSWER_S)
                self._renew(reason)
