"""A replica of Voxtral: a sound is half minutes of features, its mark the 25th token."""

import json

from tokenizers import Tokenizer
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    VoxtralProcessor,
    WhisperFeatureExtractor,
)

from tests.support.replicas.tokens import trained

_MARKS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"[X{n}]" for n in range(19))]
_MARKS += ["[AUDIO]", "[BEGIN_AUDIO]"]
_TEMPLATE = (
    "<s>{%- for message in messages %}{%- if message.role == 'user' %}{{- '[INST]' }}"
    "{%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}"
    "{%- else %}{{- '[BEGIN_AUDIO][AUDIO]' }}{%- endif %}{%- endfor %}{{- '[/INST]' }}"
    "{%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{{- '</s>' }}"
    "{%- endif %}{%- endfor %}"
)


def voxtral(n_heads: int = 2) -> tuple[PreTrainedModel, ProcessorMixin]:
    spec = json.loads(trained())
    marks = {mark: n for n, mark in enumerate(_MARKS)}
    known = {word: n + len(marks) for word, n in spec["model"]["vocab"].items()}
    spec["model"]["vocab"] = marks | known
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(_MARKS)
    words = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    words.chat_template = _TEMPLATE
    config = VoxtralConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(words),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": n_heads,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        audio_config={
            "num_mel_bins": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32 * 50,
            "hidden_size": 32,
        },
        audio_token_id=marks["[AUDIO]"],
    )
    processor = VoxtralProcessor(WhisperFeatureExtractor(feature_size=128), words)
    return VoxtralForConditionalGeneration(config), processor
