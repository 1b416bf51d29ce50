"""A MiCo-Chat out of an encoder, a language model and a fresh bridge, which stage 2 then trains.

The encoder comes from a stage 1 folder (or a converted one), from another chat model or from timm;
the language model is any causal LM of Hugging Face and stays where it is.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mico_chat.checkpoints.configs import read_part
from mico_chat.checkpoints.folders import (
    PACKAGED,
    PREPROCESSING_FILE,
    PRETRAINING,
    base_llm_path,
    local_folder,
    model_folder,
    whole_folder,
)
from mico_chat.checkpoints.load import (
    STEM_PREPROCESSING,
    TEXT_PARTS,
    load_pretraining,
    load_strict,
    read_media_model,
    read_token_table,
    text_tokenizer,
)
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError, ModelError
from mico_chat.model.config import (
    MicoBridgeConfig,
    MicoChatConfig,
    MicoConceptConfig,
    MicoConfig,
    MicoEncoderConfig,
)
from mico_chat.model.media_path import MediaModel, TokenTable
from mico_chat.model.mini.concepts import ConceptAttention
from mico_chat.model.mini.stem import timm
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor

logger = logging.getLogger(__name__)

LOADING = (
    *(RuntimeError, OSError, ValueError, TypeError, LookupError, AttributeError, EOFError),
    *(AssertionError, SafetensorError),
)
"""What timm and transformers raise for names, files and hubs that give no weights."""


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder; ``text`` is the model and tokenizer of its text branch, if kept."""

    source: MicoForPretraining | MediaModel
    preprocessing: Preprocessing
    text: tuple[MicoForPretraining, PreTrainedTokenizerBase] | None = None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# --- what goes in -------------------------------------------------------------------------------


def read_encoder(name_or_dir: str | Path) -> Encoder:
    """The encoder of a stage 1 folder, a chat model or timm (:func:`timm_name`), in float32."""
    if (name := timm_name(name_or_dir)) is not None:
        return _read_timm(name)
    folder = local_folder(model_folder(name_or_dir))
    config = encoder_config_of(folder)
    if isinstance(config, MicoConfig):
        model = MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
        preprocessing = read_preprocessing(folder, config)
        if [*folder.glob("tokenizer*"), *folder.glob("vocab*")]:
            return Encoder(model, preprocessing, (model, text_tokenizer(folder)))
        logger.warning("%s: without a tokenizer the text branch is not loaded", folder)
        return Encoder(model, preprocessing)
    preprocessing = MicoChatProcessor.from_pretrained(folder).preprocessing
    if (folder / PRETRAINING).is_dir():
        branch, tokenizer = load_pretraining(folder)
        return Encoder(branch, preprocessing, (branch, tokenizer))
    return Encoder(read_media_model(folder, torch.float32), preprocessing)


def timm_name(name_or_dir: str | Path) -> str | None:
    """timm's name of an encoder: a folder of its ``save_for_hf``, one of its models, or one of the
    hub (``timm/...``); None if it is not timm's."""
    text, file = str(name_or_dir), Path(name_or_dir) / "config.json"
    if file.is_file():
        with suppress(ValueError):  # others say what is wrong with the file
            content = json.loads(file.read_text(encoding="utf-8"))
            return f"local-dir:{text}" if "pretrained_cfg" in content else None
        return None
    if text.startswith(("timm/", "hf-hub:")):
        return "hf-hub:" + text.removeprefix("hf-hub:")
    return text if timm.models.is_model(text) else None


def _timm_config(name: str) -> tuple[MicoEncoderConfig, Preprocessing]:
    """The configuration of an encoder of timm and what it takes; reads no weights."""
    try:
        options = timm.models.resolve_model_input_args(name)
    except LOADING as error:
        raise ModelError(f"{name}: timm cannot read it: {one_line(error)}") from error
    source, size = options.pop("pretrained_cfg"), options.pop("img_size", None)
    side = int(torch.tensor(size or source["input_size"][1:]).max())
    config = MicoEncoderConfig(architecture=options.pop("model_name"), image_size=side)
    unused = ("num_classes", "pretrained_model_args")
    config.architecture_options = {k: v for k, v in options.items() if k not in unused} or None
    looks = {f"image_{key}": tuple(source[key]) for key in ("mean", "std")}
    return config, Preprocessing(image_size=side, **looks)


