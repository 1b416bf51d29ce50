"""The released MiCo checkpoint to a stage 1 folder of the same model, strictly, and back.

The release is a flat state dict in a PyTorch file, ``ckpt/model_step_N.pt``, with its settings in
``log/hps.json``. ``released_names.yaml`` maps its names to ours. Tensors that no part of this
project computes with are kept in the folder beside the model, so that the way back gives the same
checkpoint, bit for bit.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mico_chat.checkpoints.configs import read_part
from mico_chat.checkpoints.folders import PREPROCESSING_FILE, check_new, whole_folder
from mico_chat.errors import ConfigError, ModelError
from mico_chat.model.config import MicoConfig, MicoEncoderConfig, MicoTextConfig
from mico_chat.model.preprocessing import released_preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.released import PROJECTIONS

_LAYOUT = yaml.safe_load(Path(__file__).with_name("released_names.yaml").read_text("utf-8"))
NAMES: dict[str, str] = _LAYOUT["names"]
TIED: dict[str, str] = _LAYOUT["tied"]
ZEROS: tuple[str, ...] = tuple(_LAYOUT["zeros"])
VIT, BERT = NAMES["encoder.vit."], NAMES["text.bert."]
WORDS = f"{BERT}embeddings.word_embeddings.weight"
SOURCE_FILE = "released.json"
"""The file's name, its tensors' names in their order, and its settings."""
UNUSED_FILE = "released.safetensors"


@dataclass(frozen=True)
class ConvertOptions:
    """The differences of a converted model from the release.

    ``image_size`` resamples the position table, ``frames`` and ``slices`` the frame embeddings of
    pictures and sounds. ``tokenizer`` (a folder or a hub name) is the text branch's, which the
    release lacks. The numbers of heads are guessed from the widths where not given.
    """

    image_size: int | None = None
    frames: int | None = None
    slices: int | None = None
    tokenizer: str | None = None
    num_heads: int | None = None
    text_heads: int | None = None


@dataclass(frozen=True)
class Released:
    """A checkpoint: its tensors by today's names, and the checkpoint's spelling of each name.

    ``hps`` is the content of its settings file, ``settings`` the model's part of that.
    """

    file: Path
    tensors: dict[str, Tensor]
    spelt: dict[str, str]
    hps: Mapping[str, Any]
    settings: Mapping[str, Any]

    def wrong(self, said: str) -> ModelError:
        return ModelError(f"{self.file}: {said}")

    def shape(self, name: str, n_dims: int | None = None) -> tuple[int, ...]:
        if name not in self.tensors:
            raise self.wrong(f"the tensor {name} is missing")
        shape = tuple(self.tensors[name].shape)
        if n_dims not in (None, len(shape)):
            raise self.wrong(f"{name} has the shape {shape}, expected {n_dims} dimensions")
        return shape

    def layers(self, prefix: str) -> int:
        rest = [name[len(prefix) :] for name in self.tensors if name.startswith(prefix)]
        return max(int(name.partition(".")[0]) for name in rest) + 1


def convert_released(source: Path, output: Path, options: ConvertOptions | None = None) -> str:
    """Make a stage 1 folder of a released checkpoint; returns its content in a sentence.

    ``source`` is the ``.pt`` file, or the folder with ``ckpt/`` and ``log/`` in it. A ConfigError
    says which option does not fit, a ModelError names the first wrong tensor.
    """
    options = options or ConvertOptions()
    check_new(output)
    released = read_released(source)
    config = _config(released, options)
    tokenizer = _tokenizer(options.tokenizer, config.text_config)
    with torch.device("meta"):
        ours = MicoForPretraining(config).state_dict()
    state = _translated(released, ours)
    used = {*TIED, *map(released_name, ours)}
    unused = {name: tensor for name, tensor in released.tensors.items() if name not in used}
    _resample(state, released, config)
    record = {"file": released.file.name, "names": [*released.spelt.values()], "hps": released.hps}
    slices = len(state["text.context_proj.audio.frame"])
    preprocessing = released_preprocessing(config.encoder_config.image_size, slices)
    with whole_folder(output) as folder:
        config.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(unused, folder / UNUSED_FILE, metadata={"format": "pt"})
        (folder / SOURCE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        settings = preprocessing.model_dump_json(indent=1)
        (folder / PREPROCESSING_FILE).write_text(settings, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return (
        f"{len(released.tensors) - len(unused)} tensors used, {len(unused)} kept aside "
        f"({', '.join(sorted({name.split('.')[0] for name in unused}))}); "
        f"{sum(tensor.numel() for tensor in state.values()) / 1e6:,.1f} M parameters"
    )


def write_released(folder: Path, output: Path) -> str:
    """Write a stage 1 folder as a MiCo checkpoint; returns its content in a sentence.

    ``output`` is a ``.pt`` file, or a folder that then holds ``ckpt/`` and ``log/hps.json``.
    """
    check_new(output)
    try:
        config = MicoConfig.from_pretrained(folder)
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: not a stage 1 folder: {str(error).splitlines()[0]}") from error
    if config.text_config.frames is None:
        raise ModelError(
            f"{folder}: all kinds share one projection, but a MiCo checkpoint has several; only "
            "a model that was converted from a MiCo checkpoint can be written"
        )
    tensors: dict[str, Tensor] = {}
    for own, tensor in state.items():
        if (name := released_name(own)) is not None:
            tensors[name] = tensor[(None,) * _added_dims(own)]
        elif own.startswith(ZEROS) and bool(tensor.any()):
            zeros = ", ".join(prefix.rstrip(".") for prefix in ZEROS)
            raise ModelError(
                f"{folder}: {own} is not zero, and a MiCo checkpoint has no place for it; "
                f"train with freeze: [{zeros}]"
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
    if config.trained_on is not None:
        record["hps"]["trained_on"] = config.trained_on
    spelt = {todays_name(key): key for key in record["names"]}
    order = [name for name in spelt | tensors if name in tensors]
    content = {spelt.get(name, name): tensors[name] for name in order}
    if output.suffix in (".pt", ".pth", ".bin"):
        output.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, output)
    else:
        with whole_folder(output) as made:
            (made / "ckpt").mkdir()
            (made / "log").mkdir()
            torch.save(content, made / "ckpt" / record["file"])
            hps = json.dumps(record["hps"], indent=1) + "\n"
            (made / "log" / "hps.json").write_text(hps, encoding="utf-8")
    left = f"; without {', '.join(missing)}, which this folder lacks" if missing else ""
    return f"{len(content)} tensors{left}"


# --- names and shapes ---------------------------------------------------------------------------


def todays_name(key: str) -> str:
    name = key.removeprefix("module.")
    for old, new in _LAYOUT["spellings"]:
        if old in name:
            return name.replace(old, new)
    return name


def released_name(own: str) -> str | None:
    """The release's name of a tensor of ours; None where the release lacks it."""
    for ours, theirs in NAMES.items():
        if own.startswith(ours):
            return theirs + own[len(ours) :]
    return None


