"""The table of all ratios marks what falls short, and names a file that it cannot read."""

import json
from pathlib import Path

import pytest

from benchmarks.harness import Ratio, keep, read
from benchmarks.summary import REASONS, text, write
from mico_chat.errors import ConfigError

ROW = Ratio.beside_of("decode", 90.0, "tokens/s", "a loop", 100.0, 1.0)


def lines_of(*ratios: Ratio, folder: Path, reasons: dict[str, str] | None = None) -> list[str]:
    keep("one", ratios, folder, "one.md")
    return text(read(folder), reasons or {}).splitlines()


def test_a_ratio_under_its_goal_is_marked_and_has_its_reason(tmp_path: Path) -> None:
    lines = lines_of(ROW, folder=tmp_path, reasons={"decode": "Copies take it."})
    (row,) = (line for line in lines if line.startswith("| decode |"))
    assert "| 90 tokens/s | a loop | 0.90 | ≥ 1 | **falls short** |" in row
    assert "* **decode**: 0.9, not ≥ 1. Copies take it." in lines
    assert any("0 of 1 goals hold" in line for line in lines)


def test_without_a_known_reason_the_table_says_so(tmp_path: Path) -> None:
    (line,) = (one for one in lines_of(ROW, folder=tmp_path) if one.startswith("* "))
    assert line.endswith("The reason is not known yet.")


def test_a_figure_that_must_be_small_holds_below_its_goal(tmp_path: Path) -> None:
    small = Ratio(measure="memory", value=38.0, unit="MB", goal=300.0, at_most=True)
    large = small.model_copy(update={"measure": "more", "value": 301.0})
    assert (small.holds, large.holds) == (True, False)
    lines = lines_of(small, large, folder=tmp_path)
    assert any("| ≤ 300 | holds |" in line for line in lines)
    assert "Nothing." not in lines


def test_a_measure_without_a_goal_neither_holds_nor_falls_short(tmp_path: Path) -> None:
    free = Ratio.beside_of("users", 5.0, "tokens/s", "one user", 1.0)
    assert free.holds is None
    lines = lines_of(free, folder=tmp_path)
    assert any("| 5.00 |  | - |" in line for line in lines)
    assert "Nothing." in lines


def test_a_goal_is_held_to_the_two_places_that_are_shown() -> None:
    assert Ratio.beside_of("a", 0.996, "", "b", 1.0, 1.0).holds
    assert not Ratio.beside_of("a", 0.994, "", "b", 1.0, 1.0).holds


def test_each_machine_has_one_number(tmp_path: Path) -> None:
    keep("one", [ROW], tmp_path, "one.md")
    keep("two", [ROW], tmp_path, "two.md")
    keep("three", [ROW], tmp_path, "three.md", ("torch", "numpy"))
    written = text(read(tmp_path), {})
    assert "\n1. " in written
    assert "\n2. " in written
    assert "\n3. " not in written


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Invalid JSON"),
        ("[]", "object"),
        ('{"report": "a.md", "date": "2026-11-28", "machine": "x"}', "ratios"),
        (
            '{"report": "a.md", "date": "2026-11-28", "machine": "x", '
            '"ratios": [{"measure": "m", "unit": "s", "value": "fast"}]}',
            "ratios.0.value",
        ),
        (
            '{"report": "a.md", "date": "2026-11-28", "machine": "x", '
            '"ratios": [{"measure": "m", "unit": "s", "value": NaN}]}',
            "ratios.0.value",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    keep("good", [ROW], tmp_path, "one.md")
    broken = tmp_path / "ratios" / "broken.json"
    broken.write_text(content)
    with pytest.raises(ConfigError, match=said) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{broken}: ")
    assert str(error.value).endswith("run its benchmark again")
    with pytest.raises(ConfigError, match=r"broken\.json"):
        write(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run a benchmark first"):
        read(tmp_path)


def test_the_results_are_in_their_table() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    found = read(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == text(found, REASONS)
    for kept in found:
        assert (folder / kept.report).exists(), kept.report
    measures = [one.measure for kept in found for one in kept.ratios]
    assert len(measures) == len(set(measures))
    assert REASONS.keys() <= set(measures), "a reason for what no benchmark measures"


def test_what_is_kept_is_short(tmp_path: Path) -> None:
    keep("one", [ROW], tmp_path, "one.md")
    (row,) = json.loads((tmp_path / "ratios" / "one.json").read_text())["ratios"]
    assert row["ratio"] == 0.9
    assert "at_most" not in row
