"""An engine over a scheduler: one thread makes steps, callers of any event loop get deltas."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Any

from transformers import PreTrainedTokenizerFast

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
from mico_chat.errors import ContextLengthError, MicoError, ModelError

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
        loop = asyncio.get_running_loop()
        deltas: asyncio.Queue[Delta | BaseException] = asyncio.Queue()
        request = _Request(
            prompt,
            options,
            self._tokenizer,
            lambda item: loop.call_soon_threadsafe(deltas.put_nowait, item),
        )
        self._post(lambda: self._add(request))
        try:
            while True:
                item = await deltas.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.usage is not None:
                    return
        finally:
            self._post(lambda: self._drop(request))

    def stats(self) -> EngineStats:
        """What is running, waiting and held."""
        return self._scheduler.stats()

    def close(self) -> None:
        """End the thread and the model; requests that still run fail."""
        with self._wake:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _check(self, prompt: Prompt, options: GenerationOptions) -> None:
        if self._closed:
            raise ModelError("the engine is closed")
        if len(prompt) + options.max_tokens > self.max_position:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens ({prompt.media_tokens} of them for media) "
                f"and the answer may take {options.max_tokens}, more than the model's "
                f"{self.max_position}: shorten the conversation or lower max_tokens"
            )

    def _post(self, action: Callable[[], None]) -> None:
        """Have the thread do something before its next step."""
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while self._take():
            try:
                steps = self._scheduler.step()
            except Exception as error:  # a defect, or llama.cpp gave up: say it to all, go on
                logger.exception("a step failed")
                self._fail(error)
                continue
            for step in steps:
                self._advance(step)
        self._fail(ModelError("the engine was closed"))
        self._scheduler.model.close()

    def _take(self) -> bool:
        """Wait for work, and do what was posted; False when the engine is closed."""
        with self._wake:
            while not (self._inbox or self._closed) and self._scheduler.idle:
                self._wake.wait()
            actions, self._inbox = self._inbox, deque()
        for action in actions:
            action()
        return not self._closed

    def _add(self, request: _Request) -> None:
        for sequence in request.sequences:
            try:
                self._scheduler.add(sequence)
            except MicoError as error:
                self._drop(request)
                request.deliver(error)
                return
            self._requests[sequence] = request

    def _drop(self, request: _Request) -> None:
        """Forget a request, finished or not."""
        for sequence in request.sequences:
            if self._requests.pop(sequence, None) is not None:
                self._scheduler.remove(sequence)

    def _advance(self, step: Step) -> None:
        request = self._requests.get(step.sequence)
        if request is None:
            return
        try:
            request.advance(step)
        except RuntimeError:  # its event loop has gone, and nobody waits for the answer
            self._drop(request)
            return
        if request.answers[step.sequence.index].finished:
            self._scheduler.remove(step.sequence)

    def _fail(self, error: BaseException) -> None:
        """Tell all requests, and give up what is held: nobody knows what state it is in."""
        for request in set(self._requests.values()):
            self._drop(request)
            failed = (
                error if isinstance(error, MicoError) else ModelError(f"a step failed: {error}")
            )
            try:
                request.deliver(failed)
            except RuntimeError:
                continue
        self._scheduler.forget()


class _AnswerText:
    """The text of one answer as it grows."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.detokenizer = detokenizer
        self.finished = False


class _Request:
    """A prompt and its ``n`` sequences; turns steps into deltas and hands them to the caller."""

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        tokenizer: PreTrainedTokenizerFast,
        deliver: Callable[[Delta | BaseException], Any],
    ) -> None:
        self.sequences = [Sequence(prompt, options, index) for index in range(options.n)]
        self.answers = [_AnswerText(Detokenizer(tokenizer, options.stop)) for _ in self.sequences]
        self.deliver = deliver
        self._tokenizer = tokenizer

    def advance(self, step: Step) -> None:
        """Deliver what a step gave one of the sequences."""
        answer = self.answers[step.sequence.index]
        text = answer.detokenizer.add(step.sampled.token)
        reason: FinishReason | None = step.finish_reason
        if reason is not None:
            text += answer.detokenizer.finish()
        if answer.detokenizer.stopped:
            reason = "stop"
        answer.finished = reason is not None
        self.deliver(
            Delta(
                index=step.sequence.index,
                text=text,
                token_ids=(step.sampled.token,),
                logprobs=self._logprobs(step.sampled),
                finish_reason=reason,
                usage=self._usage() if all(a.finished for a in self.answers) else None,
            )
        )

    def _usage(self) -> Usage:
        first = self.sequences[0]
        return Usage(
            prompt_tokens=first.length,
            completion_tokens=sum(len(sequence.tokens) for sequence in self.sequences),
            media_tokens=first.prompt.media_tokens,
            cached_tokens=first.cached,
        )

    def _logprobs(self, sampled: Sampled) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        top = tuple(self._logprob(token, value) for token, value in sampled.top)
        return (self._logprob(sampled.token, sampled.logprob, top),)

    def _logprob(
        self, token: int, value: float, top: tuple[TokenLogprob, ...] = ()
    ) -> TokenLogprob:
        text = self._tokenizer.decode([token])
        assert isinstance(text, str)
        return TokenLogprob(token=text, token_id=token, logprob=value, top=top)
