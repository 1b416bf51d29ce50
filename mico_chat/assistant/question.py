"""From a question to the prompt that an engine continues: what a model is shown of it."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mico_chat.adapters.base import segments_of, shown_kinds
from mico_chat.ask import LORA, Ask
from mico_chat.engine.base import Engine, Prompt, TakesLoras, equal_start
from mico_chat.errors import ContextLengthError, ModelError, RequestError
from mico_chat.explain import n_prompts
from mico_chat.fair import FairQueue
from mico_chat.fields import BYTES_PER_TOKEN, check_bytes
from mico_chat.late import late
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.media.medium import SENT, MeasuredMedium, MediaReport
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
from mico_chat.tools import call_schema
from mico_chat.wire import Estimate

with late():
    from mico_chat import calls, prompt_parts

if TYPE_CHECKING:
    from mico_chat.adapters.base import ModelAdapter, PromptLayout
    from mico_chat.checkpoints.lora import Lora
    from mico_chat.encode import AnyMedium, MediaEncoder

Q = TypeVar("Q", bound="Questions")


class Questions:
    """Makes prompts of questions for a loaded model.

    ``defaults`` are used for options that a request does not set, ``system_prompt`` for
    conversations without a system message, ``loras`` for media of their kind.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: MediaEncoder,
        *,
        name: str,
        defaults: GenerationOptions | None = None,
        system_prompt: str | None = None,
        loras: dict[Kind, Lora] | None = None,
    ) -> None:
        self.name = name
        self._loras = loras or {}
        self._lora: Lora | None = None
        self.defaults = defaults or GenerationOptions()
        self.system_prompt = system_prompt
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

    def wearing(self: Q, lora: Lora) -> Q:
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

    async def shown(self, ask: Ask) -> Ask:
        """The question as the model is shown it: with its tools, depth maps and a schema of calls.

        Raises:
            RequestError: the model has no tools, no estimator of depth is loaded, or the question
                is too long.
        """
        for stage in (
            self._with_read,
            self._with_depth_scale,
            self._with_depth,
            self._with_views,
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
        return without_thoughts(ask) if given else ask

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

        @cache  # tokenizing a long conversation takes time
        def tokens(short: Shortened, n: int) -> int:
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
            n = 1 + bisect_left(range(2, pages + 1), True, key=lambda n: not fits(short, n))
            self.check_length(replace(ask, messages=short.messages))
            if short.pinned and tokens(short, 1) + least > most:
                others = tokens(whole.unpinned.shortened(whole.unpinned.steps), 1)
                if others + least <= most:
                    names = ", ".join(media[number].report.name for number in short.pinned)
                    raise ContextLengthError(
                        f"this model's maximum context length is {most} tokens, but the question "
                        f"takes {others}, the answer {least} or more, and the pinned media "
                        f"({names}) {tokens(short, 1) - others}: unpin some of them"
                    )
            elif whole.start and tokens(short, 1) + least > most:
                others = tokens(replace(short, messages=whole.last), 1)
                if others + least <= most:
                    raise ContextLengthError(
                        f"this model's maximum context length is {most} tokens, but the question "
                        f"takes {others}, the answer {least} or more, and the system message "
                        f"{tokens(short, 1) - others}: shorten the system message"
                    )
            return short, n, most - tokens(short, n)

        short, n, room = await self._tokenizing.run(ask.tenant, fitted)
        left_out: dict[str, Any] = {"turns_left_out": short.turns}
        left_out["media_left_out"] = ask.media_left_out + short.media
        options, messages = ask.options, short.messages
        if n < pages:
            messages = _viewed(messages, lambda part: replace(part.view, most_pages=n))
        if auto and LEAST_ANSWER <= room < wanted:
            options = options.model_copy(update={"max_tokens": room})
        return replace(ask, messages=messages, options=options, **left_out)

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

    async def estimate(self, ask: Ask, *, read: bool = True) -> Estimate:
        """How many tokens a question would take. Its media are decoded, but not encoded; without
        ``read``, no text or speech in them is recognised and counted."""
        ask, media, layout = await self._laid_out(ask, read)
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

    async def _laid_out(
        self, ask: Ask, read: bool = True
    ) -> tuple[Ask, list[MeasuredMedium], PromptLayout]:
        ask = await self.shown(ask)
        self.check_length(ask)
        LORA.set(self._worn(ask))
        media = await self.encoder.measure(media_of(ask.messages), tenant=ask.tenant, read=read)
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


def without_thoughts(ask: Ask) -> Ask:
    return replace(ask, options=ask.options.model_copy(update={"thinking": False}))
