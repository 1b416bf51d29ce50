"""From a recipe's ``model`` section to a model that can train, and from a trained one to a folder.

A name is a folder with a checkpoint to go on from, or one of the named configurations, whose
weights then start at random (but for a pretrained encoder taken over from stage 1 and the base
language model).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from mico_chat.base_llm import base_llm_path
from mico_chat.checkpoint import STEM_PREPROCESSING, new_processor, usual_preprocessing
from mico_chat.concept import ConceptAttention
from mico_chat.config import MicoChatConfig, MicoConfig, MicoTextConfig
from mico_chat.errors import ConfigError, MissingExtraError
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.modeling import MicoChatForConditionalGeneration, MicoForPretraining
from mico_chat.preprocessing import Preprocessing
from mico_chat.processing import MicoChatProcessor
from mico_training.recipe import LoraRecipe, ModelRecipe

PREPROCESSING_FILE = "preprocessing.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Pretraining:
    """Stage 1's model with the text branch's tokenizer."""

    model: MicoForPretraining
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing

    def save(self, folder: Path) -> None:
        """Write a folder that stage 1 can go on from and stage 2 takes its encoder from."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        content = self.preprocessing.model_dump_json(indent=1)
        (folder / PREPROCESSING_FILE).write_text(content, encoding="utf-8")


