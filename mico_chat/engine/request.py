"""A request on its way through an engine: tokens come in, deltas go out to the caller's loop.

What every engine does alike, whatever computes the tokens: which prompts it takes, how tokens
become text, where a stop text ends it, what is told of log-probabilities and usage.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from transformers import PreTrainedTokenizerFast

from mico_chat.engine.base import Delta, GenerationOptions, Prompt
from mico_chat.engine.detokenize import Detokenizer
from mico_chat.engine.scheduler import Sampled
from mico_chat.errors import ContextLengthError, MicoError, ModelError, RequestError
from mico_chat.media.medium import ContextBlock
from mico_chat.wire import FinishReason, TokenLogprob, Usage


def check_prompt(prompt: Prompt, options: GenerationOptions, max_position: int) -> None:
    """Refuse what no engine can continue.

    Raises:
        RequestError: for a prompt without tokens.
        ContextLengthError: when prompt and answer exceed ``max_position``, both numbers named.
        ModelError: for context tokens that are not all numbers.
    """
    if not len(prompt):
        raise RequestError("the prompt has no tokens")
    if len(prompt) + options.max_tokens > max_position:
        # It begins with OpenAI's words, by which clients tell this error from others.
        raise ContextLengthError(
            f"this model's maximum context length is {max_position} tokens, but the "
            f"prompt has {len(prompt)} ({prompt.media_tokens} of them for media) and the "
            f"answer may take {options.max_tokens}: shorten the conversation or lower "
            "max_tokens"
        )
    # In llama.cpp's attention they would reach the other requests of the step.
    blocks = [segment for segment in prompt.segments if isinstance(segment, ContextBlock)]
    if not all(bool(block.tokens.isfinite().all()) for block in blocks):
        raise ModelError("the context tokens of a medium hold values that are not numbers")


class Request:
    """A prompt and its ``n`` answers; turns their tokens into deltas for the loop it is made in.

    ``cached_tokens`` of the prompt were computed before; an engine sets it when it knows.
    """

    def __init__(
        self, prompt: Prompt, options: GenerationOptions, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.prompt, self.options = prompt, options
        self.loop = asyncio.get_running_loop()
        self.cached_tokens = 0
        self._texts = [Detokenizer(tokenizer, options.stop) for _ in range(options.n)]
        self._unfinished = set(range(options.n))
        self._completion_tokens = 0
        self._items: asyncio.Queue[Delta | MicoError] = asyncio.Queue()

    def put(self, item: Delta | MicoError) -> None:
        """Give the caller something; in its loop."""
        self._items.put_nowait(item)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What was put, in order, up to the last delta.

        Raises:
            MicoError: one that was put.
        """
        while True:
            item = await self._items.get()
            if isinstance(item, MicoError):
                raise item
            yield item
            if item.usage is not None:
                return

    def advance(self, index: int, sampled: Sampled, reason: FinishReason | None) -> Delta:
        """What a token adds to one of the answers, and why it is the last."""
        detokenizer = self._texts[index]
        self._completion_tokens += 1
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
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=self._completion_tokens,
            media_tokens=self.prompt.media_tokens,
            cached_tokens=self.cached_tokens,
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


class Outbox:
    """What an engine's thread has for its callers' loops, handed over together.

    A loop that wakes for the first delta of a step would take the interpreter from the thread
    that still makes the others.
    """

    def __init__(self) -> None:
        self._parcels: dict[asyncio.AbstractEventLoop, list[tuple[Request, Delta | MicoError]]] = {}

    def add(self, request: Request, item: Delta | MicoError) -> None:
        """Put something for a request's caller to what is handed over next."""
        self._parcels.setdefault(request.loop, []).append((request, item))

    def hand_over(self) -> list[asyncio.AbstractEventLoop]:
        """Give each loop what is for its callers; loops that are closed, where nobody is left."""
        parcels, self._parcels = self._parcels, {}
        closed = []
        for loop, items in parcels.items():
            try:
                loop.call_soon_threadsafe(_unpack, items)
            except RuntimeError:
                closed.append(loop)
        return closed


def _unpack(items: list[tuple[Request, Delta | MicoError]]) -> None:
    for request, item in items:
        request.put(item)
