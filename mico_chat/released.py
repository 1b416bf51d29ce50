"""The released MiCo checkpoint and our folder of the same model, either way and strictly.

The release is a flat state dict in a PyTorch file, ``ckpt/model_step_N.pt``, with its settings in
``log/hps.json``. Its names are given here as data. Every tensor of it is used, or is one of those
that no part of this project computes with: they are kept in the folder beside the model, so that
the way back gives the same checkpoint, bit for bit. Read from the repository invictus717/MiCo.

What the release has not, our model has as zeros: embeddings in the encoder's width (E_M, E_C,
E_Sam), which it adds behind its projections instead (:mod:`mico_chat.branches`).
"""

from __future__ import annotations

import json
import logging
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

from mico_chat.branches import BRANCHES
from mico_chat.config import MicoConfig, MicoEncoderConfig, MicoTextConfig
from mico_chat.errors import ConfigError, ModelError
from mico_chat.folders import PREPROCESSING_FILE, check_new, whole_folder
from mico_chat.preprocessing import Preprocessing
from mico_chat.pretraining import MicoForPretraining

logger = logging.getLogger(__name__)

SOURCE_FILE = "released.json"
"""What the folder was made of: the release's names in their order, and its settings."""
UNUSED_FILE = "released.safetensors"
"""Tensors of the release that this project does not compute with."""

VIT, BERT = "vision_encoder.visual.", "multimodal_encoder.bert."
PREDICTIONS = "multimodal_encoder.cls.predictions."
WORDS = f"{BERT}embeddings.word_embeddings.weight"

# Beginnings of our names and of the release's.
NAMES: dict[str, str] = {
    "encoder.vit.": VIT,
    "text.bert.": BERT,
    "text.head.0.": f"{PREDICTIONS}transform.dense.",
    "text.head.2.": f"{PREDICTIONS}transform.LayerNorm.",
    "text.head_bias": f"{PREDICTIONS}bias",
    "text_projection.": "contra_head_t.linear.",
    "media_projection.one.vision.": "contra_head_v.linear.",
    "media_projection.one.audio.": "contra_head_a.linear.",
    "media_projection.one.depth.": "contra_head_d.linear.",
    "media_projection.both.va.": "contra_head_va.",
    "media_projection.both.id.": "contra_head_id.",
    "matching_head.0.": "itm_head.linear1.",
    "matching_head.2.": "itm_head.layernorm.",
    "matching_head.3.": "itm_head.linear2.",
    "temperature": "contra_temp",
    **{f"text.context_proj.{b}.proj.": f"hidden_trans_{b}_multimodal." for b in BRANCHES},
    **{f"text.context_proj.{b}.frame": f"{b}_frame_embedding" for b in BRANCHES},
    **{f"text.context_proj.{b}.modality": f"{b}_type_embeddings" for b in BRANCHES},
}

# The release ties them: each holds what the other one does.
TIED = {
    f"{PREDICTIONS}decoder.weight": WORDS,
    f"{PREDICTIONS}decoder.bias": f"{PREDICTIONS}bias",
}

# Ours alone; nothing in a model that only does what the release does.
ZEROS = ("context.", "text.sampling.")

# Older spellings, of which the first one found in a name is replaced, as the release's code does.
SPELLINGS = (
    ("video", "vision"),
    ("evaclip_model", "vision_encoder"),
    ("clip_model", "vision_encoder"),
)

CLIP_TEXT = "vision_encoder.text."  # CLIP's own text tower, which is not used any more
POSITIONS = f"{BERT}embeddings.position_ids"  # 0, 1, 2, ..., which newer files leave out

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
                f"{self.file}: {name} has the shape {shape}, expected {n_dims} numbers"
            )
        return shape


# --- from the release ---------------------------------------------------------------------------


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
    unused = {
        name: tensor
        for name, tensor in released.tensors.items()
        if name not in TIED and name not in {_released_name(own) for own in ours}
    }
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
        raise ModelError(f"{file}: holds no state dict but {type(found).__name__}")
    tensors: dict[str, Tensor] = {}
    spelt: dict[str, str] = {}
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ModelError(f"{file}: {key!r} is no tensor but {type(value).__name__}")
        name = _todays(key)
        if name in tensors:
            raise ModelError(f"{file}: {spelt[name]} and {key} are two spellings of {name}")
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
        raise ModelError(f"{source}: no ckpt/model_step_N.pt in it; name the file itself")
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
            f"{file}: refused, it holds code{what} or no tensors; a checkpoint is tensors alone"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        # Of a damaged file torch raises any of these.
        raise ModelError(f"{file}: no PyTorch checkpoint, or a damaged one") from error


