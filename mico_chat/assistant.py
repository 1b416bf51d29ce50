"""Answers conversations: media become context tokens, messages a prompt, an engine continues it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Hashable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict

from mico_chat import __version__
from mico_chat.adapters.base import segments_of, shown_kinds
from mico_chat.calls import CallFormat
from mico_chat.engine.base import Delta, Engine, GenerationOptions, Prompt, equal_start
from mico_chat.engines.table import ENGINES
from mico_chat.errors import MicoError, ModelError, RequestError
from mico_chat.explain import explain, n_prompts
from mico_chat.fair import FairQueue
from mico_chat.fields import check_bytes
from mico_chat.media.decoder import Decoder
from mico_chat.media.file import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MeasuredMedium, MediaReport, Medium
from mico_chat.messages import Message, TextPart, media_of, without_depth
from mico_chat.wire import Choice, Estimate, Explanation, TokenLogprob, Usage

if TYPE_CHECKING:
    from mico_chat.adapters.base import ModelAdapter, PromptLayout
    from mico_chat.encode import CacheStats, MediaEncoder
    from mico_chat.similarity import Similarity


T = TypeVar("T")


class Answer(BaseModel):
    """A finished answer, its usage, and the report of each medium in the request's order."""

    model_config = ConfigDict(frozen=True)

    choices: tuple[Choice, ...]
    usage: Usage
    media: tuple[MediaReport, ...] = ()
    explanation: Explanation | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text


class GatheredAnswer:
    """Joins the items of :meth:`Assistant.stream` to the whole answer.

    ``texts`` is the text so far of each of the ``n`` choices; ``reports`` are those of the media.
    """

    def __init__(self, n: int) -> None:
        self.texts = [""] * n
        self.reports: tuple[MediaReport, ...] = ()
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in self.texts]
        self._ends = [Delta()] * n
        self._usage: Usage | None = None
        self._explanation: Explanation | None = None

    def add(self, item: Delta | tuple[MediaReport, ...]) -> None:
        if not isinstance(item, Delta):
            self.reports = item
            return
        self.texts[item.index] += item.text
        self._logprobs[item.index] += item.logprobs
        if item.finish_reason is not None:
            self._ends[item.index] = item
        self._usage = item.usage or self._usage
        self._explanation = item.explanation or self._explanation

    def answer(self) -> Answer:
        if self._usage is None:
            raise ModelError("the answer has not ended")
        choices = tuple(
            Choice(
                text=text,
                finish_reason=end.finish_reason or "length",
                logprobs=tuple(values),
                confidence=end.confidence,
                unsure=end.unsure,
            )
            for text, end, values in zip(self.texts, self._ends, self._logprobs, strict=True)
        )
        return Answer(
            choices=choices,
            usage=self._usage,
            media=self.reports,
            explanation=self._explanation,
        )