@dataclass(frozen=True)
class Chat:
    """The model of stages 2 and 3 with its processor."""

    model: MicoChatForConditionalGeneration
    processor: MicoChatProcessor

    @property
    def preprocessing(self) -> Preprocessing:
        """What decides a unit's pixels."""
        return Preprocessing(**self.processor.preprocessing)

    def is_saved(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether :meth:`save` needs a parameter: all but a base LLM's own."""
        held = cast(MicoChatConfig, self.model.config).base_llm is None
        return held or parameter.requires_grad or not name.startswith("llm.")

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder; a LoRA beside a base LLM of its own goes into ``lora/``."""
        llm, config = self.model.llm, cast(MicoChatConfig, self.model.config)
        if isinstance(llm, PeftModel):
            if config.base_llm is None:
                self.model.llm = llm.merge_and_unload()
            else:
                llm.save_pretrained(str(folder / "lora"))
        elif any(parameter.requires_grad for parameter in llm.parameters()):
            config.base_llm = None  # it is no longer the base: the folder holds its weights
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def build_pretraining(
    recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase | None
) -> Pretraining:
    """Stage 1's model.

    Args:
        recipe: whose ``name`` is a folder or a named configuration.
        tokenizer: the text branch's, for a named configuration; a folder has its own.

    Raises:
        ConfigError: an option that the configuration does not have, or no tokenizer.
    """
    folder = Path(recipe.name)
    if folder.is_dir():
        model = MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
        own = AutoTokenizer.from_pretrained(folder)
        preprocessing = read_preprocessing(folder, model.encoder.stem is not None)
        return Pretraining(model, own, preprocessing)
    if tokenizer is None:
        raise ConfigError(f"model {recipe.name!r} needs a tokenizer: set stage1.tokenizer")
    text = MicoTextConfig(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = pretraining_config(recipe, text)
    model = MicoForPretraining(config)
    return Pretraining(model, tokenizer, usual_preprocessing(config.encoder_config))


def pretraining_config(recipe: ModelRecipe, text: MicoTextConfig) -> MicoConfig:
    """The configuration of stage 1's model, with a text branch of that size; reads no weights."""
    folder = Path(recipe.name)
    if folder.is_dir():
        return MicoConfig.from_pretrained(folder)
    chat = MicoChatConfig.named(recipe.name)
    config = MicoConfig(
        encoder_config=chat.encoder_config,
        context_config=chat.context_config,
        concept_config=chat.concept_config,
        text_config=text,
    )
    _apply(config, recipe.options)
    return config


def read_preprocessing(folder: Path, hybrid: bool) -> Preprocessing:
    """A stage 1 folder's preprocessing; what its kind of encoder is used to, if it says nothing."""
    path = folder / PREPROCESSING_FILE
    if path.is_file():
        return Preprocessing(**json.loads(path.read_text(encoding="utf-8")))
    return STEM_PREPROCESSING if hybrid else Preprocessing()


def build_chat(recipe: ModelRecipe, spread: bool = False) -> Chat:
    """The model of stages 2 and 3; its weights are float32, the base LLM's ``llm_dtype``.

    Args:
        recipe: whose ``name`` is a folder or a named configuration.
        spread: whether several processes will share each weight (FSDP).

    Raises:
        ConfigError: unknown names or options, an encoder of another shape, or a quantization of
            weights that the model's own folder holds.
    """
    folder = Path(recipe.name)
    if folder.is_dir():
        if recipe.options or recipe.llm is not None:
            raise ConfigError(f"model: {folder} has its configuration; leave out llm and options")
        chat = _chat_of(folder, recipe, spread)
        if recipe.encoder is not None:
            _take_over(chat.model, MicoForPretraining.from_pretrained(recipe.encoder))
    else:
        chat = _new_chat(recipe, spread)
    return chat


def _chat_of(folder: Path, recipe: ModelRecipe, spread: bool) -> Chat:
    """A folder's model."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if MicoChatConfig.from_pretrained(folder).base_llm is not None:
        options |= {"llm_dtype": DTYPES[recipe.llm_dtype], **_quantized(recipe, spread)}
    elif recipe.llm_quantization is not None:
        raise ConfigError(
            f"model.llm_quantization: {folder} holds its language model itself, and a trained one "
            "would be saved quantized; keep it in a folder of its own (config.base_llm)"
        )
    model = MicoChatForConditionalGeneration.from_pretrained(folder, **options)
    return Chat(model, MicoChatProcessor.from_pretrained(folder))


def _quantized(recipe: ModelRecipe, spread: bool) -> dict[str, Any]:
    """``quantization_config`` as Hugging Face's ``from_pretrained`` takes it, or nothing."""
    if recipe.llm_quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("model.llm_quantization", "quantize")
    if recipe.llm_quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    # Spread over processes, packed weights must look like numbers of the others' precision.
    storage = DTYPES[recipe.llm_dtype] if spread else torch.uint8
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    return {"quantization_config": settings}


def hold_encoder(model: MicoChatForConditionalGeneration, recipe: ModelRecipe) -> None:
    """The encoder in ``encoder_dtype``; called when it is known what trains.

    Raises:
        ConfigError: the encoder trains, for which bfloat16 has too few digits.
    """
    if recipe.encoder_dtype == "float32":
        return
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        raise ConfigError(
            f"model.encoder_dtype {recipe.encoder_dtype}: the encoder trains and needs float32"
        )
    model.encoder.to(DTYPES[recipe.encoder_dtype])


def chat_config(recipe: ModelRecipe) -> MicoChatConfig:
    """The configuration that a recipe's model has or will have; reads no weights.

    Raises:
        ConfigError: unknown names or options.
    """
    folder = Path(recipe.name)
    if folder.is_dir():
        return MicoChatConfig.from_pretrained(folder)
    config = MicoChatConfig.named(recipe.name)
    if recipe.llm is not None:
        config.base_llm = recipe.llm
        config.llm_config = AutoConfig.from_pretrained(base_llm_path(recipe.llm))
    _apply(config, recipe.options)
    if recipe.encoder is not None and recipe.encoder.is_dir():
        source = MicoConfig.from_pretrained(recipe.encoder)
        config.encoder_config = source.encoder_config
        config.context_config = source.context_config
        config.concept_config = source.concept_config
    return config


def _new_chat(recipe: ModelRecipe, spread: bool) -> Chat:
    config = chat_config(recipe)
    pretrained = None
    if recipe.encoder is not None:
        pretrained = MicoForPretraining.from_pretrained(recipe.encoder, dtype=torch.float32)
    model = MicoChatForConditionalGeneration(config)
    if config.base_llm is None:
        raise ConfigError(f"model {recipe.name!r} has no base LLM: set model.llm")
    llm = AutoModelForCausalLM.from_pretrained(
        base_llm_path(config.base_llm),
        dtype=DTYPES[recipe.llm_dtype],
        **_quantized(recipe, spread),
    )
    model.attach_llm(llm)
    processor = new_processor(config)
    table = cast(nn.Embedding, model.get_input_embeddings()).weight
    with torch.no_grad():
        model.bridge.scale.fill_(float(table.float().std()))
    if pretrained is not None:
        _take_over(model, pretrained)
        preprocessing = read_preprocessing(
            cast(Path, recipe.encoder), pretrained.encoder.stem is not None
        )
        processor = MicoChatProcessor.for_config(config, processor.tokenizer, preprocessing)
    if model.concepts is not None:
        name_concepts(model.concepts, concept_names(config), processor.tokenizer)
    return Chat(model, processor)


def _take_over(model: MicoChatForConditionalGeneration, source: MicoForPretraining) -> None:
    """Copy the encoder, the context and the concept heads of stage 1, strictly."""
    parts: list[tuple[str, nn.Module | None, nn.Module | None]] = [
        ("encoder", model.encoder, source.encoder),
        ("context", model.context, source.context),
        ("concepts", model.concepts, source.concepts),
    ]
    for name, target, pretrained in parts:
        if (target is None) != (pretrained is None):
            raise ConfigError(f"model.encoder: {name} is there in one of the two models alone")
        if target is None or pretrained is None:
            continue
        state = dict(pretrained.state_dict())
        if isinstance(target, ConceptAttention):
            state["name_ids"] = target.name_ids  # tokens of the LLM, which stage 1 has not
        try:
            target.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ConfigError(f"model.encoder: {name} is of another shape: {reason}") from error


def concept_names(config: PreTrainedConfig) -> tuple[list[str], list[str]]:
    """Visual and sound names of a configuration's concepts; empty where it has none."""
    concept = cast(Any, config).concept_config
    if concept is None:
        return [], []
    return list(concept.visual_names or []), list(concept.sound_names or [])


def concept_labels(config: PreTrainedConfig) -> dict[Kind, dict[str, int]]:
    """Per kind, the class of each concept name; sound names come after the visual ones."""
    visual, sound = concept_names(config)
    seen = {name: number for number, name in reversed(list(enumerate(visual)))}
    heard = {name: len(visual) + number for number, name in reversed(list(enumerate(sound)))}
    return {kind: heard if kind == "audio" else seen for kind in KINDS}


def name_concepts(
    concepts: ConceptAttention,
    names: tuple[list[str], list[str]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Fill the LLM's tokens of each name (" cat" as in the middle of a sentence), -1 behind."""
    length = concepts.name_ids.shape[1]
    ids = torch.full_like(concepts.name_ids, -1)
    for row, name in enumerate([*names[0], *names[1]]):
        tokens = tokenizer(" " + name, add_special_tokens=False).input_ids[:length]
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
    concepts.name_ids.copy_(ids)


def add_lora(model: MicoChatForConditionalGeneration, recipe: LoraRecipe) -> None:
    """Put a LoRA on the language model; its own weights stay frozen.

    Raises:
        ConfigError: no layer ends in one of the targets.
    """
    names = [name for name, _ in model.llm.named_modules()]
    for target in recipe.targets:
        if not any(name.split(".")[-1] == target for name in names):
            raise ConfigError(f"stage3.lora.targets: the language model has no layer {target!r}")
    settings = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    model.llm = get_peft_model(model.llm, settings)


def _apply(config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    """Replace fields of a configuration; ``text_config.hidden_size`` reaches into a part."""
    for path, value in options.items():
        *parts, last = path.split(".")
        section: Any = config
        for part in parts:
            section = getattr(section, part, None)
        if section is None or not hasattr(section, last):
            raise ConfigError(f"model.options: the configuration has no {path!r}")
        setattr(section, last, value)


def stem_of(model: MicoForPretraining | MicoChatForConditionalGeneration) -> nn.Module:
    """The frozen CNN whose features are cached.

    Raises:
        ConfigError: the encoder has none.
    """
    stem = model.encoder.stem
    if stem is None:
        raise ConfigError("features: this encoder has no frozen stem; leave 'features' out")
    return stem


def run_stem(stem: nn.Module, pixels: Tensor) -> Tensor:
    """Features (n, C, G, G) of pixels (n, 3, H, W), on the stem's device."""
    return cast(Tensor, stem(pixels.to(next(stem.parameters()).device)))


def prepare_llm(model: MicoChatForConditionalGeneration, recipe: ModelRecipe) -> None:
    """Sets how the language model's layers run, see ``ModelRecipe``; after LoRA is put in."""
    llm = model.llm
    if recipe.llm_attention is not None:
        base: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
        base.set_attn_implementation(recipe.llm_attention)
    if recipe.llm_compile:
        for layer in llm.get_decoder().layers:
            layer.compile(dynamic=True)  # one compilation serves all layers