def _todays(key: str) -> str:
    name = key.removeprefix("module.")
    for old, new in SPELLINGS:
        if old in name:
            return name.replace(old, new)
    return name


def _hps(file: Path) -> Mapping[str, Any]:
    """The settings beside a checkpoint; nothing where they are not there."""
    path = file.parent.parent / "log" / "hps.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not the settings of a checkpoint: no JSON") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_cfg"), dict):
        raise ModelError(f"{path}: not the settings of a checkpoint: no model_cfg")
    return found


def _config(released: Released, options: ConvertOptions) -> MicoConfig:
    """Sizes from the tensors' shapes; what no shape tells, from the settings and options."""
    settings, file = released.settings, released.file
    kind = settings.get("vision_encoder_type", "evaclip01_giant")
    if kind != "evaclip01_giant":
        raise ModelError(f"{file}: its encoder is a {kind}, and only evaclip01_giant converts")
    if settings.get("pool_video", False):
        raise ModelError(f"{file}: it was trained with pool_video, which this project has not")
    _, positions, width = released.shape(f"{VIT}pos_embed", 3)
    patch = released.shape(f"{VIT}patch_embed.proj.weight", 4)[-1]
    mlp = released.shape(f"{VIT}blocks.0.mlp.fc1.weight", 2)[0]
    vocab, hidden = released.shape(WORDS, 2)
    intermediate = released.shape(f"{BERT}encoder.layer.0.intermediate.dense.weight", 2)[0]
    grid = round((positions - 1) ** 0.5)
    if grid**2 != positions - 1:
        raise ModelError(f"{file}: {VIT}pos_embed has {positions} positions, not 1 + a square")
    image_size = options.image_size or int(settings.get("vision_resolution", grid * patch))
    if image_size % patch:
        raise ConfigError(f"image size {image_size} is no multiple of the patch size {patch}")
    frames = {branch: released.shape(f"{branch}_frame_embedding", 3)[1] for branch in BRANCHES}
    for branch, asked in (("vision", options.frames), ("audio", options.slices), ("depth", None)):
        frames[branch] = asked or int(settings.get(f"max_{branch}_sample_num", frames[branch]))
    heads = options.num_heads or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 16)
    text_heads = options.text_heads or (
        hidden // TEXT_HEAD_WIDTH if hidden % TEXT_HEAD_WIDTH == 0 else FEW_HEADS
    )
    for what, size, n in (("num-heads", width, heads), ("text-heads", hidden, text_heads)):
        if size % n:
            raise ConfigError(f"{file}: a width of {size} has no {n} heads; say how many: --{what}")
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


def _released_name(own: str) -> str | None:
    """The release's name of a tensor of ours; None for one that it has not."""
    for ours, theirs in NAMES.items():
        if own.startswith(ours):
            return theirs + own[len(ours) :]
    return None


def _unused_shapes(ours: Mapping[str, Tensor]) -> dict[str, tuple[int | None, ...]]:
    """Tensors of the release that this project does not compute with; None is any size."""
    wide, hidden = ours["media_projection.one.vision.weight"], ours["text_projection.weight"]
    p, d = hidden.shape
    v = wide.shape[1]
    trans = "hidden_trans_subtitle_multimodal."
    return {
        "contra_head_s.linear.weight": (p, d),
        "contra_head_vs.weight": (p, v + d),
        "contra_head_vs.bias": (p,),
        "contra_head_vas.weight": (p, 2 * v + d),
        "contra_head_vas.bias": (p,),
        "subtitle_type_embeddings": (1, 1, d),
        f"{trans}0.weight": (d, d),
        f"{trans}0.bias": (d,),
        f"{trans}1.weight": (d,),
        f"{trans}1.bias": (d,),
        "vision_encoder.logit_scale": (),
        f"{VIT}head.weight": (None, v),
        f"{VIT}head.bias": (None,),
    }


