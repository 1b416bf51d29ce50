"""Models in torch: a chat model's engine, and other projects' models by transformers' Auto classes.

Another project's model is tried with a small medium of each kind before it serves anybody.
"""

import logging
import textwrap
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open

from mico_chat.adapters.base import segments_of
from mico_chat.adapters.text import TextAdapter
from mico_chat.adapters.transformers import TransformersAdapter
from mico_chat.checkpoints.folders import generation_of, local_folder, model_folder
from mico_chat.checkpoints.lora import Lora, read_lora
from mico_chat.engine.alone import AloneModel
from mico_chat.engine.base import Engine, Prompt
from mico_chat.engine.scheduler import Chunk
from mico_chat.engine.transformers import TransformersModel
from mico_chat.engines.base import EngineOptions, Loaded, batching_engine, ends
from mico_chat.engines.source import Source
from mico_chat.errors import ConfigError, MicoError, ModelError
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.media.medium import SAMPLE_RATE, Audio, Image, Medium, Video
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
    ending = own_ends(llm, llm.config) | ends(tokenizer)  # training ends answers with the latter
    return batching_engine("transformers", model, tokenizer, ending, options)


def own_ends(llm: Any, *otherwise: Any) -> set[int]:
    """The tokens that end a model's answer: those of its own ``generation_config.json``, as of the
    library's ``generate``; without them, those that the model and ``otherwise`` name."""
    said = llm.generation_config
    found = (not said._from_model_config and ends(said)) or ends(said, *otherwise)
    rows = len(llm.get_input_embeddings().weight)
    if beyond := sorted(token for token in found if not 0 <= token < rows):
        reason = "%s: of its end tokens %s are left out: its table of tokens has %d rows"
        logger.warning(reason, llm.name_or_path, beyond, rows)
    return found - set(beyond)


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
    """Another project's model. One whose prompts do not batch runs alone.

    What it cannot be shown is left out; the ``notes`` of what is loaded say it, and why.
    """
    llm, processor, notes = _read(source, options)
    _check_tokenizer(source, processor, llm)
    adapter: TransformersAdapter | TextAdapter
    if source.reads_text_alone:
        adapter = TextAdapter(llm, processor)
    else:
        adapter = TransformersAdapter(llm, processor, str(source.model))
    alone, why, reason = AloneModel(llm, adapter.whole_inputs), None, ""
    model: Any = None
    try:
        given = {"max_batch": options.max_batch, **options.arguments}
        model = TransformersModel(llm, counts_prompt=True, **given)
    except Exception as error:  # in this trial another project's code may raise anything
        why = _reason(error)
    tried = _Trial(adapter, alone, model)
    why = why or tried.disagreement()
    if why is not None:
        notes.append(f"requests run alone, without batching: {why}")
        adapter.encodes, model = False, alone
    for kind, reason in tried.fails.items():
        what = "text without media" if kind is None else f"the kind {kind}"
        notes.append(f"it cannot be shown {what} here: {reason}")
    adapter.input_modalities = tuple(k for k in adapter.input_modalities if k not in tried.fails)
    if tried.fails and not adapter.input_modalities:
        shown = "no text" if source.reads_text_alone else "no medium"
        raise ModelError(f"{source.model}: it can be shown {shown} here, and fails so: {reason}")
    folder = local_folder(model_folder(source.model))
    for note in notes:
        logger.warning("%s: %s", source.model, note)
    tokenizer = adapter.tokenizer
    ending = own_ends(llm, tokenizer, llm.config.get_text_config())
    engine = batching_engine("transformers", model, tokenizer, ending, options)
    loras = own_loras(source, folder)
    for lora in loras.values():
        engine.load_lora(lora)
    given = {"notes": tuple(notes), "loras": loras}
    return Loaded(adapter, engine, generation_of(folder), **given)


def own_loras(source: Source, folder: Path) -> dict[Kind, Lora]:
    """The adapters that Phi-4's folder brings: its pictures need one and its sounds another, and
    where both are shown it is that of pictures.
    """
    brought: tuple[tuple[Kind, Path], ...]
    brought = ("image", folder / "vision-lora"), ("audio", folder / "speech-lora")
    name = str(source.model)
    return {k: read_lora(path.name, path, name) for k, path in brought if path.is_dir()}


