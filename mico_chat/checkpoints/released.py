"""The released MiCo checkpoint to a stage 1 folder of the same model, strictly.

The release is a flat state dict in a PyTorch file, ``ckpt/model_step_N.pt``, with its settings in
``log/hps.json``. Every tensor of it is used, or is one of those that no part of this project
computes with: they are kept in the folder beside the model, so that the way back
(:mod:`mico_chat.checkpoints.to_released`) gives the same checkpoint, bit for bit.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mico_chat.checkpoints.folders import PREPROCESSING_FILE, check_new, whole_folder
from mico_chat.checkpoints.released_layout import (
    BERT,
    CLIP_TEXT,
    POSITIONS,
    SOURCE_FILE,
    TIED,
    UNUSED_FILE,
    VIT,
    WORDS,
    as_ours,
    released_name,
    their_shape,
    todays_name,
    unused_shapes,
)
from mico_chat.errors import ConfigError, ModelError
from mico_chat.model.branches import BRANCHES
from mico_chat.model.config import MicoConfig, MicoEncoderConfig, MicoTextConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining

HEAD_WIDTH = 88
"""Of EVA's ViT-g: 1408 / 16. The number of heads is in no tensor's shape."""
TEXT_HEAD_WIDTH = 64
"""BERT's: 768 / 12."""
FEW_HEADS = 4
"""Of a text branch whose width is no multiple of that: a miniature's."""


@dataclass(frozen=True)
class ConvertOptions:
    """What a converted model has otherwise than the release.

    ``image_size`` resamples the position table, ``frames`` and ``slices`` the frame embeddings of
    pictures and sounds. ``tokenizer`` (a folder or a hub name) is the text branch's, of which the
    release has the vectors alone. The numbers of heads are guessed from the widths where not given.
    """

    image_size: int | None = None
    frames: int | None = None
    slices: int | None = None
    tokenizer: str | None = None
    num_heads: int | None = None
    text_heads: int | None = None


