"""Shows answers as they come, media, lists and errors; no shown text can control the terminal.

Media are shown as coloured blocks: two pixels in each character cell.
Legend: H height, W width in pixels, n samples.
"""

import time
import unicodedata
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console
from rich.segment import Segment, Segments
from rich.status import Status
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mico_chat import wire
from mico_chat.media import Audio, Depth, Medium, Pages, Video
from mico_ui import describe
from mico_ui.describe import Pixels, depth_pixels, distances

SHOWN_TURNS = 6  # the last turns of an opened conversation

MAX_COLUMNS, MAX_ROWS = 60, 18  # cells of a preview, which must not fill the screen
N_FRAMES = 4  # frames of a video that are shown
_BARS = " ▁▂▃▄▅▆▇█"

# These change the direction of the text behind them: one text could look like another.
_BIDI = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}

# A word of this many cells is shown before its end: some scripts put no spaces between words.
_LONGEST_HELD = 20


def printable(text: str) -> str:
    """Text without characters that a terminal obeys, such as escape sequences; tabs are spaces."""
    return "".join(
        c
        for c in text.expandtabs(4)
        if c == "\n" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI)
    )


class WordWrap:
    """Writes an answer piece by piece in lines of at most ``width`` cells; no word is broken."""

    def __init__(self, out: IO[str], width: int) -> None:
        self._out = out
        self._width = max(width, 20)
        self._column = 0
        self._word = ""

    def feed(self, text: str) -> None:
        for character in printable(text):
            if character not in " \n":
                self._word += character
                if cell_len(self._word) < _LONGEST_HELD:
                    continue
            self._end_word()
            if character == "\n" or (character == " " and self._column < self._width - 1):
                self._write(character)
            elif character == " ":
                self._column = self._width  # the end of the line takes the place of the space
        self._out.flush()

    def end(self) -> None:
        self._end_word()
        if self._column:
            self._write("\n")
        self._out.flush()

    def _end_word(self) -> None:
        if self._column and self._column + cell_len(self._word) > self._width and self._word:
            self._write("\n")
        self._write(self._word)
        self._word = ""

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._column = 0 if text == "\n" else self._column + cell_len(text)


