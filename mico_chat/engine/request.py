"""A request in an engine: the engine's tokens become text, in deltas for the caller's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from statistics import fmean
from typing import Any, Protocol

from mico_chat.ask import NOTE
from mico_chat.engine.base import Delta, GenerationOptions, Prompt
from mico_chat.engine.grammar import Grammar
from mico_chat.engine.scheduler import Sampled
from mico_chat.errors import ContextLengthError, MicoError, ModelError, RequestError
from mico_chat.prompt_parts import SPACE
from mico_chat.thoughts import ThoughtFormat, ThoughtReader
from mico_chat.wire import FinishReason, Progress, TokenLogprob, Usage

UNFINISHED = "\ufffd"
"""The text that a tokenizer writes for a character of which some bytes are missing."""


class FastTokenizer(Protocol):
    """Its backend has ``decode`` and ``id_to_token``, as in Hugging Face's fast tokenizers."""

    @property
    def backend_tokenizer(self) -> Any: ...

    @property
    def added_tokens_decoder(self) -> Any: ...


def check_prompt(prompt: Prompt, options: GenerationOptions, max_position: int) -> None:
    """Refuse a prompt that is empty, has no room for its answer, or has broken context tokens."""
    if not len(prompt):
        raise RequestError("the prompt has no tokens")
    if len(prompt) + options.max_tokens > max_position:
        # The message begins with OpenAI's words: clients recognize the error by them.
        raise ContextLengthError(
            f"this model's maximum context length is {max_position} tokens, but the prompt has "
            f"{len(prompt)} ({prompt.media_tokens} of them for media) and the answer may take "
            f"{options.max_tokens}: shorten the conversation or lower max_tokens"
        )
    # In llama.cpp's attention, NaN would spread to the other requests of the step.
    if not all(block.is_finite for _, block in prompt.blocks):
        raise ModelError("the context tokens of a medium hold values that are not numbers")


class Request:
    """A prompt and its ``n`` answers. The event loop that makes the request receives its deltas.

    The engine sets ``cached_tokens``, the prompt tokens that were computed for earlier requests.
    """

    def __init__(
        self, prompt: Prompt, options: GenerationOptions, tokenizer: FastTokenizer
    ) -> None:
        self.prompt, self.options = prompt, options
        self.loop = asyncio.get_running_loop()
        self.note = None if prompt.scored else NOTE.get()
        self.cached_tokens = 0
        self.grammar: Grammar | None = None
        self._texts = [
            Detokenizer(tokenizer, options.stop, prompt.shown, prompt.thoughts)
            for _ in range(options.n)
        ]
        self._unfinished = set(range(options.n))
        self._logprobs: list[list[float]] = [[] for _ in range(options.n)]
        self._n_tokens, self._n_thoughts = [0] * options.n, [0] * options.n
        self._early: list[tuple[TokenLogprob, ...]] = [()] * options.n
        self.items: asyncio.Queue[Delta | MicoError] = asyncio.Queue()

    async def next(self) -> Delta:
        """The next delta; the one with a ``usage`` is the last."""
        item = await self.items.get()
        if isinstance(item, MicoError):
            raise item
        return item

    def advance(self, index: int, sampled: Sampled, reason: FinishReason | None) -> Delta:
        """The delta of an answer's next token; ``reason`` is set if the token is the last."""
        detokenizer = self._texts[index]
        self._n_tokens[index] += 1
        # The token that ends an answer adds no text and no log-probability.
        logprobs: tuple[TokenLogprob, ...] = ()
        if reason != "stop" and sampled.logprob is not None:
            self._logprobs[index].append(sampled.logprob)
            if self.options.logprobs is not None:
                found = sampled.token, sampled.logprob, sampled.top
                logprobs = (_token_logprob(detokenizer, *found),)
        text = detokenizer.add(sampled.token)
        if reason is not None:
            text += detokenizer.finish()
        if detokenizer.stopped is not None:
            reason = "stop"
        thought = ""
        if (thoughts := detokenizer.thoughts) is not None:
            thought = thoughts.take()
            logprobs, self._early[index] = (*self._early[index], *logprobs), ()
            if thoughts.thinking:  # nothing up to this token belongs to the answer
                self._n_thoughts[index], logprobs = self._n_tokens[index], ()
                self._logprobs[index].clear()
            elif thoughts.undecided and reason is None:
                self._early[index], logprobs = logprobs, ()
        if reason is not None:
            self._unfinished.discard(index)
        # The first token decides how an answer begins ("A dog.", "It is a dog."), not what it says.
        known = self._logprobs[index] if reason is not None and self.prompt.media_tokens else []
        mean = fmean(known[1:] or known) if known else None
        usage = None
        if not self._unfinished:
            usage = Usage(
                prompt_tokens=len(self.prompt),
                completion_tokens=sum(self._n_tokens),
                reasoning_tokens=sum(self._n_thoughts),
                media_tokens=self.prompt.media_tokens,
                cached_tokens=self.cached_tokens,
            )
        return Delta(
            index=index,
            text=text,
            reasoning_content=thought,
            token_ids=(sampled.token,),
            logprobs=logprobs,
            avg_logprob=mean,
            finish_reason=reason,
            stop_text=detokenizer.stopped,
            usage=usage,
        )


