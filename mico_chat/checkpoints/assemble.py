"""A MiCo-Chat out of an encoder, a language model and a fresh bridge between them.

The encoder comes from stage 1's folder (or a converted one) or from another chat model; the
language model is any causal LM of Hugging Face and stays where it is. The new model still has to
learn: stage 2 aligns its bridge.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
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

from mico_chat.checkpoints.base_llm import PACKAGED, base_llm_path
from mico_chat.checkpoints.chat_template import template_of
from mico_chat.checkpoints.folders import (
    PREPROCESSING_FILE,
    PRETRAINING,
    local_folder,
    part_of,
    whole_folder,
)
from mico_chat.checkpoints.load import (
    STEM_PREPROCESSING,
    TEXT_PARTS,
    load_pretraining,
    model_folder,
    read_token_table,
    text_tokenizer,
)
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ConfigError, ModelError
from mico_chat.model.concepts import ConceptAttention
from mico_chat.model.config import (
    MicoBridgeConfig,
    MicoChatConfig,
    MicoConfig,
)
from mico_chat.model.media_path import TokenTable
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor

logger = logging.getLogger(__name__)

HEAD_DIM, WIDEST = 64, 1024
"""Width of a head, and largest width, of a bridge whose sizes are not given; MiCo-Chat-7B's."""


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder; ``text`` is its text branch's model and tokenizer, if kept."""

    source: MicoForPretraining | MicoChatForConditionalGeneration
    preprocessing: Preprocessing
    text: tuple[MicoForPretraining, PreTrainedTokenizerBase] | None = None


# --- what goes in -------------------------------------------------------------------------------


def read_encoder(name_or_dir: str | Path) -> Encoder:
    """The encoder of stage 1's folder or of a chat model, in float32.

    Raises:
        ModelError: if it is neither.
    """
    folder = local_folder(model_folder(name_or_dir))
    config = encoder_config_of(folder)
    if isinstance(config, MicoConfig):
        model = MicoForPretraining.from_pretrained(folder, dtype=torch.float32)
        preprocessing = read_preprocessing(folder, config)
        if list(folder.glob("tokenizer*")) + list(folder.glob("vocab*")):
            return Encoder(model, preprocessing, (model, text_tokenizer(folder)))
        logger.warning(
            "%s: the tokenizer of the text branch is missing, so the text branch is not loaded",
            folder,
        )
        return Encoder(model, preprocessing)
    preprocessing = Preprocessing(**MicoChatProcessor.from_pretrained(folder).preprocessing)
    if part_of(folder, PRETRAINING) is not None:
        branch, tokenizer = load_pretraining(folder)
        return Encoder(branch, preprocessing, (branch, tokenizer))
    chat = MicoChatForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, without_base_llm=True
    )
    chat.llm = None
    return Encoder(chat, preprocessing)


