"""One harness runs each benchmark: its options, its turns, its document, and another checkout."""

import inspect
import json
import random
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from jinja2 import Environment, meta

from benchmarks import harness
from benchmarks.__main__ import NAMES
from benchmarks.engines import race, speed
from benchmarks.harness import Panel, Ratio, Report, medians, parser_of, run, turns
from mico_chat.errors import ConfigError

TEMPLATES = yaml.safe_load(Path(harness.__file__).with_name("reports.yaml").read_text("utf-8"))
DOCUMENT = {"title": "Walls of {{ n }}", "packages": ["numpy"], "about": "", "text": "{{ rows }}"}


@pytest.fixture
def templates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml, "safe_load", lambda _: {"walls": DOCUMENT, "roof": DOCUMENT})


def walls(
    place: Path, n: int = 2, names: Annotated[list[str] | None, "of walls"] = None
) -> Iterator[Report]:
    """Measures walls."""
    if not n:
        raise ConfigError("no walls")
    panel = Panel("n", "m", {"a": ([1, 2, 4], [1.0, 2.0, 4.0])}, log="2y", fit=True, level=3.0)
    ratio = Ratio.beside_of("height", 2.0, "m", "a door", 4.0, 1.0)
    yield Report({"rows": f"{place} {names}"}, [ratio], {"walls": [panel]})
    yield Report({"rows": "more"}, part="roof", file="walls")


