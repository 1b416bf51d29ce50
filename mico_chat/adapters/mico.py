"""MiCo-Chat's own adapter: encoder, context and bridge make context tokens of all five kinds."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mico_chat.adapters.base import ModelAdapter, PromptLayout, check_settings
from mico_chat.chat_template import ChatTemplate
from mico_chat.checkpoints import load as checkpoint
from mico_chat.errors import ConfigError, RequestError
from mico_chat.media.kinds import KINDS, MODALITIES, Kind
from mico_chat.media.medium import ContextBlock, MeasuredMedium, Medium
from mico_chat.media.taught import TaughtName
from mico_chat.media.view import View
from mico_chat.messages import Message
from mico_chat.model.context import KindRows
from mico_chat.model.media_path import Examples
from mico_chat.model.mini.taught import Taught
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
        self._tuned: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        known = model.rows.by_name
        self.input_modalities: tuple[Kind, ...] = tuple(k for k in MODALITIES if k in known)
        self.processor = processor
        self.tokenizer = processor.tokenizer

    @property
    def template(self) -> ChatTemplate:
        return self.processor.template

    def setting(self, shown: Sequence[Kind]) -> Hashable:
        return self.processor.preprocessing

    def viewed(self, kind: Kind, view: View) -> View:
        check_settings(view, ())
        return replace(view, tokens=None)  # one size, whatever the detail

    def prepare(self, medium: Medium, shown: Sequence[Kind]) -> MeasuredMedium:
        units = self.processor.units(medium)
        measured = MeasuredMedium(medium.kind, len(units), report=medium.report, inputs=units)
        return self.processor.counted(measured)

    def encode(self, batch: Sequence[MeasuredMedium], **more: Any) -> list[ContextBlock]:
        device, dtype = self.model.device, self.model.dtype
        units = [one.inputs for one in batch]
        taught = [self.taught_of(one.taught) if one.taught else None for one in batch]
        more |= {"taught": taught} if any(taught) else {}
        with torch.inference_mode():
            tokens = self._model_of(batch[0].lora).context_tokens(
                torch.tensor([KINDS.index(one.kind) for one in batch], device=device),
                torch.tensor([one.units for one in batch], device=device),
                (torch.cat(units) if len(units) > 1 else units[0]).to(device, dtype),
                **more,
            )
        # Copies on the CPU: views would keep the whole batch in memory.
        rows = [rows.to("cpu", torch.float32, copy=True) for rows in tokens]
        return [ContextBlock(own, one.key) for own, one in zip(rows, batch, strict=True)]

    def _model_of(self, lora: Any) -> Any:
        """The model that encodes media with an adapter: that of the adapter's own folder."""
        if lora is None:
            return self.model
        if lora not in self._tuned:
            held, device = self.model.dtype, str(self.model.device)
            self._tuned[lora] = checkpoint.load_encoder(lora.encoder, held, device)[0]
        return self._tuned[lora]

    @cached_property
    def space(self) -> str | None:
        """What taught names depend on: in another space they mean nothing. None: the model has no
        names, and so cannot be taught."""
        concepts = self.model.concepts
        return None if concepts is None else f"{concepts.space}-{len(self.tokenizer)}"

    def examples(self, batch: Sequence[MeasuredMedium]) -> NDArray[np.float32]:
        """The features (n, D) of media of one kind, by which a name is taught."""
        rows = self.encode(batch, parts=(Examples(self.model),))
        return np.concatenate([row.tokens.numpy() for row in rows])

    def ids_of(self, name: str) -> tuple[int, ...]:
        """The tokens of a name. One thread at a time calls it.

        Raises:
            RequestError: the name has more tokens than the model has places for.
        """
        ids, most = self.processor.words(f" {name}"), self.model.concepts.places
        if len(ids) > most:
            reason = f"{name!r} has {len(ids)} tokens, and {most} fit; teach a shorter name"
            raise RequestError.at("name", reason)
        return ids

    def taught_of(self, names: Sequence[TaughtName]) -> Taught:
        """Names of one kind, as the model takes them."""
        places, n = self.model.concepts.places, np.array([len(one.examples) for one in names])
        ids = torch.tensor([[*one.ids, *[-1] * (places - len(one.ids))] for one in names])
        means = torch.from_numpy(np.stack([one.examples.mean(0) for one in names]))
        most, less = LEAST[names[0].kind]
        least = torch.from_numpy(most - less / n)
        device = self.model.device
        return Taught(F.normalize(means, dim=-1).to(device), least.to(device), ids.to(device))

    def layout(
        self,
        messages: Sequence[Message],
        media: Sequence[MeasuredMedium],
        options: GenerationOptions = GREEDY,
    ) -> PromptLayout:
        ids, _ = self.processor.tokenize(messages, True, media, options)
        parts = [part for medium in media for part in medium.parts]
        return segments(ids, parts, self.processor.context_token_id)


LEAST: dict[Kind, tuple[float, float]] = {"image": (0.725, 0.04), "audio": (0.66, 0.06)}
"""A taught name is said from this cosine to the mean of its n examples on: the first number minus
the second one divided by n. A mean of few is farther from others. docs/serving.md has figures."""


def space_of(adapter: ModelAdapter) -> str | None:
    return adapter.space if isinstance(adapter, MicoAdapter) else None


def teachable(adapter: ModelAdapter) -> MicoAdapter:
    """The adapter of a model that can be taught names; a :class:`RequestError` for any other."""
    if space_of(adapter) is None:
        reason = "this model cannot be taught: it has no names of its own, as the mini has"
        raise RequestError.at("model", reason)
    return mico_of(adapter)


def mico_of(adapter: ModelAdapter) -> MicoAdapter:
    """The adapter of a MiCo-Chat model; a :class:`ConfigError` for another model's."""
    if not isinstance(adapter, MicoAdapter):
        raise ConfigError("this works on a MiCo-Chat model alone, and another model is loaded")
    return adapter
