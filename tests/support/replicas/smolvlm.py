"""A replica of SmolVLM2: its own SigLIP tower, pixel shuffle, Llama's language model."""

from transformers import (
    PreTrainedModel,
    ProcessorMixin,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.support.replicas import templates
from tests.support.replicas.tokens import tokenizer

_SIDE, _PATCH, _SHUFFLE = 56, 14, 2


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    words = tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values(), *tiles],
        [],
        named=named,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
    )
    config = SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "pad_token_id": words.pad_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": _SIDE,
            "patch_size": _PATCH,
        },
        scale_factor=_SHUFFLE,
        image_token_id=words.get_vocab()["<image>"],
    )
    # A picture is cut into up to 2 x 2 tiles beside its whole; a frame never is.
    tile, whole = {"longest_edge": _SIDE}, {"longest_edge": 2 * _SIDE}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=whole, max_image_size=tile),
        words,
        SmolVLMVideoProcessor(size=tile, max_image_size=tile, fps=1, num_frames=64),
        image_seq_len=(_SIDE // _PATCH // _SHUFFLE) ** 2,
        chat_template=templates.SMOLVLM,
    )
    return SmolVLMForConditionalGeneration(config), processor
