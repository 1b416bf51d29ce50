"""Answers conversations: media become context tokens, messages a prompt, an engine continues it."""

from __future__ import annotations

import asyncio
import copy
import uuid
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mico_chat import __version__
from mico_chat.adapters.base import segments_of, shown_kinds
from mico_chat.ask import LORA, Ask
from mico_chat.checkpoints.marks import Marks
from mico_chat.engine.base import Delta, Engine, Prompt, TakesLoras, equal_start
from mico_chat.engines.table import ENGINES
from mico_chat.errors import ContextLengthError, MicoError, ModelError, RequestError
from mico_chat.explain import explain, n_prompts, score
from mico_chat.fair import FairQueue
from mico_chat.fields import BYTES_PER_TOKEN, check_bytes
from mico_chat.late import late
from mico_chat.media.decoder import Decoder
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.media.medium import SENT, MeasuredMedium, MediaReport
from mico_chat.media.taught import MOST_EXAMPLES, NAMED_AS, TaughtName
from mico_chat.media.view import View, named_pages
from mico_chat.messages import (
    LEAST_ANSWER,
    Conversation,
    Message,
    Part,
    Shortened,
    TextPart,
    media_of,
    named,
    with_depth_scale,
    with_system,
    without_depth,
)
from mico_chat.options import GenerationOptions
from mico_chat.tools import ToolCall, call_schema
from mico_chat.wire import Choice, Estimate, Explanation, TokenLogprob, Usage

with late():
    from mico_chat import calls, prompt_parts
    from mico_chat.adapters import mico

if TYPE_CHECKING:
    from mico_chat.adapters.base import ModelAdapter, PromptLayout
    from mico_chat.checkpoints.lora import Lora
    from mico_chat.encode import AnyMedium, CacheStats, MediaEncoder
    from mico_chat.similarity import Similarity


T = TypeVar("T")

Deltas: TypeAlias = AsyncGenerator[Delta, None]

Event: TypeAlias = Delta | tuple[MediaReport, ...]
"""What an answer is made of: first the reports of its media, then deltas, the last with usage."""


_WRITTEN: dict[str, Any] = {"text": "", "reasoning_content": "", "logprobs": ()}
"""What a delta adds to an answer, and the values of one that adds nothing."""


class AnswerChoice(Choice):
    """One of the answers. Its ``pieces`` are its text and its calls of tools, in their order.
    ``stop_text`` is the stop text that ended it."""

    pieces: tuple[str | ToolCall, ...] = ()
    stop_text: str | None = None

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [piece for piece in self.pieces if isinstance(piece, ToolCall)]


class Answer(BaseModel):
    """A finished answer, its usage, and the report of each medium in the request's order."""

    model_config = ConfigDict(frozen=True)

    choices: tuple[AnswerChoice, ...]
    usage: Usage
    media: tuple[MediaReport, ...] = ()
    explanation: Explanation | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text


class GatheredAnswer:
    """Joins the events of :meth:`Assistant.stream` to the whole answer.

    ``reports`` are those of the media.
    """

    def __init__(self, n: int) -> None:
        self.reports: tuple[MediaReport, ...] = ()
        self._thoughts = [""] * n
        self._pieces: list[list[str | ToolCall]] = [[] for _ in range(n)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(n)]
        self._ends = [Delta()] * n
        self._usage: Usage | None = None
        self._explanation: Explanation | None = None

    def add(self, event: Event) -> None:
        if not isinstance(event, Delta):
            self.reports = event
            return
        self._thoughts[event.index] += event.reasoning_content
        pieces = self._pieces[event.index]
        last = pieces[-1] if pieces else None
        if isinstance(last, str) and event.text:
            pieces[-1] = last + event.text
        elif event.text:
            pieces.append(event.text)
        if (call := event.call) is not None and call.name is not None:
            pieces.append(ToolCall(call.id, call.name, call.arguments))
        elif call is not None:
            assert isinstance(last, ToolCall)
            pieces[-1] = replace(last, arguments=last.arguments + call.arguments)
        self._logprobs[event.index] += event.logprobs
        if event.finish_reason is not None:
            self._ends[event.index] = event
        self._usage = event.usage or self._usage
        self._explanation = event.explanation or self._explanation

    def text(self, index: int = 0) -> str:
        """The text so far of an answer."""
        return "".join(piece for piece in self._pieces[index] if isinstance(piece, str))

    def answer(self) -> Answer:
        if self._usage is None:
            raise ModelError("the answer has not ended")
        choices = tuple(
            AnswerChoice(
                text=self.text(index),
                reasoning_content=self._thoughts[index] or None,
                finish_reason=end.finish_reason or "length",
                logprobs=tuple(self._logprobs[index]),
                confidence=end.confidence,
                unsure=end.unsure,
                pieces=tuple(self._pieces[index]),
                stop_text=end.stop_text,
            )
            for index, end in enumerate(self._ends)
        )
        usage, media = self._usage, self.reports
        return Answer(choices=choices, usage=usage, media=media, explanation=self._explanation)


