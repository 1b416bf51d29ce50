"""What is shown: answers as they come, media, lists, errors."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import chain, islice

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mico_ui import describe
from mico_ui.answers import (
    ChatAnswer,
    ChatEvent,
    Conversation,
    ConversationSummary,
    Delta,
    StoredMedium,
)
from mico_ui.terminal.words import Flow, one_line, printable

SHOWN_TURNS = 6
"""Turns of an opened conversation that are shown, the last ones."""


class Screen:
    """Writes to ``console``. All text passes through :func:`printable`: much is other people's."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @property
    def has_colours(self) -> bool:
        """Whether pictures can be shown."""
        return self.console.is_terminal and self.console.color_system in ("256", "truecolor")

    def line(self, text: str, style: str = "") -> None:
        """A line, or more where it is too long."""
        self.console.print(Text(printable(text), style=style))

    def note(self, text: str) -> None:
        """Something by the way."""
        self.line(text, "dim")

    def error(self, message: str) -> None:
        """What went wrong, in one line."""
        told = printable(" ".join(message.split()))
        self.console.print(Text(f"error: {told}", style="red"), soft_wrap=True)

    def show(self, parts: Iterable[RenderableType]) -> None:
        """A picture or the like."""
        for part in parts:
            self.console.print(part)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Columns without lines; the first one stands out, the last one takes the room left."""
        if not rows:
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        last = len(rows[0]) - 1
        for column in range(last + 1):
            table.add_column(style="" if column else "cyan", no_wrap=column != last)
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print(table)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A sign of life while the block runs."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(Text(what, style="dim"), spinner="dots"):
            yield

    def answer(self, events: Generator[ChatEvent, None, None]) -> None:
        """Show an answer while it comes. However this ends, ``events`` is closed."""
        start = time.monotonic()
        flow = Flow(self.console.file, self.console.width)
        whole: ChatAnswer | None = None
        with closing(events):
            try:
                with self.waiting("answering"):
                    first = list(islice(events, 1))
                for event in chain(first, events):
                    if isinstance(event, Delta):
                        flow.feed(event.text)
                    elif isinstance(event, ChatAnswer):
                        whole = event
            finally:
                flow.end()
        if whole is None:
            return
        self.note(describe.usage(whole.usage, time.monotonic() - start))
        if whole.finish_reason == "length":
            tokens = describe.count(whole.usage.completion_tokens, "token")
            self.note(f"stopped at the limit of {tokens}; /set max_tokens N raises it")

    def medium(self, number: int, stored: StoredMedium) -> None:
        """An attached medium and what the server found in it."""
        report = stored.report
        found = "" if report is None else describe.facts(report)
        self.console.print(
            Text.assemble(
                (f"{number} ", "dim"),
                (f"{stored.kind} ", "cyan"),
                (printable(stored.name), "bold"),
                f"  {found}",
            )
        )
        for cut in [] if report is None else report.cut:
            self.line(f"  {cut}", "yellow")

    def conversations(self, found: Sequence[ConversationSummary], current: str | None) -> None:
        """Kept conversations, numbered for /open."""
        room = max(self.console.width - 24, 20)
        rows = []
        for number, summary in enumerate(found, 1):
            title = one_line(summary.title, room)
            here = " (this one)" if summary.id == current else ""
            rows.append(
                (str(number), describe.age(time.time() - summary.updated_at), f"{title}{here}")
            )
        self.table(rows)

    def transcript(self, conversation: Conversation) -> None:
        """What was said in a conversation."""
        self.line(conversation.title, "bold")
        left_out = len(conversation.turns) - SHOWN_TURNS
        if left_out > 0:
            self.note(f"({describe.count(left_out, 'earlier turn')}; /save writes them all)")
        for turn in conversation.turns[-SHOWN_TURNS:]:
            for medium in turn.media:
                self.note(f"[{medium.kind} {medium.name}]")
            self.line(f"> {turn.message}", "cyan")
            ends = {"cancelled": " (stopped)", "unanswered": "(not answered)"}
            self.line(turn.answer + ends.get(turn.finish_reason, ""))
