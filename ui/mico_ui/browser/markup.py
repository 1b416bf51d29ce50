"""An answer's Markdown as HTML that is safe to put into a page."""

from __future__ import annotations

from functools import cache

from markdown_it import MarkdownIt


@cache
def _parser() -> MarkdownIt:
    # HTML in an answer is shown as text, and nothing in it loads a picture from anywhere.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True})
    return parser.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])


def html_of(text: str) -> str:
    """The HTML of an answer, whole or not yet."""
    html: str = _parser().render(text)
    return html
