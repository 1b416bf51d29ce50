"""Answers conversations: media become context tokens, messages a prompt, an engine continues it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from mico_chat import __version__
from mico_chat.ask import LORA, Ask
from mico_chat.assistant.answered import Answer, AnswerChoice, Event, GatheredAnswer, answered
from mico_chat.assistant.question import Questions, pages_sent, without_thoughts
from mico_chat.checkpoints.marks import Marks
from mico_chat.engine.base import Delta, Engine, Prompt
from mico_chat.engines.table import ENGINES
from mico_chat.errors import MicoError, RequestError
from mico_chat.explain import explain, score
from mico_chat.late import late
from mico_chat.media.decoder import Decoder
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.media.medium import MeasuredMedium
from mico_chat.media.taught import MOST_EXAMPLES, NAMED_AS, TaughtName
from mico_chat.messages import Message, media_of
from mico_chat.options import GenerationOptions
from mico_chat.wire import Explanation, TokenLogprob

with late():
    from mico_chat.adapters import mico

if TYPE_CHECKING:
    from mico_chat.checkpoints.lora import Lora
    from mico_chat.encode import AnyMedium, CacheStats, MediaEncoder
    from mico_chat.similarity import Similarity

__all__ = [
    "Answer",
    "AnswerChoice",
    "Assistant",
    "Event",
    "GatheredAnswer",
    "decode_media",
    "pages_sent",
]

T = TypeVar("T")


class Assistant(Questions):
    """A loaded model that answers conversations. :meth:`close` closes its parts.

    ``similarity`` is None if the checkpoint lacks the text branch of stage 1. An answer about media
    is marked unsure if its confidence is below the mark of its kind; without ``marks`` no answer is
    marked. ``notes`` and ``loras`` are those of what was loaded
    (:class:`mico_chat.engines.base.Loaded`).
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
        super().__init__(
            engine,
            encoder,
            name=name,
            defaults=defaults,
            system_prompt=system_prompt,
            loras=loras,
        )
        self.notes, self.marks, self.similarity = tuple(notes), marks, similarity

    @property
    def fingerprint(self) -> str:
        """What computes the answers. With "varies" at the end, a seed does not repeat an answer."""
        name = f"mico-{__version__}-{self.engine.name}"
        return name if self.engine.repeats else f"{name}-varies"

    @property
    def context_cache(self) -> CacheStats:
        return self.encoder.cache.stats()

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
        if options.explain and options.n > 1:
            raise RequestError.at("explain", f"expected one answer, got n={options.n}")
        if options.explain:
            self._check_explains(ask)
        form, marks = self.call_format, self.marks
        deltas = answered(ask, deltas, explain=self.explain, marks=marks, call_format=form)
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta

    async def compute(self, ask: Ask) -> None:
        """Compute a question's prompt: answers to questions that begin like it then come sooner."""
        async with aclosing(self.stream(ask)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    return

    async def explain(self, ask: Ask, answer: str | Sequence[int]) -> Explanation:
        """What an answer to a question rests on; ``answer`` is its text, or its tokens.

        Raises:
            RequestError: there is no medium, no answer, or the engine scores no given answers.
        """
        self._check_explains(ask)
        ask = without_thoughts(ask)
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