def _added_dims(own: str) -> int:
    """The number of dimensions of size 1 that the release's tensor has before ours."""
    return 1 if own.endswith(".frame") else 2 if own.endswith(".modality") else 0


def _unused_shapes(ours: Mapping[str, Tensor]) -> dict[str, tuple[int | None, ...]]:
    """The shapes of the tensors that a model may do without; None is any size."""
    p, t = ours["text_projection.weight"].shape
    d = ours["media_projection.one.vision.weight"].shape[1]
    sizes = {"P": p, "T": t, "D": d, "D+T": d + t, "D+D+T": 2 * d + t, "1": 1, "*": None}
    return {name: tuple(sizes[size] for size in row) for name, row in _LAYOUT["unused"].items()}


# --- reading a checkpoint -----------------------------------------------------------------------


def read_released(source: Path) -> Released:
    """The tensors of a checkpoint, by today's names; never runs code that a file holds."""
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
            kind = type(value).__name__
            raise ModelError(f"{file}: {key!r} has the type {kind}, expected a tensor")
        name = todays_name(key)
        if name in tensors:
            raise ModelError(f"{file}: {spelt[name]} and {key} are two spellings of {name}")
        tensors[name], spelt[name] = value, key
    hps = _hps(file)
    return Released(file, tensors, spelt, hps, hps.get("model_cfg", {}))


