"""An engine whose thread runs the scheduler and sends deltas to callers in any event loop."""

import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Any

from mico_chat.checkpoints.lora import Lora
from mico_chat.engine.base import Delta, EngineStats, GenerationOptions, Preference, Prompt
from mico_chat.engine.grammar import Grammars
from mico_chat.engine.request import FastTokenizer, Outbox, Request, check_prompt
from mico_chat.engine.scheduler import Model, Scheduler, Sequence, Step
from mico_chat.errors import MicoError, ModelError, RequestError
from mico_chat.fair import FairQueue
from mico_chat.wire import Progress

logger = logging.getLogger(__name__)

CLOSE_S = 5.0
"""Seconds that a step may still take when the engine is closed; its thread is left alone then."""


class BatchingEngine:
    """The :class:`base.Engine` of a :class:`scheduler.Model`, with continuous batching.

    ``ends`` are the tokens that end an answer. At most ``max_running`` sequences run at once.
    """

    repeats = True

    def __init__(
        self,
        model: Model,
        tokenizer: FastTokenizer,
        ends: Collection[int],
        *,
        name: str,
        max_running: int = 16,
        prefer: Preference | None = None,
    ) -> None:
        self.name = name
        self.scores = model.scores
        self.failure: str | None = None
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(model, ends, max_running=max_running, prefer=prefer)
        self._grammars = Grammars(tokenizer.backend_tokenizer, ends)
        self._compiling = FairQueue(8, 8, each=1, name="mico-grammar")
        self._since: float | None = None  # when the thread began what it does now
        self.max_position = self._scheduler.max_position
        self._requests: dict[Sequence, Request] = {}
        self._outbox = Outbox()
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"mico-{name}", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, options: GenerationOptions
    ) -> AsyncGenerator[Delta, None]:
        check_prompt(prompt, options, self.max_position)
        request = Request(prompt, options, self._tokenizer)
        if options.form is not None:
            compile_ = self._grammars.compile
            request.grammar = await self._compiling.run(prompt.tenant, compile_, *options.form)
        if not self._post(lambda: self._add(request)):
            raise ModelError(self.failure or "the engine is closed")
        try:
            while (delta := await request.next()).usage is None:
                yield delta
            yield delta
        finally:
            self._post(lambda: self._drop(request))

    def load_lora(self, lora: Lora) -> None:
        model: Any = self._scheduler.model
        model.loras.load(lora)

    def unload_lora(self, lora: Lora) -> None:
        model: Any = self._scheduler.model
        self._post(lambda: model.loras.unload(lora))

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def prepare(self) -> None:
        try:
            self._grammars.prepare()
        except RequestError as error:
            logger.info("%s", error)

    @property
    def busy_s(self) -> float:
        """Seconds since the present step began; 0 between steps."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def give_up(self, reason: str) -> None:
        """Answer all requests with an error: the thread does not come back from its step."""
        self.failure = reason
        with self._wake:
            self._closed = True
        outbox = Outbox()  # the thread may be in the middle of its own
        for request in set(self._requests.copy().values()):
            outbox.add(request, ModelError(reason))
        outbox.hand_over()

    def forget(self) -> None:
        self._post(self._scheduler.forget)

    def close(self) -> None:
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        self._compiling.close()
        self._grammars.close()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            logger.error("a step of the engine does not end; its thread is left alone")

    def _post(self, action: Callable[[], None]) -> bool:
        """Let the thread run an action before its next step; False if the engine is closed."""
        with self._wake:
            if self._closed:
                return False
            self._inbox.append(action)
            self._wake.notify()
            return True

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        reason = "the engine was closed"
        try:
            while self._take():
                self._step()
                self._hand_over()
                self._since = None
        except Exception as error:
            logger.exception("an unexpected error ended the engine")
            reason = self.failure = f"the engine ended: {error}"
        with self._wake:
            self._closed = True
        self._take()
        self._since = None
        self._fail(reason)
        self._hand_over()
        self._scheduler.model.close()

    def _take(self) -> bool:
        """Wait for work, and run the posted actions; False when the engine is closed."""
        with self._wake:
            while not (self._inbox or self._closed) and self._scheduler.idle:
                self._wake.wait()
            # Both are read under one lock: nothing is posted after the engine is closed.
            actions, self._inbox = self._inbox, deque()
            closed = self._closed
        self._since = time.monotonic()
        for action in actions:
            action()
        return not closed

    def _step(self) -> None:
        try:
            steps = self._scheduler.step()
        except Exception as error:  # all requests of the step fail; the engine goes on
            logger.exception("a step of the engine failed")
            self._fail(f"a step of the engine failed: {error}")
            self._scheduler.forget()
            return
        for sequence, request in self._requests.items():
            if request.note is not None and not sequence.index and len(sequence.tokens) < 2:
                done, total = min(sequence.computed, sequence.length), sequence.length
                self._outbox.add(request, Progress(what="prompt", done=done, total=total))
        for step in steps:
            self._advance(step)

    def _add(self, request: Request) -> None:
        for index in range(request.options.n):
            grammar = None if request.grammar is None else request.grammar.copy()
            sequence = Sequence(request.prompt, request.options, index, grammar)
            try:
                self._scheduler.add(sequence)
            except Exception as error:
                self._end(request, error)
                return
            self._requests[sequence] = request

    def _advance(self, step: Step) -> None:
        request = self._requests.get(step.sequence)
        if request is None:
            return
        try:
            if isinstance(step.result, Exception):
                raise step.result
            if step.sequence.index == 0:  # the other answers may reuse the prompt of this answer
                request.cached_tokens = step.sequence.cached
            delta = request.advance(step.sequence.index, step.result, step.finish_reason)
        except Exception as error:
            self._end(request, error)
            return
        # The scheduler frees the answer's slot before the caller gets the last delta.
        if delta.usage is not None:
            self._drop(request)
        elif delta.finish_reason is not None:
            self._scheduler.remove(step.sequence)
        self._outbox.add(request, delta)

    def _drop(self, request: Request) -> None:
        for sequence in [s for s, owner in self._requests.items() if owner is request]:
            del self._requests[sequence]
            self._scheduler.remove(sequence)

    def _end(self, request: Request, error: Exception) -> None:
        self._drop(request)
        if not isinstance(error, MicoError):
            logger.error("a request failed", exc_info=error)
            error = ModelError(f"the request failed: {error}")
        self._outbox.add(request, error)

    def _hand_over(self) -> None:
        """Send the outbox; the requests of a closed loop are dropped."""
        for loop in self._outbox.hand_over():
            for request in {r for r in self._requests.values() if r.loop is loop}:
                self._drop(request)

    def _fail(self, reason: str) -> None:
        requests = set(self._requests.values())
        for request in requests:  # first: dropping a request may raise an error of the model
            self._outbox.add(request, ModelError(reason))
        for request in requests:
            self._drop(request)
