"""Fields of a request's JSON: each error names the field, what was expected and what was found."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mico_chat.errors import ContextLengthError, RequestError

BYTES_PER_TOKEN = 16
"""Text with more bytes for each token of a context is refused before it is tokenised, which takes
200 times its memory. English has 4 to 5 bytes a token; long runs of one sign alone have more."""


def object_at(part: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = part.get(key)
    check_object(value, f"{where}.{key}")
    return cast("Mapping[str, Any]", value)


def check_object(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise RequestError.at(where, f"expected an object, got {type_of(value)}")


def check_one_of(value: Any, known: Sequence[str], where: str, hint: str = "") -> None:
    if value not in known:
        reason = f"{reprlib.repr(value)} is none of {', '.join(known)}{hint}"
        raise RequestError.at(where, reason)


def string_at(part: Mapping[str, Any], key: str, where: str) -> str:
    value = part.get(key)
    if not isinstance(value, str):
        raise RequestError.at(f"{where}.{key}", f"expected a string, got {type_of(value)}")
    check_text(value, f"{where}.{key}")
    return value


def check_text(text: str, where: str) -> None:
    """Refuse half a surrogate pair: JSON can express it, tokenizers and files cannot."""
    if text.isascii():  # a quick check, as data URIs are long
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"character {error.start} is half of a surrogate pair, which is no text"
        raise RequestError.at(where, reason) from error


def check_bytes(n_bytes: int, max_tokens: int, where: str) -> None:
    """Refuse text of so many bytes that it cannot fit into a context of ``max_tokens``."""
    most = BYTES_PER_TOKEN * max_tokens
    if n_bytes > most:
        raise ContextLengthError(
            f"this model's maximum context length is {max_tokens} tokens, but the text of {where} "
            f"has {n_bytes} bytes, more than {most} ({BYTES_PER_TOKEN} for each token): send less",
            where,
        )


def type_of(value: Any) -> str:
    names = {type(None): "nothing", str: "a string", bool: "a boolean", int: "a number"}
    names |= {float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