def _token_logprob(
    texts: Detokenizer, token: int, logprob: float, top: tuple[tuple[int, float], ...] = ()
) -> TokenLogprob:
    return TokenLogprob(
        token=texts.of_token(token),
        token_id=token,
        logprob=logprob,
        top=tuple(_token_logprob(texts, *other) for other in top),
    )


class Outbox:
    """Collects the deltas of a step, and hands each event loop all of its deltas at once.

    If each delta woke its loop, the loop would take Python's lock from the engine's thread.
    """

    def __init__(self) -> None:
        self._parcels: dict[asyncio.AbstractEventLoop, list[tuple[Request, Any]]] = {}

    def add(self, request: Request, item: Delta | Progress | MicoError) -> None:
        self._parcels.setdefault(request.loop, []).append((request, item))

    def hand_over(self) -> list[asyncio.AbstractEventLoop]:
        """Give each loop the items of its callers; returns the loops that are closed."""
        parcels, self._parcels = self._parcels, {}
        closed = []
        for loop, items in parcels.items():
            try:
                loop.call_soon_threadsafe(_unpack, items)
            except RuntimeError:
                closed.append(loop)
        return closed


def _unpack(items: list[tuple[Request, Any]]) -> None:
    for request, item in items:
        if not isinstance(item, Progress):
            request.items.put_nowait(item)
        elif request.note is not None:
            request.note(item)


class Detokenizer:
    """Token ids to text, token by token; special tokens are left out, but those in ``shown``.

    Text that a later token may change is held back: an unfinished character, and the beginning of a
    stop text. ``stopped`` is the stop text that has ended the text. ``thoughts`` takes out of the
    text what the model thinks before; no stop text ends that.

    The tokenizers library's ``DecodeStream`` drops an unfinished character at the end, and fails
    if a token changes the text of the tokens before it.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        stop: Sequence[str] = (),
        shown: frozenset[int] = frozenset(),
        thoughts: ThoughtFormat | None = None,
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._hidden: set[int] = set()
        if shown:
            added = tokenizer.added_tokens_decoder.items()
            self._hidden = {number for number, token in added if token.special} - shown
        self._stop = tuple(text for text in stop if text)
        # The tokens of ``_before``, the text given last, and the tokens after it. Both are decoded
        # together: the text of a token may depend on the token before it.
        self._ids: list[int] = []
        self._n_before = 0
        self._before = ""
        self._held = ""
        self.stopped: str | None = None
        self.thoughts = None if thoughts is None else ThoughtReader(thoughts)

    def of_token(self, token: int) -> str:
        """The text of a token, if it were the next one."""
        text = str(self._backend.decode([token], skip_special_tokens=False))
        piece = self._backend.id_to_token(token) or ""
        # SentencePiece's decoder removes a leading space: correct only at the answer's start.
        taken = piece.startswith(SPACE) and text == piece.replace(SPACE, " ")[1:]
        return f" {text}" if taken and self._ids else text

    def add(self, token: int) -> str:
        if self.stopped is not None:
            return ""
        self._ids.append(token)
        written = self._decode()
        if len(written) <= len(self._before) or written.endswith(UNFINISHED):
            return ""
        self._hold(written[len(self._before) :])
        del self._ids[: self._n_before]
        self._n_before = len(self._ids)
        self._before = self._decode()
        return self._give(final=False)

    def finish(self) -> str:
        """The text that was held back; an unfinished character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        self._hold(self._decode()[len(self._before) :], final=True)
        return self._give(final=True)

    def _hold(self, text: str, *, final: bool = False) -> None:
        self._held += text if self.thoughts is None else self.thoughts.feed(text, final=final)

    def _decode(self) -> str:
        if self._hidden:
            ids = [token for token in self._ids if token not in self._hidden]
            return str(self._backend.decode(ids, skip_special_tokens=False))
        return str(self._backend.decode(self._ids, skip_special_tokens=True))

    def _give(self, *, final: bool) -> str:
        held = self._held
        ends = [(at, text) for text in self._stop if (at := held.find(text)) >= 0]
        if ends:
            end, self.stopped = min(ends)
            piece, self._held = held[:end], ""
        else:
            certain = len(held) if final else len(held) - self._may_be_stop(held)
            piece, self._held = held[:certain], held[certain:]
        return piece

    def _may_be_stop(self, text: str) -> int:
        longest = 0
        for stop in self._stop:
            at = text.find(stop[0], max(0, len(text) + 1 - len(stop)))
            while at >= 0 and len(text) - at > longest:
                if stop.startswith(text[at:]):
                    longest = len(text) - at
                at = text.find(stop[0], at + 1)
        return longest
