"""Models of GGUF files: a language model and the projector of its media, both for llama.cpp.

The chat template of the file is rendered with a marker for each message's content. Text that a user
types never becomes markup (:meth:`Vocabulary.joined`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from mico_chat.adapters.base import Prepared, PromptLayout
from mico_chat.adapters.mtmd import Part, Projector, Rows
from mico_chat.adapters.pictures import as_picture, smaller
from mico_chat.adapters.vocabulary import Vocabulary
from mico_chat.errors import RequestError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import (
    Audio,
    ContextBlock,
    Depth,
    EncodedMedium,
    Image,
    MeasuredMedium,
    Medium,
    Normal,
    Video,
)
from mico_chat.messages import Message, TextPart
from mico_chat.model.processing import MARKER, PromptText

TIME_EVERY_S = 5.0
"""A clip's time stands behind a frame at most every five seconds, as libmtmd writes it."""


class GgufAdapter:
    """See :class:`mico_chat.adapters.base.ModelAdapter`. Without a projector it reads text alone."""

    def __init__(self, vocabulary: Vocabulary, projector: Projector | None) -> None:
        self.tokenizer = vocabulary
        self._projector = projector
        kinds: list[Kind] = []
        if projector is not None:
            kinds += ["image", "video"] if projector.sees else []
            kinds += ["audio"] if projector.hears else []
        self.input_modalities: tuple[Kind, ...] = tuple(kinds)

    # --- media ------------------------------------------------------------------------------------

    def setting(self, shown: Sequence[Kind]) -> Hashable:
        return "mtmd"

    def prepare(self, medium: Medium, shown: Sequence[Kind]) -> Prepared:
        legend = ""
        cut: tuple[str, ...] = ()
        given: Audio | Image | Video
        if isinstance(medium, Depth | Normal):
            given, legend = as_picture(medium)
        elif isinstance(medium, Image | Video):
            given, cut = smaller(medium)
        else:
            given = medium
        assert self._projector is not None
        chunks = self._projector.chunks(medium.name, _parts(given))
        measured = MeasuredMedium(
            medium.kind,
            len(given.frames) if isinstance(given, Video) else 1,
            report=medium.report,
            n_tokens=sum(len(piece) for piece in chunks.pieces if isinstance(piece, Rows)),
            cut=cut,
            as_picture=bool(legend),
            notes=(chunks.pieces, legend),
        )
        return Prepared(measured, chunks)

    def encode(self, batch: Sequence[Prepared]) -> list[ContextBlock]:
        assert self._projector is not None
        encode = self._projector.encode
        return [ContextBlock(encode(one.inputs), one.key) for one in batch]

    # --- conversations ----------------------------------------------------------------------------

    def layout(
        self, messages: Sequence[Message], media: Sequence[MeasuredMedium], *, prefix: str = ""
    ) -> PromptLayout:
        contents = self._contents(messages, media)
        marked = [
            {"role": m.role, "content": f"{MARKER}{i}{MARKER}"} for i, m in enumerate(messages)
        ]
        parts: list[PromptText | MeasuredMedium] = []
        shown: list[int] = []
        for place, rendered in enumerate(self.tokenizer.rendered(marked).split(MARKER)):
            if place % 2 == 0:
                parts.append(PromptText(rendered, markup=True))
            else:
                shown.append(int(rendered))
                parts += contents[shown[-1]]
        with_media = [i for i, message in enumerate(messages) if message.media]
        if [i for i in shown if i in with_media] != with_media:
            raise RequestError(
                "the model's chat template leaves out a message with media", "messages"
            )
        parts.append(PromptText(prefix))
        segments = list(self._segments(parts))
        if not isinstance(segments[-1], tuple):
            raise RequestError(
                "the prompt ends with a medium: write something behind it", "messages"
            )
        first = segments[0] if isinstance(segments[0], tuple) else ()
        return [self.tokenizer.with_bos(first), *segments[bool(first) :]]

    def _contents(
        self, messages: Sequence[Message], media: Sequence[MeasuredMedium]
    ) -> list[list[PromptText | MeasuredMedium]]:
        """Each message's texts and media."""
        waiting = iter(media)
        contents = []
        for message in messages:
            content: list[PromptText | MeasuredMedium] = []
            for part in message.content:
                if isinstance(part, TextPart):
                    content.append(PromptText(part.text))
                    continue
                for own in next(waiting).with_track:
                    content.append(own)
                    content.append(PromptText(own.notes[1]))
            contents.append(content)
        return contents

    def _segments(
        self, parts: Sequence[PromptText | MeasuredMedium]
    ) -> Iterator[tuple[int, ...] | MeasuredMedium]:
        """Token ids and media, of which each part with markup around it is one."""
        ids: list[int] = []
        for is_text, run in groupby(parts, lambda part: isinstance(part, PromptText)):
            if is_text:
                ids += self.tokenizer.joined([part for part in run if isinstance(part, PromptText)])
                continue
            for medium in run:
                assert isinstance(medium, MeasuredMedium)
                row = 0
                for piece in medium.notes[0]:
                    if isinstance(piece, Rows):
                        if ids:
                            yield tuple(ids)
                        ids = []
                        yield _part_of(medium, row, piece)
                        row += len(piece)
                    else:
                        ids += piece
        if ids:
            yield tuple(ids)


def _parts(medium: Image | Audio | Video) -> list[Part]:
    """A medium as libmtmd gets it; a clip as libmtmd itself would show it."""
    if isinstance(medium, Image):
        return [medium.pixels]
    if isinstance(medium, Audio):
        return [medium.samples]
    parts: list[Part] = ["Video:"]
    due = 0.0
    for frame, time in zip(medium.frames, medium.times.tolist(), strict=True):
        parts.append(frame)
        if time >= due:
            parts.append(f"[{int(time // 60)}m{time % 60:.2f}s]")
            due += TIME_EVERY_S
    return parts


def _part_of(medium: MeasuredMedium, row: int, piece: Rows) -> MeasuredMedium:
    """Some of a medium's context tokens, as a medium of their own."""
    if not isinstance(medium, EncodedMedium):
        return replace(medium, n_tokens=len(piece))
    block = ContextBlock(
        medium.block.tokens[row : row + len(piece)],
        medium.block.key + row.to_bytes(4),
        piece.positions,
        piece.n_positions,
        piece.causal,
    )
    return replace(medium, n_tokens=len(piece), block=block)
