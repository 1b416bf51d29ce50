"""Replicas of any architecture: its config class's defaults with small sizes, its own processor.

The tokens that a processor names are read in its module. What else a config and a processor must
agree about is written in :data:`OWN`.
"""

import inspect
import re
import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers as hf
from transformers.models.auto import modeling_auto
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

from tests.support.replicas import templates
from tests.support.replicas.towers import Made, words_of

_CLASSES: dict[str, str] = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
_CLASSES |= modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

_SIZES = {"image_size": 56, "patch_size": 14, "max_position_embeddings": 4096}
_SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
_SIZES |= {"num_key_value_heads": 1, "num_experts_per_tok": 2}
_LAYERS = {"num_hidden_layers", "depth", "encoder_layers", "decoder_layers", "n_layers"}
_HEADS = ("num_attention_heads", "num_heads", "encoder_attention_heads", "attention_heads")
_WIDE = {"hidden_size", "embed_dim", "d_model", "projector_hidden_size", "out_hidden_size"}
_WIDE |= {"output_dim", "projection_dim", "moe_intermediate_size", "encoder_hidden_size"}
_WIDE |= {
    "text_hidden_size",
    "projection_hidden_size",
    "vision_hidden_size",
    "mm_hidden_size",
    "input_dim",
}
_WIDER = {"intermediate_size", "mlp_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"}
_MOST = 150_000_000
KINDS = "image", "audio", "video"
WIDTH = 32

MEDIA_TYPES = tuple(sorted(_CLASSES))

_GRIDS = [[56 * rows, 56 * columns] for rows in (1, 2) for columns in (1, 2)]
_CLASS = {"processor": {"num_additional_image_tokens": 1}}  # CLIP's tower has a token of the whole
_GLM = {"marks": {k: f"<|begin_of_{k}|><|{k}|><|end_of_{k}|>" for k in ("image", "video")}}
_QWEN = {"marks": {k: f"<|vision_start|><|{k}_pad|><|vision_end|>" for k in ("image", "video")}}
_DEEP = {"config": {"vision_config": {"deepstack_visual_indexes": [0]}}}
_MERGED = {"processor": {"spatial_merge_size": 2}}
_ROPE = {"rope_type": "default", "rope_theta": 500_000.0, "mrope_section": [3, 3, 2]}

OWN: dict[str, dict[str, Any]] = {
    "internvl": {"processor": {"image_seq_length": 4}},
    "glm4v": _GLM,
    "glm46v": _GLM,
    "glm4v_moe": _GLM,
    "glm_ocr": _GLM | {"like": "glm46v"},
    "glmga": _GLM | {"like": "glm46v"},
    "cosmos3_omni": _QWEN | _DEEP | {"like": "qwen3_vl"},
    "qwen2_vl": _QWEN,
    "qwen3_vl_moe": _QWEN | _DEEP,
    "qwen3_5_moe": _QWEN,
    "qwen3_omni_moe_thinker": _DEEP
    | {
        "like": "qwen3_omni_moe",
        "ids": {"vision_start_token_id": "<|vision_bos|>"},
    },
    "llava": _CLASS,
    "llava_next": _CLASS,
    "llava_next_video": _CLASS,
    "vipllava": _CLASS | {"config": {"vision_feature_layers": [-1, -2]}},
    "video_llava": _CLASS | {"image_processor": {"size": {"shortest_edge": 56}, "crop_size": 56}},
    "paddleocr_vl": {
        "marks": {"image": "<|IMAGE_START|><|image|><|IMAGE_END|>"},
        "tokens": {f"image_{end}_token": f"<|IMAGE_{end.upper()}|>" for end in ("start", "end")},
        "ids": {"vision_start_token_id": "<|IMAGE_START|>"},
    },
    "mistral3": _MERGED,
    "mistral_large4": _MERGED,
    "deepseek_vl": {"processor": {"num_image_tokens": 16}},
    "janus": {"processor": {"num_image_tokens": 16}},
    "aya_vision": {
        "processor": {"img_size": 56, "patch_size": 28},
        "ids": {"image_token_id": "<|IMG_PATCH|>"},
    },
    "molmo2": {
        "image_processor": {"size": {"height": 168, "width": 168}},
        "video_processor": {"size": {"height": 168, "width": 168}},
        "config": {
            "adapter_config": {"vision_feature_layer": [1, 0]},
            "vision_config": {"image_size": [168, 168], "num_position_embeddings": 144},
        },
        "ids": {
            "image_patch_id": "<im_patch>",
            "image_start_token_id": "<im_start>",
            "image_end_token_id": "<im_end>",
            "low_res_image_start_token_id": "<low_res_im_start>",
            "frame_start_token_id": "<frame_start>",
            "frame_end_token_id": "<frame_end>",
        },
    },
    "ernie4_5_vl_moe": {
        "video_processor": {"draw_on_frames": False},
        "config": {"text_config": {"rope_parameters": _ROPE}},
    },
    "kimi_k25": {"config": {"text_config": {"head_dim": 64, "num_key_value_heads": 2}}},
    "minimax_m3_vl": {
        "config": {"merged_hidden_size": 4 * 32},
        "tokens": {
            f"{name.replace(' ', '_')}_token": f"]<]{name}[>["
            for name in ("image", "video", "start of image", "end of image")
        },
    },
    "gemma4_unified": {
        "tokens": {
            f"{n}_token": f"<|{n}|>"
            for n in ("image", "audio", "video", "boi", "eoi", "boa", "eoa")
        }
    },
}