@dataclass(frozen=True)
class Released:
    """A checkpoint as it was read: its tensors by today's names, and how it spelt them."""

    file: Path
    tensors: dict[str, Tensor]
    spelt: dict[str, str]
    hps: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """How its model was built; nothing where the settings were not beside it."""
        return cast(Mapping[str, Any], self.hps.get("model_cfg", {}))

    def shape(self, name: str, n_dims: int) -> tuple[int, ...]:
        """The shape of a tensor that the sizes are read from.

        Raises:
            ModelError: if it is missing or has another number of dimensions.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.file}: the tensor {name} is missing")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != n_dims:
            raise ModelError(
                f"{self.file}: {name} has the shape {shape}, expected {n_dims} dimensions"
            )
        return shape


def convert_released(source: Path, output: Path, options: ConvertOptions | None = None) -> str:
    """Make a stage 1 folder of a released checkpoint; returns what it holds, in a sentence.

    Args:
        source: the ``.pt`` file, or the folder with ``ckpt/`` and ``log/`` in it.
        output: a folder that is not there yet.

    Raises:
        ConfigError: an output that exists, or options that do not fit the checkpoint.
        ModelError: a file that is no such checkpoint, naming the first tensor at fault.
    """
    options = options or ConvertOptions()
    check_new(output)
    released = read_released(source)
    config = _config(released, options)
    tokenizer = _tokenizer(options.tokenizer, cast(MicoTextConfig, config.text_config))
    with torch.device("meta"):
        ours = MicoForPretraining(config).state_dict()
    state = _translated(released, ours)
    used = {*TIED, *map(released_name, ours)}
    unused = {name: tensor for name, tensor in released.tensors.items() if name not in used}
    _resample(state, released, config)
    record = {
        "file": released.file.name,
        "names": list(released.spelt.values()),
        "hps": dict(released.hps),
    }
    text, encoder = cast(MicoTextConfig, config.text_config), config.encoder_config
    assert isinstance(encoder, MicoEncoderConfig)
    preprocessing = Preprocessing(
        image_size=encoder.image_size, max_slices=cast(dict[str, int], text.frames)["audio"]
    )
    with whole_folder(output) as folder:
        config.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(unused, folder / UNUSED_FILE, metadata={"format": "pt"})
        (folder / SOURCE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        content = preprocessing.model_dump_json(indent=1)
        (folder / PREPROCESSING_FILE).write_text(content, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return (
        f"{len(released.tensors) - len(unused)} tensors used, {len(unused)} kept aside "
        f"({', '.join(sorted({name.split('.')[0] for name in unused}))}); "
        f"{sum(tensor.numel() for tensor in state.values()) / 1e6:,.1f} M parameters"
    )


def read_released(source: Path) -> Released:
    """The tensors of a checkpoint, by today's names; never runs code that a file holds.

    Raises:
        ModelError: for a file that is no state dict, or has code in it.
    """
    file = _newest(source)
    found = _load(file)
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{file}: expected a state dict, got {type(found).__name__}")
    tensors: dict[str, Tensor] = {}
    spelt: dict[str, str] = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"{file}: {key!r} has the type {type(value).__name__}, expected a tensor"
            )
        name = todays_name(key)
        if name in tensors:
            raise ModelError(
                f"{file}: {spelt[name]} and {key} are two spellings of the same tensor {name}"
            )
        tensors[name], spelt[name] = value, key
    return Released(file, tensors, spelt, _hps(file))


def _newest(source: Path) -> Path:
    """The file itself, or the one of the last step in a folder's ``ckpt``."""
    if source.is_file():
        return source
    if not source.exists():
        raise ModelError(f"{source}: no such file or folder")
    steps = {
        int(match[1]): path
        for path in (source / "ckpt").glob("model_step_*.pt")
        if (match := re.fullmatch(r"model_step_(\d+)\.pt", path.name))
    }
    if not steps:
        raise ModelError(
            f"{source}: ckpt/model_step_N.pt is missing in this folder; name the checkpoint "
            "file itself"
        )
    return steps[max(steps)]


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)|(?:class|function) `?([\w.]+)", str(error))
        what = f" ({code[1] or code[2]})" if code else ""
        raise ModelError(
            f"{file}: refused, because it holds code{what} or something that is not a "
            "tensor; a checkpoint may hold only tensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        # Of a damaged file torch raises any of these.
        raise ModelError(f"{file}: this is not a PyTorch checkpoint, or it is damaged") from error


def _hps(file: Path) -> Mapping[str, Any]:
    """The settings beside a checkpoint; nothing where they are not there."""
    path = file.parent.parent / "log" / "hps.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the settings of the checkpoint are not JSON") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_cfg"), dict):
        raise ModelError(f"{path}: the settings of the checkpoint lack model_cfg")
    return found


def _config(released: Released, options: ConvertOptions) -> MicoConfig:
    """Sizes from the tensors' shapes; what no shape tells, from the settings and options."""
    settings, file = released.settings, released.file
    kind = settings.get("vision_encoder_type", "evaclip01_giant")
    if kind != "evaclip01_giant":
        raise ModelError(
            f"{file}: its encoder is {kind}, but only evaclip01_giant can be converted"
        )
    if settings.get("pool_video", False):
        raise ModelError(
            f"{file}: it was trained with pool_video, which this project does not support"
        )
    _, positions, width = released.shape(f"{VIT}pos_embed", 3)
    patch = released.shape(f"{VIT}patch_embed.proj.weight", 4)[-1]
    mlp = released.shape(f"{VIT}blocks.0.mlp.fc1.weight", 2)[0]
    vocab, hidden = released.shape(WORDS, 2)
    intermediate = released.shape(f"{BERT}encoder.layer.0.intermediate.dense.weight", 2)[0]
    grid = round((positions - 1) ** 0.5)
    if grid**2 != positions - 1:
        raise ModelError(
            f"{file}: {VIT}pos_embed has {positions} positions, expected 1 + a square number"
        )
    image_size = options.image_size or int(settings.get("vision_resolution", grid * patch))
    if image_size % patch:
        raise ConfigError(f"image size {image_size} is not a multiple of the patch size {patch}")
    frames = {branch: released.shape(f"{branch}_frame_embedding", 3)[1] for branch in BRANCHES}
    for branch, asked in (("vision", options.frames), ("audio", options.slices), ("depth", None)):
        frames[branch] = asked or int(settings.get(f"max_{branch}_sample_num", frames[branch]))
    heads = options.num_heads or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 16)
    text_heads = options.text_heads or (
        hidden // TEXT_HEAD_WIDTH if hidden % TEXT_HEAD_WIDTH == 0 else FEW_HEADS
    )
    for what, size, n in (("num-heads", width, heads), ("text-heads", hidden, text_heads)):
        if size % n:
            raise ConfigError(
                f"{file}: the width {size} cannot be divided into {n} heads; give the right "
                f"number of heads: --{what}"
            )
    return MicoConfig(
        architectures=["MicoForPretraining"],
        dtype=str(released.tensors[WORDS].dtype).removeprefix("torch."),
        encoder_config=MicoEncoderConfig(
            architecture="eva_giant_patch14_clip_224",
            architecture_options={
                "patch_size": patch,
                "embed_dim": width,
                "depth": _layers(released, f"{VIT}blocks."),
                "num_heads": heads,
                "mlp_ratio": mlp / width,
            },
            image_size=image_size,
            patch_size=patch,
        ),
        text_config=MicoTextConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=_layers(released, f"{BERT}encoder.layer."),
            num_attention_heads=text_heads,
            intermediate_size=intermediate,
            max_position_embeddings=released.shape(
                f"{BERT}embeddings.position_embeddings.weight", 2
            )[0],
            projection_dim=released.shape("contra_head_t.linear.weight", 2)[0],
            frames=frames,
            head_norm_eps=1e-12,
            matching_classes=2,
        ),
    )


def _layers(released: Released, prefix: str) -> int:
    numbers = {
        int(match[1])
        for name in released.tensors
        if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))
    }
    return max(numbers) + 1


def _translated(released: Released, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's tensors by our names, each of them there and of its shape, none besides."""
    file, given = released.file, released.tensors
    expected: dict[str, tuple[int | None, ...]] = dict(unused_shapes(ours))
    state: dict[str, Tensor] = {}
    for own, blank in ours.items():
        name = released_name(own)
        if name is None:
            state[own] = torch.zeros(blank.shape, dtype=given[WORDS].dtype)
            continue
        expected[name] = their_shape(own, blank)
    for alias, name in TIED.items():
        expected[alias] = expected[name]
    known = {*expected, POSITIONS}
    for name, tensor in given.items():
        if name not in known and not name.startswith(CLIP_TEXT):
            raise ModelError(f"{file}: {released.spelt[name]} is not a tensor of a MiCo checkpoint")
        if name in expected and not tensor.is_floating_point():
            raise ModelError(
                f"{file}: {name} has the type {tensor.dtype}, expected floating-point numbers"
            )
    for name, shape in expected.items():
        if name not in given:
            raise ModelError(f"{file}: the tensor {name} is missing")
        found = tuple(given[name].shape)
        if len(found) != len(shape) or any(
            wanted is not None and size != wanted for size, wanted in zip(found, shape, strict=True)
        ):
            wanted_shape = tuple("any" if size is None else size for size in shape)
            raise ModelError(f"{file}: {name} has the shape {found}, expected {wanted_shape}")
    for alias, name in TIED.items():
        if not torch.equal(given[alias], given[name]):
            raise ModelError(
                f"{file}: {alias} differs from {name}, but the model shares one tensor for both"
            )
    for own in ours:
        name = released_name(own)
        if name is not None:
            state[own] = as_ours(own, given[name]).contiguous()
    return state


def _resample(state: dict[str, Tensor], released: Released, config: MicoConfig) -> None:
    """Tables of other lengths than the model's: positions as timm does, frames to the nearest."""
    encoder, text = config.encoder_config, config.text_config
    assert isinstance(encoder, MicoEncoderConfig)
    assert isinstance(text, MicoTextConfig)
    grid = encoder.image_size // encoder.patch_size
    positions = state["encoder.vit.pos_embed"]
    if positions.shape[1] != grid**2 + 1:
        state["encoder.vit.pos_embed"] = (
            resample_abs_pos_embed(positions.float(), [grid, grid], num_prefix_tokens=1)
            .to(positions.dtype)
            .contiguous()
        )
    for branch, rows in cast(dict[str, int], text.frames).items():
        own = f"text.context_proj.{branch}.frame"
        table = state[own]
        if len(table) != rows:
            nearest = F.interpolate(table.float().T[None], rows, mode="nearest")[0].T
            state[own] = nearest.to(table.dtype).contiguous()
    if released.settings.get("frame_embedding_type", "adaptive") == "none":
        # Its code then leaves out the frames of pictures alone.
        state["text.context_proj.vision.frame"].zero_()


def _tokenizer(name: str | None, text: MicoTextConfig) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    try:
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer {name}: {str(error).splitlines()[0]}") from error
    if len(tokenizer) != text.vocab_size:
        raise ConfigError(
            f"tokenizer {name} has {len(tokenizer)} tokens, but the text branch has "
            f"{text.vocab_size}"
        )
    text.mask_token_id = tokenizer.mask_token_id
    text.pad_token_id = tokenizer.pad_token_id
    return tokenizer