def test_options_document_ratios_and_pictures(
    templates: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["here", "--names", "a", "b", "--n", "3", "--names", "c"]
    run("walls", walls, [*words, "--output", str(tmp_path)])
    shown, text = capsys.readouterr().out, (tmp_path / "walls.md").read_text()
    command = f"`python -m benchmarks walls {' '.join(words)}`"
    assert text.startswith("# Walls of 3\n\n")
    assert text.splitlines()[2].endswith(f"Made by {command}.")
    assert text.endswith("\n\nhere ['a', 'b', 'c']\n\nmore\n"), "reports with one file share it"
    assert "height: 0.5, falls short ≥ 1" in shown
    (kept,) = (tmp_path / "ratios").iterdir()
    assert json.loads(kept.read_bytes())["report"] == "walls.md"
    assert (tmp_path / "walls.png").read_bytes()[1:4] == b"PNG"


def test_nothing_is_written_without_a_folder(
    templates: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("walls", walls, ["here"])
    assert not list(tmp_path.iterdir())


def test_an_error_ends_in_one_line() -> None:
    with pytest.raises(SystemExit, match="error: no walls"):
        run("walls", walls, ["here", "--n", "0"])


@pytest.mark.parametrize(
    ("value", "at_most", "holds"),
    [(1, True, True), (3, True, False), (1, False, False), (3, 0, True)],
)
def test_a_goal_is_a_lower_or_an_upper_bound(value: float, at_most: bool, holds: bool) -> None:
    ratio = Ratio(measure="height", value=value, unit="m", goal=2, at_most=at_most)
    assert ratio.holds is holds


def test_one_slow_turn_does_not_move_the_figure() -> None:
    assert medians({"a": [1.0, 2.0, 99.0]}) == {"a": 2.0}


def test_all_ways_have_turns_in_an_order_that_is_drawn() -> None:
    order: list[str] = []

    def asked(name: str) -> float:
        order.append(name)
        return len(order)

    ways = {name: partial(asked, name) for name in "abc"}
    found = turns(ways, 3, warm=2, rng=random.Random(0))
    assert [sorted(order[at : at + 3]) for at in range(0, 15, 3)] == [["a", "b", "c"]] * 5
    assert len({tuple(order[at : at + 3]) for at in range(0, 15, 3)}) > 1
    assert sorted(value for values in found.values() for value in values) == list(range(7, 16))


def test_another_checkout_is_measured_in_turns_by_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one has a module for each benchmark instead of the harness."""
    asked = []

    def elsewhere(command: list[str], *, cwd: Path, **_: Any) -> None:
        asked.append((cwd, command[2:-2]))
        value = 2.0 if cwd == tmp_path else 3.0
        ratio = Ratio.beside_of("height", value + len(asked), "m", "a door", 4.0)
        harness.keep("walls", [ratio], Path(command[-1]), "walls.md")

    monkeypatch.setattr(subprocess, "run", elsewhere)
    text = harness.beside("open-walls", ["--n", "3"], tmp_path, 2)
    here = Path(harness.__file__).parents[1]
    assert [cwd for cwd, _ in asked] == [here, tmp_path, tmp_path, here]
    assert asked[0][1] == ["benchmarks", "open-walls", "--n", "3"]
    assert asked[1][1] == ["benchmarks.open_walls", "--n", "3"]
    assert "| height | m | 5.5 (4 to 7) | 4.5 (4 to 5) | 1.222 |" in text
    assert "| height | of a door |" in text


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_has_its_options_and_document(name: str) -> None:
    module, _, function = NAMES[name].partition(":")
    measure = getattr(import_module(module), function)
    parser_of(name, measure)
    parts = (
        import_module(module).SECTIONS if name == "race" else {} if name == "summary" else [name]
    )
    code = inspect.getsource(import_module(module))
    for part in parts:
        template = TEMPLATES[part]
        environment = Environment()
        environment.filters["f"] = format
        whole = "\n".join(template.get(key, "") for key in ("title", "about", "text"))
        needed = meta.find_undeclared_variables(environment.parse(whole)) - {"table"}
        assert needed, part
        if name != "race":
            known = set(inspect.signature(measure).parameters)
            assert {one for one in needed - known if f'"{one}"' not in code} == set(), part


def test_speed_before_and_after_stands_beside_goal_and_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both checkouts take turns; medians of both, and how far the new figure is from the limit."""
    (tmp_path / "benchmarks").mkdir()
    asked: list[tuple[Path, str, list[str]]] = []
    rates = {tmp_path: iter([50.0, 10.0, 60.0]), speed.HERE: iter([100.0, 110.0, 500.0])}

    def run_in(checkout: Path, name: str, arguments: list[str]) -> list[Ratio]:
        asked.append((checkout, name, arguments))
        rate, new = next(rates[checkout]), checkout == speed.HERE
        own = Ratio.beside_of("decode", rate, "tokens/s", "a loop", 100.0, 1.0)
        wait = Ratio.bound("wait", 1000 / rate, "ms", 5.0)
        if not new:  # a checkout from before there were limits, with a row that is no more
            return [own, wait, wait.model_copy(update={"measure": "gone"})]
        limits = {"decode": 220.0, "wait": 1000 / 220}
        return [one.model_copy(update={"limit": limits[one.measure]}) for one in (own, wait)]

    monkeypatch.setattr(speed, "in_checkout", run_in)
    report = speed.measure(tmp_path, only=["decoding"], repeats=2)
    assert [checkout for checkout, _, _ in asked] == [
        *(tmp_path, speed.HERE, speed.HERE, tmp_path, tmp_path, speed.HERE)
    ]
    assert asked[0][1] == "race"
    assert asked[0][2][:2] == ["--only", "decoding"]
    assert asked[0][2][-2:] == ["--repeats", "2"]
    decode, wait, gone = report.values["rows"]
    assert decode[2:5] == ["50", "110", "2.20"]
    assert decode[5:] == ["1.10 of a loop", "≥ 1 holds", "220", "50%"]
    assert wait[2:5] == ["20", "9.091", "0.45"]
    assert wait[6:] == ["≤ 5 **falls short**", "4.545", "50%"], "less is better"
    assert gone[2:5] == ["20", "", ""]
    with pytest.raises(ConfigError, match="the parts are decoding"):
        speed.measure(tmp_path, only=["walls"])
    with pytest.raises(ConfigError, match="no checkout of this project"):
        speed.measure(tmp_path / "none")


def test_a_limit_is_the_slower_of_reading_and_multiplying() -> None:
    """A machine that reads 100 steps a second and multiplies 1,000 tokens."""
    machine = {"size": 1.0, "bandwidth": 100.0, "flops": 1.0, "half": 1000.0}
    free = {"attention": 0.0, "picture": 1000.0, "picture_tokens": 0}
    found = race.ideals(machine | free)
    assert found["decode of one stream"] == pytest.approx(100)
    assert found["prompt of 300 tokens"] == pytest.approx(1000)
    assert found[race.LONG_PROMPT] == pytest.approx(1000)
    assert found["8 streams of 64 + 64 tokens"] == pytest.approx(512 / (0.512 + 0.64))
    assert found["16 pictures at once"] == pytest.approx(512 / (16 + 32 * 0.016))
    slow = race.ideals(machine | free | {"attention": 2 / race.LONG})
    assert slow[race.LONG_PROMPT] == pytest.approx(500)
