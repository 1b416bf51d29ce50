"""An answer's Markdown as HTML that is safe to put into a page."""

from __future__ import annotations

from functools import cache, lru_cache

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

MAX_COLOURED = 20_000
"""Characters of code up to which it is coloured; an answer is drawn anew while it grows."""


@cache
def _parser() -> MarkdownIt:
    # HTML in an answer is shown as text, and nothing in it loads a picture from anywhere.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _coloured})
    return parser.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])


@lru_cache(maxsize=64)
def _coloured(code: str, language: str, attributes: str) -> str:
    """Code as HTML, its words in spans with Pygments' short class names behind ``hl-``.

    Empty, for the parser to escape the code as it is, where the language is none that is known.
    """
    if not language or len(code) > MAX_COLOURED:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return ""
    html: str = highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix="hl-"))
    return html


def html_of(text: str) -> str:
    """The HTML of an answer, whole or not yet."""
    html: str = _parser().render(text)
    return html
