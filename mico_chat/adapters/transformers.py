"""Other open multimodal models of Hugging Face: those that ``AutoModelForMultimodalLM`` loads.

The model's processor gives the inputs of a medium (:mod:`mico_chat.adapters.processor`), the model
the rows of its tokens (:mod:`mico_chat.adapters.capture`).
"""

import inspect
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from mico_chat.adapters.capture import Capture, moved
from mico_chat.adapters.processor import ProcessorAdapter, Shown, of_frames, refused
from mico_chat.engine.base import Prompt
from mico_chat.errors import RequestError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import (
    SAMPLE_RATE,
    Audio,
    ContextBlock,
    Image,
    MeasuredMedium,
    Medium,
    Video,
)

ARGUMENTS: dict[Kind, str] = {"image": "images", "audio": "audio", "video": "videos"}
"""The processor takes each kind of medium by this argument."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The model's inputs for a medium, whose tokens are ``start`` to ``stop`` of the prompt."""

    tensors: Mapping[str, Tensor]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors.values())

    @property
    def shapes(self) -> Hashable:
        return self.stop, *((name, value.shape) for name, value in sorted(self.tensors.items()))


class TransformersAdapter(ProcessorAdapter):
    """See :class:`mico_chat.adapters.base.ModelAdapter`; ``name`` is the model's, for errors."""

    def __init__(self, model: nn.Module, processor: Any, name: str) -> None:
        super().__init__(processor, name)
        self.model: Any = model
        self._processing = threading.Lock()
        self.encodes = True
        """False for a model that runs alone: its blocks hold its own inputs, not rows."""
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._capture = cache(partial(Capture, model))
        parameters = inspect.signature(model.forward).parameters
        self._takes = None if "kwargs" in parameters else set(parameters)

    def _read(self, medium: Medium, n: int) -> tuple[Shown, int, Inputs]:
        output = self._processed(medium, n)
        (replaced,) = output.pop("text_replacement_offsets")
        ids: list[int] = output["input_ids"][0].tolist()
        start, stop = self._span(ids, first=n > 1)
        tensors = {
            name: value
            for name, value in output.items()
            if isinstance(value, Tensor) and (self._takes is None or name in self._takes)
        }
        shown = Shown(replaced[0]["replacement"], tuple(ids[start:stop]))
        return shown, stop - start, Inputs(tensors, start, stop)

    def _processed(self, medium: Medium, n: int) -> Any:
        """The processor's output for a conversation that shows a medium, ``n`` times."""
        settings: dict[str, Any] = {}
        content: Any
        if isinstance(medium, Video):
            content, settings = [[medium.frames]], of_frames(medium.times)
        elif isinstance(medium, Audio):
            content, settings = [medium.samples], {"sampling_rate": SAMPLE_RATE}
        else:
            assert isinstance(medium, Image)
            content = [[PIL.Image.fromarray(medium.pixels)] * n]
        text = self._alone(medium.kind, n)
        with refused(medium, f"the processor of {self._name}"), self._processing:
            return self.processor(
                text=[text],
                add_special_tokens=not self._begins(text),
                return_tensors="pt",
                return_text_replacement_offsets=True,
                **{ARGUMENTS[medium.kind]: content},
                **settings,
            )

    def encode(self, batch: Sequence[MeasuredMedium]) -> list[ContextBlock]:
        """Media whose inputs have equal shapes are computed in one forward."""
        if not self.encodes:
            return super().encode(batch)
        groups: dict[Hashable, list[MeasuredMedium]] = {}
        for one in batch:
            groups.setdefault(one.inputs.shapes, []).append(one)
        found: dict[int, ContextBlock] = {}
        for group in groups.values():
            tensors = [one.inputs.tensors for one in group]
            joined = {name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}
            rows, positions = self._capture().rows(joined)
            for row, one in enumerate(group):
                start, stop = one.inputs.start, one.inputs.stop
                block = ContextBlock(
                    rows[row, start:stop].to("cpu", torch.float32, copy=True), one.key
                )
                if positions is not None:
                    own = positions[:, row].cpu() - positions[-1, row, start].cpu()
                    n_positions = int(own[-1, stop])
                    block = replace(block, positions=own[-3:, start:stop], n_positions=n_positions)
                found[id(one)] = block
        return [found[id(one)] for one in batch]

    def why_not(self, prepared: MeasuredMedium) -> str | None:
        """Why a medium's rows do not do for the model; None if they do."""
        return self._capture().why_not(prepared.inputs.tensors)

    def whole_inputs(self, prompt: Prompt, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """The model's own inputs of a whole prompt; ``inputs`` are those of its one block."""
        ids: list[Tensor] = []
        of_tokens: dict[str, list[Tensor]] = {}  # such as which kind of medium a token is of
        media: dict[str, list[Tensor]] = {}
        for segment in prompt.segments:
            if not isinstance(segment, ContextBlock):
                ids.append(torch.tensor([segment]))
                continue
            own: Inputs = inputs or segment.inputs
            ids.append(own.tensors["input_ids"][:, own.start : own.stop])
            for name, value in own.tensors.items():
                if value.shape != own.tensors["input_ids"].shape:
                    media.setdefault(name, []).append(value)
                elif name not in ("input_ids", "attention_mask"):
                    of_tokens.setdefault(name, []).append(value[:, own.start : own.stop])
        try:
            found = {name: torch.cat(values) for name, values in media.items()}
        except RuntimeError as error:
            reason = "cannot be shown media of such different sizes together; show one at a time"
            raise RequestError(f"{self._name} runs alone, and {reason}") from error
        for name, values in of_tokens.items():
            waiting, zeros = iter(values), map(torch.zeros_like, ids)
            pairs = zip(prompt.segments, zeros, strict=True)
            rows = [next(waiting) if isinstance(one, ContextBlock) else zero for one, zero in pairs]
            found[name] = torch.cat(rows, 1)
        found["input_ids"] = torch.cat(ids, 1)
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        return moved(found, self._device, self._dtype)
