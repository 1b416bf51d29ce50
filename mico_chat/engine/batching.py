"""An engine over a scheduler: one thread makes steps, callers of any event loop get deltas."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection

from transformers import PreTrainedTokenizerFast

from mico_chat.encoded import ContextBlock
from mico_chat.engine.base import (
    Delta,
    EngineStats,
    FinishReason,
    GenerationOptions,
    Prompt,
    TokenLogprob,
    Usage,
)
from mico_chat.engine.detokenize import Detokenizer
from mico_chat.engine.scheduler import Model, Sampled, Scheduler, Sequence, Step
from mico_chat.errors import ContextLengthError, MicoError, ModelError, RequestError

logger = logging.getLogger(__name__)


class BatchingEngine:
    """Continuous batching over a :class:`scheduler.Model`; see :class:`base.Engine`.

    Args:
        model: taken over: ``close`` closes it.
        tokenizer: for the text of the answers.
        ends: tokens that end an answer.
        name: of the engine.
        max_running: sequences that have a slot at once.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerFast,
        ends: Collection[int],
        *,
        name: str,
        max_running: int = 16,
    ) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(model, ends, max_running=max_running)
        self.max_position = self._scheduler.most
        self._requests: dict[Sequence, _Request] = {}
        # What a step gives is handed over together: a loop that wakes for the first delta would
        # take the interpreter from the thread that still makes the others.
        self._outbox: dict[asyncio.AbstractEventLoop, list[_Parcel]] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"mico-{name}", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, options: GenerationOptions
    ) -> AsyncGenerator[Delta, None]:
        """Continue a prompt; see :meth:`base.Engine.generate`."""
        self._check(prompt, options)
        deltas: asyncio.Queue[Delta | MicoError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        request = _Request(prompt, options, self._tokenizer, loop, deltas.put_nowait)
        if not self._post(lambda: self._add(request)):
            raise ModelError("the engine is closed")
        try:
            while True:
                item = await deltas.get()
                if isinstance(item, MicoError):
                    raise item
                yield item
                if item.usage is not None:
                    return
        finally:
            self._post(lambda: self._drop(request))

    def stats(self) -> EngineStats:
        """What is running, waiting and held."""
        return self._scheduler.stats()

    def forget(self) -> None:
        """Give up what is kept of finished requests, before the next step."""
        self._post(self._scheduler.forget)

    def close(self) -> None:
        """End the thread and the model; requests that still run fail."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _check(self, prompt: Prompt, options: GenerationOptions) -> None:
        if not len(prompt):
            raise RequestError("the prompt has no tokens")
        if len(prompt) + options.max_tokens > self.max_position:
            # It begins with OpenAI's words, by which clients tell this error from others.
            raise ContextLengthError(
                f"this model's maximum context length is {self.max_position} tokens, but the "
                f"prompt has {len(prompt)} ({prompt.media_tokens} of them for media) and the "
                f"answer may take {options.max_tokens}: shorten the conversation or lower "
                "max_tokens"
            )
        # In llama.cpp's attention they would reach the other requests of the step.
        blocks = [segment for segment in prompt.segments if isinstance(segment, ContextBlock)]
        if not all(bool(block.tokens.isfinite().all()) for block in blocks):
            raise ModelError("a medium's context tokens are not all numbers")

    def _post(self, action: Callable[[], None]) -> bool:
        """Have the thread do something before its next step; False if it makes no more."""
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
        except Exception as error:
            logger.exception("the engine ends")
            reason = f"the engine ended: {error}"
        with self._wake:
            self._closed = True
        self._take()
        self._fail(reason)
        self._hand_over()
        self._scheduler.model.close()

    def _take(self) -> bool:
        """Wait for work, and do what was posted; False when the engine is closed."""
        with self._wake:
            while not (self._inbox or self._closed) and self._scheduler.idle:
                self._wake.wait()
            # Read together: nothing is posted any more once it is closed.
            actions, self._inbox = self._inbox, deque()
            closed = self._closed
        for action in actions:
            action()
        return not closed

    def _step(self) -> None:
        try:
            steps = self._scheduler.step()
        except Exception as error:  # a defect, or llama.cpp gave up: say it to all, go on
            logger.exception("a step failed")
            self._fail(f"a step failed: {error}", forget=True)
            return
        for step in steps:
            self._advance(step)

    def _add(self, request: _Request) -> None:
        for sequence in request.sequences:
            try:
                self._scheduler.add(sequence)
            except Exception as error:
                self._end(request, error)
                return
            self._requests[sequence] = request

    def _advance(self, step: Step) -> None:
        """Turn a step into a delta, unless its request has gone."""
        request = self._requests.get(step.sequence)
        if request is None:
            return
        if step.sampled is None:
            assert step.error is not None
            self._end(request, step.error)
            return
        try:
            delta = request.advance(step.sequence.index, step.sampled, step.finish_reason)
        except Exception as error:
            self._end(request, error)
            return
        # Whoever has an answer's last delta finds nothing left of it.
        if delta.usage is not None:
            self._drop(request)
        elif delta.finish_reason is not None:
            self._scheduler.remove(step.sequence)
        self._deliver(request, delta)

    def _drop(self, request: _Request) -> None:
        """Forget a request, finished or not."""
        for sequence in request.sequences:
            if self._requests.pop(sequence, None) is not None:
                self._scheduler.remove(sequence)

    def _end(self, request: _Request, error: Exception) -> None:
        """Tell one request what went wrong with it."""
        self._drop(request)
        if not isinstance(error, MicoError):
            logger.error("a request failed", exc_info=error)
            error = ModelError(f"the request failed: {error}")
        self._deliver(request, error)

    def _deliver(self, request: _Request, item: Delta | MicoError) -> None:
        """Put something for a request's caller to what is handed over next."""
        self._outbox.setdefault(request.loop, []).append((request.put, item))

    def _hand_over(self) -> None:
        """Give each loop what is for its callers."""
        outbox, self._outbox = self._outbox, {}
        for loop, parcels in outbox.items():
            try:
                loop.call_soon_threadsafe(_unpack, parcels)
            except RuntimeError:  # it is closed, and nobody is left to take anything
                for request in {r for r in self._requests.values() if r.loop is loop}:
                    self._drop(request)

    def _fail(self, reason: str, *, forget: bool = False) -> None:
        """End all requests, give up what is held for others where it is in doubt, and tell them."""
        requests = set(self._requests.values())
        try:
            for request in requests:
                self._drop(request)
            if forget:
                self._scheduler.forget()
        finally:
            for request in requests:
                self._deliver(request, ModelError(reason))


_Parcel = tuple[Callable[[Delta | MicoError], None], Delta | MicoError]


def _unpack(parcels: list[_Parcel]) -> None:
    for put, item in parcels:
        put(item)


class _Request:
    """A prompt and its ``n`` sequences; turns what steps give them into deltas.

    ``put`` is called in ``loop`` with what is for the caller.
    """

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        tokenizer: PreTrainedTokenizerFast,
        loop: asyncio.AbstractEventLoop,
        put: Callable[[Delta | MicoError], None],
    ) -> None:
        self.sequences = [Sequence(prompt, options, index) for index in range(options.n)]
        self.loop, self.put = loop, put
        self._texts = [Detokenizer(tokenizer, options.stop) for _ in self.sequences]
        self._unfinished = set(range(options.n))

    def advance(self, index: int, sampled: Sampled, reason: FinishReason | None) -> Delta:
        """What a token adds to one of the answers, and why it is the last."""
        detokenizer = self._texts[index]
        # The token that ends an answer is no part of its text, nor of what is told of its tokens.
        logprobs = () if reason == "stop" else _logprobs(detokenizer, sampled)
        text = detokenizer.add(sampled.token)
        if reason is not None:
            text += detokenizer.finish()
        if detokenizer.stopped:
            reason = "stop"
        if reason is not None:
            self._unfinished.discard(index)
        return Delta(
            index=index,
            text=text,
            token_ids=(sampled.token,),
            logprobs=logprobs,
            finish_reason=reason,
            usage=None if self._unfinished else self._usage(),
        )

    def _usage(self) -> Usage:
        first = self.sequences[0]
        return Usage(
            prompt_tokens=first.length,
            completion_tokens=sum(len(sequence.tokens) for sequence in self.sequences),
            media_tokens=first.prompt.media_tokens,
            cached_tokens=first.cached,
        )


def _logprobs(texts: Detokenizer, sampled: Sampled) -> tuple[TokenLogprob, ...]:
    """What is told of a token that comes after those that a detokenizer has."""

    def of(token: int, value: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text = texts.of_token(token)
        return TokenLogprob(token=text, token_id=token, logprob=value, top=top)

    if sampled.logprob is None:
        return ()
    top = tuple(of(token, value) for token, value in sampled.top)
    return (of(sampled.token, sampled.logprob, top),)
