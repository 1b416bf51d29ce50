"""The report of a build: every reason, amount and stage, and texts that would be markup."""

import re
from pathlib import Path

import numpy as np
import pytest

from mico_corpus.looking.report import write_report
from mico_corpus.looking.summary import SAMPLED, Spread
from mico_corpus.rows import CLIP, INDEX, REASONS
from tests.mico_corpus.made import HOSTILE, build, clip_row, write_rows


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = build(tmp_path_factory.mktemp("report"))
    write_report(output)
    return output


@pytest.fixture(scope="module")
def text(output: Path) -> str:
    return (output / "build" / "report.md").read_text()


def rows_of(text: str, title: str) -> list[list[str]]:
    """The cells of the table below a title, without its head."""
    lines = text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[2:]]


def test_what_went_in_and_came_out(text: str) -> None:
    assert "7 files were given; 7 have been looked at, with 1.5 minutes of video." in text
    assert "15 clips were cut from them; 13 of these were chosen." in text
    assert "12 clips are in 3 shards: 1.2 minutes." in text
    assert "Not finished" not in text


def test_each_reason_has_its_count_its_meaning_and_examples(text: str) -> None:
    files = {row[0]: row[1:] for row in rows_of(text, "Files without clips")}
    assert files["broken"][:2] == ["1", REASONS["broken"]]
    assert files["broken"][2] == r"cut \| short.mp4: moov atom not found"
    clips = {row[0]: row[1:] for row in rows_of(text, "Clips left out")}
    assert {name: row[0] for name, row in clips.items()} == {
        "dark": "1",
        "duplicate": "1",
        "unsafe": "1",
    }
    assert "films 4.mp4, 12.0 to 18.0 s: 0.93 by nudity" in clips["unsafe"][2]


def test_annotators_sources_and_stages(text: str) -> None:
    annotators = {(row[0], row[2], row[3]): row for row in rows_of(text, "Annotators")}
    assert annotators["whisper", "speech", "audio"][5:] == ["9", "9", "0.80"]
    assert annotators["rooms", "depth", "image"][4:] == ["-", "12", "12", "-"]
    sources = {tuple(row[:2]): row[2:] for row in rows_of(text, "By source and licence")}
    assert sources["phones", "CC0-1.0"] == ["2", "0.01", "6", "0.01"]
    stages = {row[0]: row[1:] for row in rows_of(text, "How long it took")}
    assert stages["mini"] == ["12", "6.0", "0.500", "2.00"]
    assert stages["reading and cutting"][0] == "7"


def test_texts_are_never_markup(output: Path, text: str) -> None:
    page = (output / "build" / "report.html").read_text()
    for written in (text, page):
        assert "<script" not in written
        assert "<img src=x" not in written
        assert "<b>empty" not in written
        assert "&lt;script&gt;alert(1)" in written
    assert HOSTILE not in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.partition("base64,")[0], "nothing is fetched from anywhere"


def test_a_build_that_has_not_ended_says_so(tmp_path: Path) -> None:
    rows = [clip_row(number, tmp_path) for number in range(4)]
    write_rows(tmp_path / "build" / "clips.parquet", CLIP, rows)
    done = {"annotations": [], "stages": [], "shard": "a.tar", "files": []}
    write_rows(tmp_path / "build" / "index" / "0.parquet", INDEX, [rows[0] | done])
    write_report(tmp_path)
    text = (tmp_path / "build" / "report.md").read_text()
    assert "Not finished: 3 chosen clips have not been annotated yet." in text
    write_report(tmp_path / "empty")
    assert "Nothing failed." in (tmp_path / "empty" / "build" / "report.md").read_text()


def test_a_histogram_is_drawn_from_values_of_the_whole_column() -> None:
    spread = Spread()
    for first in range(0, 1_000_000, 70_000):
        spread.add(np.arange(first, min(first + 70_000, 1_000_000), dtype=np.float64))
    spread.add(np.array([np.nan, np.inf]))
    assert SAMPLED <= len(spread.values) <= 2 * SAMPLED
    assert spread.count == 1_000_000
    assert spread.mean == pytest.approx(499_999.5)
    steps = np.diff(spread.values)
    assert (steps == steps[0]).all(), "the kept values are evenly spread"
