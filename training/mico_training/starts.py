"""Where pretraining starts: the ViT's weights from timm, the text branch's from a BERT.

The paper starts from EVA-CLIP and BERT. Loading is strict: every tensor of the ViT and of BERT must
be there with the model's shape. What has no counterpart is named, on either side: a source's
classifier, pooler and text tower are left aside, and the parts that BERT lacks start new.
"""

import importlib
import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from transformers import AutoConfig, BertForMaskedLM

from mico_chat.checkpoints.assemble import LOADING, one_line
from mico_chat.checkpoints.configs import read_part
from mico_chat.errors import ConfigError, ModelError
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.mini.stem import timm
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.text_branch import TextBranch
from mico_training.recipe import ModelRecipe

logger = logging.getLogger(__name__)

CLASSIFIER = "head."
"""timm's name of a ViT's classifier; in CLIP's ViTs the projection to the contrastive space."""

POSITIONS = "pos_embed"
VISION_PREFIXES = ("visual.trunk.", "visual.")
"""What a file with both towers of a CLIP has before the ViT's names."""

LOCAL = (".", "/", "~")
CROSS = ".crossattention."
HEAD = {  # of BertForMaskedLM: of the text branch
    "cls.predictions.transform.dense.": "head.0.",
    "cls.predictions.transform.LayerNorm.": "head.2.",
    "cls.predictions.bias": "head_bias",
}


def start_from(model: MicoForPretraining, recipe: ModelRecipe) -> list[str]:
    """Fill a new model with the weights that a recipe names; says what was used, left and new."""
    said = []
    if recipe.encoder_weights is not None:
        said.append(_start_encoder(model.encoder, recipe.encoder_weights))
    if recipe.text_weights is not None:
        said.append(_start_text(model.text, recipe.text_weights))
    for line in said:
        logger.info("%s", line)
    return said


# --- the ViT ------------------------------------------------------------------------------------


def _start_encoder(encoder: OmniEncoder, source: str) -> str:
    vit: Any = encoder.vit
    given, aside, heads = _timm_weights(source, vit)
    own = vit.state_dict()
    unused = (CLASSIFIER, POSITIONS)  # the latter without E_Pos
    aside += [name for name in given if name.startswith(unused) and name not in own]
    given = {name: tensor for name, tensor in given.items() if name not in aside}
    note = _resample(given, vit)
    advice = "name weights of this ViT, or set model.options.encoder_config to the sizes of those"
    key = f"model.encoder_weights {source}"
    _check(key, own, given, advice)
    if heads not in (None, n := vit.blocks[0].attn.num_heads):
        raise ConfigError(f"{key}: it has {heads} attention heads, but the model has {n}; {advice}")
    vit.load_state_dict(given)
    return f"{key}: all {len(own)} tensors of the ViT{note}; left aside: {_named(aside)}"


def _timm_weights(source: str, vit: nn.Module) -> tuple[dict[str, Tensor], list[str], int | None]:
    """A source's tensors by timm's names, the names left aside, and its heads, if known."""
    path, key = Path(source).expanduser(), f"model.encoder_weights {source}"
    try:
        if path.is_file():
            return *_of_file(path, vit), None
        if path.is_dir():
            name = f"local-dir:{path}"
        elif source.startswith(LOCAL):
            raise ConfigError(f"{key}: there is no such file or folder")
        else:
            name = f"hf-hub:{source}" if "/" in source and ":" not in source else source
        # With the classes that the weights have: timm would load other numbers without strictness.
        found = timm.create_model(name, pretrained=True)
        blocks = getattr(found, "blocks", None)
        heads = None if blocks is None else int(blocks[0].attn.num_heads)
        return found.state_dict(), [], heads
    except LOADING as error:
        raise ConfigError(
            f"{key}: timm cannot load it: {one_line(error)}; give a timm name with a tag, a hub "
            "name, a folder that timm saved, or a .safetensors or .pt file"
        ) from error


