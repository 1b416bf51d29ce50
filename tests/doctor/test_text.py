"""The report's look, and the same for programs."""

from __future__ import annotations

import io
import json
import os
import pty
import re

import pytest

from mico_chat.cli.doctor.finding import Finding, Report, Section
from mico_chat.cli.doctor.text import Style, render

PLAIN = Style(unicode=True, colour=False, width=80)

REPORT = Report(
    "1.2.3",
    "mini",
    "llamacpp",
    [
        Section("One", [Finding("short", "ok", "well"), Finding("much longer", "note", "é")]),
        Section(
            "Two",
            [
                Finding(
                    "fit",
                    "problem",
                    "word " * 30,
                    "mico-chat serve --model a-very-long-name/that-does-not-fit-into-the-line " * 2,
                    {"needed": 5},
                    [("a", "1"), ("bcd", "234")],
                ),
                Finding("x", "warning", "careful"),
            ],
        ),
    ],
)


def test_it_is_aligned_and_wrapped() -> None:
    lines = render(REPORT, PLAIN).splitlines()
    assert lines[:3] == ["One", "  ✓ short        well", "  · much longer  é"]
    assert lines[4].startswith("Two")
    wrapped = [line for line in lines if "word" in line]
    assert len(wrapped) > 1
    assert all(len(line) <= 80 for line in wrapped)
    assert {line.index("word") for line in wrapped} == {17}
    table = lines.index(" " * 17 + "a      1")
    assert lines[table + 1] == " " * 17 + "bcd  234"
    (mend,) = [line for line in lines if "→" in line]  # in one line, to be copied
    assert mend.startswith(" " * 17 + "→ mico-chat serve")
    assert lines[-2:] == ["1 problem: fit.", "1 warning: x."]


def test_plain_ascii() -> None:
    text = render(REPORT, Style(unicode=False, colour=False, width=80))
    assert text.isascii()
    assert "  x fit" in text
    assert "-> mico-chat serve" in text


def test_colours_change_nothing_else() -> None:
    coloured = render(REPORT, Style(unicode=True, colour=True, width=80))
    assert "\x1b[31m✗\x1b[0m fit" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == render(REPORT, PLAIN)


def test_nothing_wrong() -> None:
    report = Report("1", "mini", "llamacpp", [Section("One", [Finding("a", "ok", "b")])])
    assert render(report, PLAIN).endswith("\nmini works here with the engine llamacpp.")
    assert report.exit_code == 0
    absent = Report("1", "someone/something", None, report.sections)
    assert render(absent, PLAIN).endswith("\nsomeone/something is not on this machine yet.")


@pytest.mark.parametrize(
    ("encoding", "unicode"), [("utf-8", True), ("ascii", False), ("latin-1", False)]
)
def test_what_a_stream_can_show(encoding: str, unicode: bool) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert Style.of(stream) == Style(unicode, colour=False, width=100)


def test_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "70")
    parent, child = pty.openpty()
    os.close(parent)
    with open(child, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
        assert Style.of(terminal) == Style(unicode=True, colour=True, width=70)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not Style.of(terminal).colour


def test_for_programs() -> None:
    record = json.loads(json.dumps(REPORT.record()))
    assert (record["ok"], record["model"], record["engine"]) == (False, "mini", "llamacpp")
    (fit, _) = record["findings"]["two"]
    assert (fit["mark"], fit["facts"]) == ("problem", {"needed": 5})
    assert "rows" not in fit
    assert REPORT.exit_code == 1
