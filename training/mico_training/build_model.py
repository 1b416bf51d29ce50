"""From a recipe's ``model`` section to a model that can train, and from a trained one to a folder.

A name is a folder with a checkpoint to go on from, or one of the named configurations, whose
weights then start at random (but for a pretrained encoder taken over from stage 1 and the base
language model).
"""

import copy
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mico_chat.checkpoints import assemble
from mico_chat.checkpoints.folders import LORA, PREPROCESSING_FILE, base_llm_path
from mico_chat.checkpoints.load import text_tokenizer
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, save_with_llm
from mico_chat.errors import ConfigError, MissingExtraError, ModelError
from mico_chat.media.kinds import MODALITIES, Kind
from mico_chat.model.config import MicoChatConfig, MicoConfig, MicoTextConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor
from mico_training.data.mixture import Mixture
from mico_training.recipe import LoraRecipe, ModelRecipe
from mico_training.starts import start_from
from mico_training.trained import trains

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Pretraining:
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
    """The model of stages 2 and 3 with its processor.

    ``encoder`` is the folder its encoder is from: with the text branch of its pretraining, if any.
    """

    model: MicoChatForConditionalGeneration
    processor: MicoChatProcessor
    encoder: Path | None = None

    def is_saved(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether :meth:`save` needs a parameter: all but a base LLM's own."""
        held = self.model.config.base_llm is None
        return held or parameter.requires_grad or not name.startswith("llm.")

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder.

        A LoRA beside a base LLM of its own goes into ``lora/``, a base LLM that was trained as a
        whole into ``llm/``, and the text branch into ``pretraining/`` if it still fits the encoder.
        """
        llm, config = self.model.llm, self.model.config
        if isinstance(llm, PeftModel):
            if config.base_llm is None:
                self.model.llm = llm.merge_and_unload()
            else:
                llm.save_pretrained(str(folder / LORA))
        if config.base_llm is not None and not isinstance(llm, PeftModel) and trains(llm):
            save_with_llm(self.model, self.processor, folder)
        else:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        if self.encoder is not None and not trains(self.model.encoder, self.model.context):
            assemble.keep_text_branch(self.encoder, folder)


def build_pretraining(
    recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase | None
) -> Pretraining:
    """Stage 1's model. A named configuration needs a tokenizer; a folder has its own."""
    folder = Path(recipe.name)
    if folder.is_dir():
        _starts_elsewhere(recipe, f"{folder} has weights; leave them out")
        model = MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
        model = _with_rows(model, recipe) if recipe.options else model
        if recipe.encoder is not None:
            _take_over(model, assemble.read_encoder(recipe.encoder))
        return Pretraining(
            model, text_tokenizer(folder), assemble.read_preprocessing(folder, model.config)
        )
    if tokenizer is None:
        raise ConfigError(f"model {recipe.name!r} needs a tokenizer: set stage1.tokenizer")
    config = pretraining_config(recipe, text_config(tokenizer))
    model = MicoForPretraining(config)
    start_from(model, recipe)
    if model.names is not None:
        visual, sound = config.concept_names
        model.names.start([*visual, *sound], tokenizer, model.text.table)
    return Pretraining(model, tokenizer, assemble.usual_preprocessing(config))


def _with_rows(model: MicoForPretraining, recipe: ModelRecipe) -> MicoForPretraining:
    """A folder's model with rows for more kinds, which start at random; the old rows stay."""
    key, before = "context_config.kind_rows", model.config.context_config.kind_rows
    rows = recipe.options.get(key)
    kept = isinstance(rows, dict) and {kind: rows.get(kind) for kind in before} == before
    if set(recipe.options) != {key} or not kept:
        raise ConfigError(
            f"model.options: {recipe.name} has its own configuration; only {key} can be set, which "
            f"must keep {before}"
        )
    config = copy.deepcopy(model.config)
    config.context_config.kind_rows = rows
    old, grown = model.state_dict(), MicoForPretraining(config)
    for name, value in grown.state_dict().items():
        (value[: len(old[name])] if value.ndim else value).copy_(old[name])
    return grown


def text_config(tokenizer: PreTrainedTokenizerBase, **sizes: int) -> MicoTextConfig:
    mask, pad = cast(int, tokenizer.mask_token_id), cast(int, tokenizer.pad_token_id)
    return MicoTextConfig(
        vocab_size=len(tokenizer), mask_token_id=mask, pad_token_id=pad, **cast(Any, sizes)
    )


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
    _set_options(config, recipe.options)
    return config


def build_chat(recipe: ModelRecipe) -> Chat:
    """The model of stages 2 and 3; its weights are float32, the base LLM's ``llm_dtype``.

    Raises:
        ConfigError: unknown names or options, an encoder of another shape, or a quantization of
            weights that the model's own folder holds.
    """
    _starts_elsewhere(recipe, "only stage 1 starts from them; give its output as model.encoder")
    folder, config = Path(recipe.name), chat_config(recipe)
    encoder = None if recipe.encoder is None else assemble.read_encoder(recipe.encoder)
    precision = {"dtype": DTYPES[recipe.llm_dtype], **_quantized(recipe)}
    if not folder.is_dir():
        if config.base_llm is None:
            raise ConfigError(f"model {recipe.name!r} has no base LLM: set model.llm")
        path = base_llm_path(config.base_llm)
        llm = AutoModelForCausalLM.from_pretrained(path, **precision)
        return Chat(*assemble.build(config, llm, encoder), recipe.encoder)
    if recipe.options or recipe.llm is not None:
        raise ConfigError(f"model: {folder} has its own configuration; leave out llm and options")
    if config.base_llm is None and recipe.llm_quantization is not None:
        raise ConfigError(
            f"model.llm_quantization: {folder} holds its language model itself, which "
            "training would save quantized; keep the language model in a folder of its own "
            "(config.base_llm)"
        )
    if config.base_llm is not None:
        precision["llm_dtype"] = precision["dtype"]
    model = MicoChatForConditionalGeneration.from_pretrained(
        folder, **(precision | {"dtype": torch.float32})
    )
    if encoder is not None:
        _take_over(model, encoder)
    return Chat(model, MicoChatProcessor.from_pretrained(folder), recipe.encoder or folder)


def _starts_elsewhere(recipe: ModelRecipe, reason: str) -> None:
    for key in ("encoder_weights", "text_weights"):
        if vars(recipe)[key] is not None:
            raise ConfigError(f"model.{key} {vars(recipe)[key]}: {reason}")


def _take_over(
    model: MicoForPretraining | MicoChatForConditionalGeneration, encoder: assemble.Encoder
) -> None:
    try:
        assemble.take_over(model, encoder)
    except ModelError as error:
        raise ConfigError(f"model.encoder: {error}") from error


def _quantized(recipe: ModelRecipe) -> dict[str, Any]:
    """``quantization_config`` as Hugging Face's ``from_pretrained`` takes it, or nothing."""
    if recipe.llm_quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("model.llm_quantization", "quantize")
    settings = BitsAndBytesConfig(load_in_8bit=True)
    if recipe.llm_quantization == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"quantization_config": settings}