def _of_file(path: Path, vit: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors by timm's names, and the names of tensors outside of the ViT.

    timm's filter knows the spellings of EVA-CLIP's, CLIP's and other files. It also resamples
    patches, which would hide a wrong patch size, so the file's own tables are put back.
    """
    raw: dict[str, Tensor] = timm.models.load_state_dict(str(path))
    prefix = next((p for p in VISION_PREFIXES if any(name.startswith(p) for name in raw)), "")
    filtered = getattr(importlib.import_module(type(vit).__module__), "checkpoint_filter_fn", None)
    found = dict(raw) if filtered is None else dict(filtered(dict(raw), vit))
    for name in (POSITIONS, "patch_embed.proj.weight"):
        if name in found and (own := raw.get(prefix + name)) is not None:
            found[name] = own if own.dim() == found[name].dim() else found[name]
    return found, [name for name in raw if not name.startswith(prefix)]


def _resample(given: dict[str, Tensor], vit: Any) -> str:
    """Bring positions of another image size to the model's grid, as timm does; says so."""
    table, own = given.get(POSITIONS), vit.pos_embed
    if table is None or own is None or table.shape[0::2] != own.shape[0::2]:
        return ""
    prefix, grid = vit.num_prefix_tokens, list(vit.patch_embed.grid_size)
    side = round((table.shape[1] - prefix) ** 0.5)
    if table.shape == own.shape or side**2 != table.shape[1] - prefix:
        return ""
    given[POSITIONS] = resample_abs_pos_embed(table, grid, num_prefix_tokens=prefix)
    return f", position embeddings resampled from {side} x {side} to {grid[0]} x {grid[1]}"


# --- the text branch ----------------------------------------------------------------------------


def _start_text(text: TextBranch, source: str) -> str:
    key = f"model.text_weights {source}"
    place = str(Path(source).expanduser())
    if source.startswith(LOCAL) and not Path(place).is_dir():
        raise ConfigError(f"{key}: there is no such folder")
    try:
        config = read_part(AutoConfig, place, "configuration")
        if config.model_type != "bert":
            raise ConfigError(f"{key}: a model of type {config.model_type!r}, expected 'bert'")
        bert, info = cast(Any, BertForMaskedLM).from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
    except (ModelError, *LOADING) as error:
        raise ConfigError(f"{key}: {one_line(error)}") from error
    given = bert.state_dict()
    missing = set(info["missing_keys"])
    inside = {n.removeprefix("bert."): t for n, t in given.items() if n.startswith("bert.")}
    lacking = {n.removeprefix("bert.") for n in missing if n.startswith("bert.")}
    own = text.bert.state_dict()
    new = [f"bert.{name}" for name in own if CROSS in name and name not in inside]
    expected = {name: tensor for name, tensor in own.items() if f"bert.{name}" not in new}
    advice = (
        "set model.options.text_config to the BERT's sizes, and stage1.tokenizer to its tokenizer"
    )
    _check(key, expected, {n: t for n, t in inside.items() if n not in lacking}, advice)
    if (theirs := config.num_attention_heads) != (n := text.bert.config.num_attention_heads):
        raise ConfigError(
            f"{key}: it has {theirs} attention heads, but the model has {n}; {advice}"
        )
    text.bert.load_state_dict(inside, strict=False)
    head = {
        ours + name[len(theirs) :]: tensor
        for name, tensor in given.items()
        for theirs, ours in HEAD.items()
        if name.startswith(theirs) and name not in missing
    }
    text.load_state_dict(head, strict=False)
    filled = {f"bert.{name}" for name in inside} | set(head)
    new = [name for name in text.state_dict() if name not in filled]
    aside = _named(sorted(info["unexpected_keys"]))
    return f"{key}: {len(filled)} tensors of BERT; left aside: {aside}; new: {_named(new)}"


# --- both ---------------------------------------------------------------------------------------


def _check(key: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], advice: str) -> None:
    """A ConfigError names the first tensor whose name or shape does not fit."""

    def refuse(said: str, more: int) -> NoReturn:
        raise ConfigError(f"{key}: {said}{f' (and {more} more)' if more > 0 else ''}; {advice}")

    shapes = [n for n in own if n in given and own[n].shape != given[n].shape]
    if shapes:
        name = shapes[0]
        theirs, ours = tuple(given[name].shape), tuple(own[name].shape)
        refuse(f"{name} has the shape {theirs}, but {ours} in the model", len(shapes) - 1)
    if lacking := [name for name in own if name not in given]:
        refuse(f"it lacks {lacking[0]}, which the model has", len(lacking) - 1)
    if unknown := [name for name in given if name not in own]:
        refuse(f"it has {unknown[0]}, which the model lacks", len(unknown) - 1)


def _named(names: Iterable[str]) -> str:
    """Names, those of layers once: "head.weight", "bert.encoder.layer.*.crossattention"."""
    short: dict[str, None] = {}
    for name in names:
        if CROSS in name:
            name = "the text branch's cross-attention"
        elif name.count(".") > 2:
            name = ".".join(name.split(".")[:2]) + ".*"
        short[name] = None
    shown = ", ".join(islice(short, 12))
    return (shown or "nothing") + (f" and {len(short) - 12} more" if len(short) > 12 else "")
