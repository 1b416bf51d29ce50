"""A replica of LLaVA-OneVision: SigLIP's tower, Qwen2's language model."""

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from tests.support.replicas import templates
from tests.support.replicas.tokens import tokenizer

_SIDE, _PATCH = 56, 14


def llava_onevision(n_heads: int = 2) -> tuple[PreTrainedModel, ProcessorMixin]:
    named = {"image_token": "<image>", "video_token": "<video>"}
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()],
        [],
        named=named,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    ids = words.get_vocab()
    # A single picture is cut into up to 2 x 2 tiles beside its whole.
    grids = [[_SIDE * rows, _SIDE * columns] for rows in (1, 2) for columns in (1, 2)]
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": n_heads,
            "num_key_value_heads": 1,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": _SIDE,
            "patch_size": _PATCH,
            "vision_use_head": False,
        },
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=grids,
    )
    size = {"height": _SIDE, "width": _SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
        words,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(_SIDE // _PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=templates.LLAVA_ONEVISION,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor
