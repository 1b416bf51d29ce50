"""Tiny random models of other people's multimodal classes, and the library's own answer of each.

A replica has its family's structure, markup and chat template, random weights, and sizes that run
in milliseconds. It shows that code works, never that an answer is right.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
)

from mico_chat.tools import Tool
from tests.support.replicas import towers
from tests.support.replicas.gemma import gemma3n
from tests.support.replicas.qwen import qwen2_5_omni, qwen2_5_vl, qwen2_audio, qwen3_5, qwen3_vl
from tests.support.replicas.shrunk import MEDIA_TYPES, WIDTH, shrunk, widened
from tests.support.replicas.smolvlm import smolvlm
from tests.support.replicas.voxtral import voxtral

Conversation = list[dict[str, Any]]

_FAMILIES: dict[str, tuple[Callable[..., tuple[PreTrainedModel, ProcessorMixin]], tuple[str, ...]]]
_FAMILIES = {
    "qwen2_5_omni": (qwen2_5_omni, ("image", "audio", "video")),
    "qwen3_vl": (qwen3_vl, ("image", "video")),
    "llava_onevision": (towers.llava_onevision, ("image", "video")),
    "qwen2_audio": (qwen2_audio, ("audio",)),
    "smolvlm": (smolvlm, ("image", "video")),
    "gemma3n": (gemma3n, ("image", "audio")),
    "qwen3_5": (qwen3_5, ("image", "video")),
    "lfm2_vl": (towers.lfm2_vl, ("image",)),
    "gemma3": (towers.gemma3, ("image",)),
    "phi4_multimodal": (towers.phi4_multimodal, ("image", "audio")),
    "mllama": (towers.mllama, ("image",)),
    "idefics2": (partial(shrunk, "idefics2"), ("image",)),
    "instructblip": (towers.instructblip, ("image",)),
    "ovis2": (towers.ovis2, ("image",)),
    "minicpmv4_6": (partial(shrunk, "minicpmv4_6"), ("image", "video")),
    "gemma4": (towers.gemma4, ("image", "video")),
    "paligemma": (towers.paligemma, ("image",)),
    "qwen2_5_vl": (qwen2_5_vl, ("image", "video")),
    "voxtral": (voxtral, ("audio",)),
}
ALONE = tuple(_FAMILIES)[8:-2]
"""Families whose prompts do not batch."""

NAMES = tuple(_FAMILIES)[:8]
_BY_HAND = {"qwen2_5_omni_thinker": "qwen2_5_omni"}
ARCHITECTURES = MEDIA_TYPES
"""The architectures of the installed transformers that read media and answer in text."""
_ENDS = ("<|im_end|>", "<|endoftext|>", "<end_of_utterance>", "<end_of_turn>", "<eos>")
_FPS = 1000
"""Frames a second that metadata names: a frame's number is its time in milliseconds."""


def reads(name: str) -> tuple[str, ...]:
    """The kinds of media that a replica reads."""
    return _FAMILIES[name][1]


