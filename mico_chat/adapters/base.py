"""The protocol of a model adapter: media to blocks of context tokens, conversations to prompts.

MiCo-Chat's adapter is :mod:`mico_chat.adapters.mico`; the other modules here are those of other
open models. The media encoder, the assistant and all behind them see this protocol alone.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from mico_chat.errors import RequestError
from mico_chat.media.kinds import KINDS, TABLE, Kind
from mico_chat.media.medium import ContextBlock, MeasuredMedium, Medium
from mico_chat.media.view import View
from mico_chat.messages import Message
from mico_chat.options import GREEDY, GenerationOptions

if TYPE_CHECKING:
    from mico_chat.chat_template import ChatTemplate
    from mico_chat.model.splice import Segment

UNIT = 1024
"""Tokens of a large picture that take as much memory while they are computed as a small picture."""

PromptLayout = Sequence[tuple[int, ...] | MeasuredMedium]
"""A prompt's parts in order: token ids, or the medium whose context tokens stand there."""


class ModelAdapter(Protocol):
    """One model's reading of media and conversations. Its methods may be called in any thread."""

    input_modalities: tuple[Kind, ...]
    """The kinds of medium that the model itself reads."""

    tokenizer: Any

    @property
    def template(self) -> ChatTemplate: ...

    def setting(self, shown: Sequence[Kind]) -> Hashable:
        """All that a medium's context tokens depend on, besides its content.

        ``shown`` are the kinds of all media of the conversation.
        """

    def viewed(self, kind: Kind, view: View) -> View:
        """The view of a medium with what to decode of it. Without ``tokens`` in it, the model shows
        each medium of the kind in one size.

        Raises:
            RequestError: the model has no settings as the view asks for; it says which ones it has.
        """

    def prepare(self, medium: Medium, shown: Sequence[Kind]) -> MeasuredMedium:
        """Preprocess a medium, in no more tokens than its view has if the model can, and count its
        context tokens; the media in it are left out."""

    def encode(self, batch: Sequence[MeasuredMedium]) -> list[ContextBlock]:
        """The context tokens of media with one ``lora``. One thread at a time calls it."""

    def layout(
        self,
        messages: Sequence[Message],
        media: Sequence[MeasuredMedium],
        options: GenerationOptions = GREEDY,
    ) -> PromptLayout:
        """A conversation's prompt. ``media`` are those of the messages, in order.

        The prompt ends with the ``prefix`` of the answer. One thread at a time calls it.
        """


def segments_of(layout: PromptLayout) -> tuple[Segment, ...]:
    """The segments of a prompt whose media are encoded."""
    return tuple(part.encoded if isinstance(part, MeasuredMedium) else part for part in layout)


def measured(
    medium: Medium, units: int, n_tokens: int, cut: tuple[str, ...], notes: Any, inputs: Any
) -> MeasuredMedium:
    """A medium that an adapter has prepared; the ``legend`` of its notes is that of a map."""
    units = max(units, n_tokens // UNIT)
    known = MeasuredMedium(medium.kind, units, report=medium.report, n_tokens=n_tokens, cut=cut)
    return replace(known, as_picture=bool(notes.legend), notes=notes, inputs=inputs)


def check_settings(view: View, known: Collection[str], why: str = "the model takes") -> None:
    """Refuse settings of a processor that are not ``known``; ``why`` stands before these."""
    for name in view.processor.keys() - set(known):
        reason = f"{why} {', '.join(known) or 'none'}; leave it out"
        raise RequestError.at(f"mm_processor_kwargs.{name}", reason)


def check_reads(adapter: ModelAdapter, name: str, kind: Kind) -> None:
    """Refuse a medium of a kind that the model cannot be shown in any form."""
    if kind in shown_kinds(adapter.input_modalities):
        return
    reads = ", ".join(TABLE[one].plural for one in adapter.input_modalities) or "text alone"
    found = TABLE[kind].words
    raise RequestError(f"{name}: this model cannot read {found}; it reads {reads}", kind)


def shown_kinds(input_modalities: Sequence[Kind]) -> tuple[Kind, ...]:
    """The kinds that a model can be shown: those that it reads itself, and those that are made
    of others, which bring their text.

    Maps become pictures for a model that reads pictures.
    """

    def can_be_shown(kind: Kind) -> bool:
        as_picture = TABLE[kind].is_map and "image" in input_modalities
        return kind in input_modalities or as_picture or bool(TABLE[kind].made_of)

    return tuple(kind for kind in KINDS if can_be_shown(kind))
