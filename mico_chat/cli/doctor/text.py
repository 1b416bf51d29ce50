"""The report as text: aligned, wrapped, in colour on a terminal, in ASCII where that is all."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from mico_chat.cli.doctor.finding import Finding, Mark, Report

_SIGNS: dict[Mark, str] = {"ok": "✓", "note": "·", "warning": "!", "problem": "✗"}
_ASCII: dict[Mark, str] = {"ok": "+", "note": "-", "warning": "!", "problem": "x"}
_COLOURS: dict[Mark, str] = {"ok": "32", "note": "2", "warning": "33", "problem": "31"}

_NARROWEST = 60
_WIDEST = 100
_NO_TERMINAL = 100


@dataclass(frozen=True)
class Style:
    """How a stream can be written to."""

    unicode: bool
    colour: bool
    width: int

    @classmethod
    def of(cls, stream: TextIO) -> Style:
        """By the stream's encoding, whether it is a terminal, and ``NO_COLOR``."""
        try:
            "".join((*_SIGNS.values(), "→", "é")).encode(stream.encoding or "ascii")
            unicode = True
        except (UnicodeEncodeError, LookupError):
            unicode = False
        terminal = stream.isatty()
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        width = shutil.get_terminal_size((_NO_TERMINAL, 24)).columns if terminal else _NO_TERMINAL
        return cls(unicode, terminal and not plain, max(_NARROWEST, min(width, _WIDEST)))


def render(report: Report, style: Style) -> str:
    """The whole report, without a newline at its end."""
    names = max((len(finding.name) for finding in report.findings), default=0)
    lines = []
    for section in report.sections:
        lines += [_bold(section.title, style)]
        for finding in section.findings:
            lines += _finding(finding, names, style)
        lines += [""]
    text = "\n".join([*lines, *_summary(report, style)])
    return text if style.unicode else text.encode("ascii", "replace").decode()


def _finding(finding: Finding, names: int, style: Style) -> Iterator[str]:
    sign = (_SIGNS if style.unicode else _ASCII)[finding.mark]
    before = 2 + len(sign) + 1 + names + 2
    text = textwrap.wrap(finding.text, max(20, style.width - before), break_on_hyphens=False)
    yield (
        f"  {_coloured(sign, finding.mark, style)} {finding.name.ljust(names)}  "
        f"{text[0] if text else ''}"
    ).rstrip()
    for line in text[1:]:
        yield " " * before + line
    for row in _table(finding.rows):
        yield " " * before + row
    if finding.mend is not None:
        arrow = "→" if style.unicode else "->"
        # In one piece, to be copied.
        yield " " * before + f"{arrow} {finding.mend}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join(cells).rstrip()


def _summary(report: Report, style: Style) -> Iterator[str]:
    marks: tuple[Mark, ...] = ("problem", "warning")
    said = {mark: _counted(report.marked(mark), mark) for mark in marks}
    if said["problem"]:
        yield _coloured(said["problem"], "problem", style)
    else:
        here = f"works here with the engine {report.engine}"
        text = f"{report.model} {'is not on this machine yet' if report.engine is None else here}."
        yield _coloured(text, "note" if report.engine is None else "ok", style)
    if said["warning"]:
        yield _coloured(said["warning"], "warning", style)


def _counted(findings: Sequence[Finding], mark: str) -> str:
    """``"2 problems: llamacpp, fit."``, or nothing."""
    if not findings:
        return ""
    names = ", ".join(dict.fromkeys(finding.name for finding in findings))
    return f"{len(findings)} {mark}{'s' * (len(findings) > 1)}: {names}."


def _coloured(text: str, mark: Mark, style: Style) -> str:
    return f"\x1b[{_COLOURS[mark]}m{text}\x1b[0m" if style.colour else text


def _bold(text: str, style: Style) -> str:
    return f"\x1b[1m{text}\x1b[0m" if style.colour else text
