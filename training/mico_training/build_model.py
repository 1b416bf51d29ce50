"""From a recipe's ``model`` section to a model that can train, and from a trained one to a folder.

A name is a folder with a checkpoint to go on from, a packaged model, or one of the named
configurations, whose weights then start at random (but for a pretrained encoder taken over from
stage 1 and the base language model).
"""

import copy
import importlib.util
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from mico_chat.checkpoints import assemble
from mico_chat.checkpoints.configs import read_part
from mico_chat.checkpoints.folders import (
    LORA,
    PREPROCESSING_FILE,
    PRETRAINING,
    base_llm_path,
    is_packaged,
    model_folder,
)
from mico_chat.checkpoints.load import text_tokenizer
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, save_with_llm
from mico_chat.errors import ConfigError, MissingExtraError, ModelError
from mico_chat.media.kinds import MODALITIES, Kind
from mico_chat.model.config import MicoChatConfig, MicoConfig, MicoTextConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor
from mico_training.data.mixture import Mixture
from mico_training.parallel import layers
from mico_training.recipe import LoraRecipe, ModelRecipe
from mico_training.starts import start_from
from mico_training.trained import trains

OF_TOKENIZER = ("vocab_size", "mask_token_id", "pad_token_id")
"""A text branch has these from its tokenizer."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
USUAL_TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
"""The layers of a new LoRA where a language model has all four; else all linear layers have it."""


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
    ``folder`` is the one that the model is from, maybe with an adapter that was merged.
    """

    model: MicoChatForConditionalGeneration
    processor: MicoChatProcessor
    encoder: Path | None = None
    folder: Path | None = None

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
            adapter = None if self.folder is None else self.folder / LORA
            if adapter is not None and adapter.is_dir() and not isinstance(llm, PeftModel):
                shutil.copytree(adapter, folder / LORA, dirs_exist_ok=True)
        if self.encoder is not None and not trains(self.model.encoder, self.model.context):
            assemble.keep_text_branch(self.encoder, folder)


def folder_of(recipe: ModelRecipe) -> Path | None:
    """The folder of a model's weights, also of a packaged one; None: a configuration's name."""
    there = Path(recipe.name).is_dir() or is_packaged(recipe.name)
    return Path(model_folder(recipe.name)) if there else None


def build_pretraining(
    recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase | None
) -> Pretraining:
    """Stage 1's model. A named configuration needs a tokenizer; a folder has its own."""
    if recipe.system_prompt is not None:
        raise ConfigError("model.system_prompt: stage 1 trains no chat; give it in stages 2 and 3")
    folder = folder_of(recipe)
    if folder is None and tokenizer is None:
        raise ConfigError(f"model {recipe.name!r} needs a tokenizer: set stage1.tokenizer")
    text = MicoTextConfig() if tokenizer is None else text_config(tokenizer)
    config = pretraining_config(recipe, text)
    encoder = None if recipe.encoder is None else assemble.read_encoder(recipe.encoder)
    model: Any
    words: Any = tokenizer
    if folder is not None:
        _starts_elsewhere(recipe, f"{folder} has weights; leave them out")
        parts = assemble.read_encoder(folder)
        model, words = parts.text or (parts.source, text_tokenizer(folder))
        model = _with_rows(model, recipe) if recipe.options else model
        preprocessing = parts.preprocessing
    else:
        if recipe.encoder is not None and recipe.encoder_weights is not None:
            raise ConfigError("model: encoder and encoder_weights exclude each other; give one")
        model = MicoForPretraining(config)
        start_from(model, recipe)
        given = encoder and encoder.preprocessing
        preprocessing = given or assemble.usual_preprocessing(config)
        if model.names is not None:
            visual, sound = config.concept_names
            model.names.start([*visual, *sound], words, model.text.table)
    if encoder is not None:
        _take_over(model, encoder, recipe)
    return Pretraining(model, words, preprocessing)


def _with_rows(model: MicoForPretraining, recipe: ModelRecipe) -> MicoForPretraining:
    """A folder's model with rows for more kinds, which start at random; the old rows stay."""
    key, before = "context_config.kind_rows", model.config.context_config.kind_rows
    rows = recipe.options.get(key)
    if set(recipe.options) != {key} or not isinstance(rows, dict) or rows | before != rows:
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
    folder = folder_of(recipe)
    if folder is not None:
        branch = folder / PRETRAINING
        found = assemble.encoder_config_of(branch if branch.is_dir() else folder)
        if not isinstance(found, MicoConfig):
            raise ConfigError(
                f"model.name {recipe.name}: this chat model has no text branch; start one beside "
                f"its encoder: model: {{name: mini-scratch, encoder: {recipe.name}}}"
            )
        return found
    chat = MicoChatConfig.named(recipe.name)
    if (given := _encoder_config(recipe)) is not None:
        assemble.take_encoder(chat, given)
    sizes = MicoConfig.known().get(recipe.name, {}).get("text_config", {})
    text.update({key: size for key, size in sizes.items() if key not in OF_TOKENIZER})
    config = MicoConfig(
        encoder_config=chat.encoder_config,
        context_config=chat.context_config,
        concept_config=chat.concept_config,
        text_config=text,
    )
    _set_options(config, recipe.options)
    return config


