"""Models of GGUF files: a language model and the projector of its media, both for llama.cpp.

Text that a user types never becomes markup (:meth:`Vocabulary.joined`).
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from mico_chat.adapters.base import PromptLayout, check_settings, measured
from mico_chat.adapters.mtmd import Chunks, Part, Projector, Rows
from mico_chat.adapters.pictures import USUAL_FPS, Shown, roomy, within
from mico_chat.adapters.pictures import shown as shown_as
from mico_chat.adapters.vocabulary import Vocabulary
from mico_chat.chat_template import ChatTemplate
from mico_chat.errors import RequestError
from mico_chat.media.file import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import Audio, ContextBlock, Image, MeasuredMedium, Medium, Video
from mico_chat.media.view import View
from mico_chat.messages import Message
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.prompt_parts import Placeholders, PromptPart, PromptText

TIME_EVERY_S = 5.0
"""A clip's time stands behind a frame at most every five seconds, as libmtmd writes it."""


@dataclass(frozen=True)
class Notes:
    """A medium's markup and context tokens, and the ``legend`` of a map shown as a picture."""

    pieces: Sequence[tuple[int, ...] | Rows]
    legend: str


class GgufAdapter:
    """See :class:`mico_chat.adapters.base.ModelAdapter`; it reads text without a projector."""

    def __init__(self, vocabulary: Vocabulary, projector: Projector | None) -> None:
        self.tokenizer = vocabulary
        template: Any = vocabulary
        self.template = ChatTemplate(template)
        self._projector = projector
        self.input_modalities: tuple[Kind, ...] = () if projector is None else projector.kinds

    def setting(self, shown: Sequence[Kind]) -> Hashable:
        return "mtmd"

    def viewed(self, kind: Kind, view: View) -> View:
        check_settings(view, (), "with llama.cpp, image_min_tokens and image_max_tokens of")
        return roomy(view, USUAL_FPS)

    def prepare(self, medium: Medium, shown: Sequence[Kind]) -> MeasuredMedium:
        given, legend = shown_as(medium)
        assert self._projector is not None
        projector = self._projector

        def read(given: Shown, share: float) -> tuple[int, Chunks]:
            chunks = projector.chunks(medium.name, _parts(given))
            return sum(len(one) for one in chunks.pieces if isinstance(one, Rows)), chunks

        chunks, n_tokens, cut = within(given, read)
        units = len(given.frames) if isinstance(given, Video) else 1
        return measured(medium, units, n_tokens, cut, Notes(chunks.pieces, legend), chunks)

    def encode(self, batch: Sequence[MeasuredMedium]) -> list[ContextBlock]:
        assert self._projector is not None
        encode = self._projector.encode
        return [ContextBlock(encode(one.inputs), one.key) for one in batch]

    def layout(
        self,
        messages: Sequence[Message],
        media: Sequence[MeasuredMedium],
        options: GenerationOptions = GREEDY,
    ) -> PromptLayout:
        waiting = iter(media)
        shown: list[MeasuredMedium] = []

        def show(medium: MediaFile | Medium) -> list[PromptPart]:
            parts: list[PromptPart] = []
            for own in next(waiting).pieces:
                if isinstance(own, str):
                    parts.append(PromptText(own))
                    continue
                parts += [Placeholders(len(shown), own.n_tokens), PromptText(own.notes.legend)]
                shown.append(own)
            return parts

        parts = self.template.parts(messages, show, options)
        order = [part.token for part in parts if isinstance(part, Placeholders)]
        if order != list(range(len(shown))):
            reason = f"it shows {len(order)} of {len(shown)} media in their order"
            raise RequestError(f"the model's chat template: {reason}", "messages")
        segments = list(self._segments(parts, shown))
        if not isinstance(segments[-1], tuple):
            raise RequestError("the prompt ends with a medium: write text behind it", "messages")
        first = segments[0] if isinstance(segments[0], tuple) else ()
        return [self.tokenizer.with_bos(first), *segments[bool(first) :]]

    def _segments(
        self, parts: Sequence[PromptPart], shown: Sequence[MeasuredMedium]
    ) -> Iterator[tuple[int, ...] | MeasuredMedium]:
        """Token ids, and the context tokens of media between their markup."""
        ids: list[int] = []
        for is_text, run in groupby(parts, lambda part: isinstance(part, PromptText)):
            if is_text:
                ids += self.tokenizer.joined([part for part in run if isinstance(part, PromptText)])
                continue
            for part in run:
                assert isinstance(part, Placeholders)
                row = 0
                for piece in shown[part.token].notes.pieces:
                    if isinstance(piece, Rows):
                        if ids:
                            yield tuple(ids)
                        ids = []
                        yield _part_of(shown[part.token], row, piece)
                        row += len(piece)
                    else:
                        ids += piece
        if ids:
            yield tuple(ids)


def _parts(medium: Shown) -> list[Part]:
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
    if medium.block is None:
        return replace(medium, n_tokens=len(piece))
    tokens, key = medium.block.tokens[row : row + len(piece)], medium.block.key + row.to_bytes(4)
    block = ContextBlock(tokens, key, piece.positions, piece.n_positions, piece.causal)
    return replace(medium, n_tokens=len(piece), block=block)
