"""A Hugging Face tokenizer as the metadata of a GGUF file that llama.cpp tokenizes with.

llama.cpp knows two kinds of BPE that Llama models use. *Byte-level* BPE ("gpt2") keeps its merges,
and has a name (``pre``) for the pattern that cuts text into words. *SentencePiece* BPE ("llama")
keeps a score for each token, and merges the pair with the highest score. Both are read from the
serialised ``tokenizers`` backend, so the file splits text as the model's own tokenizer does.

With a ``Metaspace`` step llama.cpp puts a space before every text and after every special token;
that step puts one before the first text alone. An engine that gives token ids is not affected.
"""

import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from mico_chat.errors import ModelError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Steps: ByteLevel with GPT-2's own pattern, ByteLevel without a pattern, every digit alone.
_WORDS, _BYTES, _DIGITS = "words", "bytes", "digits"
_LLAMA3 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_OTHER}"
_QWEN2 = rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_OTHER}"

PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_WORDS,), False): "gpt-2",
    ((_DIGITS, _WORDS), False): "smollm",
    ((_LLAMA3, _BYTES), True): "llama-bpe",
    ((_LLAMA3, _BYTES), False): "smaug-bpe",
    ((_QWEN2, _BYTES), False): "qwen2",
}
"""llama.cpp's names (``src/llama-vocab.cpp``) by the steps that cut text into words, and by
``ignore_merges``: whether a word that is a token stays whole."""

_SPACE = "▁"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write a tokenizer's tokens, merges or scores, special tokens and chat template.

    Rows of the token table (``vocab_size``) without a token become unused tokens. A tokenizer that
    llama.cpp cannot follow is a :class:`ModelError`, which names the difference.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        found = type(tokenizer).__name__
        raise ModelError(f"GGUF export needs a fast tokenizer, but this is a {found}")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its type is {model['type']}, and not BPE")
    merges = [tuple(pair) for pair in model["merges"]]
    # transformers' own Llama tokenizer does not tell its backend which token is the unknown one.
    unknown = model["unk_token"] or tokenizer.unk_token
    tokens, types = _tokens(spec, vocab_size, unknown)
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_puts_space(spec))
        writer.add_token_scores(_scores(tokens, types, merges))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(spec))
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer)


def _tokens(
    spec: Mapping[str, Any], vocab_size: int, unknown: str | None
) -> tuple[list[str], list[TokenType]]:
    """Text and type of each row of the token table."""
    tokens = [f"[PAD{row}]" for row in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    named = [(row, text, TokenType.NORMAL) for text, row in spec["model"]["vocab"].items()]
    for added in spec["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        named.append((added["id"], added["content"], kind))
    beyond = [row for row, _, _ in named if row >= vocab_size]
    if beyond:
        raise ModelError(
            f"the tokenizer has a token with the id {min(beyond)}, but the model has only "
            f"{vocab_size} token vectors"
        )
    for row, text, kind in named:
        tokens[row], types[row] = text, kind
    if spec["model"]["byte_fallback"]:
        rows = {text: row for row, text in enumerate(tokens)}
        for byte in (f"<0x{number:02X}>" for number in range(256)):
            if byte not in rows:
                raise ModelError(f"the tokenizer uses byte fallback but lacks the token {byte}")
            types[rows[byte]] = TokenType.BYTE
        if unknown is not None and unknown in rows:
            types[rows[unknown]] = TokenType.UNKNOWN
    if len(set(tokens)) != vocab_size:
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise _unsupported(f"it has the token {twice!r} twice")
    return tokens, types


def _pre_tokenizer(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for the steps by which this tokenizer cuts text into words."""
    model, normalizer = spec["model"], spec["normalizer"]
    # llama.cpp does not normalise text. Almost all text is in normal form C already.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unsupported(f"it changes the text first ({_short(normalizer)})")
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model[affix]:
            raise _unsupported(f"it has a {affix} ({model[affix]!r})")
    steps = tuple(_step(step) for step in _flat(spec["pre_tokenizer"], "pretokenizers"))
    whole = bool(model["ignore_merges"])
    if (name := PRE_TOKENIZERS.get((steps, whole))) is None:
        found = f"{' + '.join(steps) or 'none'}, ignore_merges {whole}"
        known = ", ".join(PRE_TOKENIZERS.values())
        raise _unsupported(f"its pre-tokenizer ({found}) is none of the known ones ({known})")
    return name


def _step(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return _WORDS if use_regex else _BYTES
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
        case {"pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return str(regex)
    return _short(step)


def _puts_space(spec: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text; an error if more than spaces is changed."""
    steps = _flat(spec["normalizer"], "normalizers") + _flat(spec["pre_tokenizer"], "pretokenizers")
    puts_space = False
    for step in steps:
        match step:
            case {"type": "Metaspace", "replacement": "▁", "split": False}:
                puts_space = puts_space or step["prepend_scheme"] != "never"
            case _ if step == _PREPEND:
                puts_space = True
            case _ if step != _REPLACE:
                raise _unsupported(f"it changes or cuts the text first ({_short(step)})")
    return puts_space


def _scores(
    tokens: list[str], types: list[TokenType], merges: list[tuple[str, ...]]
) -> list[float]:
    """A score for each token such that the highest score is the first merge.

    SentencePiece merges any two neighbours that make a token, in the order of the tokens' scores.
    ``tokenizers`` merges listed pairs, in the order of the list. They agree if no pair is missing
    and if a token's pairs are neighbours in the list. Runs of spaces may be mixed with one another:
    in Llama 2 they share one score.
    """
    order = [token for token, _ in groupby(left + right for left, right in merges)]
    # Places from the last to the first: where a token has several, the first remains.
    rank = {token: place for place, token in reversed(list(enumerate(order)))}
    mixed = {token for place, token in enumerate(order) if rank[token] != place}
    pairs = set(merges)
    known = set(tokens)
    missing = [
        (token[:cut], token[cut:])
        for token, kind in zip(tokens, types, strict=True)
        if kind == TokenType.NORMAL
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known and (token[:cut], token[cut:]) not in pairs
    ]
    if missing or any(token.strip(_SPACE) for token in mixed):
        why = f"it lacks the merge {missing[0]}" if missing else "its merges are in another order"
        differs = "it uses byte fallback but differs from SentencePiece's BPE"
        raise _unsupported(f"{differs}, because {why}")
    if mixed:
        together = min(rank[token] for token in mixed)
        rank.update(dict.fromkeys(mixed, together))
    return [-float(rank.get(token, len(order))) for token in tokens]


def _unsupported(reason: str) -> ModelError:
    return ModelError(f"llama.cpp cannot read this tokenizer: {reason}: use --engine transformers")


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        # llama.cpp would choose one itself, and stop at it.
        raise ModelError("the tokenizer lacks an eos_token: set the token that ends an answer")
    for name in ("bos", "eos", "unk", "pad"):
        if (row := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(row)
    plain = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    writer.add_add_bos_token(len(framed) > len(plain) and framed[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(framed) > len(plain) and framed[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _flat(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[parts] for inner in _flat(part, parts)]


def _short(step: Mapping[str, Any]) -> str:
    text = json.dumps(step, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:160]} .."