class Assistant:
    """A loaded model that answers conversations. :meth:`close` closes its parts.

    ``defaults`` are used for options that a request does not set, ``system_prompt`` for
    conversations without a system message. ``similarity`` is None if the checkpoint lacks the text
    branch of stage 1. An answer about media is marked unsure if its confidence is below
    ``unsure_below``; if that is None, no answer is marked.
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
        unsure_below: float | None = None,
    ) -> None:
        self.name = name
        self.defaults = defaults or GenerationOptions()
        self.system_prompt = system_prompt
        self.unsure_below = unsure_below
        self.similarity = similarity
        self.engine = engine
        self.encoder = encoder
        # The tokenizer is switched between markup and a user's text: one thread at a time.
        self._tokenizing = FairQueue(1, most=1, name="mico-tokenize")
        self._own_start: tuple[str | None, Sequence[Hashable]] | None = None

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
    def call_format(self) -> CallFormat | None:
        """How the model writes calls of tools; None if it calls none."""
        return self.adapter.template.call_format

    @property
    def context_cache(self) -> CacheStats:
        return self.encoder.cache.stats()

    def check_length(self, messages: Sequence[Message], prefix: str = "") -> None:
        """Refuse text that cannot fit, before its media are encoded and it is tokenised or stored.

        Raises:
            ContextLengthError: it has more bytes than the model's context could hold.
        """
        n_bytes = sum(message.n_bytes for message in messages) + len(prefix.encode())
        check_bytes(n_bytes, self.engine.max_position, "messages")

    async def prepare(
        self, messages: Sequence[Message], *, prefix: str = "", salt: str = "", alone: bool = False
    ) -> tuple[Prompt, tuple[MediaReport, ...]]:
        """A conversation's prompt, and the report of each of its media.

        ``prefix`` is the beginning of the answer. Only conversations with the same ``salt`` share
        encoded media and computed tokens, besides those of the system prompt: give each tenant
        its own salt. ``alone``: no medium is encoded in a batch with others.
        """
        self.check_length(messages, prefix)
        media = await self.encoder.encode(media_of(messages), salt=salt, alone=alone)
        prompt = await self._tokenizing.run(salt, self._prompt, messages, media, prefix, salt)
        return prompt, tuple(medium.report for medium in media)

    @property
    def depth_model(self) -> str | None:
        """The model that estimates depth maps of pictures."""
        return None if self.encoder.depths is None else self.encoder.depths.name

    async def depth_of(self, picture: MediaFile | Medium, *, salt: str = "") -> MediaFile:
        """The depth map of a picture, estimated from it alone: a file that says so.

        Raises:
            RequestError: no estimator is loaded.
        """
        return await self.encoder.estimated(picture, salt=salt)

    async def with_depth(self, messages: Sequence[Message], *, salt: str = "") -> list[Message]:
        """The messages; a depth map that is estimated from it stands behind each picture.

        A message that has a depth map gets none.

        Raises:
            RequestError: no estimator is loaded.
        """
        self.encoder.check_estimates()
        found = []
        for message in messages:
            parts = list(message.content)
            places = [at for at, part in enumerate(parts) if not isinstance(part, TextPart)]
            for number in reversed(without_depth(message.media)):
                at = places[number]
                parts.insert(at + 1, await self.depth_of(message.media[number], salt=salt))
            found.append(replace(message, content=tuple(parts)))
        return found

    async def estimate(
        self, messages: Sequence[Message], options: GenerationOptions, *, salt: str = ""
    ) -> Estimate:
        """How many tokens a request would take. Its media are decoded, but not encoded."""
        self.check_length(messages, options.prefix)
        media = await self.encoder.measure(media_of(messages), salt=salt)
        layout = await self._tokenizing.run(salt, self._layout, messages, media, options.prefix)
        n_tokens = sum(len(part) for part in layout)
        length = self.engine.max_position
        max_tokens = options.over(self.defaults).max_tokens
        return Estimate(
            prompt_tokens=n_tokens,
            media_tokens=sum(medium.all_tokens for medium in media),
            max_tokens=max_tokens,
            context_length=length,
            fits=n_tokens + max_tokens <= length,
            media=tuple(medium.report for medium in media),
            explain_prompts=n_prompts([one.report for one in media]) if options.explain else None,
        )

    async def stream(
        self, messages: Sequence[Message], options: GenerationOptions, *, salt: str = ""
    ) -> AsyncGenerator[Delta | tuple[MediaReport, ...], None]:
        """The reports of the media, then the answer's deltas. Closing it stops the model."""
        prefix = options.prefix
        if prefix and options.json_schema is not None:
            raise RequestError("prefix: it cannot be combined with json_schema", "prefix")
        options = options.over(self.defaults)
        seeded = options.seed is not None
        prompt, reports = await self.prepare(messages, prefix=prefix, salt=salt, alone=seeded)
        yield reports
        if prefix:
            for index in range(options.n):
                yield Delta(index=index, text=prefix)
        if options.explain:
            if options.n > 1:
                raise RequestError.at("explain", f"expected one answer, got n={options.n}")
            self._check_explains(len(reports))
        tokens: list[int] = []
        async with aclosing(self.engine.generate(prompt, options)) as deltas:
            async for delta in deltas:
                tokens += delta.token_ids
                if options.explain and delta.usage is not None:
                    if delta.text or delta.logprobs:  # nobody should wait for them
                        yield Delta(text=delta.text, logprobs=delta.logprobs)
                    if delta.finish_reason == "stop":  # the token that ends it is not shown
                        del tokens[-1:]
                    update: dict[str, Any] = {"text": "", "logprobs": ()}
                    if tokens:
                        update["explanation"] = await self.explain(
                            messages, tokens, prefix=prefix, salt=salt
                        )
                    delta = delta.model_copy(update=update)
                yield self._marked(delta)

    async def explain(
        self,
        messages: Sequence[Message],
        answer: str | Sequence[int],
        *,
        prefix: str = "",
        salt: str = "",
    ) -> Explanation:
        """What an answer to a conversation rests on; ``answer`` is its text, or its tokens.

        Raises:
            RequestError: there is no medium, no answer, or the engine scores no given answers.
        """
        media = media_of(messages)
        self._check_explains(len(media))
        if not answer:
            raise RequestError.at("explain", "the answer is empty")

        def prompt(variant: Sequence[MeasuredMedium]) -> Prompt:
            asked = self._prompt(messages, variant, prefix, salt)
            if not isinstance(answer, str):
                return asked.with_answer(answer)
            whole = self._prompt(messages, variant, prefix + answer, salt)
            return replace(whole, scored=len(whole) - len(asked))

        async def laid(variants: Sequence[Sequence[MeasuredMedium]]) -> list[Prompt]:
            return [await self._tokenizing.run(salt, prompt, variant) for variant in variants]

        return await explain(self.engine, self.encoder, laid, media, salt=salt)

    def _check_explains(self, media: int) -> None:
        if not self.engine.scores:
            able = " and ".join(sorted(row.name for row in ENGINES.values() if row.scores))
            raise RequestError.at("explain", f"the {self.engine.name} engine cannot; {able} can")
        if not media:
            raise RequestError.at("explain", "no medium, on which an answer could rest")

    def _marked(self, delta: Delta) -> Delta:
        if self.unsure_below is None or delta.confidence is None:
            return delta
        return delta.model_copy(update={"unsure": delta.confidence < self.unsure_below})

    async def answer(
        self, messages: Sequence[Message], options: GenerationOptions, *, salt: str = ""
    ) -> Answer:
        gathered = GatheredAnswer(options.n)
        stream = self.stream(messages, options, salt=salt)
        async with aclosing(stream) as items:
            async for item in items:
                gathered.add(item)
        return gathered.answer()

    def answer_all(
        self, batch: Sequence[Sequence[Message]], options: GenerationOptions
    ) -> list[Answer]:
        """Answer conversations at the same time, in order, from code without an event loop."""
        return asyncio.run(_gathered(self.answer(messages, options) for messages in batch))

    def try_all(
        self, batch: Sequence[Sequence[Message]], options: GenerationOptions, *, salt: str = ""
    ) -> list[Answer | MicoError]:
        """Like :meth:`answer_all`; the error of a failed request takes the place of its answer."""

        async def one(messages: Sequence[Message]) -> Answer | MicoError:
            try:
                return await self.answer(messages, options, salt=salt)
            except MicoError as error:
                return error

        return asyncio.run(_gathered(map(one, batch)))

    def _layout(
        self, messages: Sequence[Message], media: Sequence[MeasuredMedium], prefix: str
    ) -> PromptLayout:
        if self.system_prompt is not None and all(m.role != "system" for m in messages):
            messages = [Message.system(self.system_prompt), *messages]
        return self.adapter.layout(messages, media, prefix=prefix)

    def _prompt(
        self, messages: Sequence[Message], media: Sequence[MeasuredMedium], prefix: str, salt: str
    ) -> Prompt:
        prompt = Prompt(segments_of(self._layout(messages, media, prefix)))
        calls = any(message.tools for message in messages)
        shown = self.adapter.template.call_tokens if calls else frozenset()
        unsalted = equal_start(self._own_words(), prompt.identities)
        return replace(prompt, salt=salt, shown=shown, unsalted=unsalted)

    def _own_words(self) -> Sequence[Hashable]:
        """The tokens with which each conversation without a system message begins.

        There are none if the chat template refuses such a conversation.
        """
        known, prompt = self._own_start, self.system_prompt
        if known is None or known[0] != prompt:
            try:
                asked = [self._layout([Message.user(text)], (), "") for text in "01"]
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


async def _gathered(answers: Iterable[Awaitable[T]]) -> list[T]:
    return await asyncio.gather(*answers)


def decode_media(messages: Sequence[Message], decoder: Decoder) -> list[Message]:
    """Messages whose files are decoded by ``decoder``; decoded media are kept."""
    return [message.with_files(decoder.decode) for message in messages]
