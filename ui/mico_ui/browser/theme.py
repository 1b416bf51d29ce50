"""How the page looks: Gradio's plainest theme with the fonts of the machine, and our own sheet."""

from __future__ import annotations

from pathlib import Path

from gradio.themes import Base

WEB = Path(__file__).parent / "web"

# In the order in which they build on each other; `start` is last.
SCRIPTS = ("core", "cards", "attachments", "turns", "composer", "library", "compare", "start")


def theme() -> Base:
    """Gradio's own parts (its toasts) in our fonts; nothing is fetched from another site."""
    fonts = ("system-ui", "sans-serif")
    return Base(font=fonts, font_mono=("ui-monospace", "monospace"))


def head() -> str:
    """The scripts, as what goes into the page's head."""
    code = "\n".join((WEB / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    return f"<script>{code}</script>"


def markup() -> str:
    """The page's HTML."""
    return (WEB / "page.html").read_text(encoding="utf-8")
