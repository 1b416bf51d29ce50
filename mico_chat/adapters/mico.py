"""MiCo-Chat's own adapter: encoder, context and bridge make context tokens of all five kinds."""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mico_chat.adapters.base import ModelAdapter, PromptLayout
from mico_chat.chat_template import ChatTemplate
from mico_chat.errors import ConfigError
from mico_chat.media.kinds import KINDS, MODALITIES, Kind
from mico_chat.media.medium import ContextBlock, MeasuredMedium, Medium
from mico_chat.messages import Message
from mico_chat.model.context import KindRows
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.model.splice import segments
from mico_chat.options import GREEDY, GenerationOptions


class TokenModel(Protocol):
    """A model that encodes media, such as a chat model."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def rows(self) -> KindRows: ...

    def context_tokens(
        self, media_kind: Tensor, media_units: Tensor, pixel_values: Tensor
    ) -> list[Tensor]:
        """Tokens (n, L) of each medium; ``media_kind``, ``media_units`` (M,), pixels (U, ...)."""


class MicoAdapter:
    """See :class:`mico_chat.adapters.base.ModelAdapter`."""

    def __init__(self, model: TokenModel, processor: MicoChatProcessor) -> None:
        self.model: Any = model  # evaluations switch parts of it off
        known = model.rows.by_name
        self.input_modalities: tuple[Kind, ...] = tuple(k for k in MODALITIES if k in known)
        self.processor = processor
        self.tokenizer = processor.tokenizer

    @property
    def template(self) -> ChatTemplate:
        return self.processor.template

    def setting(self, shown: Sequence[Kind]) -> Hashable:
        return self.processor.preprocessing

    def prepare(self, medium: Medium, shown: Sequence[Kind]) -> MeasuredMedium:
        units = self.processor.units(medium)
        measured = MeasuredMedium(medium.kind, len(units), report=medium.report, inputs=units)
        return self.processor.counted(measured)

    def encode(self, batch: Sequence[MeasuredMedium]) -> list[ContextBlock]:
        device, dtype = self.model.device, self.model.dtype
        units = [one.inputs for one in batch]
        with torch.inference_mode():
            tokens = self.model.context_tokens(
                torch.tensor([KINDS.index(one.kind) for one in batch], device=device),
                torch.tensor([one.units for one in batch], device=device),
                (torch.cat(units) if len(units) > 1 else units[0]).to(device, dtype),
            )
        # Copies on the CPU: views would keep the whole batch in memory.
        rows = [rows.to("cpu", torch.float32, copy=True) for rows in tokens]
        return [ContextBlock(own, one.key) for own, one in zip(rows, batch, strict=True)]

    def layout(
        self,
        messages: Sequence[Message],
        media: Sequence[MeasuredMedium],
        options: GenerationOptions = GREEDY,
    ) -> PromptLayout:
        ids, _ = self.processor.tokenize(messages, True, media, options)
        parts = [part for medium in media for part in medium.parts]
        return segments(ids, parts, self.processor.context_token_id)


def mico_of(adapter: ModelAdapter) -> MicoAdapter:
    """The adapter of a MiCo-Chat model; a :class:`ConfigError` for another model's."""
    if not isinstance(adapter, MicoAdapter):
        raise ConfigError("this works on a MiCo-Chat model alone, and another model is loaded")
    return adapter