def encoder_config_of(folder: Path) -> MicoConfig | MicoChatConfig:
    """The configuration of a model with an encoder.

    Raises:
        ModelError: for a folder with another model, or none.
    """
    config = _config_of(folder)
    if not isinstance(config, MicoConfig | MicoChatConfig):
        raise ModelError(
            f"{folder}: the model type is {config.model_type!r}; an encoder is read "
            "from a model of type 'mico' (stage 1) or 'mico_chat'"
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


def _config_of(name_or_dir: str | Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name_or_dir)
        return config
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(name_or_dir, "configuration", error) from error


def _tokenizer(llm: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(llm)
        return tokenizer
    except (OSError, ValueError) as error:
        raise _unreadable(llm, "tokenizer", error) from error


def _unreadable(name: str | Path, part: str, error: Exception) -> ModelError:
    reason = (str(error).strip().splitlines() or [repr(error)])[0]
    return ModelError(f"{name}: the {part} cannot be read: {reason}")


def llm_config(llm: str) -> PreTrainedConfig:
    """The configuration of a causal language model, by its packaged name, folder or hub name.

    Raises:
        ModelError: if it is something else.
    """
    config = _config_of(base_llm_path(llm))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{llm}: a model of type {config.model_type!r} is not a causal language model"
        )
    return config


# --- putting it together ------------------------------------------------------------------------


def take_encoder(config: MicoChatConfig, source: MicoConfig | MicoChatConfig) -> None:
    """Give a configuration the encoder's parts of another one."""
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

    Args:
        config: of all its parts; ``base_llm`` names the language model.
        llm: that language model, or its token table alone.
        encoder: a source of weights; without it they start at random.
        chat_template: a name or file; see :func:`mico_chat.checkpoints.chat_template.template_of`.

    Raises:
        ConfigError: for a chat template that cannot be used.
        ModelError: for a language model that is not named, lacks a chat template or has fewer
            token vectors than tokens, or an encoder of another shape than the configuration's.
    """
    if config.base_llm is None:
        raise ModelError("the configuration does not name a language model (base_llm)")
    source = base_llm_path(config.base_llm)
    tokenizer = _tokenizer(source)
    template = template_of(source, tokenizer, chat_template)
    if len(tokenizer) > config.context_token_id:
        raise ModelError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, but the model has "
            f"{config.context_token_id} token vectors"
        )
    model = MicoChatForConditionalGeneration(config)
    model.attach_llm(llm)
    table = cast(nn.Embedding, model.get_input_embeddings()).weight
    with torch.no_grad():
        model.bridge.scale.fill_(float(table.float().std()))
    if encoder is None:
        preprocessing = usual_preprocessing(config)
    else:
        take_over(model, encoder)
        preprocessing = encoder.preprocessing
    if model.concepts is not None:
        name_concepts(model.concepts, concept_names(config), tokenizer)
    return model, MicoChatProcessor.for_config(config, tokenizer, preprocessing, template)


def take_over(model: MicoChatForConditionalGeneration, encoder: Encoder) -> None:
    """Copy an encoder, its context and its concept heads into a model, strictly.

    Raises:
        ModelError: for a part of another shape, or a part that one of the two lacks.
    """
    source = encoder.source
    for name in ("encoder", "context", "concepts"):
        target: nn.Module | None = getattr(model, name)
        pretrained: nn.Module | None = getattr(source, name)
        if (target is None) != (pretrained is None):
            raise ModelError(f"only one of the two models has {name}")
        if target is None or pretrained is None:
            continue
        state = dict(pretrained.state_dict())
        if isinstance(target, ConceptAttention):
            state["name_ids"] = target.name_ids  # tokens of the LLM, which stage 1 lacks
        try:
            target.load_state_dict(state)
        except RuntimeError as error:  # torch has no error of its own for it
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"{name} has different shapes in the two models: {reason}") from error


def concept_names(config: MicoConfig | MicoChatConfig) -> tuple[list[str], list[str]]:
    """Visual and sound names of a configuration's concepts; empty where it has none."""
    concept = config.concept_config
    if concept is None:
        return [], []
    return list(concept.visual_names or []), list(concept.sound_names or [])


def name_concepts(
    concepts: ConceptAttention,
    names: tuple[list[str], list[str]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Set the LLM's tokens of each name (" cat" as in the middle of a sentence), then -1."""
    length = concepts.name_ids.shape[1]
    ids = torch.full_like(concepts.name_ids, -1)
    for row, name in enumerate([*names[0], *names[1]]):
        tokens = tokenizer(" " + name, add_special_tokens=False).input_ids[:length]
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
    concepts.name_ids.copy_(ids)


def set_options(config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    """Replace fields of a configuration; ``bridge.depth`` is short for ``bridge_config.depth``.

    Raises:
        ConfigError: for an unknown field, or a value of another type.
    """
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
        whole_number = isinstance(before, float) and type(value) is int
        alike = type(value) is type(before) or whole_number
        if isinstance(before, int | float | str) and not alike:
            kind = type(before).__name__
            raise ConfigError(
                f"{path}: expected a value of type {kind}, like the present value {before!r}, "
                f"but got {value!r}"
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
    """Write a chat model's folder; of the language model only the token vectors are read.

    Args:
        encoder: stage 1's folder or a chat model's.
        llm: a folder, a hub name or a packaged model's name.
        output: the folder to write; it appears whole or not at all.
        options: fields of the configuration, such as ``{"bridge.hidden_size": 512}``.
        chat_template: a name or file; see :func:`mico_chat.checkpoints.chat_template.template_of`.

    Raises:
        ConfigError: if the output is there already, or for a wrong option or template.
        ModelError: for an encoder or a language model that cannot be used.
    """
    with whole_folder(output) as written:
        config = MicoChatConfig(llm_config=llm_config(llm), base_llm=_lasting(llm))
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
    if (branch := part_of(encoder, PRETRAINING)) is not None:
        shutil.copytree(branch, folder / PRETRAINING, dirs_exist_ok=True)
    elif isinstance(_config_of(encoder), MicoConfig) and (text := read_encoder(encoder).text):
        save_text_branch(*text, folder)


def _lasting(llm: str) -> str:
    """A language model's name that does not depend on the working directory."""
    folder = Path(llm).expanduser()
    return str(folder.resolve()) if llm not in PACKAGED and folder.is_dir() else llm


def _bridge(encoder_width: int) -> MicoBridgeConfig:
    """A bridge with 32 tokens a still and 1 a frame, as wide as the encoder within bounds."""
    n_heads = max(1, min(encoder_width, WIDEST) // HEAD_DIM)
    width = n_heads * HEAD_DIM if encoder_width >= HEAD_DIM else encoder_width
    return MicoBridgeConfig(hidden_size=width, num_heads=n_heads)


def _check_bridge(config: MicoChatConfig) -> None:
    bridge = config.bridge_config
    if bridge.num_heads < 1 or bridge.hidden_size % bridge.num_heads:
        raise ConfigError(
            f"bridge.hidden_size {bridge.hidden_size} is not a multiple of bridge.num_heads "
            f"{bridge.num_heads}"
        )
    for name in ("hidden_size", "depth", "still_grid", "place_tokens", "frame_grid"):
        if vars(bridge)[name] < 1:
            raise ConfigError(f"bridge.{name} {vars(bridge)[name]} is less than 1")
