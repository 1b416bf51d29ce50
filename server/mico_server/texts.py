"""Texts that a database and JSON can carry, and how a search reads them."""

from __future__ import annotations

import re
import unicodedata

from mico_chat import messages
from mico_chat.errors import RequestError

# PostgreSQL has no NUL in its texts, and no encoding has half a surrogate pair.
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def check_text(text: str, where: str) -> str:
    """The text as it is.

    Raises:
        RequestError: if it has a NUL character or an unpaired surrogate; ``where`` names it.
    """
    messages.check_text(text, where)
    if (place := text.find("\0")) >= 0:
        raise RequestError.at(where, f"a NUL character at position {place}; send text without it")
    return text


def cleaned(text: str) -> str:
    """The text with U+FFFD for what cannot be stored: the model cannot be asked for other words."""
    return _UNSTORABLE.sub("\ufffd", text)


def folded(text: str) -> str:
    """The text as searches compare it: no case, and one form of each accented letter.

    Databases disagree on the case of all but ASCII letters, so they are not asked.
    """
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def title_of(text: str, kinds: tuple[str, ...], *, length: int = 60) -> str:
    """A conversation's title: the first words of its first message, or what it shows."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not words:
        return ", ".join(dict.fromkeys(kinds))
    if len(words) <= length:
        return words
    cut = words[: length - 1]
    # At the last word's end; a script without spaces is cut anywhere.
    return f"{cut.rsplit(' ', 1)[0]}…"
