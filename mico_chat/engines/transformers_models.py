"""Models in torch: a chat model's engine, and other projects' models by transformers' Auto classes.

Another project's model is tried with a small medium of each kind before it serves anybody.
"""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from mico_chat.adapters.base import segments_of
from mico_chat.adapters.transformers import TransformersAdapter
from mico_chat.checkpoints.folders import generation_of, local_folder, model_folder
from mico_chat.engine.alone import AloneModel
from mico_chat.engine.base import Engine, Prompt
from mico_chat.engine.scheduler import Chunk
from mico_chat.engine.transformers import TransformersModel
from mico_chat.engines.base import EngineOptions, Loaded, batching_engine, ends
from mico_chat.engines.source import Source
from mico_chat.errors import ConfigError, ModelError
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.media.medium import SAMPLE_RATE, Audio, Image, MeasuredMedium, Medium, Video
from mico_chat.messages import Message

logger = logging.getLogger(__name__)

THINKERS = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""The class of the part that answers in text, of models that speak too."""

ALIKE = 0.999
"""The least cosine of two models' logits, about their mean, that count as equal."""


def torch_engine(llm: Any, tokenizer: Any, options: EngineOptions) -> Engine:
    """The engine of a causal language model in torch."""
    model = TransformersModel(llm, max_batch=options.max_batch, **options.arguments)
    ending = ends(tokenizer, llm.config, llm.generation_config)
    return batching_engine("transformers", model, tokenizer, ending, options)


def bitsandbytes(quantization: str | None) -> Any:
    """The ``quantization_config`` of a quantization, as ``from_pretrained`` takes it."""
    if quantization is None:
        return None
    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def load_open(source: Source, options: EngineOptions) -> Loaded:
    """Another project's model. One whose prompts do not batch runs alone."""
    llm, processor = _read(source, options)
    adapter = TransformersAdapter(llm, processor, str(source.model))
    model: Any = None
    try:
        model = TransformersModel(llm, max_batch=options.max_batch, **options.arguments)
        why = _disagreement(llm, adapter, model)
    except Exception as error:  # in this trial another project's code may raise anything
        why = f"{type(error).__name__}: {error}"
    if why is not None:
        logger.warning("%s: requests run alone, one after the other: %s", source.model, why)
        adapter.encodes = False
        model = AloneModel(llm, adapter.whole_inputs)
        _leave_out_failing(adapter, model, source.model)
    tokenizer = adapter.tokenizer
    ending = ends(tokenizer, llm.config.get_text_config(), llm.generation_config)
    folder = local_folder(model_folder(source.model))
    engine = batching_engine("transformers", model, tokenizer, ending, options)
    return Loaded(adapter, engine, generation_of(folder))


def read_config(source: Source, options: EngineOptions) -> Any:
    return _read_part(transformers.AutoConfig, "config.json", source, options)


def read_processor(source: Source, options: EngineOptions) -> Any:
    part = "processor (tokenizer*.json, *_config.json, chat_template.jinja)"
    return _read_part(transformers.AutoProcessor, part, source, options)


def _read_part(auto: Any, part: str, source: Source, options: EngineOptions, **more: Any) -> Any:
    """A part of another project's model, by a class of transformers."""
    model, trusted = source.model, options.trust_remote_code
    try:
        folder = local_folder(model_folder(model))
        return auto.from_pretrained(folder, trust_remote_code=trusted, **more)
    except Exception as error:  # what a broken file makes transformers raise may be anything
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ConfigError(
                f"{model}: it brings Python code of its own, which is not run; read the code, and "
                "if you trust it, add --trust-remote-code"
            ) from error
        raise ModelError(f"{model}: transformers cannot load its {part}: {reason}") from error


def _read(source: Source, options: EngineOptions) -> tuple[Any, Any]:
    config, quantization = read_config(source, options), bitsandbytes(options.quantization)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    auto = getattr(transformers, THINKERS.get(config.model_type, "AutoModelForMultimodalLM"))
    part = "weights (*.safetensors), or the model of config.json"
    given = {"dtype": options.dtype or "bfloat16", "quantization_config": quantization}
    if quantization is not None:
        given["device_map"] = {"": device}
    llm = _read_part(auto, part, source, options, **given)
    processor = read_processor(source, options)
    return (llm if quantization else llm.to(device)).train(False), processor


def _disagreement(llm: Any, adapter: TransformersAdapter, batched: Any) -> str | None:
    """Why this project's engine does not compute what the model itself does; None if it does.

    Each kind of medium is tried with a small one, by the logits of the answer's first token.
    """
    for kind in adapter.input_modalities:
        prepared = adapter.prepare(_small(kind), [kind])
        if (why := adapter.why_not(prepared)) is not None:
            return why
        prompt = _prompt(adapter, kind, prepared)
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


def _leave_out_failing(adapter: TransformersAdapter, model: AloneModel, name: object) -> None:
    """Leave out the kinds of media that the model cannot answer about alone either; a
    :class:`ModelError` if these are all.
    """
    works, reason = list[Kind](), ""
    for kind in adapter.input_modalities:
        try:
            prompt = _prompt(adapter, kind, adapter.prepare(_small(kind), [kind]))
            model.run([Chunk(0, 0, prompt.tokens(0, len(prompt))[0], 1, prompt=prompt)])
            works.append(kind)
        except Exception as error:  # as in the trial before
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.warning("%s: it cannot be shown the kind %s here: %s", name, kind, reason)
        finally:
            model.truncate(0, 0)
    if not works:
        raise ModelError(f"{name}: it can be shown no medium here, and fails so: {reason}")
    adapter.input_modalities = tuple(works)


def _prompt(adapter: TransformersAdapter, kind: Kind, prepared: MeasuredMedium) -> Prompt:
    (block,) = adapter.encode([prepared])
    asked = Message.user(_small(kind), "Describe it.")
    return Prompt(segments_of(adapter.layout([asked], [replace(prepared, block=block)])))


def _small(kind: Kind) -> Medium:
    random = np.random.default_rng(0)
    layout = TABLE[kind].layout
    if layout == "slices":
        return Audio(random.uniform(-0.5, 0.5, SAMPLE_RATE).astype(np.float32))
    frames = random.integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
    if layout == "frames":
        return Video(frames, np.arange(4) / 2)
    return Image(frames[0])
