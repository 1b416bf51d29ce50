"""A tiny Vicuna: its files, its tokenizer's layout, its config; random weights.

Like ``lmsys/vicuna-7b-v1.5``: a SentencePiece model (``tokenizer.model`` alone) with byte pieces, a
tokenizer that puts a beginning-of-text token, no chat template, and a generation config with a
temperature but without sampling, which some releases of transformers refuse to write again.
"""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 448

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_TEXTS = [
    SYSTEM,
    "USER: What is in this picture? ASSISTANT: A red square, and a cat beside it.",
    "USER: What colour is it? ASSISTANT: It is red, green or blue.",
    "Picture: Sound: Video: Sound track: Depth map: Normal map: What do you hear? A tone.",
]


def vicuna_folder(
    folder: Path, *, legacy: bool = False, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Path:
    """Write the model; ``legacy`` is the tokenizer's (a space behind each special token)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, legacy)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32: vLLM has no narrower ones
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        # Far from the near ties of small weights.
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    llm = LlamaForCausalLM(config)
    nn.Module.to(llm, dtype)
    llm.save_pretrained(folder)
    _edit(folder / "config.json", _name_or_path="vicuna-7b-v1.5")
    _edit(folder / "generation_config.json", max_length=4096, temperature=0.9, top_p=0.6)
    return folder


def pickle_weights(folder: Path) -> None:
    """The weights in two files of ``torch.save`` with an index, as Vicuna's are."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {
        name: f"pytorch_model-{1 + (at % 2):05d}-of-00002.bin" for at, name in enumerate(names)
    }
    for shard in set(shards.values()):
        torch.save({n: t for n, t in state.items() if shards[n] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, legacy: bool) -> None:
    """``tokenizer.model`` and its config: <unk>, <s>, </s>, the bytes, then pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
        "model_max_length": 4096,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{f"{name}_token": _token(text) for name, text in _SPECIAL.items()},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


_SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}


def _token(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": text, **flags}


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content, indent=2))