class Screen:
    """Writes to ``console``. All text passes through :func:`printable`: much is other people's."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, text: str, style: str = "") -> None:
        self.console.print(Text(printable(text), style=style))

    def note(self, text: str) -> None:
        self.line(text, "dim")

    def error(self, message: str) -> None:
        text = printable(" ".join(message.split()))
        self.console.print(Text(f"error: {text}", style="red"), soft_wrap=True)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        if not rows:
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        last = len(rows[0]) - 1
        for column in range(last + 1):
            table.add_column(style="" if column else "cyan", no_wrap=column != last)
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print(table)

    def waiting(self, reason: str) -> Status | AbstractContextManager[None]:
        if not self.console.is_terminal:
            return nullcontext()
        return self.console.status(Text(reason, style="dim"), spinner="dots")

    def answer(self, events: Generator[wire.ChatEvent, None, None]) -> None:
        """Show an answer while it comes, and close ``events`` at any end."""
        start = time.monotonic()
        text = WordWrap(self.console.file, self.console.width)
        whole: wire.ChatResponse | None = None
        thinks = False
        with closing(events), ExitStack() as before:
            status = before.enter_context(self.waiting("answering"))
            try:
                for event in events:
                    if isinstance(event, wire.Progress):
                        if status is not None:
                            status.update(Text(describe.progress(event), style="dim"))
                        continue
                    before.close()
                    if isinstance(event, wire.DeltaEvent):
                        if event.reasoning_content and not thinks:
                            thinks = True
                            self.note("thinking")
                        text.feed(event.text)
                    elif isinstance(event, wire.ChatResponse):
                        whole = event
                        text.feed(describe.UNSURE * bool(event.unsure))
            finally:
                text.end()
        if whole is None:
            return
        self.note(describe.usage(whole.usage, time.monotonic() - start))
        if left_out := describe.left_out(whole.usage):
            self.note(f"(answered {left_out}: the whole conversation does not fit)")
        for sent in whole.usage.pages_sent:
            self.note(printable(sent))
        if whole.finish_reason == "length":
            tokens = describe.count(whole.usage.completion_tokens, "token")
            self.note(f"stopped at the limit of {tokens}; /set max_tokens N raises it")

    def medium(self, number: int, stored: wire.MediaObject) -> None:
        found = "" if stored.report is None else printable(describe.in_short(stored.report))
        name = (printable(stored.name), "bold")
        shown = ((f"{number} ", "dim"), (f"{stored.kind} ", "cyan"), name, f"  {found}")
        self.console.print(Text.assemble(*shown))
        for cut in () if stored.report is None else stored.report.cut:
            self.line(f"  {cut}", "yellow")

    def conversations(self, found: Sequence[wire.ConversationSummary], current: str | None) -> None:
        room = max(self.console.width - 24, 20)
        rows = []
        for number, summary in enumerate(found, 1):
            title = Text(" ".join(printable(summary.title).split()))
            title.truncate(room, overflow="ellipsis")
            here = " (archived)" if summary.archived else ""
            here += " (this one)" if summary.id == current else ""
            when = describe.age(time.time() - summary.updated_at)
            rows.append((str(number), when, f"{title.plain}{here}"))
        self.table(rows)

    def transcript(self, conversation: wire.ConversationObject) -> None:
        self.line(conversation.title, "bold")
        left_out = len(conversation.turns) - SHOWN_TURNS
        if left_out > 0:
            self.note(f"({describe.count(left_out, 'earlier turn')}; /save writes them all)")
        for turn in conversation.turns[-SHOWN_TURNS:]:
            for medium in turn.media:
                self.note(f"[{medium.kind} {medium.name}]")
            self.line(f"> {turn.message}", "cyan")
            broke_off = describe.BROKEN_OFF if turn.answer else "(not answered)"
            ends = {"cancelled": " (stopped)", "unanswered": broke_off}
            unsure = describe.UNSURE * bool(turn.unsure)
            self.line(turn.answer + ends.get(turn.finish_reason, "") + unsure)


def preview(medium: Medium, columns: int) -> list[Segments | Text]:
    """A medium to look at, at most ``columns`` cells wide."""
    width = min(columns, MAX_COLUMNS)
    if isinstance(medium, Audio):
        return [waveform(medium.samples, width)]
    if isinstance(medium, Depth):
        words = Text(f"{distances(medium)}; bright is near", style="dim")
        return [_blocks(fitted(depth_pixels(medium.values), width)), words]
    if isinstance(medium, Video):
        n_frames = min(N_FRAMES, len(medium.frames))
        picked = np.linspace(0, len(medium.frames) - 1, n_frames).round().astype(int)
        each = (columns - N_FRAMES) // N_FRAMES
        frames = [fitted(medium.frames[n], max(1, min(each, width))) for n in picked]
        gap = np.zeros((len(frames[0]), 1, 3), np.uint8)
        strip = [piece for frame in frames for piece in (frame, gap)]
        shown: list[Segments | Text] = [_blocks(np.concatenate(strip[:-1], axis=1))]
        if medium.audio is not None:
            shown.append(waveform(medium.audio.samples, frames[0].shape[1] * len(frames)))
        return shown
    if isinstance(medium, Pages):
        if not medium.pages:
            text = printable(medium.report.written[0].text if medium.report.written else "")
            return [Text("\n".join(line[:width] for line in text.splitlines()[:4]), style="dim")]
        medium = medium.pages[0]
    return [_blocks(fitted(medium.pixels, width))]


def _blocks(pixels: Pixels) -> Segments:
    """Pixels (H, W, 3) as cells of a terminal: the upper half block over a background."""
    rows = pixels.tolist()
    cells = []
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for top, bottom in zip(upper, lower, strict=True):
            style = Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom))
            cells.append(Segment("▀", style))
        cells.append(Segment.line())
    return Segments(cells)


def fitted(pixels: Pixels, columns: int) -> Pixels:
    """Scaled to at most ``columns`` wide and MAX_ROWS cells high; an even number of rows."""
    height, width = pixels.shape[:2]
    scale = min(columns / width, 2 * MAX_ROWS / height)
    size = max(1, round(width * scale)), max(2, round(height * scale / 2) * 2)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX), np.uint8)


def waveform(samples: NDArray[np.float32], columns: int) -> Text:
    """A line of bars for samples (n,), each as high as the loudest sample of its part."""
    parts = np.array_split(np.abs(samples), columns)
    peaks = np.array([part.max() if len(part) else 0.0 for part in parts])
    loudest = peaks.max(initial=0.0)
    heights = np.ceil(peaks / loudest * (len(_BARS) - 1)) if loudest > 0 else peaks
    return Text("".join(_BARS[int(height)] for height in heights), style="cyan")