def read_config(source: Source, options: EngineOptions) -> Any:
    return _read_part(transformers.AutoConfig, "config.json", source, options)


def read_processor(source: Source, options: EngineOptions) -> Any:
    """A model's processor, or the tokenizer of a model that reads text alone."""
    if source.reads_text_alone:
        part = "tokenizer (tokenizer*.json, chat_template.jinja)"
        return _read_part(transformers.AutoTokenizer, part, source, options)
    part, folder = "processor (tokenizer*.json, *_config.json)", Path(model_folder(source.model))
    written = ("tokenizer*", "*.model", "vocab*", "tekken*")
    if folder.is_dir() and not any(file for name in written for file in folder.glob(name)):
        raise ModelError(f"{source.model}: the folder lacks a tokenizer (tokenizer.json): fetch it")
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
        for file in sorted(Path(model).glob("*.safetensors")) if "safetensors" in part else ():
            if (why := _broken(file)) is not None:
                reason = f"{file.name} is not whole ({why}): fetch it again"
        raise ModelError(f"{model}: transformers cannot load its {part}: {reason}") from error


def _read(source: Source, options: EngineOptions) -> tuple[Any, Any, list[str]]:
    """The model, its processor, and a note of weights that the files lack."""
    config, quantization = read_config(source, options), bitsandbytes(options.quantization)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    reads = "AutoModelForCausalLM" if source.reads_text_alone else "AutoModelForMultimodalLM"
    auto = getattr(transformers, THINKERS.get(config.model_type, reads))
    part = "weights (*.safetensors), or the model of config.json"
    given = {"dtype": options.dtype or "bfloat16", "quantization_config": quantization}
    if quantization is not None:
        given["device_map"] = {"": device}
    # The library's own error of sizes names no tensor.
    given |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    llm, info = _read_part(auto, part, source, options, **given)
    for name, found, expected in sorted(info["mismatched_keys"]):
        sizes = f"{name} is {tuple(found)} in the file but {tuple(expected)} by config.json"
        all_ = f"of {len(info['mismatched_keys'])} such weights the first"
        raise ModelError(f"{source.model}: {sizes} ({all_}): fetch both again")
    notes = []
    if missing := sorted(info["missing_keys"]):
        weights = f"the files lack {len(missing)} weights, such as {missing[0]}"
        notes.append(f"answers are of no use: {weights}, which are random now")
    processor = read_processor(source, options)
    return (llm if quantization else llm.to(device)).train(False), processor, notes


def _broken(file: Path) -> str | None:
    """Why a file of weights cannot be read; None if it can."""
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)


def _check_tokenizer(source: Source, processor: Any, llm: Any) -> None:
    """Refuse a folder without chat template, and the tokenizer of another model, whose tokens this
    model's table lacks.
    """
    whole = source.reads_text_alone
    tokenizer = processor if whole else getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"{source.model}: its {type(processor).__name__} has no tokenizer")
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        reason, advice = "the folder lacks a chat template", "choose a model that is made to chat"
        if (Path(model_folder(source.model)) / "tekken.json").is_file():
            advice = "write Mistral's there, which its authors keep in the package mistral-common"
        raise ModelError(f"{source.model}: {reason} (chat_template.jinja): {advice}")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.get_vocab(with_added_tokens=False) if backend else tokenizer.get_vocab()
    last, rows = max(known.values(), default=0), len(llm.get_input_embeddings().weight)
    if last >= rows:
        reason = f"its tokenizer's ids go up to {last}, but its table of tokens has {rows} rows"
        raise ModelError(f"{source.model}: {reason}: put the model's own tokenizer into the folder")


SCALES = 1, 3, 7
"""The trial's media have these sizes until one is taken: some processors take no odd sizes, and the
last has sides that patches of 14, 16, 28 and 32 pixels fill."""