def _newest(source: Path) -> Path:
    """The file itself, or the one of the last step in a folder's ``ckpt``."""
    if source.is_file():
        return source
    if not source.exists():
        raise ModelError(f"{source}: no such file or folder")
    files = [*(source / "ckpt").glob("model_step_*.pt")]
    found = [(re.fullmatch(r"model_step_(\d+)\.pt", file.name), file) for file in files]
    steps = {int(match[1]): file for match, file in found if match is not None}
    if not steps:
        raise ModelError(f"{source}: ckpt/model_step_N.pt is missing; name the checkpoint itself")
    return steps[max(steps)]


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)|(?:class|function) `?([\w.]+)", str(error))
        what = f" ({code[1] or code[2]})" if code else ""
        reason = f"refused, because it holds code{what} or another thing than tensors"
        raise ModelError(f"{file}: {reason}") from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        # torch raises any of these for a damaged file.
        raise ModelError(f"{file}: this is not a PyTorch checkpoint, or it is damaged") from error


def _hps(file: Path) -> Mapping[str, Any]:
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


# --- to our model -------------------------------------------------------------------------------


def _config(released: Released, options: ConvertOptions) -> MicoConfig:
    """Sizes from the tensors' shapes; sizes that no shape shows from the settings and options."""
    settings = released.settings
    kind = settings.get("vision_encoder_type", "evaclip01_giant")
    if kind != "evaclip01_giant":
        raise released.wrong(f"its encoder is {kind}, but only evaclip01_giant can be converted")
    if settings.get("pool_video", False):
        raise released.wrong("it was trained with pool_video, which cannot be converted")
    _, positions, width = released.shape(f"{VIT}pos_embed", 3)
    patch = released.shape(f"{VIT}patch_embed.proj.weight", 4)[-1]
    mlp = released.shape(f"{VIT}blocks.0.mlp.fc1.weight", 2)[0]
    vocab, hidden = released.shape(WORDS, 2)
    intermediate = released.shape(f"{BERT}encoder.layer.0.intermediate.dense.weight", 2)[0]
    length = released.shape(f"{BERT}embeddings.position_embeddings.weight", 2)[0]
    grid = round((positions - 1) ** 0.5)
    if grid**2 != (n := positions - 1):
        raise released.wrong(f"{VIT}pos_embed has {n + 1} positions, expected 1 + a square number")
    image_size = options.image_size or int(settings.get("vision_resolution", grid * patch))
    if image_size % patch:
        raise ConfigError(f"image size {image_size} is not a multiple of the patch size {patch}")
    rows = {name: released.shape(f"{name}_frame_embedding", 3)[1] for name in PROJECTIONS}
    frames = {name: int(settings.get(f"max_{name}_sample_num", n)) for name, n in rows.items()}
    frames["vision"] = options.frames or frames["vision"]
    frames["audio"] = options.slices or frames["audio"]
    # No tensor shows a head's width. It is 88 in EVA's ViT-g (1408 / 16), 64 in BERT (768 / 12);
    # a text branch whose width is no multiple of that is a miniature.
    heads = options.num_heads or (width // 88 if width % 88 == 0 else 16)
    text_heads = options.text_heads or (hidden // 64 if hidden % 64 == 0 else 4)
    for option, size, n in (("num-heads", width, heads), ("text-heads", hidden, text_heads)):
        if size % n:
            said = f"the width {size} cannot be divided into {n} heads"
            raise ConfigError(f"{released.file}: {said}; give the right number: --{option}")
    return MicoConfig(
        architectures=["MicoForPretraining"],
        dtype=str(released.tensors[WORDS].dtype).removeprefix("torch."),
        trained_on=released.hps.get("trained_on"),
        encoder_config=MicoEncoderConfig(
            architecture="eva_giant_patch14_clip_224",
            architecture_options={
                "patch_size": patch,
                "embed_dim": width,
                "depth": released.layers(f"{VIT}blocks."),
                "num_heads": heads,
                "mlp_ratio": mlp / width,
            },
            image_size=image_size,
            patch_size=patch,
        ),
        text_config=MicoTextConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_hidden_layers=released.layers(f"{BERT}encoder.layer."),
            num_attention_heads=text_heads,
            intermediate_size=intermediate,
            max_position_embeddings=length,
            projection_dim=released.shape("contra_head_t.linear.weight", 2)[0],
            frames=frames,
            head_norm_eps=1e-12,
            matching_classes=2,
            subtitles=True,
        ),
    )


def _translated(released: Released, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's tensors by our names; a missing, misshapen or unknown tensor is an error."""
    given = released.tensors
    names = {own: released_name(own) for own in ours}
    expected = _unused_shapes(ours)
    for own, name in names.items():
        if name is not None:
            shape: list[int | None] = [*(1,) * _added_dims(own), *ours[own].shape]
            if own.endswith(".frame") or own == "encoder.vit.pos_embed":
                shape[1] = None  # these tables may have any number of rows
            expected[name] = tuple(shape)
    expected |= {alias: expected[name] for alias, name in TIED.items()}
    for name, tensor in given.items():
        if name not in expected and not name.startswith(tuple(_LAYOUT["ignored"])):
            raise released.wrong(f"{released.spelt[name]} is not a tensor of a MiCo checkpoint")
        if name in expected and not tensor.is_floating_point():
            raise released.wrong(f"{name} has the type {tensor.dtype}, expected floating point")
    for name, theirs in expected.items():
        found = released.shape(name)
        if len(found) != len(theirs) or any(
            one not in (None, size) for size, one in zip(found, theirs, strict=True)
        ):
            wanted = tuple("any" if size is None else size for size in theirs)
            raise released.wrong(f"{name} has the shape {found}, expected {wanted}")
    for alias, name in TIED.items():
        if not torch.equal(given[alias], given[name]):
            said = f"{alias} differs from {name}, but the model shares one tensor for both"
            raise released.wrong(said)
    zeros = given[WORDS].dtype
    return {
        own: torch.zeros(ours[own].shape, dtype=zeros)
        if name is None
        else given[name][(0,) * _added_dims(own)].contiguous()
        for own, name in names.items()
    }


def _resample(state: dict[str, Tensor], released: Released, config: MicoConfig) -> None:
    """Resample the tables: positions as timm does, frames to the nearest."""
    grid = config.encoder_config.image_size // config.encoder_config.patch_size
    positions = state["encoder.vit.pos_embed"]
    if positions.shape[1] != grid**2 + 1:
        resampled = resample_abs_pos_embed(positions.float(), [grid, grid], num_prefix_tokens=1)
        state["encoder.vit.pos_embed"] = resampled.to(positions.dtype).contiguous()
    for name, rows in (config.text_config.frames or {}).items():
        own = f"text.context_proj.{name}.frame"
        table = state[own]
        if len(table) != rows:
            nearest = F.interpolate(table.float().T[None], rows, mode="nearest")[0].T
            state[own] = nearest.to(table.dtype).contiguous()
    if released.settings.get("frame_embedding_type", "adaptive") == "none":
        # The release's code then leaves out the frame embeddings of pictures, and of no other kind.
        state["text.context_proj.vision.frame"].zero_()


def _tokenizer(name: str | None, text: MicoTextConfig) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    tokenizer: PreTrainedTokenizerBase = read_part(AutoTokenizer, name, "tokenizer")
    if (n := len(tokenizer)) != (rows := text.vocab_size):
        raise ConfigError(f"tokenizer {name}: {n} tokens, but the text branch has {rows}")
    text.mask_token_id = tokenizer.mask_token_id
    text.pad_token_id = tokenizer.pad_token_id
    return tokenizer
