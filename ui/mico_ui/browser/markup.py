"""Answers as HTML: Markdown, coloured code, and formulas as MathML, which browsers draw themselves.

Nothing of an answer becomes markup of its own: HTML is shown as text, nothing loads a picture, and
of a formula only what MathML knows is kept.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from html import escape, unescape
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

LONGEST_CODE = 20_000  # characters that are coloured: an answer is drawn anew while it grows
LONGEST_FORMULA = 2_000

# What a formula's elements may say of themselves: no addresses, no styles, no scripts.
_ATTRIBUTES = {
    *("xmlns", "display", "mathvariant", "stretchy", "fence", "form", "separator", "lspace"),
    *("rspace", "minsize", "maxsize", "accent", "accentunder", "columnalign", "rowspacing"),
    *("columnspacing", "columnlines", "rowlines", "frame", "linethickness", "displaystyle"),
    *("scriptlevel", "width", "height", "depth", "movablelimits", "symmetric", "largeop"),
}


@lru_cache(maxsize=64)
def _coloured(code: str, language: str, attributes: str) -> str:
    """Code as HTML with Pygments' short class names behind ``hl-``.

    For an unknown language the result is empty, and the parser escapes the code as it is.
    """
    if not language or len(code) > LONGEST_CODE:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return ""
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix="hl-")))


@lru_cache(maxsize=256)
def mathml(latex: str, display: str) -> str:
    """A formula as MathML; one that cannot be read, or is very long, is shown as it is written."""
    as_written = f"<code>{escape(latex)}</code>"
    if len(latex) > LONGEST_FORMULA:
        return as_written
    try:
        found = convert_to_element(latex, display=display)
    except Exception:  # the library's errors have no common class
        return as_written
    for element in found.iter():
        for name in set(element.attrib) - _ATTRIBUTES:
            del element.attrib[name]
        # The library writes characters as references. Serializing escapes what is no reference.
        element.text = unescape(element.text or "")
    return ElementTree.tostring(found, encoding="unicode")


def _formula(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    is_block = tokens[at].type.startswith("math_block") or tokens[at].type.endswith("double")
    return mathml(tokens[at].content.strip(), "block" if is_block else "inline")


_MARKDOWN = (
    MarkdownIt(
        "commonmark", {"html": False, "breaks": True, "linkify": True, "highlight": _coloured}
    )
    .enable(["table", "strikethrough", "linkify"])
    .disable(["image", "html_block", "html_inline"])
    # "$5 and $6" are no formula.
    .use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    .use(texmath_plugin, "brackets")
)
for _name in ("inline", "inline_double", "block", "block_label", "block_eqno"):
    _MARKDOWN.add_render_rule(f"math_{_name}", _formula)


def html_of(text: str) -> str:
    # A number alone is an answer, and no empty item of a list.
    alone = re.fullmatch(r"\s*(\d+)([.)])\s*", text)
    return str(_MARKDOWN.render(f"{alone[1]}\\{alone[2]}" if alone else text))