def _read_timm(name: str) -> Encoder:
    """An encoder of timm with its weights; its context starts new."""
    config, preprocessing = _timm_config(name)
    bridge = MicoBridgeConfig(hidden_size=64, num_heads=1, depth=1)  # nobody uses it
    try:
        model = MediaModel(MicoChatConfig(encoder_config=config, bridge_config=bridge))
        encoder, side = model.encoder, config.image_size
        source = timm.create_model(name, pretrained=True, num_classes=0, img_size=side)
        encoder.vit.load_state_dict(source.state_dict())
        with torch.no_grad():
            shape = tuple(encoder(torch.zeros(1, 3, side, side)).shape)
    except LOADING as error:
        reason = f"{one_line(error)}; an encoder is a ViT whose tokens lie on a square grid"
        raise ModelError(f"{name}: timm gives no encoder: {reason}") from error
    wanted = (1, encoder.n_prefix + encoder.grid**2, encoder.embed_dim)
    if shape != wanted:
        raise ModelError(f"{name}: timm makes {shape} of a picture, but tokens are {wanted}")
    return Encoder(model, preprocessing)


def encoder_config_of(folder: str | Path) -> MicoConfig | MicoChatConfig:
    if (name := timm_name(folder)) is not None:
        return MicoConfig(encoder_config=_timm_config(name)[0])
    folder = local_folder(model_folder(folder))
    config = read_part(AutoConfig, folder, "configuration")
    if not isinstance(config, MicoConfig | MicoChatConfig):
        raise ModelError(
            f"{folder}: the model type is {config.model_type!r}; an encoder is read "
            "from a model of type 'mico' (stage 1) or 'mico_chat', or from timm"
        )
    return config


def read_preprocessing(folder: Path, config: MicoConfig) -> Preprocessing:
    """A stage 1 folder's preprocessing; where it has none, the usual one of its encoder."""
    path = folder / PREPROCESSING_FILE
    if path.is_file():
        return Preprocessing(**json.loads(path.read_text(encoding="utf-8")))
    return usual_preprocessing(config)


def usual_preprocessing(config: MicoConfig | MicoChatConfig) -> Preprocessing:
    """The preprocessing of the encoder's stem; CLIP's for an encoder without one."""
    encoder = config.encoder_config
    usual = Preprocessing() if encoder.stem is None else STEM_PREPROCESSING
    return usual.model_copy(update={"image_size": encoder.image_size})


def llm_config(llm: str) -> PreTrainedConfig:
    """The configuration of a causal language model, by its packaged name, folder or hub name."""
    config: PreTrainedConfig = read_part(AutoConfig, base_llm_path(llm), "configuration")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{llm}: a model of type {config.model_type!r} is not a causal language model"
        )
    return config


# --- putting it together ------------------------------------------------------------------------


def take_encoder(config: MicoChatConfig, source: MicoConfig | MicoChatConfig) -> None:
    config.encoder_config = source.encoder_config
    config.context_config = source.context_config
    config.concept_config = source.concept_config


def build(
    config: MicoChatConfig,
    llm: PreTrainedModel | TokenTable,
    encoder: Encoder | None = None,
    chat_template: str | None = None,
) -> tuple[MicoChatForConditionalGeneration, MicoChatProcessor]:
    """A model whose bridge starts at random, and its processor.

    ``llm`` is the language model that ``config.base_llm`` names, or its token table alone. Without
    an ``encoder`` the encoder starts at random too. Parts that do not fit together are an error.
    """
    if config.base_llm is None:
        raise ModelError("the configuration does not name a language model (base_llm)")
    source = base_llm_path(config.base_llm)
    tokenizer: PreTrainedTokenizerBase = read_part(AutoTokenizer, source, "tokenizer")
    template = template_of(source, tokenizer, chat_template)
    if len(tokenizer) > (rows := config.context_token_id):
        raise ModelError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, but the model has {rows} token "
            "vectors"
        )
    model = MicoChatForConditionalGeneration(config)
    model.attach_llm(llm)
    table: Any = model.get_input_embeddings()
    with torch.no_grad():
        scale = getattr(table, "scalar_embed_scale", 1.0)  # Gemma's multiplies its vectors
        model.bridge.scale.fill_(float(table.weight.float().std()) * scale)
    preprocessing = usual_preprocessing(config) if encoder is None else encoder.preprocessing
    if encoder is not None:
        take_over(model, encoder)
    if model.concepts is not None and config.concept_config is not None:
        name_concepts(model.concepts, config.concept_config, tokenizer)
    if model.things is not None:
        model.thing_words.learn_words(
            # The last: a digit may have its space as a token of its own.
            lambda word: tokenizer(" " + word, add_special_tokens=False).input_ids[-1]
        )
    return model, MicoChatProcessor.for_config(config, tokenizer, preprocessing, template)