def pixels(seed: int, *shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def medium(kind: str, seed: int, *, other: bool = False) -> dict[str, Any]:
    """A part of a message; another seed is another content of the same size, or of the ``other``
    size."""
    if kind == "image":
        shape = (100, 60) if other else (48, 80)
        return {"type": kind, "image": Image.fromarray(pixels(seed, *shape))}
    if kind == "audio":
        time = np.arange(9_000 if other else 16_000) / 16_000
        sound = (0.5 * np.sin(2 * np.pi * (200 + 300 * seed) * time)).astype(np.float32)
        return {"type": kind, "audio": sound}
    clip = pixels(seed, 4, 40, 56)[:, : 32 if other else 40, : 32 if other else 56]
    return {"type": kind, "video": clip, "times": [0.0, 0.5, 1.0, 1.5]}


def user(*content: dict[str, Any] | str) -> dict[str, Any]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


def build(name: str, folder: Path, *, seed: int = 0, width: int = WIDTH, **options: Any) -> Path:
    """Save a replica, its processor and its generation settings to ``folder``.

    ``name`` is a family's or an architecture's. ``width`` is that of its layers, a multiple of 32;
    ``options`` are those of the family: ``size`` of Qwen2.5-Omni, ``n_heads`` of others.
    """
    torch.manual_seed(seed)
    name = _BY_HAND.get(name, name)
    if name in _FAMILIES:
        model, processor = _FAMILIES[name][0](**options)
        model = model if width == WIDTH else widened(model, width // WIDTH)
    else:
        model, processor = shrunk(name, width)
    words = processor.tokenizer
    control = {i for i, word in words.added_tokens_decoder.items() if word.special}
    ends = {words.convert_tokens_to_ids(end) for end in _ENDS if end in words.get_vocab()}
    _spread(model, seldom=sorted(ends), never=sorted(control - ends))
    # As they begin, these forget a picture within the question, and attend to all tokens alike.
    for part, weight in model.named_parameters() if name in ("qwen3_5", "lfm2_vl") else ():
        for end, value in (("A_log", -4.0), ("q_norm.weight", 8.0), ("q_layernorm.weight", 8.0)):
            if part.endswith(end):
                torch.nn.init.constant_(weight, value)
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(ends), pad_token_id=words.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    conversation: Conversation,
    tools: Sequence[Tool],
    n: int,
    **settings: Any,
) -> list[int]:
    """At most ``n`` tokens of the library's own greedy answer; ``settings`` are for the
    processor."""
    given = inputs(processor, conversation, tools, **settings)
    generate = cast(Callable[..., torch.Tensor], model.generate)
    output = generate(**given, do_sample=False, max_new_tokens=n)
    tokens: list[int] = output[0, given["input_ids"].shape[1] :].tolist()
    return tokens


@torch.no_grad()
def whole_omni(thinker: Path, folder: Path) -> Path:
    """A Thinker as a part of the whole model, which is how Qwen2.5-Omni is published."""
    model, processor = load(thinker)
    config = Qwen2_5OmniConfig(thinker_config=model.config.to_dict(), enable_audio_output=False)
    torch.manual_seed(0)
    whole = Qwen2_5OmniForConditionalGeneration(config)
    whole.thinker.load_state_dict(model.state_dict())
    whole.generation_config = model.generation_config
    for part in (whole, processor):
        part.save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread(model: PreTrainedModel, seldom: list[int], never: list[int], gain: float = 2.0) -> None:
    """Scale weights to their inputs: attention is sharp then, and each medium moves the answer.

    ``seldom`` and ``never`` say how often tokens are to be in an answer: those that end it, and the
    rest of the markup.
    """
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(0, gain / sqrt(weight[0].numel()))
    scores = model.get_output_embeddings().weight
    scores[seldom] *= 0.8
    scores[never] *= 0.1


def metadata(times: Sequence[float]) -> dict[str, Any]:
    """What a processor needs to know of frames that were sampled at ``times`` in seconds."""
    step = times[1] - times[0] if len(times) > 1 else 1.0
    numbers = [round(time * _FPS) for time in times]
    duration = times[-1] + step
    return {
        "total_num_frames": round(duration * _FPS),
        "fps": float(_FPS),
        "duration": duration,
        "frames_indices": numbers,
    }


def inputs(
    processor: ProcessorMixin,
    conversation: Conversation,
    tools: Sequence[Tool] = (),
    **settings: Any,
) -> Any:
    """The library's own inputs of a conversation.

    A part of type ``video`` has its frames' ``times`` in seconds beside the array. ``settings``
    are for the processor.
    """
    clips = [
        part["times"]
        for message in conversation
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "video"
    ]
    if clips:
        settings = {
            "do_sample_frames": False,
            "video_metadata": [metadata(times) for times in clips],
            **settings,
        }
    if hasattr(processor, "_retrieve_input_features"):
        raise LookupError("the library reads Voxtral's conversations by mistral-common alone")
    declared: Any = [{"type": "function", "function": tool.declaration} for tool in tools]
    return processor.apply_chat_template(
        conversation,
        tools=declared or None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=settings,
    )


def load(folder: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A replica and its processor, as the Auto classes load them."""
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    return model.train(False), processor


def reference(
    folder: Path, conversation: Conversation, max_new_tokens: int, **settings: Any
) -> list[int]:
    """:func:`answer` of a replica in a folder."""
    return answer(*load(folder), conversation, (), max_new_tokens, **settings)