def _translated(released: Released, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's tensors by our names, each of them there and of its shape, none besides."""
    file, given = released.file, released.tensors
    expected: dict[str, tuple[int | None, ...]] = dict(_unused_shapes(ours))
    state: dict[str, Tensor] = {}
    for own, blank in ours.items():
        name = _released_name(own)
        if name is None:
            state[own] = torch.zeros(blank.shape, dtype=given[WORDS].dtype)
            continue
        expected[name] = _their_shape(own, blank)
    for alias, name in TIED.items():
        expected[alias] = expected[name]
    known = {*expected, POSITIONS}
    for name, tensor in given.items():
        if name not in known and not name.startswith(CLIP_TEXT):
            raise ModelError(f"{file}: {released.spelt[name]} is no tensor of a MiCo checkpoint")
        if name in expected and not tensor.is_floating_point():
            raise ModelError(f"{file}: {name} is {tensor.dtype}, expected floating-point numbers")
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
            raise ModelError(f"{file}: {alias} differs from {name}, which it is tied to")
    for own in ours:
        name = _released_name(own)
        if name is not None:
            state[own] = _as_ours(own, given[name]).contiguous()
    return state


def _their_shape(own: str, blank: Tensor) -> tuple[int | None, ...]:
    """The release's tables have a batch dimension; how many rows they have is their own."""
    shape = tuple(blank.shape)
    if own.endswith(".frame"):
        return (1, None, shape[1])
    if own == "encoder.vit.pos_embed":
        return (1, None, shape[2])
    return (1, 1, *shape) if own.endswith(".modality") else shape


def _as_ours(own: str, tensor: Tensor) -> Tensor:
    if own.endswith(".frame"):
        return tensor[0]
    return tensor[0, 0] if own.endswith(".modality") else tensor


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
            f"tokenizer {name} has {len(tokenizer)} tokens but the text branch {text.vocab_size}"
        )
    text.mask_token_id = tokenizer.mask_token_id
    text.pad_token_id = tokenizer.pad_token_id
    return tokenizer


# --- to the release -----------------------------------------------------------------------------


def write_released(folder: Path, output: Path) -> str:
    """Write a stage 1 folder as a MiCo checkpoint; returns what was left out, in a sentence.

    Args:
        folder: one that :func:`convert_released` made, or stage 1 from one.
        output: a ``.pt`` file, or a folder that then holds ``ckpt/`` and ``log/hps.json``.

    Raises:
        ConfigError: an output that exists.
        ModelError: a model that the release's layout cannot hold.
    """
    check_new(output)
    try:
        config = MicoConfig.from_pretrained(folder)
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: not a stage 1 folder: {str(error).splitlines()[0]}") from error
    text = config.text_config
    if not isinstance(text, MicoTextConfig) or text.frames is None:
        raise ModelError(
            f"{folder}: all kinds share one projection, and a MiCo checkpoint has one for each "
            "branch; only a model that began as a converted one can be written"
        )
    tensors: dict[str, Tensor] = {}
    for own, tensor in state.items():
        name = _released_name(own)
        if name is not None:
            tensors[name] = _as_theirs(own, tensor)
        elif own.startswith(ZEROS) and bool(tensor.any()):
            raise ModelError(
                f"{folder}: {own} is not zero, and a MiCo checkpoint has no place for it; "
                f"train with freeze: [{', '.join(prefix.rstrip('.') for prefix in ZEROS)}]"
            )
        elif not own.startswith(ZEROS):
            raise ModelError(f"{folder}: a MiCo checkpoint has no place for {own}")
    tensors |= {alias: tensors[name] for alias, name in TIED.items()}
    if (folder / UNUSED_FILE).is_file():
        tensors |= load_file(folder / UNUSED_FILE)
    missing = sorted(set(_unused_shapes(state)) - set(tensors))
    record: dict[str, Any] = {"names": [], "hps": {}, "file": "model_step_0.pt"}
    if (folder / SOURCE_FILE).is_file():
        record = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    spelt = {_todays(key): key for key in record["names"]}
    order = [name for name in spelt if name in tensors]
    order += [name for name in tensors if name not in spelt]
    content = {spelt.get(name, name): tensors[name] for name in order}
    if output.suffix in (".pt", ".pth", ".bin"):
        output.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, output)
    else:
        with whole_folder(output) as made:
            (made / "ckpt").mkdir()
            (made / "log").mkdir()
            torch.save(content, made / "ckpt" / record["file"])
            hps = json.dumps(record["hps"], indent=1)
            (made / "log" / "hps.json").write_text(hps + "\n", encoding="utf-8")
    left = f"; without {', '.join(missing)}, which this folder has not" if missing else ""
    return f"{len(content)} tensors{left}"


def _as_theirs(own: str, tensor: Tensor) -> Tensor:
    if own.endswith(".frame"):
        return tensor[None]
    return tensor[None, None] if own.endswith(".modality") else tensor
