"""What adapters of other projects' models share: the work of a model's own processor, no weights.

A medium is preprocessed by the model's own processor, in a short conversation that shows it alone.
There the processor says how many tokens the medium takes. A prompt is the model's own chat
template, in which the medium's own text takes the place of the template's one placeholder. Only
markup of the template becomes control tokens: what people write is told apart from it
(:mod:`mico_chat.client_text`).

The processors get arrays that this project's decoder made, never a URL or a path.
"""

import inspect
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers.video_utils import VideoMetadata

from mico_chat.adapters.base import PromptLayout, check_settings, measured
from mico_chat.adapters.pictures import USUAL_FPS, USUAL_FRAMES, roomy, within
from mico_chat.adapters.pictures import Shown as AnyShown
from mico_chat.adapters.pictures import shown as shown_as
from mico_chat.chat_template import ChatTemplate
from mico_chat.errors import ConfigError, ModelError, RequestError
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.media.medium import (
    SAMPLE_RATE,
    Audio,
    ContextBlock,
    Image,
    MeasuredMedium,
    Medium,
    Video,
)
from mico_chat.media.view import MOST_FRAMES, View
from mico_chat.messages import Message, TextPart
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.prompt_parts import PromptText, string_tokenizer

logger = logging.getLogger(__name__)

TICKS = 1_000_000
"""Frames a second of the file that a processor is told of: a frame's number is its time in µs."""

LONGEST = 1 << 20
"""Frames, and seconds, of a clip of which a processor says which frames it takes."""

HALF_MINUTES = "_retrieve_input_features"
"""This method of a processor makes features of a sound of any length; Voxtral's has it."""

LEAST_SAMPLES = SAMPLE_RATE // 10
"""A shorter sound gets silence behind it: of less than 50 ms some models make no token."""


@dataclass(frozen=True, eq=False)
class Shown:
    """How a medium stands in a prompt: ``text`` in place of the template's one placeholder, ``ids``
    that its context tokens replace, and the ``legend`` of a map that is shown as a picture. A model
    that runs alone gets the ``medium`` itself with the whole prompt.
    """

    text: str
    ids: tuple[int, ...]
    legend: str = ""
    medium: Any = None


