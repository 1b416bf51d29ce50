"""A chat as one HTML file, for whoever is to read it: it needs no script and no network.

Answers look as on the page. Texts of users and names of files are escaped, and the file's own
policy lets nothing run and nothing be fetched. Pictures are drawn anew, without what their files
say of the place and the camera.
"""

import asyncio
import base64
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

from mico_chat.media.file import mime_type
from mico_chat.media.kinds import TABLE
from mico_chat.wire import ConversationObject, ShownMedium, TurnObject
from mico_ui import describe, routes
from mico_ui.browser.cards import MediaDesk, Picture, report_of
from mico_ui.browser.markup import html_of
from mico_ui.browser.visitor import Visitor
from mico_ui.routes import MediumId

PICTURE_SIDE = 1024  # longest side of a picture, in pixels: the decoder gives no more
MOST_OF_ONE = 8 << 20  # bytes of a sound or a video
MOST_OF_ALL = 32 << 20  # characters of all media, as they are written

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
    "base-uri 'none'; form-action 'none'"
)
_WEB = Path(__file__).parent / "web"


@cache
def _style() -> str:
    """The page's colours, its rules for what is said, and a few of this file's own."""
    page = (_WEB / "style.css").read_text(encoding="utf-8")
    light, dark = re.findall(r"\{(\s+--ground[^}]+)\}", page)
    said = re.findall(r"^\.mico (?:a|pre|math|\.said|\.note|\.answer \.text)\b.+", page, re.M)
    schemes = (("screen and (prefers-color-scheme: dark)", dark), ("print", light))
    colours = [f"@media {medium} {{ :root {{{values}}} }}" for medium, values in schemes]
    own = (_WEB / "share.css").read_text(encoding="utf-8")
    return "\n".join((f":root {{{light}}}", *colours, *said, own))


async def shared(desk: MediaDesk, visitor: Visitor, chat: ConversationObject) -> str:
    """The path of a conversation that is shown, with its media, as the text of an HTML file."""
    media = _Media(desk, visitor)
    turns = [
        f'<article aria-label="Turn {n}">\n<h2>Question</h2>\n'
        + "".join([await media.figure(medium) for medium in turn.media])
        + f"{_said(turn.message)}<h2>Answer</h2>\n{_answer(turn)}</article>\n"
        for n, turn in enumerate(chat.turns, 1)
    ]
    title = escape(chat.title)
    system = f"<h2>System prompt</h2>\n{_said(chat.system)}" if chat.system else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_style()}</style>\n</head>\n"
        f'<body class="mico">\n<main>\n<h1 dir="auto">{title}</h1>\n'
        f'<p class="note">A chat with {escape(chat.model)}.</p>\n{system}{"".join(turns)}'
        "</main>\n</body>\n</html>\n"
    )


def _said(text: str) -> str:
    return f'<div class="said" dir="auto">{escape(text)}</div>\n' if text else ""


def _answer(turn: TurnObject) -> str:
    html = html_of(turn.answer).replace("<pre", '<pre tabindex="0"')
    html = html.replace("<a href", '<a rel="noopener noreferrer nofollow" target="_blank" href')
    notes = [describe.mark(turn), describe.left_out(turn.usage) if turn.usage else ""]
    said = "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes if note)
    return f'<div class="answer"><div class="text" dir="auto">{html}</div>\n{said}</div>\n'


class _Media:
    """Writes media into a file as long as there is room for them."""

    def __init__(self, desk: MediaDesk, visitor: Visitor) -> None:
        self._desk, self._visitor = desk, visitor
        self._room = MOST_OF_ALL
        self._shown: set[MediumId] = set()

    async def figure(self, medium: ShownMedium) -> str:
        """A medium as large as there is room for; a line says what is not here."""
        shown, row = MediumId(medium.kind, medium.id), TABLE[medium.kind]
        notes = [row.noun]
        body = ""
        if shown in self._shown:
            notes.append("the same as above")
        else:
            self._shown.add(shown)
            card = await self._desk.preview(self._visitor, shown)
            whole, small = await self._whole(shown, card.pictures), _pictures(card.pictures)
            body = next((html for html in (whole, small) if 0 < len(html) <= self._room), "")
            self._room -= len(body)
            notes += [*card.facts, *card.cut]
            if card.pictures and (body != whole or not whole):
                kept = "a small preview is here" if body else "its name is here"
                notes.append(f"only {kept}: the file is too large for this page")
        named = f"<strong>{escape(medium.name)}</strong> {escape(' · '.join(notes))}"
        return f"<figure>{body}<figcaption>{named}</figcaption></figure>\n"

    async def _whole(self, shown: MediumId, previews: Sequence[Picture]) -> str:
        """A sound or a video that plays, behind its previews; anything else as pictures."""
        if not previews:
            return ""  # it cannot be decoded
        stored = await self._visitor.send(self._desk.api, routes.medium(shown.id))
        player = TABLE[shown.kind].player
        plays = player in ("audio", "video")
        if plays and stored.bytes > min(MOST_OF_ONE, self._room):
            return ""
        content = await self._visitor.send(self._desk.api, routes.medium_content(shown.id))
        if not plays:
            report = report_of(stored).model_copy(update={"kind": shown.kind})
            draw = self._desk.previewer.draw
            drawn = await asyncio.to_thread(draw, content, report, PICTURE_SIDE)
            return _pictures(drawn.pictures)
        data = base64.b64encode(content).decode("ascii")
        label = f'aria-label="{escape(stored.name)}"'
        url = f"data:{mime_type(shown.kind, content[:64])};base64,{data}"
        return f'{_pictures(previews)}<{player} controls {label} src="{url}"></{player}>'


def _pictures(pictures: Sequence[Picture]) -> str:
    return "".join(
        f'<img src="{one.src}" alt="{escape(one.alt)}">'
        if one.src
        else f'<pre tabindex="0">{escape(one.text)}</pre>'
        for one in pictures
    )