def hold_encoder(model: MicoChatForConditionalGeneration, recipe: ModelRecipe) -> None:
    """The encoder in ``encoder_dtype``; a ConfigError if it trains: bfloat16 has too few digits."""
    if recipe.encoder_dtype == "float32":
        return
    if trains(model.encoder):
        reason = "the encoder is trained, so it needs float32"
        raise ConfigError(f"model.encoder_dtype {recipe.encoder_dtype}: {reason}")
    model.encoder.to(DTYPES[recipe.encoder_dtype])


def chat_config(recipe: ModelRecipe) -> MicoChatConfig:
    """The configuration that a recipe's model has or will have; reads no weights."""
    folder = Path(recipe.name)
    if folder.is_dir():
        return MicoChatConfig.from_pretrained(folder)
    config = MicoChatConfig.named(recipe.name)
    if recipe.llm is not None:
        config.base_llm = recipe.llm
        config.llm_config = assemble.llm_config(recipe.llm)
    _set_options(config, recipe.options)
    if recipe.encoder is not None and recipe.encoder.is_dir():
        assemble.take_encoder(config, assemble.encoder_config_of(recipe.encoder))
    return config


def concept_labels(config: MicoConfig | MicoChatConfig) -> dict[Kind, dict[str, int]]:
    """Per kind, the class of each concept name; sound names come after the visual ones."""
    visual, sound = config.concept_names
    seen = {name: number for number, name in reversed(list(enumerate(visual)))}
    heard = {name: len(visual) + number for number, name in reversed(list(enumerate(sound)))}
    return {kind: heard if kind == "audio" else seen for kind in MODALITIES}


def add_lora(model: MicoChatForConditionalGeneration, recipe: LoraRecipe) -> None:
    """Put a LoRA on the language model, frozen; a ConfigError if a target is no layer's name."""
    names = {name.split(".")[-1] for name, _ in model.llm.named_modules()}
    for target in recipe.targets:
        if target not in names:
            raise ConfigError(f"stage3.lora.targets: the language model lacks the layer {target!r}")
    settings = LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    model.llm = get_peft_model(model.llm, settings)


def _set_options(config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    try:
        assemble.set_options(config, options)
    except ConfigError as error:
        raise ConfigError(f"model.options: {error}") from error


def prepare_llm(model: MicoChatForConditionalGeneration, recipe: ModelRecipe) -> None:
    """Sets how the language model's layers run, see ``ModelRecipe``; after LoRA is put in."""
    llm = model.llm
    if recipe.llm_attention is not None:
        base: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
        base.set_attn_implementation(recipe.llm_attention)
    if recipe.llm_compile:
        for layer in llm.get_decoder().layers:
            layer.compile(dynamic=True)  # one compilation serves all layers


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MOST_SAMPLES = 100_000


def kept_vocabulary(folder: Path, mixture: Mixture, size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``; the first call learns it from the mixture's captions.

    A resumed run reads the same tokens. Each source gives at most its first ``MOST_SAMPLES``
    samples.
    """
    if not (folder / "tokenizer.json").is_file():
        captions = (
            caption
            for source in mixture.sources
            for index in range(min(len(source), MOST_SAMPLES))
            for captions in source[index].captions.values()
            for caption in captions
        )
        learn_vocabulary(captions, size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def learn_vocabulary(captions: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer of at most ``size`` entries, BERT's special tokens first.

    The same captions give the same tokenizer. The trainer numbers the letters within words ("##a")
    in the order of a hash table, which is another in each process, and joins those of lower numbers
    first where counts are equal. So their order is given, as if they were special tokens.
    """
    captions, found = list(captions), dict[str, int]()
    for n in (1, size):  # at first without a single merge
        inside = sorted(token for token in found if token.startswith("##"))
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=n, special_tokens=[*SPECIAL, *inside], show_progress=False
        )
        tokenizer = _word_pieces({})
        tokenizer.train_from_iterator(captions, trainer)
        found = tokenizer.get_vocab()
    tokenizer = _word_pieces(found)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=None,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _word_pieces(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer
