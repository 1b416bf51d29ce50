"""Other open multimodal models of Hugging Face: those that ``AutoModelForMultimodalLM`` loads.

A medium is preprocessed by the model's own processor, in a short conversation that shows it alone.
There the processor says how the medium stands in a prompt, as text with placeholders, and the model
gives the rows of its tokens (:mod:`mico_chat.adapters.capture`). A prompt is the model's own chat
template, in which this text takes the medium's place. Only markup of the template becomes control
tokens: what people write is rendered as a mark, and tokenized apart
(:mod:`mico_chat.chat_template`).

The processors get arrays that this project's decoder made, never a URL or a path.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from mico_chat.adapters.base import Prepared, PromptLayout
from mico_chat.adapters.capture import Capture
from mico_chat.adapters.pictures import as_picture, smaller
from mico_chat.chat_template import ChatTemplate
from mico_chat.engine.base import Prompt
from mico_chat.errors import ConfigError, ModelError, RequestError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import (
    SAMPLE_RATE,
    Audio,
    ContextBlock,
    Depth,
    Image,
    MeasuredMedium,
    Medium,
    Normal,
    Video,
)
from mico_chat.messages import Message, TextPart
from mico_chat.prompt_parts import PromptText, string_tokenizer

ARGUMENTS: dict[Kind, str] = {"image": "images", "audio": "audio", "video": "videos"}
"""The processor's argument for each kind of medium."""

TICKS = 1000
"""Frames a second of the file that a processor is told of: a frame's number is its time in ms."""


LEAST_SAMPLES = SAMPLE_RATE // 10
"""A shorter sound gets silence behind it: of less than 50 ms some models make no token."""


@dataclass(frozen=True, eq=False)
class Shown:
    """How a medium stands in a prompt.

    ``text`` takes the place of the template's one placeholder; ``ids`` are the tokens that the
    context tokens replace; ``legend`` explains a map that is shown as a picture.
    """

    text: str
    ids: tuple[int, ...]
    legend: str = ""


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


class TransformersAdapter:
    """See :class:`mico_chat.adapters.base.ModelAdapter`; ``name`` is the model's, for errors."""

    def __init__(self, model: nn.Module, processor: Any, name: str) -> None:
        self.model: Any = model
        # A copy, with a tokenizer of its own: a tokenizer has switches, which each call turns.
        self.processor = deepcopy(processor)
        self._processing = threading.Lock()
        self.tokenizer = processor.tokenizer
        self._begin: list[int] = self.tokenizer("").input_ids
        self.encodes = True
        """False for a model that runs alone: its blocks hold its own inputs, not rows."""
        self._name = name
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._capture = cache(partial(Capture, model))
        self._tokens = string_tokenizer(self.tokenizer)
        self.template = ChatTemplate(self.tokenizer, processor.chat_template)
        # SmolVLM's processor has a template of its own for conversations with clips.
        own = getattr(sys.modules[type(processor).__module__], "DEFAULT_CHAT_TEMPLATE", None)
        self._of_clips = self.template if own is None else ChatTemplate(self.tokenizer, own)
        self.input_modalities = reads(processor)
        parameters = inspect.signature(model.forward).parameters
        self._takes = None if "kwargs" in parameters else set(parameters)
        self._marks = {k: str(getattr(processor, f"{k}_token")) for k in self.input_modalities}
        ids = (getattr(processor, f"{k}_token_id", None) for k in self.input_modalities)
        self._placeholders = {token for token in ids if token is not None}
        self._alone = cache(self._rendered_alone)
        self._of_turns = set(self.tokenizer(self._alone("image", 0)).input_ids)

    # --- media ------------------------------------------------------------------------------------

    def setting(self, shown: Sequence[Kind]) -> Hashable:
        return "image" in self.input_modalities and self._several(shown)

    def _several(self, shown: Sequence[Kind]) -> bool:
        """Whether a picture is processed as one of several, which LLaVA-OneVision does differently:
        it cuts a single picture into tiles.
        """
        names = getattr(self.processor.image_processor, "model_input_names", ())
        n = sum(kind in ("image", "depth", "normal") for kind in shown)
        return n > 1 and "batch_num_images" in names

    def prepare(self, medium: Medium, shown: Sequence[Kind]) -> Prepared:
        cut: tuple[str, ...] = ()
        legend = ""
        if isinstance(medium, Depth | Normal):
            picture, legend = as_picture(medium)
        if isinstance(medium, Audio):
            medium, cut = self._fitted(medium)
        elif isinstance(medium, Image | Video):
            medium, cut = smaller(medium)
        given = picture if legend else medium
        n = 2 if isinstance(given, Image) and self._several(shown) else 1  # the first one counts
        output = self._processed(given, n)
        (replaced,) = output.pop("text_replacement_offsets")
        ids: list[int] = output["input_ids"][0].tolist()
        start, stop = self._span(ids, first=n > 1)
        tensors = {
            name: value
            for name, value in output.items()
            if isinstance(value, Tensor) and (self._takes is None or name in self._takes)
        }
        notes = Shown(replaced[0]["replacement"], tuple(ids[start:stop]), legend)
        units = len(medium.frames) if isinstance(medium, Video) else n
        measured = MeasuredMedium(
            medium.kind,
            units,
            report=medium.report,
            n_tokens=stop - start,
            cut=cut,
            as_picture=bool(legend),
            notes=notes,
        )
        return Prepared(measured, Inputs(tensors, start, stop))

    def _processed(self, medium: Medium, n: int) -> Any:
        """The processor's output for a conversation that shows a medium, ``n`` times."""
        settings: dict[str, Any] = {}
        content: Any
        if isinstance(medium, Video):
            frames, times = medium.frames, medium.times
            if len(frames) == 1:  # Qwen3-VL needs two
                frames, times = frames.repeat(2, 0), times.repeat(2)
            content, settings = [[frames]], _of_frames(times)
        elif isinstance(medium, Audio):
            content, settings = [medium.samples], {"sampling_rate": SAMPLE_RATE}
        else:
            assert isinstance(medium, Image)
            content = [[PIL.Image.fromarray(medium.pixels)] * n]
        text = self._alone(medium.kind, n)
        try:
            with self._processing:
                return self.processor(
                    text=[text],
                    add_special_tokens=not self._begins(text),
                    return_tensors="pt",
                    return_text_replacement_offsets=True,
                    **{ARGUMENTS[medium.kind]: content},
                    **settings,
                )
        except (ValueError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise RequestError(
                f"{medium.name}: the processor of {self._name} refuses it: {reason}", medium.kind
            ) from error

    def _span(self, ids: Sequence[int], *, first: bool) -> tuple[int, int]:
        """The tokens of a medium: its placeholders, and the control tokens around them."""
        places = [place for place, token in enumerate(ids) if token in self._placeholders]
        if not places:
            raise ModelError(f"the processor of {self._name} makes no placeholders for a medium")
        start, stop = places[0], places[-1] + 1
        if first:  # of two equal media
            gaps = [a for a, b in pairwise(places) if b > a + 1]
            stop = (gaps[len(gaps) // 2] if gaps else places[len(places) // 2 - 1]) + 1
        around = set(self.tokenizer.all_special_ids) - self._of_turns
        while start and ids[start - 1] in around:
            start -= 1
        while not first and stop < len(ids) and ids[stop] in around:
            stop += 1
        return start, stop

    def encode(self, batch: Sequence[Prepared]) -> list[ContextBlock]:
        """Media whose inputs have equal shapes are computed in one forward."""
        if not self.encodes:
            return [
                ContextBlock(torch.zeros(len(one.measured), 0), one.key, inputs=one.inputs)
                for one in batch
            ]
        groups: dict[Hashable, list[int]] = {}
        for place, one in enumerate(batch):
            groups.setdefault(one.inputs.shapes, []).append(place)
        found: dict[int, ContextBlock] = {}
        for places in groups.values():
            inputs = [batch[place].inputs for place in places]
            rows, positions = self._capture().rows(_joined([one.tensors for one in inputs]))
            for row, place in enumerate(places):
                start, stop = inputs[row].start, inputs[row].stop
                own = None if positions is None else positions[:, row].cpu()
                found[place] = ContextBlock(
                    rows[row, start:stop].to("cpu", torch.float32, copy=True),
                    batch[place].key,
                    None if own is None else own[-3:, start:stop] - own[-1, start],
                    0 if own is None else int(own[-1, stop] - own[-1, start]),
                )
        return [found[place] for place in range(len(batch))]

    def why_not(self, prepared: Prepared) -> str | None:
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
            raise RequestError(
                f"{self._name} runs alone, and cannot be shown media of such different sizes "
                "together; show one at a time"
            ) from error
        for name, values in of_tokens.items():
            waiting = iter(values)
            found[name] = torch.cat(
                [
                    next(waiting) if isinstance(segment, ContextBlock) else torch.zeros_like(own)
                    for segment, own in zip(prompt.segments, ids, strict=True)
                ],
                1,
            )
        found["input_ids"] = torch.cat(ids, 1)
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        return {name: self._moved(value) for name, value in found.items()}

    def _moved(self, value: Tensor) -> Tensor:
        return value.to(self._device, self._dtype if value.is_floating_point() else None)

    def _fitted(self, sound: Audio) -> tuple[Audio, tuple[str, ...]]:
        """A sound of a length that the model hears."""
        missing = LEAST_SAMPLES - len(sound.samples)
        if missing > 0:
            return Audio(np.pad(sound.samples, (0, missing)), report=sound.report), ()
        most = _most_samples(self.processor.feature_extractor)
        if most is None or len(sound.samples) <= most:
            return sound, ()
        cut = f"the model hears the first {most / SAMPLE_RATE:g} s of {sound.seconds:.1f} s"
        return Audio(sound.samples[:most], report=sound.report), (cut,)

    # --- conversations ----------------------------------------------------------------------------

    def layout(
        self, messages: Sequence[Message], media: Sequence[MeasuredMedium], *, prefix: str = ""
    ) -> PromptLayout:
        waiting = iter(media)
        shown: list[MeasuredMedium] = []
        listed = []
        for message in messages:
            content: list[Any] = []
            for part in message.content:
                if isinstance(part, TextPart):
                    content.append(part)
                    continue
                own = next(waiting)
                shown += own.with_track
                content += [*own.with_track, *([TextPart(own.notes.legend)] * own.as_picture)]
            listed.append(replace(message, content=tuple(content)))
        parts, order = self._expanded(self._parts(listed), shown)
        first = parts[0].text if parts else ""
        lead = [] if self._begins(first) else self._begin
        ids = [*lead, *(token for token, _ in self._tokens([*parts, PromptText(prefix)]))]
        return list(_cut(ids, order))

    def _parts(self, messages: Sequence[Message]) -> list[PromptText]:
        """The prompt of messages whose media are measured, with the template's placeholders."""

        def show(medium: Any) -> dict[str, str]:
            return {"type": _seen_as(medium)}

        clips = any(m.kind == "video" for message in messages for m in message.media)
        template = self._of_clips if clips else self.template
        return cast("list[PromptText]", template.parts(messages, show))

    def _expanded(
        self, parts: Sequence[PromptText], shown: Sequence[MeasuredMedium]
    ) -> tuple[list[PromptText], list[MeasuredMedium]]:
        """The parts of a prompt, and its media in the order in which the template puts them."""
        waiting: dict[Kind, Iterator[MeasuredMedium]] = {
            kind: iter([m for m in shown if _seen_as(m) == kind]) for kind in self._marks
        }
        order: list[MeasuredMedium] = []

        def expansion(found: re.Match[str]) -> str:
            kind = next(kind for kind, mark in self._marks.items() if mark == found[0])
            order.append(next(waiting[kind]))
            return str(order[-1].notes.text)

        marks = re.compile("|".join(map(re.escape, self._marks.values())))
        expanded = [
            PromptText(marks.sub(expansion, part.text), markup=True) if part.markup else part
            for part in parts
        ]
        if len(order) != len(shown):
            raise ModelError(
                f"the chat template of {self._name} shows {len(order)} of {len(shown)} media"
            )
        return expanded, order

    def _rendered_alone(self, kind: Kind, n: int) -> str:
        """A conversation that shows a medium, ``n`` times; 0 shows none."""
        content: list[Any] = [MeasuredMedium(kind, 1)] * n
        message = Message("user", (*content, TextPart(".")))
        return "".join(part.text for part in self._parts([message]))

    def _begins(self, text: str) -> bool:
        """Whether a prompt's text has the token that begins a text, which is not added then."""
        begin = self.tokenizer.bos_token
        return begin is not None and text.startswith(begin)


def reads(processor: Any) -> tuple[Kind, ...]:
    """The kinds of medium that a processor takes, by its parts.

    ``input_modalities`` of a model's class says less: SmolVLM's has no video.
    """
    parts: dict[Kind, tuple[str, ...]] = {
        "image": ("image_processor",),
        "audio": ("feature_extractor", "audio_processor"),
        "video": ("video_processor",),
    }
    found = tuple(
        kind
        for kind, names in parts.items()
        if any(getattr(processor, name, None) is not None for name in names)
        and getattr(processor, f"{kind}_token", None) is not None
    )
    if not found:
        raise ConfigError(f"{type(processor).__name__} takes no media that are known here")
    return found


def _seen_as(medium: MeasuredMedium) -> Kind:
    return "image" if medium.as_picture else medium.kind


def _of_frames(times: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """The processor's settings for frames that were sampled at ``times`` in seconds."""
    step = float(times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0
    seconds = float(times[-1]) + step
    about = {
        "total_num_frames": round(seconds * TICKS),
        "fps": float(TICKS),
        "duration": seconds,
        "frames_indices": [round(float(time) * TICKS) for time in times],
    }
    return {"do_sample_frames": False, "video_metadata": [about], "fps": 1 / step}


def _most_samples(extractor: Any) -> int | None:
    """The samples at 16 kHz that a feature extractor takes; it drops more in silence."""
    if (most := getattr(extractor, "n_samples", None)) is not None:  # Whisper's
        return int(most)
    default = inspect.signature(extractor.__call__).parameters.get("max_length")
    return default.default if default is not None and isinstance(default.default, int) else None


def _joined(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}


def _cut(
    ids: Sequence[int], media: Sequence[MeasuredMedium]
) -> Iterator[tuple[int, ...] | MeasuredMedium]:
    """A prompt's tokens, in which each medium replaces its own."""
    at = 0
    for medium in media:
        own = medium.notes.ids
        start = ids.index(own[0], at)
        while tuple(ids[start : start + len(own)]) != own:
            start = ids.index(own[0], start + 1)
        if start > at:
            yield tuple(ids[at:start])
        yield medium
        at = start + len(own)
    if at < len(ids):
        yield tuple(ids[at:])