def _sizes(width: int, layers: int) -> dict[str, int]:
    sizes = dict.fromkeys(_WIDE, width) | dict.fromkeys(_WIDER, 2 * width)
    sizes |= dict.fromkeys(_LAYERS, layers) | dict.fromkeys(_HEADS, 2)
    return sizes | {"head_dim": width // 2} | _SIZES


def _shrink(config: Any, sizes: Mapping[str, int], own: Mapping[str, Any]) -> Any:
    """Give a config and its parts small sizes; ``own`` are values of it and its parts by names."""
    for name, value in list(vars(config).items()):
        if isinstance(value, hf.PretrainedConfig):
            _shrink(value, sizes, own.get(name, {}))
        elif name in own:
            setattr(config, name, own[name])
        elif name in sizes and isinstance(value, int):
            setattr(config, name, sizes[name])
        elif name == "dtype":
            setattr(config, name, None)
        elif name == "image_grid_pinpoints":
            setattr(config, name, _GRIDS)
        elif name in ("layer_types", "mlp_layer_types") and value:
            setattr(config, name, (list(dict.fromkeys(value)) * sizes["depth"])[: sizes["depth"]])
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_type" in value:
            angles = int(sizes["head_dim"] * value.get("partial_rotary_factor", 1)) // 2
            value["mrope_section"] = [angles - 2 * (angles // 3), angles // 3, angles // 3]
    return config


def shrunk(model_type: str, width: int = WIDTH, layers: int = 2) -> Made:
    own = OWN.get(model_type, {})
    like = own.get("like", model_type)
    kind: Any = getattr(hf, PROCESSOR_MAPPING_NAMES[like])
    named, more = _tokens_of(kind)
    words, ids, text = words_of(named | own.get("tokens", {}), *more)
    sizes = _sizes(width, layers)
    sizes |= {n: v for n, v in text.items() if n == "vocab_size" or n.endswith("_token_id")}
    parts: dict[str, Any] = {"tokenizer": words}
    for name in sorted(kind.get_attributes(), reverse=True):
        if name != "tokenizer":
            patch = getattr(parts.get("video_processor"), "patch_size", None)
            parts[name] = _part(name, like, own.get(name, {}), patch)
    for name, inner in (("patch_size", "patch_size"), ("feature_size", "num_mel_bins")):
        for part in parts.values():
            if isinstance(value := getattr(part, name, None), int):
                sizes[inner] = value
    config = _shrink(hf.CONFIG_MAPPING[model_type](), sizes, own.get("config", {}))
    inner_configs = [v for v in vars(config).values() if isinstance(v, hf.PretrainedConfig)]
    given = dict(own.get("processor", {}))
    for name in ("patch_size", "vision_feature_select_strategy"):
        found = [getattr(one, name, None) for one in (config, *inner_configs)]
        if name in inspect.signature(kind.__init__).parameters and any(found):
            given.setdefault(name, next(filter(None, found)))
    processor = kind(**parts, **given)
    marks = {}
    for medium in KINDS:
        if (mark := getattr(processor, f"{medium}_token", None)) is None:
            continue
        marks[medium] = own.get("marks", {}).get(medium, mark)
        for one in (config, *inner_configs):
            for name in (f"{medium}_token_id", f"{medium}_token_index"):
                if name in vars(one):
                    setattr(one, name, ids[mark])
    for name, token in own.get("ids", {}).items():
        setattr(config, name, ids[token])
    processor.chat_template = templates.qwen(marks)
    with torch.device("meta"):
        n = sum(
            one.numel() for one in getattr(hf, _CLASSES[model_type])(deepcopy(config)).parameters()
        )
    if n > _MOST:
        raise ValueError(f"{n / 1e6:.0f} million parameters are left")
    return getattr(hf, _CLASSES[model_type])(config), processor


def widened(model: Any, times: int) -> Any:
    """A model of the same class whose layers are so many times as wide."""
    config = deepcopy(model.config)
    for part in (config, *(v for v in vars(config).values() if isinstance(v, hf.PretrainedConfig))):
        for name, value in vars(part).items():
            if name in _WIDE | _WIDER | {
                "head_dim",
                "global_head_dim",
                "vision_output_dim",
            } and isinstance(value, int):
                setattr(part, name, times * value)
            elif name == "rope_parameters" and value and "mrope_section" in value:
                value["mrope_section"] = [times * n for n in value["mrope_section"]]
    return type(model)(config)


def _tokens_of(kind: Any) -> tuple[dict[str, str], list[str]]:
    """The tokens that a processor's module takes from its tokenizer, by names, and others in it."""
    source = inspect.getsource(sys.modules[kind.__module__])
    named = {
        n: f"<|{n.removesuffix('_token')}|>" for n in re.findall(r"izer\.(\w+_token)\b", source)
    }
    written = re.findall(r"(\w+_token)\b[^\n]*?[\"']([<\[][^\"'\s]+[>\]])[\"']", source)
    named |= dict(written)
    for role in ("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token"):
        named.pop(role, None)
    more = set(re.findall(r"[\"'](<[^\"'\s<>{}/]+>|\[[A-Z_]+\])[\"']", source))
    return named, sorted(more - set(named.values()))


def _part(name: str, like: str, own: Mapping[str, Any], patch: int | None) -> Any:
    """A processor's part, whose sizes fit the small tower, with patches of that size."""
    tables = {"image_processor": IMAGE_PROCESSOR_MAPPING_NAMES}
    tables["video_processor"] = VIDEO_PROCESSOR_MAPPING_NAMES
    table = tables.get(name, FEATURE_EXTRACTOR_MAPPING_NAMES)
    alike = [
        t for t, kind in PROCESSOR_MAPPING_NAMES.items() if kind == PROCESSOR_MAPPING_NAMES[like]
    ]
    found: Any = next(filter(None, (table.get(one) for one in (like, *alike))))
    found = max(found.items())[1] if isinstance(found, dict) else found
    part = getattr(hf, found)
    given = dict(own)
    if patch and getattr(part, "patch_size", None):
        given["patch_size"] = patch
    for edge in ("size", "crop_size"):
        if edge not in given and getattr(part, edge, None):
            given[edge] = _small(
                dict(getattr(part, edge)), patch or getattr(part, "patch_size", None) or 14
            )
    if getattr(part, "image_grid_pinpoints", None):
        given["image_grid_pinpoints"] = _GRIDS
    return part(**given)


def _small(size: dict[str, Any], patch: int) -> dict[str, int]:
    if size.get("longest_edge", 0) > 5000:  # these are pixels, not sides
        return {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 16 * (2 * patch) ** 2}
    return {name: 56 for name, value in size.items() if value}
