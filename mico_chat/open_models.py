"""Loads other projects' open multimodal models, by ``AutoModelForMultimodalLM`` of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mico_chat.adapters.base import segments_of
from mico_chat.checkpoints.folders import generation_of, local_folder, model_folder
from mico_chat.engine.base import Prompt
from mico_chat.engine.scheduler import Chunk
from mico_chat.errors import ConfigError, ModelError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import SAMPLE_RATE, Audio, EncodedMedium, Image, Medium, Video
from mico_chat.messages import Message

if TYPE_CHECKING:
    from mico_chat.adapters.transformers import TransformersAdapter
    from mico_chat.load import EngineOptions, Loaded

logger = logging.getLogger(__name__)

THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""The class of the part that answers in text, of models that speak too."""

MODALITIES: tuple[Kind, ...] = ("image", "audio", "video")
"""Of vLLM."""

CONFIG, PROCESSOR = "config.json", "processor (tokenizer*.json, *_config.json, chat_template.jinja)"

ALIKE = 0.999
"""The least cosine of two models' logits, about their mean, that count as equal."""


def load_open(model: str | Path, options: EngineOptions, bitsandbytes: Any) -> Loaded:
    """The model in the transformers engine. One whose prompts do not batch runs alone."""
    from mico_chat.adapters.transformers import TransformersAdapter
    from mico_chat.engine.alone import AloneModel
    from mico_chat.engine.batching import BatchingEngine
    from mico_chat.engine.transformers import TransformersModel
    from mico_chat.load import MAX_RUNNING, Loaded, ends

    llm, processor = _read(model, options, bitsandbytes)
    folder = local_folder(model_folder(model))
    adapter = TransformersAdapter(llm, processor, str(model))
    batched: Any = None
    try:
        batched = TransformersModel(llm, max_batch=options.max_batch, **options.arguments)
        why = _disagreement(llm, adapter, batched)
    except Exception as error:  # in this trial another project's code may raise anything
        why = f"{type(error).__name__}: {error}"
    if why is not None:
        logger.warning("%s: requests run alone, one after the other: %s", model, why)
        adapter.encodes = False
        batched = AloneModel(llm, adapter.whole_inputs)
    engine = BatchingEngine(
        batched,
        adapter.tokenizer,
        ends(adapter.tokenizer, llm.config.get_text_config(), llm.generation_config),
        name="transformers",
        max_running=options.max_running or MAX_RUNNING,
    )
    return Loaded(adapter, engine, generation_of(folder))


def load_in_vllm(model: str | Path, options: EngineOptions) -> Loaded:
    """The model in the vLLM engine; this process has its processor alone."""
    import transformers

    from mico_chat.adapters.processor import reads
    from mico_chat.adapters.vllm import VllmAdapter
    from mico_chat.engine.vllm import VllmEngine
    from mico_chat.engine.vllm_start import engine_arguments
    from mico_chat.load import Loaded, ends

    folder = local_folder(model_folder(model))
    trust = options.trust_remote_code
    with _loading(model, CONFIG):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with _loading(model, PROCESSOR):
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    kinds = reads(processor)
    arguments = engine_arguments(
        folder,
        {"trust_remote_code": trust, **options.arguments},
        dtype=options.dtype,
        quantization=options.quantization,
        max_running=options.max_running,
        media={kind: options.max_media if kind in kinds else 0 for kind in MODALITIES},
    )
    tokenizer = processor.tokenizer
    engine = VllmEngine(arguments, tokenizer, ends(tokenizer, config.get_text_config()))
    return Loaded(VllmAdapter(engine, processor, str(model)), engine, generation_of(folder))


@contextmanager
def _loading(model: str | Path, part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # what a broken file makes transformers raise may be anything
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ConfigError(
                f"{model}: it brings Python code of its own, which is not run; read the code, and "
                "if you trust it, add --trust-remote-code"
            ) from error
        raise ModelError(f"{model}: transformers cannot load its {part}: {reason}") from error


def _read(model: str | Path, options: EngineOptions, bitsandbytes: Any) -> tuple[Any, Any]:
    import transformers

    folder = local_folder(model_folder(model))
    dtype = options.dtype or "bfloat16"
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    trust = options.trust_remote_code
    with _loading(model, CONFIG):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    with _loading(model, "weights (*.safetensors), or the model of config.json"):
        auto: Any = transformers.AutoModelForMultimodalLM
        if config.model_type in THINKERS:
            auto = getattr(transformers, THINKERS[config.model_type])
        llm = auto.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=bitsandbytes,
            trust_remote_code=trust,
            **({} if bitsandbytes is None else {"device_map": {"": device}}),
        )
    with _loading(model, PROCESSOR):
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    if bitsandbytes is None:
        llm = llm.to(device)
    return llm.train(False), processor


def _disagreement(llm: Any, adapter: TransformersAdapter, batched: Any) -> str | None:
    """Why this project's engine does not compute what the model itself does; None if it does.

    Each kind of medium is tried with a small one, by the logits of the answer's first token.
    """
    for kind in adapter.input_modalities:
        medium = _small(kind)
        prepared = adapter.prepare(medium, [kind])
        if (why := adapter.why_not(prepared)) is not None:
            return why
        (block,) = adapter.encode([prepared])
        encoded = EncodedMedium(**vars(prepared.measured), block=block)
        parts = adapter.layout([Message.user(medium, "Describe it.")], [encoded])
        prompt = Prompt(segments_of(parts))
        with torch.inference_mode():
            theirs = llm(**adapter.whole_inputs(prompt, prepared.inputs)).logits[0, -1].float()
        ids, context = prompt.tokens(0, len(prompt))
        positions = None if prompt.positions is None else prompt.positions[:, :-1]
        (ours,) = batched.run([Chunk(0, 0, ids, 1, context, positions)])
        batched.truncate(0, 0)
        ours, theirs = ours - ours.mean(), theirs.to(ours.device) - theirs.mean()
        alike = float(torch.cosine_similarity(ours, theirs, dim=0))
        if not alike >= ALIKE:
            return f"the logits for {kind} differ from the model's own (cosine {alike:.4f})"
    return None


def _small(kind: Kind) -> Medium:
    random = np.random.default_rng(0)
    if kind == "audio":
        return Audio(random.uniform(-0.5, 0.5, SAMPLE_RATE).astype(np.float32))
    frames = random.integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    if kind == "video":
        return Video(frames, np.arange(4) / 2)
    return Image(frames[0])