def take_over(
    model: MicoChatForConditionalGeneration | MicoForPretraining, encoder: Encoder
) -> None:
    """Copy an encoder, its context and its concept heads into a model, strictly."""
    source, config = encoder.source, model.config
    config.trained_on = [*(config.trained_on or []), *(source.config.trained_on or [])] or None
    for name in ("encoder", "context", "concepts"):
        target: nn.Module | None = getattr(model, name)
        pretrained: nn.Module | None = getattr(source, name)
        if target is None and pretrained is None:
            continue
        if target is None or pretrained is None:
            raise ModelError(f"only one of the two models has {name}")
        state = dict(pretrained.state_dict())
        if isinstance(target, ConceptAttention):
            for ids in ("name_ids", "exact_ids"):  # tokens of the LLM, which stage 1 lacks
                if ids in state:
                    state[ids] = getattr(target, ids)
        load_strict(target, state, f"{name} has different shapes in the two models")


def name_concepts(
    concepts: ConceptAttention, config: MicoConceptConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Set the LLM's tokens of each name (" cat" as in the middle of a sentence), then -1."""
    visual, sound = config.visual_names or [], config.sound_names or []
    tables = [(concepts.name_ids, config.plain_names or [*visual, *sound])]
    if concepts.exact_ids is not None:
        tables.append((concepts.exact_ids, visual))
    for ids, names in tables:
        ids.fill_(-1)
        for row, name in zip(ids, names, strict=True):
            tokens = tokenizer(" " + name, add_special_tokens=False).input_ids[: len(row)]
            row[: len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)


def set_options(config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    """Replace fields of a configuration; ``bridge.depth`` is short for ``bridge_config.depth``."""
    for path, value in options.items():
        *parts, last = path.split(".")
        section: Any = config
        for part in parts:
            section = vars(section).get(part, vars(section).get(f"{part}_config"))
            if not isinstance(section, PreTrainedConfig):
                break
        if not isinstance(section, PreTrainedConfig) or last not in vars(section):
            raise ConfigError(f"the configuration lacks {path!r}")
        before = vars(section)[last]
        kinds = (float, int) if type(before) is float else (type(before),)
        if isinstance(before, int | float | str) and type(value) not in kinds:
            raise ConfigError(
                f"{path}: expected a value of type {kinds[0].__name__}, like the present value "
                f"{before!r}, but got {value!r}"
            )
        setattr(section, last, value)


# --- the command --------------------------------------------------------------------------------


def assemble(
    encoder: str | Path,
    llm: str,
    output: Path,
    *,
    options: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
) -> Path:
    """Write a chat model's folder, whole or not at all.

    ``encoder`` is a stage 1 folder, a chat model or a ViT of timm, ``llm`` a folder, a hub name or
    a packaged name, of which only the token vectors are read, ``options`` fields of the
    configuration, such as ``{"bridge.hidden_size": 512}``. Errors: ConfigError, ModelError.
    """
    with whole_folder(output) as written:
        place = Path(llm).expanduser()
        # A folder's name must not depend on the working directory.
        lasting = str(place.resolve()) if llm not in PACKAGED and place.is_dir() else llm
        config = MicoChatConfig(llm_config=llm_config(llm), base_llm=lasting)
        parts = read_encoder(encoder)
        take_encoder(config, parts.source.config)
        config.bridge_config = _bridge(parts.source.encoder.embed_dim)
        set_options(config, options or {})
        _check_bridge(config)
        table = read_token_table(base_llm_path(llm), torch.float32)
        model, processor = build(config, table, parts, chat_template)
        model.save_pretrained(written)
        processor.save_pretrained(written)
        if parts.text is not None:
            save_text_branch(*parts.text, written)
    return output


def save_text_branch(
    model: MicoForPretraining, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Path:
    """Write the text branch of an encoder into the folder of a chat model; returns the place."""
    beside = folder / PRETRAINING
    tokenizer.save_pretrained(beside)
    model.config.save_pretrained(beside)
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith(TEXT_PARTS)}
    save_file(state, beside / "model.safetensors", {"format": "pt"})
    return beside


def keep_text_branch(encoder: Path, folder: Path) -> None:
    """Copy the text branch of an encoder's folder, if it has one, into a chat model's folder."""
    if timm_name(encoder) is not None:
        return
    encoder = local_folder(model_folder(encoder))
    if (encoder / PRETRAINING).is_dir():
        shutil.copytree(encoder / PRETRAINING, folder / PRETRAINING, dirs_exist_ok=True)
        return
    stage_1 = isinstance(encoder_config_of(encoder), MicoConfig)
    if stage_1 and (text := read_encoder(encoder).text) is not None:
        save_text_branch(*text, folder)


def _bridge(encoder_width: int) -> MicoBridgeConfig:
    """A bridge with 32 tokens a still and 1 a frame, as wide as the encoder within bounds."""
    head, widest = 64, 1024  # of MiCo-Chat-7B's bridge
    n_heads = max(1, min(encoder_width, widest) // head)
    return MicoBridgeConfig(hidden_size=min(n_heads * head, encoder_width), num_heads=n_heads)


def _check_bridge(config: MicoChatConfig) -> None:
    bridge = config.bridge_config
    if bridge.num_heads < 1 or bridge.hidden_size % bridge.num_heads:
        raise ConfigError(
            f"bridge.hidden_size {bridge.hidden_size} is not a multiple of bridge.num_heads "
            f"{bridge.num_heads}"
        )
    least = {"hidden_size": 1, "depth": 1, "still_grid": 0, "frame_grid": 1, "n_still": 1}
    for name, number in least.items():
        if (given := getattr(bridge, name)) < number:
            raise ConfigError(f"bridge.{name} {given} is less than {number}")


# --- chat templates -------------------------------------------------------------------------------

_TEMPLATES = Path(__file__).parent / "chat_templates"
"""Of models before mid-2023, which came without one: only their training code shows the format."""


def read_template(name_or_file: str) -> str:
    known = sorted(path.stem for path in _TEMPLATES.glob("*.jinja"))
    file = _TEMPLATES / f"{name_or_file}.jinja" if name_or_file in known else Path(name_or_file)
    try:
        return file.expanduser().read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat template {name_or_file!r}: it is neither a file that can be read nor one "
            f"of the names {', '.join(known)}"
        ) from error


def template_of(
    llm: str | Path, tokenizer: PreTrainedTokenizerBase, chosen: str | None = None
) -> str:
    """The chat template named or in the file ``chosen``; else the language model's own."""
    if chosen is not None:
        return _checked(read_template(chosen), tokenizer, chosen)
    if isinstance(own := tokenizer.chat_template, str):
        return own
    if _is_vicuna(llm):
        return read_template("vicuna_v1.1")
    raise ModelError(
        f"{llm}: its tokenizer lacks a chat template: give a Jinja file or the name vicuna_v1.1"
    )


def _is_vicuna(llm: str | Path) -> bool:
    """Judged by its name or by the name in its config; version 0 had another format."""
    config: dict[str, Any]
    config, _ = PreTrainedConfig.get_config_dict(llm)
    names = (Path(llm).name, str(config.get("_name_or_path", "")))
    return config.get("model_type") == "llama" and any(
        "vicuna" in name.lower() and "v0" not in name.lower() for name in names
    )


def _checked(template: str, tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    said = "\ue000what is said\ue000"
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], chat_template=template, tokenize=False
        )
    except (TemplateError, TypeError, KeyError) as error:
        reason = f"it cannot format a user's message: {error}"
        raise ConfigError(f"chat template {name}: {reason}") from error
    if said not in str(rendered):
        raise ConfigError(f"chat template {name}: it leaves out the user's message")
    return template
