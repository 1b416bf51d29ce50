"""A replica of Gemma 3n: a convolutional tower, a conformer, layers that share keys and values."""

import torch
from transformers import (
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    PreTrainedModel,
    ProcessorMixin,
    SiglipImageProcessor,
)

from tests.support.replicas import templates
from tests.support.replicas.tokens import tokenizer

_SIDE, _STRIDE = 128, 32


def gemma3n() -> tuple[PreTrainedModel, ProcessorMixin]:
    text = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    text += ["<start_of_image>", "<start_of_audio>"]
    # The towers' own embeddings hold these, behind those of the text; the last one pads a sound.
    vision = ["<end_of_image>", "<image_soft_token>"]
    audio = ["<end_of_audio>", "<audio_soft_token>", "<unused0>"]
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "boa_token": "<start_of_audio>",
        "eoa_token": "<end_of_audio>",
        "audio_token": "<audio_soft_token>",
    }
    words = tokenizer(
        [*text, *vision, *audio],
        [],
        named=named,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    ids = words.get_vocab()
    n_image_tokens = (_SIDE // _STRIDE) ** 2
    config = Gemma3nConfig(
        text_config={
            "vocab_size": len(words),
            "vocab_size_per_layer_input": ids["<end_of_image>"],
            "hidden_size": 32,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "laurel_rank": 8,
            "pad_token_id": ids["<pad>"],
            "eos_token_id": ids["<eos>"],
            "bos_token_id": ids["<bos>"],
        },
        vision_config={
            "architecture": "test_efficientnet",
            "model_args": {"channel_multiplier": 0.5},
            "hidden_size": 128,
            "vocab_size": len(vision),
            "vocab_offset": ids["<end_of_image>"],
        },
        audio_config={
            "hidden_size": 32,
            "vocab_size": len(audio),
            "vocab_offset": ids["<end_of_audio>"],
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 2,
            "sscp_conv_channel_size": (8, 4),
        },
        vision_soft_tokens_per_image=n_image_tokens,
        boi_token_id=ids["<start_of_image>"],
        eoi_token_id=ids["<end_of_image>"],
        image_token_id=ids["<image_soft_token>"],
        boa_token_id=ids["<start_of_audio>"],
        eoa_token_id=ids["<end_of_audio>"],
        audio_token_id=ids["<audio_soft_token>"],
    )
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessor(size={"height": _SIDE, "width": _SIDE}, do_normalize=False),
        words,
        chat_template=templates.GEMMA,
        image_seq_length=n_image_tokens,
    )
    model = Gemma3nForConditionalGeneration(config)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            # From zeros, as the class makes it, the embeddings of each layer would change nothing.
            layer.altup.correct_output_scale.fill_(1.0)
            # A sound has few tokens among 188: without this the answer does not heed it.
            layer.post_attention_layernorm.weight.fill_(8.0)
    return model, processor