class Assistant:
    """A loaded model that answers conversations. :meth:`close` closes its parts.

    ``defaults`` are used for options that a request does not set, ``system_prompt`` for
    conversations without a system message. ``similarity`` is None if the checkpoint lacks the text
    branch of stage 1. An answer about media is marked unsure if its confidence is below the mark
    of its kind; without ``marks`` no answer is marked. ``notes`` and ``loras`` are those of what
    was loaded (:class:`mico_chat.engines.base.Loaded`).
    """

    def __init__(
        self,
        engine: Engine,
        encoder: MediaEncoder,
        *,
        name: str,
        similarity: Similarity | None = None,
        defaults: GenerationOptions | None = None,
        system_prompt: str | None = None,
        marks: Marks | None = None,
        notes: Sequence[str] = (),
        loras: dict[Kind, Lora] | None = None,
    ) -> None:
        self.name, self.notes = name, tuple(notes)
        self._loras = loras or {}
        self._lora: Lora | None = None
        self.defaults = defaults or GenerationOptions()
        self.system_prompt = system_prompt
        self.marks = marks
        self.similarity = similarity
        self.engine = engine
        self.encoder = encoder
        # The tokenizer is switched between markup and a user's text: one thread at a time.
        self._tokenizing = FairQueue(1, most=1, name="mico-tokenize")
        self._own_start: tuple[str | None, Sequence[Hashable]] | None = None

    @property
    def wardrobe(self) -> TakesLoras:
        """The engine, if it takes adapters."""
        if not isinstance(self.engine, TakesLoras):
            raise ModelError(f"{self.name}: the {self.engine.name} engine takes no adapters here")
        return self.engine

    def wearing(self, lora: Lora) -> Assistant:
        """This assistant with an adapter that its engine has loaded; both share all parts."""
        other = copy.copy(self)
        other.name, other._lora = lora.name, lora
        return other

    def _worn(self, ask: Ask) -> Lora | None:
        """The adapter of a question's answer: the one asked for, or else its media's own."""
        kinds = {medium.kind for medium in media_of(ask.messages)}
        own = (lora for kind, lora in self._loras.items() if kind in kinds)
        return self._lora or next(own, None)

    @property
    def adapter(self) -> ModelAdapter:
        return self.encoder.adapter

    @property
    def fingerprint(self) -> str:
        """What computes the answers. With "varies" at the end, a seed does not repeat an answer."""
        name = f"mico-{__version__}-{self.engine.name}"
        return name if self.engine.repeats else f"{name}-varies"

    @property
    def input_modalities(self) -> tuple[Kind, ...]:
        """The kinds of medium that may be shown to the model, maps as pictures too."""
        return shown_kinds(self.adapter.input_modalities)

    @property
    def call_format(self) -> calls.CallFormat | None:
        """How the model writes calls of tools; None if it calls none."""
        return self.adapter.template.call_format

    def check_tools(self) -> None:
        if self.call_format is None:
            reason = "this model's chat template has no tools that are known here; leave them out"
            raise RequestError.at("tools", reason)

    @property
    def context_cache(self) -> CacheStats:
        return self.encoder.cache.stats()

    # --- stages before the answer: each takes a question and gives the one that follows ---

    async def shown(self, ask: Ask) -> Ask:
        """The question as the model is shown it: with its tools, depth maps and a schema of calls.

        Raises:
            RequestError: the model has no tools, no estimator of depth is loaded, or the question
                is too long.
        """
        stages = (self._with_read, self._with_depth_scale, self._with_depth, self._with_views)
        for stage in (
            *stages,
            self._with_pages,
            self._with_tools,
            self._with_thinking,
            self._with_room,
        ):
            ask = await stage(ask)
        return ask

    async def _with_read(self, ask: Ask) -> Ask:
        """Name media of earlier turns that the model does not read, if the request says so: another
        model may have answered those."""
        if ask.options.truncation != "auto":
            return ask
        messages, unread = list(ask.messages), 0
        for at, message in enumerate(messages[: -len(Conversation.of(messages).last)]):
            parts = list(message.content)
            for place, part in enumerate(parts):
                if not isinstance(part, TextPart) and part.kind not in self.input_modalities:
                    parts[place], unread = named(part), unread + 1
            messages[at] = replace(message, content=tuple(parts))
        return replace(ask, messages=messages, media_left_out=unread) if unread else ask

    async def _with_depth_scale(self, ask: Ask) -> Ask:
        options = ask.options
        if "depth_scale" not in options.model_fields_set:
            return ask
        return replace(ask, messages=with_depth_scale(ask.messages, options.depth_scale))

    async def _with_depth(self, ask: Ask) -> Ask:
        """Put an estimated depth map behind each picture of a message that has no depth map."""
        if not ask.options.estimate_depth:
            return ask
        self.encoder.check_estimates()
        found = []
        for message in ask.messages:
            parts = list(message.content)
            places = [at for at, part in enumerate(parts) if not isinstance(part, TextPart)]
            for number in reversed(without_depth(message.media)):
                depth = await self.encoder.estimated(message.media[number], tenant=ask.tenant)
                parts.insert(places[number] + 1, depth)
            found.append(replace(message, content=tuple(parts)))
        return replace(ask, messages=found)

    async def _with_views(self, ask: Ask) -> Ask:
        """Show each medium as the request says of all, if the model can."""
        io, processor = ask.options.media_io_kwargs, ask.options.mm_processor_kwargs
        if not (io or processor):
            return ask
        for kind in self.adapter.input_modalities:
            self.adapter.viewed(kind, View().over_all(kind, io, processor))

        def seen(part: AnyMedium) -> View:
            return part.view.over_all(part.kind, io, processor)

        return replace(ask, messages=_viewed(ask.messages, seen))

    async def _with_pages(self, ask: Ask) -> Ask:
        """Show first the pages of documents that the questions name, the last question's before
        those of others."""
        texts = (named_pages(m.text) for m in reversed(ask.messages) if m.role == "user")
        pages = tuple(dict.fromkeys(chain.from_iterable(texts)))

        def seen(part: AnyMedium) -> View:
            return replace(part.view, pages=pages) if _has_pages(part) else part.view

        return replace(ask, messages=_viewed(ask.messages, seen)) if pages else ask

    async def _with_tools(self, ask: Ask) -> Ask:
        use = ask.tools
        if use.declared:
            self.check_tools()
        if not use.chosen:
            return ask
        first, *others = ask.messages
        options = ask.options
        if use.forced:
            options = options.model_copy(update={"json_schema": call_schema(use.chosen)})
        return replace(ask, messages=[replace(first, tools=use.chosen), *others], options=options)

    async def _with_thinking(self, ask: Ask) -> Ask:
        """An answer whose beginning or form is given has no thoughts before it."""
        options = ask.options
        given = [name for name in ("prefix", "explain") if getattr(options, name)]
        if options.form is not None:
            given.append("tool_choice" if ask.tools.forced else options.form[0])
        if options.thinking and self.adapter.template.thoughts is None:
            reason = "this model's chat template knows no thinking; leave it out"
            raise RequestError.at("thinking", reason)
        if options.thinking and given:
            reason = f"an answer with {given[0]} has no thoughts; leave one of the two out"
            raise RequestError.at("thinking", reason)
        return _without_thoughts(ask) if given else ask

    async def _with_room(self, ask: Ask) -> Ask:
        """Leave out pages of documents that do not fit; then, if the request says so, what is
        oldest of the conversation."""
        auto, given = ask.options.truncation == "auto", [m for a in ask.messages for m in a.media]
        documents = any(map(_has_pages, given))
        if not (auto or documents) or ask.plain is not None:
            return ask
        wanted, most = ask.options.over(self.defaults).max_tokens, self.engine.max_position
        whole = Conversation.of(ask.messages) if auto else Conversation((), (), ask.messages)
        n_bytes = sum(message.n_bytes for message in (*whole.start, *whole.last))
        if not (documents or whole.steps) and 2 * n_bytes < most:
            return ask  # short, and nothing to leave out: not worth decoding its media for
        LORA.set(self._worn(ask))
        media = await self.encoder.measure(media_of(ask.messages), tenant=ask.tenant)
        pages = max((len(one.report.pages or ()) for one in media), default=1)
        least = min(wanted, LEAST_ANSWER)

        def tokens(short: Shortened, n: int = 1) -> int:
            views = (replace(one.view, most_pages=n) for one in given)
            seen = [one.within(view) for one, view in zip(media, views, strict=True)]
            shown = [seen[number] for number in short.kept]
            layout = self._layout(replace(ask, messages=short.messages), shown)
            return sum(map(len, layout))

        def fits(short: Shortened, n: int = 1) -> bool:
            n_bytes = sum(message.n_bytes for message in short.messages)
            return n_bytes <= BYTES_PER_TOKEN * most and tokens(short, n) + wanted <= most

        def fitted() -> tuple[Shortened, int, int]:
            short = whole.fitted(fits)  # with a page of each document; then with more
            n = bisect_left(range(1, pages + 1), True, key=lambda n: not fits(short, n))
            self.check_length(replace(ask, messages=short.messages))
            if short.pinned and tokens(short) + least > most:
                others = tokens(whole.unpinned.shortened(whole.unpinned.steps))
                if others + least <= most:
                    names = ", ".join(media[number].report.name for number in short.pinned)
                    raise ContextLengthError(
                        f"this model's maximum context length is {most} tokens, but the question "
                        f"takes {others}, the answer {least} or more, and the pinned media "
                        f"({names}) {tokens(short) - others}: unpin some of them"
                    )
            elif whole.start and tokens(short) + least > most:
                others = tokens(replace(short, messages=whole.last))
                if others + least <= most:
                    raise ContextLengthError(
                        f"this model's maximum context length is {most} tokens, but the question "
                        f"takes {others}, the answer {least} or more, and the system message "
                        f"{tokens(short) - others}: shorten the system message"
                    )
            return short, max(1, n), most - tokens(short, max(1, n))

        short, n, room = await self._tokenizing.run(ask.tenant, fitted)
        left_out: dict[str, Any] = {"turns_left_out": short.turns}
        left_out["media_left_out"] = ask.media_left_out + short.media
        options, messages = ask.options, short.messages
        if n < pages:
            messages = _viewed(messages, lambda part: replace(part.view, most_pages=n))
        if auto and LEAST_ANSWER <= room < wanted:
            options = options.model_copy(update={"max_tokens": room})
        return replace(ask, messages=messages, options=options, **left_out)

    # --- teaching ---

    @property
    def space(self) -> str | None:
        """The space in which names are taught (:class:`MicoAdapter`); None: none can be."""
        return mico.space_of(self.adapter)

    def say(self, names: Callable[[str, str], Awaitable[Sequence[TaughtName]]]) -> None:
        """Say the names that ``names`` gives for a tenant and a space, from the next request on."""

        async def names_of(tenant: str) -> Sequence[TaughtName]:
            return () if self.space is None else await names(tenant, self.space)

        self.encoder.names_of = names_of

    async def ids_of(self, name: str, tenant: str = "") -> tuple[int, ...]:
        """The tokens of a name; a :class:`RequestError` if the model cannot be taught to say it."""
        return await self._tokenizing.run(tenant, mico.teachable(self.adapter).ids_of, name)

    async def taught(self, name: str, media: Sequence[AnyMedium], tenant: str = "") -> TaughtName:
        """A name with the features of 1 to 5 media that show it, pictures or sounds.

        Raises:
            RequestError: the model cannot be taught the name, or not by these media.
            MediaError: a file is broken.
        """
        ids, kinds = await self.ids_of(name, tenant), sorted({medium.kind for medium in media})
        if not 1 <= len(media) <= MOST_EXAMPLES:
            reason = f"{len(media)} examples, but a request takes 1 to {MOST_EXAMPLES}"
            raise RequestError.at("examples", reason)
        if len(kinds) > 1 or NAMED_AS.get(kinds[0]) != kinds[0]:
            found = " and ".join(TABLE[kind].plural for kind in kinds)
            reason = f"{found}, but a name is taught by pictures alone or by sounds alone"
            raise RequestError.at("examples", reason)
        look = mico.teachable(self.adapter).examples
        return TaughtName(name, kinds[0], await self.encoder.looked_at(media, look, tenant), ids)

    async def retaught(
        self, name: str, kind: Kind, values: NDArray[np.float32], tenant: str = ""
    ) -> TaughtName:
        """A name of which another service of the same space gave the features (n, D).

        Raises:
            RequestError: they are not such features, or the model cannot say the name.
        """
        ids = await self.ids_of(name, tenant)
        widths = mico.mico_of(self.adapter).model.concepts.widths
        if values.shape[1:] != (widths.get(kind),) or not (np.abs(values) <= 1).all():
            reason = f"expected {widths.get(kind)} numbers from -1 to 1 for each example of {kind}"
            raise RequestError.at("features", f"{name!r}: {reason}, got {values.shape}")
        return TaughtName(name, kind, values, ids)

    # --- answers ---

    def check_length(self, ask: Ask) -> None:
        """Refuse text that cannot fit, before its media are encoded and it is tokenised or stored.

        Raises:
            ContextLengthError: it has more bytes than the model's context could hold.
        """
        messages = ask.messages
        if ask.options.truncation == "auto":  # all but what cannot be left out
            whole = Conversation.of(messages)
            messages = [*whole.start, *whole.last]
        n_bytes = sum(message.n_bytes for message in messages)
        n_bytes += len(ask.options.prefix.encode())
        check_bytes(n_bytes, self.engine.max_position, "messages")

    async def prepare(self, ask: Ask) -> tuple[Prompt, tuple[MediaReport, ...]]:
        """A question's prompt, and the report of each of its media.

        With a seed, no medium is encoded in a batch with others.
        """
        self.check_length(ask)
        alone = ask.options.seed is not None
        LORA.set(self._worn(ask))
        media = await self.encoder.encode(media_of(ask.messages), tenant=ask.tenant, alone=alone)
        prompt = await self._tokenizing.run(ask.tenant, self._prompt, ask, media)
        return prompt, tuple(medium.report for medium in media)

    @property
    def depth_model(self) -> str | None:
        """The model that estimates depth maps of pictures."""
        return None if self.encoder.depths is None else self.encoder.depths.name

    async def estimate(self, ask: Ask) -> Estimate:
        """How many tokens a question would take. Its media are decoded, but not encoded."""
        ask, media, layout = await self._laid_out(ask)
        n_tokens = sum(len(part) for part in layout)
        length = self.engine.max_position
        max_tokens = ask.options.over(self.defaults).max_tokens
        reports = tuple(medium.report for medium in media)
        return Estimate(
            prompt_tokens=n_tokens,
            media_tokens=sum(medium.all_tokens for medium in media),
            turns_left_out=ask.turns_left_out,
            media_left_out=ask.media_left_out,
            max_tokens=max_tokens,
            context_length=length,
            fits=n_tokens + max_tokens <= length,
            media=reports,
            explain_prompts=n_prompts(reports) if ask.options.explain else None,
        )

    async def _laid_out(self, ask: Ask) -> tuple[Ask, list[MeasuredMedium], PromptLayout]:
        ask = await self.shown(ask)
        self.check_length(ask)
        LORA.set(self._worn(ask))
        media = await self.encoder.measure(media_of(ask.messages), tenant=ask.tenant)
        return ask, media, await self._tokenizing.run(ask.tenant, self._layout, ask, media)

    async def tokens(self, ask: Ask, *, special: bool = True) -> tuple[int, ...]:
        """The tokens of a prompt of text; a plain one has the ``special`` ones around it or not."""
        if media_of(ask.messages):
            reason = "a medium has no token ids; /v1/estimate counts its tokens"
            raise RequestError.at("messages", reason)
        if ask.plain is None:
            _, _, layout = await self._laid_out(ask)
            return tuple(Prompt(segments_of(layout)).tokens(0, sum(map(len, layout)))[0])
        self.check_length(ask)
        plain = partial(prompt_parts.plain_tokens, special=special)
        return await self._tokenizing.run(ask.tenant, plain, self.adapter.tokenizer, ask.plain)

    async def text_of(self, ids: tuple[int, ...], tenant: str = "") -> str:
        """The text of tokens, markup too."""
        tokenizer = self.adapter.tokenizer
        check = partial(prompt_parts.plain_tokens, where="tokens")
        known = await self._tokenizing.run(tenant, check, tokenizer, ids)
        return str(tokenizer.backend_tokenizer.decode(known, False))

    async def scored(self, ask: Ask) -> list[TokenLogprob]:
        """The log-probability of each token of a plain prompt but the first, after those before it.

        Raises:
            RequestError: the engine scores no tokens that are given.
        """
        self._check_scores("echo")
        prompt = await self._tokenizing.run(ask.tenant, self._prompt, ask, ())
        prompt = replace(prompt, scored=len(prompt) - 1)
        return await score(self.engine, prompt, ask.options.logprobs or 0) if prompt.scored else []

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """The reports of the media, then the answer's deltas. Closing it stops the model."""
        ask = await self.shown(replace(ask, options=ask.options.over(self.defaults)))
        options = ask.options
        if options.prefix and options.form is not None:
            raise RequestError.at("prefix", f"it cannot be combined with {options.form[0]}")
        prompt, reports = await self.prepare(ask)
        ask = replace(ask, pages_sent=pages_sent(reports))
        yield reports
        if options.prefix:
            for index in range(options.n):
                yield Delta(index=index, text=options.prefix)
        deltas = self.engine.generate(prompt, options)
        for stage in (self._explained, self._marked, self._with_calls, self._counted):
            deltas = stage(ask, deltas)
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta

    # --- stages of an answer: each takes the deltas of the one before it, and closes it ---

    def _explained(self, ask: Ask, deltas: Deltas) -> Deltas:
        """Add what the answer rests on to the last delta, if the question wants to know."""
        if not ask.options.explain:
            return deltas
        if ask.options.n > 1:
            raise RequestError.at("explain", f"expected one answer, got n={ask.options.n}")
        self._check_explains(ask)

        async def events() -> Deltas:
            tokens: list[int] = []
            async with aclosing(deltas):
                async for delta in deltas:
                    tokens += delta.token_ids
                    if delta.usage is not None:
                        # Nobody should wait for them.
                        yield Delta(**{name: getattr(delta, name) for name in _WRITTEN})
                        if delta.finish_reason == "stop":  # the token that ends it is not shown
                            del tokens[-1:]
                        found = await self.explain(ask, tokens) if tokens else None
                        delta = delta.model_copy(update={**_WRITTEN, "explanation": found})
                    yield delta

        return events()

    def _counted(self, ask: Ask, deltas: Deltas) -> Deltas:
        """Say in the usage what was left out of the conversation."""
        names = ("turns_left_out", "media_left_out", "pages_sent")
        left_out = {name: getattr(ask, name) for name in names}
        if not any(left_out.values()):
            return deltas

        async def events() -> Deltas:
            async with aclosing(deltas):
                async for delta in deltas:
                    if delta.usage is not None:
                        usage = delta.usage.model_copy(update=left_out)
                        delta = delta.model_copy(update={"usage": usage})
                    yield delta

        return events()

    def _marked(self, ask: Ask, deltas: Deltas) -> Deltas:
        """Mark answers whose confidence is low."""
        marks = self.marks
        if marks is None:
            return deltas
        said: dict[int, str] = defaultdict(str)

        async def events() -> Deltas:
            async with aclosing(deltas):
                async for delta in deltas:
                    said[delta.index] += delta.text
                    if delta.confidence is not None:
                        unsure = marks.unsure(said[delta.index], delta.confidence)
                        delta = delta.model_copy(update={"unsure": unsure})
                    yield delta

        return events()

    def _with_calls(self, ask: Ask, deltas: Deltas) -> Deltas:
        """Tell calls of tools from text. One that must be made is written bare, by a schema."""
        use, form = ask.tools, calls.OBJECTS if ask.tools.forced else self.call_format
        if not use.chosen or form is None:
            return deltas

        async def events() -> Deltas:
            readers = [
                calls.CallReader(form, use.chosen, most=use.most) for _ in range(ask.options.n)
            ]
            async with aclosing(deltas):
                try:
                    async for delta in deltas:
                        for piece in pieces_of(delta, readers[delta.index]):
                            yield piece
                except RequestError as error:
                    _, found, reason = str(error).partition("json_schema: ")
                    if not (use.forced and found):
                        raise
                    reason = f"the model cannot be made to call a tool: {reason}"
                    raise RequestError.at(
                        "tool_choice", f"{reason}, or tool_choice auto"
                    ) from error

        return events()

    async def explain(self, ask: Ask, answer: str | Sequence[int]) -> Explanation:
        """What an answer to a question rests on; ``answer`` is its text, or its tokens.

        Raises:
            RequestError: there is no medium, no answer, or the engine scores no given answers.
        """
        self._check_explains(ask)
        ask = _without_thoughts(ask)
        if not answer:
            raise RequestError.at("explain", "the answer is empty")

        def prompt(variant: Sequence[MeasuredMedium]) -> Prompt:
            asked = self._prompt(ask, variant)
            if not isinstance(answer, str):
                return asked.with_answer(answer)
            update = {"prefix": ask.options.prefix + answer}
            options = ask.options.model_copy(update=update)
            whole = self._prompt(replace(ask, options=options), variant)
            return replace(whole, scored=len(whole) - len(asked))

        async def prompts(variants: Sequence[Sequence[MeasuredMedium]]) -> list[Prompt]:
            return [await self._tokenizing.run(ask.tenant, prompt, variant) for variant in variants]

        media = media_of(ask.messages)
        LORA.set(self._worn(ask))
        return await explain(self.engine, self.encoder, prompts, media, tenant=ask.tenant)

    def _check_explains(self, ask: Ask) -> None:
        self._check_scores("explain")
        if not media_of(ask.messages):
            raise RequestError.at("explain", "no medium, on which an answer could rest")

    def _check_scores(self, field: str) -> None:
        if not self.engine.scores:
            able = " and ".join(sorted(row.name for row in ENGINES.values() if row.scores))
            raise RequestError.at(field, f"the {self.engine.name} engine cannot; {able} can")

    async def answer(self, ask: Ask) -> Answer:
        gathered = GatheredAnswer(ask.options.n)
        async with aclosing(self.stream(ask)) as events:
            async for event in events:
                gathered.add(event)
        return gathered.answer()

    def answer_all(
        self, batch: Sequence[Sequence[Message]], options: GenerationOptions
    ) -> list[Answer]:
        """Answer conversations at the same time, in order, from code without an event loop."""
        return asyncio.run(_gathered(self.answer(Ask(messages, options)) for messages in batch))

    def try_all(
        self, batch: Sequence[Sequence[Message]], options: GenerationOptions, *, tenant: str = ""
    ) -> list[Answer | MicoError]:
        """Like :meth:`answer_all`; the error of a failed request takes the place of its answer."""

        async def one(messages: Sequence[Message]) -> Answer | MicoError:
            try:
                return await self.answer(Ask(messages, options, tenant))
            except MicoError as error:
                return error

        return asyncio.run(_gathered(map(one, batch)))

    # --- prompts ---

    def _layout(self, ask: Ask, media: Sequence[MeasuredMedium]) -> PromptLayout:
        if ask.plain is not None:
            return [prompt_parts.plain_tokens(self.adapter.tokenizer, ask.plain)]
        messages = with_system(ask.messages, self.system_prompt)
        return self.adapter.layout(messages, media, ask.options)

    def _prompt(self, ask: Ask, media: Sequence[MeasuredMedium]) -> Prompt:
        given: dict[str, Any] = {"tenant": ask.tenant, "lora": self._worn(ask)}
        prompt = Prompt(segments_of(self._layout(ask, media)))
        if ask.plain is not None:
            return replace(prompt, **given)
        used = any(message.tools for message in ask.messages)
        template = self.adapter.template
        thoughts = template.thoughts_before(ask.options)
        shown = template.call_tokens if used else frozenset()
        if thoughts is not None:
            shown |= template.thought_tokens
        common = equal_start(self._own_words(), prompt.identities)
        return replace(prompt, **given, shown=shown, common=common, thoughts=thoughts)

    def _own_words(self) -> Sequence[Hashable]:
        """The tokens with which each conversation without a system message begins.

        There are none if the chat template refuses such a conversation.
        """
        known, prompt = self._own_start, self.system_prompt
        if known is None or known[0] != prompt:
            try:
                asked = [self._layout(Ask([Message.user(text)]), ()) for text in "01"]
            except RequestError:
                asked = [(), ()]
            first, second = (Prompt(segments_of(layout)).identities for layout in asked)
            self._own_start = known = prompt, first[: equal_start(first, second)]
        return known[1]

    def close(self) -> None:
        self._tokenizing.close()
        self.engine.close()
        self.encoder.close()
        if self.similarity is not None:
            self.similarity.close()


def pieces_of(delta: Delta, reader: calls.CallReader) -> list[Delta]:
    """A delta as one delta for each piece of text or of a call that it completes.

    The first has the delta's log-probabilities and thoughts, the last all else.
    """
    ends = delta.finish_reason is not None
    pieces = [*reader.feed(delta.text), *(reader.finish() if ends else ())]
    parts: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, str):
            parts.append({"text": piece})
            continue
        if piece.name is not None:
            piece = replace(piece, id=f"call_{uuid.uuid4().hex[:24]}")
        parts.append({"text": "", "call": piece})
    if not parts:
        return [delta.model_copy(update={"text": ""})]
    found = [Delta(index=delta.index, **part) for part in parts[:-1]]
    found.append(delta.model_copy(update={**parts[-1], "logprobs": (), "reasoning_content": ""}))
    own = {"logprobs": delta.logprobs, "reasoning_content": delta.reasoning_content}
    found[0] = found[0].model_copy(update=own)
    return found


def pages_sent(reports: Sequence[MediaReport]) -> tuple[str, ...]:
    """What :class:`Usage` says of documents of which only some pages were shown."""
    sent = ((one.name, cut) for one in reports for cut in one.cut if SENT.search(cut))
    return tuple(f"{Path(name).name}: {cut}" for name, cut in sent)


def _has_pages(medium: AnyMedium) -> bool:
    return bool(TABLE[medium.kind].made_of)


def _viewed(messages: Sequence[Message], seen: Callable[[AnyMedium], View]) -> list[Message]:
    """Messages whose media are shown as ``seen`` says."""

    def one(part: Part) -> Part:
        return part if isinstance(part, TextPart) else replace(part, view=seen(part))

    return [replace(m, content=tuple(map(one, m.content))) for m in messages]


def _without_thoughts(ask: Ask) -> Ask:
    return replace(ask, options=ask.options.model_copy(update={"thinking": False}))


async def _gathered(answers: Iterable[Awaitable[T]]) -> list[T]:
    return await asyncio.gather(*answers)


def decode_media(messages: Sequence[Message], decoder: Decoder) -> list[Message]:
    """Messages whose files are decoded by ``decoder``; decoded media are kept."""
    return [message.with_files(decoder.decode) for message in messages]