def _encoder_config(recipe: ModelRecipe) -> MicoConfig | MicoChatConfig | None:
    """The configuration of ``model.encoder``, unless its folder is still to be made."""
    place = recipe.encoder
    if place is None or not (
        place.is_dir() or is_packaged(str(place)) or assemble.timm_name(place)
    ):
        return None
    return assemble.encoder_config_of(place)


def build_chat(recipe: ModelRecipe, tune_adapter: bool = False) -> Chat:
    """The model of stages 2 and 3; its weights are float32, the base LLM's ``llm_dtype``.

    A folder's adapter is merged, or stays apart to go on with it (``tune_adapter``).

    Raises:
        ConfigError: unknown names or options, an encoder of another shape, or a quantization of
            weights that the model's own folder holds.
    """
    _starts_elsewhere(recipe, "only stage 1 starts from them; give its output as model.encoder")
    folder, config = folder_of(recipe), chat_config(recipe)
    encoder = None if recipe.encoder is None else assemble.read_encoder(recipe.encoder)
    precision = {"dtype": DTYPES[recipe.llm_dtype], **_quantized(recipe)}
    if folder is None:
        if config.base_llm is None:
            raise ConfigError(f"model {recipe.name!r} has no base LLM: set model.llm")
        path = base_llm_path(config.base_llm)
        llm = AutoModelForCausalLM.from_pretrained(path, **precision)
        chat = Chat(*assemble.build(config, llm, encoder), recipe.encoder)
        return with_prompt(chat, recipe.system_prompt)
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
        folder, **(precision | {"dtype": torch.float32}), tune_adapter=tune_adapter
    )
    if encoder is not None:
        _take_over(model, encoder, recipe)
    processor = MicoChatProcessor.from_pretrained(folder)
    found = Chat(model, processor, recipe.encoder or folder, folder)
    return with_prompt(found, recipe.system_prompt)


def with_prompt(chat: Chat, prompt: str | None) -> Chat:
    """The chat model with a system prompt of a recipe, if there is one, in place of its own."""
    if prompt is not None:
        chat.processor.system_prompt = prompt
    return chat


def _starts_elsewhere(recipe: ModelRecipe, reason: str) -> None:
    for key in ("encoder_weights", "text_weights"):
        if vars(recipe)[key] is not None:
            raise ConfigError(f"model.{key} {vars(recipe)[key]}: {reason}")


def _take_over(
    model: MicoForPretraining | MicoChatForConditionalGeneration,
    encoder: assemble.Encoder,
    recipe: ModelRecipe,
) -> None:
    try:
        assemble.take_over(model, encoder)
    except ModelError as error:
        advice = f"mico-chat assemble --encoder {recipe.encoder} --llm NAME --output DIR"
        if isinstance(model, MicoForPretraining):
            advice = f"model: {{name: mini-scratch, encoder: {recipe.encoder}}}"
        raise ConfigError(f"model.encoder: {error}; a model that fits: {advice}") from error


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
    folder, name = folder_of(recipe), recipe.name
    if folder is not None:
        found = read_part(AutoConfig, folder, "configuration")
        if isinstance(found, MicoChatConfig):
            return found
        lacks, parts = "is not a chat model", f"--encoder DIR --llm {name}"
        if isinstance(found, MicoConfig):
            lacks, parts = "has no language model", f"--encoder {name} --llm NAME"
        advice = f"make a chat model of it: mico-chat assemble {parts} --output DIR"
        raise ConfigError(f"model.name {name} {lacks}; {advice}")
    config = MicoChatConfig.named(name)
    if recipe.llm is not None:
        config.base_llm = recipe.llm
        config.llm_config = assemble.llm_config(recipe.llm)
    _set_options(config, recipe.options)
    if (given := _encoder_config(recipe)) is not None:
        assemble.take_encoder(config, given)
    return config


def concept_labels(config: MicoConfig | MicoChatConfig) -> dict[Kind, dict[str, int]]:
    """Per kind, the class of each concept name; sound names come after the visual ones."""
    visual, sound = config.concept_names
    seen = {name: number for number, name in reversed(list(enumerate(visual)))}
    heard = {name: len(visual) + number for number, name in reversed(list(enumerate(sound)))}
    return {kind: heard if kind == "audio" else seen for kind in MODALITIES}