class ProcessorAdapter(ABC):
    """See :class:`mico_chat.adapters.base.ModelAdapter`; ``name`` is the model's, for errors."""

    def __init__(self, processor: Any, name: str) -> None:
        # A copy, with a tokenizer of its own: a tokenizer has switches, which each call turns.
        self.processor = deepcopy(processor)
        self.tokenizer = processor.tokenizer
        self._name = name
        self._tokens = string_tokenizer(self.tokenizer)
        self.template = ChatTemplate(self.tokenizer, processor.chat_template)
        # SmolVLM's processor has a template of its own for conversations with clips.
        own = getattr(sys.modules[type(processor).__module__], "DEFAULT_CHAT_TEMPLATE", None)
        self._of_clips = self.template if own is None else ChatTemplate(self.tokenizer, own)
        self.input_modalities = reads(processor)
        self._marks = {k: str(getattr(processor, f"{k}_token")) for k in self.input_modalities}
        ids = [getattr(processor, f"{kind}_token_id", None) for kind in self._marks]
        ids += map(self.tokenizer.convert_tokens_to_ids, self._marks.values())
        self._placeholders = {token for token in ids if token is not None}
        self._lists = True
        self._lists = self._takes_lists()
        self._alone = cache(self._rendered_alone)
        self._of_turns = set(self.tokenizer(self._alone("image", 0)).input_ids)
        self._begin = self._before(self._alone("image", 0))

    def _before(self, text: str) -> list[int]:
        """The tokens that the processor puts before a text: Molmo2's puts one that its tokenizer
        does not. They are the tokenizer's if the processor takes no text without media."""
        own: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        try:
            given = self.processor(text=[text], add_special_tokens=not self._begins(text))
            (*ids,) = map(int, given["input_ids"][0])
        except Exception as error:  # another project's code may raise anything
            logger.info("%s: its processor takes no text alone: %r", self._name, error)
            ids = []
        at = len(ids) - len(own)
        return ids[:at] if at >= 0 and ids[at:] == own else list(self.tokenizer("").input_ids)

    def setting(self, shown: Sequence[Kind]) -> Hashable:
        return "image" in self.input_modalities and self._several(shown)

    def _several(self, shown: Sequence[Kind]) -> bool:
        """Whether a picture is processed as one of several, which LLaVA-OneVision does differently:
        it cuts a single picture into tiles.
        """
        names = getattr(self.processor.image_processor, "model_input_names", ())
        n = sum(2 if TABLE[kind].made_of else TABLE[kind].layout == "still" for kind in shown)
        return n > 1 and "batch_num_images" in names

    def prepare(self, medium: Medium, shown: Sequence[Kind]) -> MeasuredMedium:
        given, legend = shown_as(medium)
        short: tuple[str, ...] = ()
        if isinstance(given, Audio):
            given, short = self._fitted(given)
        n = 2 if isinstance(given, Image) and self._several(shown) else 1  # the first one counts
        if isinstance(given, Video) and len(given.frames) == 1:  # Qwen3-VL needs two
            given = replace(given, frames=given.frames.repeat(2, 0), times=given.times.repeat(2))

        def read(given: AnyShown, share: float) -> tuple[int, tuple[Shown, Any]]:
            settings = {**self._coarser(given.kind, share), **given.view.processor}
            shown, n_tokens, inputs = self._read(given, n, settings)
            return n_tokens, (shown, inputs)

        (shown_so, inputs), n_tokens, cut = within(given, read)
        units = len(given.frames) if isinstance(given, Video) else n
        notes = replace(shown_so, legend=legend)
        return measured(medium, units, n_tokens, short + cut, notes, inputs)

    @abstractmethod
    def _read(
        self, medium: AnyShown, n: int, settings: Mapping[str, Any]
    ) -> tuple[Shown, int, Any]:
        """How the first of ``n`` equal media stands in a prompt, its number of tokens, inputs, as
        the processor makes them with its ``settings``."""

    def viewed(self, kind: Kind, view: View) -> View:
        seen: Kind = "image" if TABLE[kind].layout == "still" else kind
        own = self._knobs(seen)
        check_settings(view, self._knobs("video") | self._knobs("image"))
        given = {name: value for name, value in view.processor.items() if name in own}
        for name, value in given.items():
            _check_setting(name, value, own)
        edges = {edge: given.pop(name) for name, edge in _EDGES.items() if name in given}
        if edges or "size" in given:  # the library has renamed the first two
            given["size"] = {**own["size"], **given.get("size", {}), **edges}
        view = replace(view, processor=given)
        if kind != "video" or not hasattr(_part(self.processor, "video"), "sample_frames"):
            return roomy(view)
        return replace(roomy(view, frames=MOST_FRAMES), sampler=self._frames)

    def _frames(self, n_frames: int, seconds: float) -> list[int]:
        """The frames of a clip that the processor takes; evenly spaced ones if it takes none of it,
        as of few frames. One that takes all frames gets a rate, or a number, of ours."""
        part: Any = _part(self.processor, "video")
        own = {name: getattr(part, name, None) for name in part.valid_kwargs.__annotations__}
        if not own.get("do_sample_frames") and not (own.get("fps") or own.get("num_frames")):
            rate = own.get("max_frames") or own.get("max_num_frames")
            own |= {"fps": USUAL_FPS} if rate else {"num_frames": min(USUAL_FRAMES, n_frames)}
        found: Any = np.linspace(0, n_frames - 1, min(USUAL_FRAMES, n_frames)).round()
        if 0 < n_frames <= LONGEST and 0 < seconds <= LONGEST:  # a damaged file says anything
            about = VideoMetadata(n_frames, fps=n_frames / seconds, duration=seconds)
            try:
                found = part.sample_frames(about, **own)
            except Exception as error:  # another project's code may raise anything
                logger.info("%s: %d frames of %.1f s: %r", self._name, n_frames, seconds, error)
        return sorted({int(n) for n in found if 0 <= n < n_frames})

    def _knobs(self, kind: Kind) -> dict[str, Any]:
        """The settings of the processor that say how finely it shows a kind, and their values."""
        part = None if kind == "audio" else _part(self.processor, kind)
        names = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
        own = {name: getattr(part, name, None) for name in sorted(names) if _KNOB.fullmatch(name)}
        own["size"] = {name: v for name, v in dict(own.get("size") or {}).items() if v is not None}
        return {name: v for name, v in own.items() if name == "size" or not isinstance(v, Mapping)}

    def _coarser(self, kind: Kind, share: float) -> dict[str, Any]:
        """Settings for a share of the tokens, where a smaller picture has as many: fewer tiles."""
        own, found = self._knobs(kind), dict[str, Any]()
        if share < 1 and own.get("max_patches"):
            found["max_patches"] = max(1, int(own["max_patches"] * share))
        if share < 1 and "do_image_splitting" in own:
            found["do_image_splitting"] = False
        return found

    def encode(self, batch: Sequence[MeasuredMedium]) -> list[ContextBlock]:
        """Blocks that hold the inputs: the engine encodes media itself."""
        return [ContextBlock(torch.zeros(len(one), 0), one.key, inputs=one.inputs) for one in batch]

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

    def _fitted(self, sound: Audio) -> tuple[Audio, tuple[str, ...]]:
        """A sound of a length that the model hears."""
        missing = LEAST_SAMPLES - len(sound.samples)
        if missing > 0:
            return Audio(np.pad(sound.samples, (0, missing)), report=sound.report), ()
        whole = hasattr(self.processor, HALF_MINUTES)
        most = None if whole else _most_samples(_part(self.processor, "audio"))
        if most is None or len(sound.samples) <= most:
            return sound, ()
        cut = f"the model hears the first {most / SAMPLE_RATE:g} s of {sound.seconds:.1f} s"
        return Audio(sound.samples[:most], report=sound.report), (cut,)

    def layout(
        self,
        messages: Sequence[Message],
        media: Sequence[MeasuredMedium],
        options: GenerationOptions = GREEDY,
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
                for one in next(waiting).pieces:
                    if isinstance(one, str):
                        content.append(TextPart(one))
                        continue
                    shown.append(one)
                    content += [one, *([TextPart(one.notes.legend)] * one.as_picture)]
            listed.append(replace(message, content=tuple(content)))
        return self._joined(self._parts(listed, options), shown)

    def _joined(self, parts: Sequence[PromptText], shown: Sequence[MeasuredMedium]) -> PromptLayout:
        """The layout of a prompt whose parts hold the template's placeholders of ``shown``."""
        parts, order = self._expanded(parts, shown)
        first = parts[0].text if parts else ""
        lead = [] if self._begins(first) else self._begin
        ids = [*lead, *(token for token, _ in self._tokens(parts))]
        return list(_cut(ids, order))

    def _parts(
        self, messages: Sequence[Message], options: GenerationOptions = GREEDY
    ) -> list[PromptText]:
        """The prompt of messages whose media are measured, with the template's placeholders."""
        clips = any(m.kind == "video" for message in messages for m in message.media)
        template = self._of_clips if clips else self.template

        def show(medium: Any) -> dict[str, str] | list[PromptText]:
            kind, mark = _seen_as(medium), self._marks[_seen_as(medium)]
            return {"type": kind} if self._lists else [PromptText(f"{mark}\n", markup=True)]

        return cast("list[PromptText]", template.parts(messages, show, options))

    def _takes_lists(self) -> bool:
        """Whether the template takes a content of several parts; some take strings alone, in which
        people write a medium's mark before their text.
        """
        try:
            return bool(self._rendered_alone(self.input_modalities[0], 1))
        except RequestError:
            return not self.template.takes_text

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
            counts = f"{len(order)} of {len(shown)}"
            raise ModelError(f"the chat template of {self._name} shows {counts} media")
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


_KNOB = re.compile(
    r"size|(min|max)_(?!\w*frames)\w+|do_image_splitting|do_pan_and_scan|pan_and_scan_\w+"
    r"|crop_to_patches|use_thumbnail"
)
"""The settings of processors that say how finely a picture or clip is shown."""

_EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
_AT_MOST = 4
"""A setting that counts may be so many times the model's own; its pixels may not be more."""


def _check_setting(name: str, value: Any, knobs: Mapping[str, Any]) -> None:
    """Refuse a value of another type than the model's own, or one that asks for too much work."""
    where, own, size = f"mm_processor_kwargs.{name}", knobs.get(name), knobs["size"]
    expected = "true or false"
    if name == "size":
        if isinstance(value, Mapping) and value and value.keys() <= size.keys():
            for side, pixels in value.items():
                _check_setting(f"size.{side}", pixels, knobs)
            return
        expected = f"an object with some of {', '.join(size) or 'nothing'}"
    elif isinstance(own, bool):
        if isinstance(value, bool):
            return
    else:
        most = max(size.values(), default=0) if own is None else _AT_MOST * own
        if type(value) in (int, type(own)) and 0 < value <= most:
            return
        expected = f"a number above 0, at most {most}"
    raise RequestError.at(where, f"expected {expected}, got {value!r}")


def reads(processor: Any) -> tuple[Kind, ...]:
    """The kinds of medium that a processor takes; its model's class may say less, as SmolVLM's."""
    found = tuple(
        kind
        for kind in _PARTS
        if _part(processor, kind) is not None
        and getattr(processor, f"{kind}_token", None) is not None
    )
    if not found:
        raise ConfigError(f"{type(processor).__name__} takes no media that are known here")
    return found


_PARTS: dict[Kind, tuple[str, ...]] = {
    "image": ("image_processor",),
    "audio": ("audio_processor", "feature_extractor"),
    "video": ("video_processor",),
}


def _part(processor: Any, kind: Kind) -> Any:
    """The part of a processor that takes a kind of medium; None if it lacks one."""
    found = (getattr(processor, name, None) for name in _PARTS[kind])
    return next((part for part in found if part is not None), None)


def class_reads(architectures: Sequence[str]) -> set[str]:
    """The kinds of medium that a class of transformers names, of those that a config names."""
    for name in architectures:
        found: Any = getattr(transformers, name, None)
        if found is not None:
            wanted = found.input_modalities
            return {wanted} if isinstance(wanted, str) else set(wanted)
    return set()


def _seen_as(medium: MeasuredMedium) -> Kind:
    return "image" if medium.as_picture else medium.kind


@contextmanager
def refused(medium: Medium, by: str) -> Iterator[None]:
    """Turns a processor's errors into those of a request; ``by`` names the processor."""
    try:
        yield
    except (ValueError, IndexError, RuntimeError) as error:
        cause = error.__cause__ or error  # vLLM's own message has all numbers of the medium
        reason = " ".join(str(cause).split())
        raise RequestError(f"{medium.name}: {by} refuses it: {reason}", medium.kind) from error


def of_frames(
    times: np.ndarray[Any, np.dtype[np.float64]], seconds: float | None = None
) -> dict[str, Any]:
    """The processor's settings for frames that were sampled at ``times`` in seconds of a clip."""
    step = float(times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0
    seconds = seconds or float(times[-1]) + step
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
