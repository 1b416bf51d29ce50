"""Chat templates as models ship them, and a tokenizer that has their control tokens."""

from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import byte_level


def _read(name: str) -> str:
    return Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")


HERMES = _read("hermes")
"""Qwen2.5's, which Hermes' models share."""

LLAMA = _read("llama")
"""Llama 3.2's without its dates and built-in tools."""

MISTRAL = _read("mistral")
"""Mistral v3's: it writes strings of a tool unescaped, and wants ids of nine characters."""

XML = _read("xml")
"""As in Qwen3-Coder: tools and calls are written tag by tag."""

THINKING = _read("thinking")
"""Qwen3's, in short: with ``enable_thinking`` false the prompt has empty thoughts already."""

VISION = _read("vision")
"""Qwen3-VL's, in short: contents are strings or lists, and the template marks the media."""

THOUGHTS = _read("thoughts")
"""Qwen3-VL-Thinking's, in short: thoughts of turns before the last question are left out."""

CHANNELS = _read("channels")
"""Gemma 4's, in short: channels are left out of earlier answers, and contents are trimmed."""

LISTS = _read("lists")
"""LLaVA-OneVision's: contents are lists alone."""

_SPECIAL = (
    "<|im_start|> <|vision_start|> <|image_pad|> <|vision_end|> <s> </s> <|start_header_id|> "
    "<|end_header_id|> <|eot_id|> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] "
    "[/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] <|turn> <turn|> "
    '<|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> <|image|> <|"|>'
)
_ADDED = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "    ",
)


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """Bytes, control tokens, and added tokens that are not special, one of them of spaces."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL.split()})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _ADDED])
    tokenizer.chat_template = template
    return tokenizer