def add_lora(
    model: MicoChatForConditionalGeneration, recipe: LoraRecipe, folder: Path | None = None
) -> None:
    """Put a LoRA on the language model, frozen, or go on with that of the model's ``folder``.

    A ConfigError if a target is no layer's name, or if the folder's LoRA is another one.
    """
    if folder is not None and (folder / LORA).is_dir():
        settings: Any = PeftConfig.from_pretrained(str(folder / LORA))
        settings.inference_mode = False
        keys = {"alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
        for key in recipe.model_fields_set:
            asked, has = vars(recipe)[key], vars(settings)[keys.get(key, key)]
            if asked is not None and (set(asked) if key == "targets" else asked) != has:
                raise ConfigError(
                    f"stage3.lora.{key} {asked}: the LoRA in {folder}, which goes on, has {has}; "
                    f"leave {key} out, or merge it first: mico-chat merge {folder} --output DIR"
                )
    else:
        named, head = dict(model.llm.named_modules()), model.llm.get_output_embeddings()
        names = {name.split(".")[-1] for name in named}
        linear = (n for n, m in named.items() if isinstance(m, (nn.Linear, Conv1D)) and m != head)
        every = sorted({name.split(".")[-1] for name in linear})
        targets = recipe.targets or (USUAL_TARGETS if names.issuperset(USUAL_TARGETS) else every)
        for target in targets:
            if target not in names:
                reason = f"the language model lacks the layer {target!r}"
                raise ConfigError(f"stage3.lora.targets: {reason}")
        settings = LoraConfig(
            r=recipe.r,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=list(targets),
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.llm.modules()),
            task_type="CAUSAL_LM",
        )
    if isinstance(model.llm, PeftModel):  # the folder's
        model.llm.set_adapter("default")
    else:
        model.llm = get_peft_model(model.llm, settings)


def _set_options(config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    try:
        assemble.set_options(config, options)
    except ConfigError as error:
        raise ConfigError(f"model.options: {error}") from error


def check_packing(llm: Any) -> None:
    """A ConfigError if a language model mixes the conversations of a row (``train.packing``).

    It reads one behind another that changes, and alone.
    """
    table, was = llm.get_input_embeddings(), llm.training
    ids = torch.arange(12, device=table.weight.device) % table.num_embeddings
    two = table(ids)[None].detach().requires_grad_()  # 4-bit layers keep their gradient by it
    other = torch.cat([two[:, :6].flip(1), two[:, 6:]], 1)
    places = torch.arange(6, device=ids.device).repeat(2)[None]

    def read(tokens: Tensor, positions: Tensor) -> Tensor:
        asked = {"inputs_embeds": tokens, "position_ids": positions, "use_cache": False}
        return cast(Tensor, llm.get_decoder()(**asked).last_hidden_state[:, -6:].detach().float())

    llm.eval()
    try:
        first, second, alone = (
            read(two, places),
            read(other, places),
            read(two[:, 6:], places[:, 6:]),
        )
    except TypeError as error:  # it takes no positions
        mixed, said = True, f": {error}"
    else:
        size, exact = float(first.abs().max()), table.weight.dtype == torch.float32
        mixed, said = float((first - second).abs().max()) > 1e-4 * size, ""
        mixed |= float((first - alone).abs().max()) > (1e-3 if exact else 0.1) * size
    llm.train(was)
    if mixed:
        raise ConfigError(
            f"train.packing: this language model ({llm.config.model_type}) does not keep the "
            f"conversations of a row apart{said}; leave out train.packing, or set "
            "train.group_by_length, which saves padding too"
        )


def prepare_llm(model: MicoChatForConditionalGeneration, recipe: ModelRecipe) -> None:
    """Sets how the language model's layers run, see ``ModelRecipe``; after LoRA is put in."""
    llm = model.llm
    if recipe.llm_attention is not None:
        base: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
        base.set_attn_implementation(recipe.llm_attention)
    if recipe.llm_compile:
        compile_layers(llm, "llm_compile")
    if recipe.compile:
        compile_layers(model.encoder, "compile")


def compile_layers(model: nn.Module, key: str) -> None:
    """Have a model's layers run through ``torch.compile``, as ``model.<key>`` asks.

    A ConfigError if nothing can be compiled here.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        now = time.time()  # it is new, so that no cache knows what is compiled
        torch.compile(lambda x: x.sin() * now)(torch.ones(8, device=device))
    except RuntimeError as error:
        said = str(error).strip().splitlines()
        raise ConfigError(
            f"model.{key}: torch.compile does not work here ({said[0] if said else error!r}); "
            f"install a C++ compiler (g++), on a GPU Triton, or leave out model.{key}"
        ) from error
    for layer in layers(model):
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
