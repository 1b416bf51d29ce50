"""Replicas of Qwen's families: Qwen2.5-Omni's Thinker, Qwen3-VL, Qwen3.5 and Qwen2-Audio."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)

from tests.support.replicas import templates
from tests.support.replicas.tokens import tokenizer

_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TOOLS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_N_MELS = 128
_SEEN = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
_VL_TEMPLATE = templates.qwen(
    {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    }
)


@dataclass(frozen=True)
class Size:
    """A language model's width, layers and so on, and the most tokens of a picture."""

    width: int = 32
    mlp: int = 64
    layers: int = 2
    heads: int = 2
    picture: int = 16


_TINY = Size()


def qwen2_5_omni(size: Size = _TINY) -> tuple[PreTrainedModel, ProcessorMixin]:
    named = {
        "image_token": "<|IMAGE|>",
        "audio_token": "<|AUDIO|>",
        "video_token": "<|VIDEO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    words = tokenizer([*_CHATML, *named.values()], _TOOLS, named=named, **_ROLES)
    ids = words.get_vocab()
    angles = size.width // size.heads // 2
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": size.width,
            "intermediate_size": size.mlp,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": max(1, size.heads // 2),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [angles // 4, angles * 3 // 8, angles * 3 // 8],
            },
        },
        # The first of two layers sees windows of 2 x 2 merged patches, the last one all.
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": size.width,
        },
        audio_config={
            "num_mel_bins": _N_MELS,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
            "n_window": 100,
            "output_dim": size.width,
        },
        audio_token_index=ids["<|AUDIO|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        user_token_id=ids["user"],
    )
    # No field of the class, though the model reads it: the published configuration brings it along.
    config.vision_start_token_id = ids["<|vision_bos|>"]
    pixels = {"shortest_edge": 4 * 28 * 28, "longest_edge": size.picture * 28 * 28}
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(size=pixels),
        Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=True),
        WhisperFeatureExtractor(feature_size=_N_MELS),
        words,
        chat_template=templates.qwen(
            {
                "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
                "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
                "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
            },
            default_system="You are a helpful assistant.",
        ),
    )
    return Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def _vision_ids(words: Any) -> dict[str, Any]:
    ids, places = words.get_vocab(), ("vision_start", "vision_end", "image", "video")
    return {
        f"{name}_token_id": ids[mark] for name, mark in zip(places, _SEEN.values(), strict=True)
    }


def qwen2_5_vl(n_heads: int = 2) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Its processor has the bounds of the published one: 4 to 16,384 tokens of a picture."""
    words = tokenizer([*_CHATML, *_SEEN.values()], _TOOLS, named=_SEEN, **_ROLES)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": n_heads,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [8 // n_heads, 4 // n_heads, 4 // n_heads],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        **_vision_ids(words),
    )
    pixels = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16_384 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels),
        words,
        Qwen2VLVideoProcessor(cap_pixels_per_frame=True),
        chat_template=_VL_TEMPLATE,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_5() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen3-VL's processor and tower, and a language model with a recurrent state."""
    model, processor = qwen3_vl()
    config = model.config.to_dict()
    text, tower = config.pop("text_config"), config.pop("vision_config")
    text |= {f"linear_num_{one}_heads": 2 for one in ("key", "value")}
    text |= {f"linear_{one}_head_dim": 8 for one in ("key", "value")}
    text["rope_parameters"]["partial_rotary_factor"] = 1.0
    text |= {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
    del text["model_type"], tower["model_type"], tower["deepstack_visual_indexes"]
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    own = Qwen3_5Config(text_config=text, vision_config=tower, **ids)
    return Qwen3_5ForConditionalGeneration(own), processor


def qwen3_vl(n_heads: int = 2) -> tuple[PreTrainedModel, ProcessorMixin]:
    words = tokenizer([*_CHATML, *_SEEN.values()], _TOOLS, named=_SEEN, **_ROLES)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": n_heads,
            "num_key_value_heads": 1,
            "head_dim": 32 // n_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [8 // n_heads, 4 // n_heads, 4 // n_heads],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **_vision_ids(words),
    )
    # A clip's bounds are those of all its frames together.
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(
            size={"shortest_edge": 4 * 32 * 32, "longest_edge": 16 * 32 * 32},
            patch_size=16,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        words,
        Qwen3VLVideoProcessor(
            size={"shortest_edge": 4 * 32 * 32, "longest_edge": 64 * 32 * 32},
            cap_pixels_per_frame=True,
        ),
        chat_template=_VL_TEMPLATE,
    )
    return Qwen3VLForConditionalGeneration(config), processor


def qwen2_audio(n_heads: int = 2) -> tuple[PreTrainedModel, ProcessorMixin]:
    named = {
        "audio_token": "<|AUDIO|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    }
    words = tokenizer([*_CHATML, *named.values()], [], named=named, **_ROLES)
    config = Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": n_heads,
            "num_key_value_heads": 1,
        },
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": _N_MELS,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 32,
        },
        audio_token_index=words.get_vocab()["<|AUDIO|>"],
    )
    processor = Qwen2AudioProcessor(
        WhisperFeatureExtractor(feature_size=_N_MELS), words, chat_template=templates.QWEN2_AUDIO
    )
    return Qwen2AudioForConditionalGeneration(config), processor
