"""A replica of Gemma 3, in which the tokens of a picture attend to each other."""

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PreTrainedModel,
    ProcessorMixin,
)

from tests.support.replicas import templates
from tests.support.replicas.tokens import tokenizer

_SIDE, _PATCH = 56, 14


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    words = tokenizer(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values()],
        [],
        named=named,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    ids = words.get_vocab()
    n_tokens = (_SIDE // _PATCH) ** 2
    config = Gemma3Config(
        text_config={
            "vocab_size": len(words),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "tie_word_embeddings": False,  # or it would repeat its last word
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": _SIDE,
            "patch_size": _PATCH,
        },
        mm_tokens_per_image=n_tokens,
        image_token_index=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        tie_word_embeddings=False,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": _SIDE, "width": _SIDE}),
        words,
        # Here the template's mark of a picture is its first token.
        chat_template=templates.GEMMA.replace("<image_soft_token>", "<start_of_image>"),
        image_seq_length=n_tokens,
    )
    return Gemma3ForConditionalGeneration(config), processor