class _Trial:
    """The logits of an answer's first token, by this project's engine and by the library itself,
    for a small medium of each kind and for text (None). ``fails`` has what the library cannot do.
    """

    def __init__(
        self, adapter: TransformersAdapter | TextAdapter, alone: AloneModel, batched: Any
    ) -> None:
        self._adapter, self._batched = adapter, batched
        self._theirs: dict[Kind | None, Any] = {}
        self._pairs: dict[Kind, list[int]] = {}
        self._scales: dict[Kind | None, int] = {}
        self.fails: dict[Kind | None, str] = {}
        adapter.encodes = False
        for kind, scale in product((None, *adapter.input_modalities), SCALES):
            if kind in self._theirs:
                continue
            self._scales[kind] = scale
            try:
                prompt = self._prompt(kind)
                chunk = Chunk(0, 0, prompt.tokens(0, len(prompt))[0], 1, prompt=prompt)
                (found,) = alone.run([chunk])
                if isinstance(found, Exception):
                    raise found
                self._theirs[kind] = found
                self.fails.pop(kind, None)
            except Exception as error:  # another project's code may raise anything
                self.fails[kind] = _reason(error)
            finally:
                alone.truncate(0, 0)
            try:
                if kind is not None:
                    self._pairs[kind] = self._pair(kind)
            except Exception as error:  # as above: some models take one picture
                logger.info("two media of the kind %s: %s", kind, _reason(error))
        adapter.encodes = True

    def disagreement(self) -> str | None:
        """Why this project's engine does not compute what the library does; None if it does."""
        for kind, theirs in self._theirs.items():
            try:
                if kind in self._pairs and self._pair(kind) != self._pairs[kind]:
                    return f"two media of the kind {kind} have other tokens than each of them"
                if (why := self._differs(kind, theirs)) is not None:
                    return why
            except Exception as error:  # as above
                return _reason(error)
        return None

    def _differs(self, kind: Kind | None, theirs: Any) -> str | None:
        prepared = None if kind is None else self._adapter.prepare(self._small(kind), [kind])
        own = self._adapter
        if prepared and isinstance(own, TransformersAdapter) and (why := own.why_not(prepared)):
            return why
        prompt = self._prompt(kind)
        at, parts = 0, [len(prompt)]
        if self._batched.state_bytes:  # not every model's recurrent state goes on with some tokens
            parts = [len(prompt) - 2, len(prompt)]
        for stop in parts:
            ids, context = prompt.tokens(at, stop)
            positions = None if prompt.positions is None else prompt.positions[:, at:stop]
            (ours,) = self._batched.run([Chunk(0, at, ids, 1, context, positions)])
            at = stop
        self._batched.truncate(0, 0)
        ours, theirs = ours - ours.mean(), theirs.to(ours.device) - theirs.mean()
        alike = float(torch.cosine_similarity(ours, theirs, dim=0))
        if not alike >= ALIKE:
            return f"the logits for {kind or 'text'} differ from the model's own ({alike:.4f})"
        return None

    def _pair(self, kind: Kind) -> list[int]:
        """The tokens of a prompt with two media: some processors number them."""
        media = [self._small(kind)] * 2
        prepared = [self._adapter.prepare(medium, [kind, kind]) for medium in media]
        layout = self._adapter.layout([Message.user(*media, "Compare them.")], prepared)
        ids: list[int] = []
        for part in layout:
            if isinstance(part, tuple):
                ids += part
            elif part.block is None:
                ids += part.notes.ids
            else:  # of a model that runs alone: the whole prompt's
                return list(part.block.inputs["input_ids"][0].tolist())
        return ids

    def _small(self, kind: Kind) -> Medium:
        return _small(kind, self._scales[kind])

    def _prompt(self, kind: Kind | None) -> Prompt:
        media = [] if kind is None else [self._small(kind)]
        prepared = [self._adapter.prepare(medium, [medium.kind]) for medium in media]
        blocks = self._adapter.encode(prepared)
        shown = [replace(one, block=block) for one, block in zip(prepared, blocks, strict=True)]
        asked = Message.user(*media, "Describe it.")
        return Prompt(segments_of(self._adapter.layout([asked], shown)))


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, MicoError) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(text, 300, placeholder=" ...")


def _small(kind: Kind, scale: int = 1) -> Medium:
    """A medium whose sides and length are so many times the smallest's."""
    random = np.random.default_rng(0)
    layout = TABLE[kind].layout
    if layout == "slices":
        return Audio(random.uniform(-0.5, 0.5, scale * SAMPLE_RATE).astype(np.float32))
    frames = random.integers(0, 256, (4 * scale, 64 * scale, 96 * scale, 3), dtype=np.uint8)
    if layout == "frames":
        return Video(frames, np.arange(len(frames)) / 2)
    return Image(frames[0])
