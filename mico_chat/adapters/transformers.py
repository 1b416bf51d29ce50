"""Other open multimodal models of Hugging Face: those that ``AutoModelForMultimodalLM`` loads.

The model's processor gives the inputs of a medium (:mod:`mico_chat.adapters.processor`), the model
the rows of its tokens (:mod:`mico_chat.adapters.capture`).
"""

import inspect
import re
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from mico_chat.adapters.base import PromptLayout
from mico_chat.adapters.capture import Capture, moved
from mico_chat.adapters.pictures import Shown as AnyShown
from mico_chat.adapters.processor import HALF_MINUTES, ProcessorAdapter, Shown, of_frames, refused
from mico_chat.checkpoints.lora import wearing
from mico_chat.engine.base import Prompt
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
from mico_chat.prompt_parts import PromptText, control_tokens

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


@dataclass(frozen=True, eq=False)
class Given:
    """A medium of a model that runs alone, whose processor gets it with the whole prompt."""

    medium: Any

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.medium.own_arrays)


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
        config: Any = model.config
        named = [f"{kind}_token_{end}" for kind in self._marks for end in ("id", "index")]
        self._placeholders |= {vars(config)[name] for name in named if name in vars(config)}
        words = {*control_tokens(self.tokenizer).values(), *self._marks.values()} - {""}
        self._markup = re.compile("|".join(map(re.escape, sorted(words, reverse=True))))
        # MiniMax-M3's processor leaves it to its caller to scale clips to whole patches.
        scaled = getattr(processor, "videos_kwargs", {}).get("do_resize", True)
        self._scaling = {} if scaled else {"do_resize": True}
        self._takes = None if "kwargs" in parameters else set(parameters)

    def _read(
        self, medium: AnyShown, n: int, settings: Mapping[str, Any]
    ) -> tuple[Shown, int, Any]:
        marks = self._alone(medium.kind, n)
        asked = {**settings, "return_text_replacement_offsets": True}
        if not self.encodes:  # later the processor gets all media, with what the request says
            asked = dict(medium.view.processor)
        output = self._processed(marks, [medium] * n, asked)
        ids: list[int] = output["input_ids"][0].tolist()
        if not self.encodes:
            text = self.tokenizer(self._alone(medium.kind, 0)).input_ids
            has = any(token in self._placeholders for token in ids)
            start, stop = self._span(ids, first=n > 1) if has else (0, len(ids) - len(text))
            shown = Shown(self._marks[medium.kind], tuple(ids[start:stop]), medium=medium)
            return shown, max(0, stop - start), Given(medium)
        (replaced,) = output.pop("text_replacement_offsets")
        start, stop = self._span(ids, first=n > 1)
        tensors = {
            name: value
            for name, value in output.items()
            if isinstance(value, Tensor) and (self._takes is None or name in self._takes)
        }
        shown = Shown(replaced[0]["replacement"], tuple(ids[start:stop]))
        return shown, stop - start, Inputs(tensors, start, stop)

    def _processed(self, text: str, media: Sequence[Medium], asked: Mapping[str, Any]) -> Any:
        """The processor's output for a prompt with its marks of ``media``, in order, with the
        settings that are ``asked`` for."""
        given: dict[str, list[Any]] = {}
        settings: dict[str, Any] = dict(asked)
        for medium in media:
            of_kind = given.setdefault(ARGUMENTS[medium.kind], [])
            if isinstance(medium, Video):
                of_kind.append(medium.frames)
                earlier = settings.get("video_metadata", [])
                settings |= of_frames(medium.times, medium.report.seconds) | self._scaling
                settings["video_metadata"] = [*earlier, *settings["video_metadata"]]
            elif isinstance(medium, Audio):
                of_kind.append(medium.samples)
                settings["sampling_rate"] = SAMPLE_RATE
            else:
                assert isinstance(medium, Image)
                of_kind.append(PIL.Image.fromarray(medium.pixels))
        nested = {n: v if n == ARGUMENTS["audio"] else [v] for n, v in given.items()}
        with refused(media[0], f"the processor of {self._name}"), self._processing:
            if hasattr(self.processor, HALF_MINUTES):
                return self._of_half_minutes(text, given["audio"])
            return self.processor(
                text=[text],
                add_special_tokens=not self._begins(text),
                return_tensors="pt",
                **nested,
                **settings,
            )

    def _of_half_minutes(self, text: str, sounds: Sequence[Any]) -> Any:
        """The inputs of sounds that Voxtral's processor makes, which itself takes sounds only from
        the tokenizer of its authors (mistral-common): half minutes of features."""
        features = getattr(self.processor, HALF_MINUTES)
        settings = dict(self.processor._merge_kwargs()["audio_kwargs"])
        length = settings.pop("max_source_positions")
        tower, mark = self.model.config.audio_config, self._marks["audio"]
        parts = [features([one], length, **settings) for one in sounds]
        each = tower.max_source_positions * tower.hidden_size // tower.intermediate_size
        marks = [mark * (len(part) * each) for part in parts]
        first, *texts = text.split(mark)
        text = first + "".join(own + after for own, after in zip(marks, texts, strict=True))
        begins = self._begins(text)
        found = self.tokenizer(text, add_special_tokens=not begins, return_tensors="pt")
        offsets = {"text_replacement_offsets": [[{"replacement": own} for own in marks]]}
        return {**found, "input_features": torch.cat(parts), **(offsets if self.encodes else {})}

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
            with wearing(group[0].lora):
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

    def whole_inputs(self, prompt: Prompt) -> dict[str, Any]:
        """The model's own inputs of a whole prompt, of a model that runs alone."""
        if prompt.blocks:  # each has those of the whole
            found: Any = prompt.blocks[0][1].inputs
        else:
            ids = torch.tensor([prompt.tokens(0, len(prompt))[0]])
            found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return dict(moved(found, self._device, self._dtype))

    def _joined(self, parts: Sequence[PromptText], shown: Sequence[MeasuredMedium]) -> PromptLayout:
        """Of a model that runs alone, the processor itself puts the text and all media together."""
        if self.encodes or not shown:
            return super()._joined(parts, shown)
        template = "".join(part.text for part in parts if part.markup)
        marked = any(mark in template for mark in self._marks.values())
        order = self._expanded(parts, shown)[1] if marked else shown  # some need no marks
        text = "".join(part.text if part.markup else self._plain(part.text) for part in parts)
        given = [one.notes.medium for one in order]
        asked = {name: v for one in given for name, v in one.view.processor.items()}
        output = self._processed(text, given, asked)
        ids: list[int] = output["input_ids"][0].tolist()
        layout: list[tuple[int, ...] | MeasuredMedium] = []
        at = 0
        for one in order:
            start, stop = self._found(ids, at, one.notes.ids)
            if start > at:
                layout.append(tuple(ids[at:start]))
            block = ContextBlock(torch.zeros(stop - start, 0), one.key, inputs=output)
            layout.append(replace(one, n_tokens=len(block), block=block))
            at = stop
        return [*layout, tuple(ids[at:])] if at < len(ids) else layout

    def _found(self, ids: Sequence[int], at: int, own: Sequence[int]) -> tuple[int, int]:
        """Where a medium is: its ``own`` tokens or, in other company, as many from its first."""
        places = range(at, len(ids) - len(own) + 1)
        equal = (place for place in places if tuple(ids[place : place + len(own)]) == own)
        first = (place for place in range(at, len(ids)) if ids[place] in self._placeholders)
        start = next(equal, next(first, at)) if own else at
        return start, min(start + len(own), len(ids))

    def _plain(self, text: str) -> str:
        """A client's text without markup: an invisible sign parts what would be a control token."""
        return self._markup.sub(lambda found: f"{found[0][0]}\u2060{found[0][1:]}", text)
