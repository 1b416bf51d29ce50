"""The harness of all benchmarks: arguments, turns, medians, reports, and ratios against goals.

A benchmark is a function with typed options that returns a :class:`Report`, or yields several. The
options become its command line. The harness adds ``--output`` and ``--beside``.
"""

import argparse
import inspect
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, get_args, get_origin

import jinja2
import yaml
from matplotlib.axes import Axes
from pydantic import BaseModel, ConfigDict, ValidationError

from mico_chat.engine.cpu import processor, usable_cores
from mico_chat.errors import ConfigError
from mico_training.records import panels

FOLDER = "ratios"
RACE = "race"
"""The benchmark that runs when no name is given."""
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


# --- what a benchmark finds -----------------------------------------------------------------------


class Ratio(BaseModel):
    """A figure of ours, alone or beside another system's; the goal is of the ratio if it has one.

    ``at_most``: the goal is an upper bound. ``limit``: the machine allows no better value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    measure: str
    value: float
    unit: str
    beside: str = ""
    ratio: float | None = None
    goal: float | None = None
    at_most: bool = False
    limit: float | None = None

    @classmethod
    def beside_of(
        cls, measure: str, value: float, unit: str, beside: str, other: float,
        goal: float | None = None, *, at_most: bool = False,
    ) -> Self:  # fmt: skip
        """Our ``value`` over the ``other``, which is that of ``beside``."""
        given = {"measure": measure, "value": value, "unit": unit, "beside": beside}
        return cls(**given, ratio=value / other, goal=goal, at_most=at_most)

    @classmethod
    def bound(cls, measure: str, value: float, unit: str, goal: float) -> Self:
        """Our ``value`` alone, which may be at most the goal."""
        return cls(measure=measure, value=value, unit=unit, goal=goal, at_most=True)

    @property
    def figure(self) -> float:
        return self.value if self.ratio is None else self.ratio

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached, to two places; None: it has no goal."""
        if self.goal is None:
            return None
        figure = round(self.figure, 2)
        return figure <= self.goal if self.at_most else figure >= self.goal

    @property
    def wanted(self) -> str:
        return "" if self.goal is None else f"{'≤' if self.at_most else '≥'} {self.goal:g}"


@dataclass(frozen=True)
class Panel:
    """A panel of a picture: lines of points by their labels, and a straight line if ``fit``.

    ``log``: the axes that are logarithmic; "2" stands for x with a tick at each power of two.
    """

    x: str
    y: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    title: str = ""
    log: str = ""
    fit: bool = False
    level: float | None = None

    def draw(self, axes: Axes) -> None:
        for label, (x, y) in self.curves.items():
            axes.plot(x, y, "o" if self.fit else ".-", label=label)
            if self.fit:
                slope, fixed, _ = line(x, y)
                axes.plot(x, [fixed + slope * at for at in x], color="0.6")
        if self.level is not None:
            axes.axhline(self.level, color="0.5", linestyle="--")
        axes.set(xlabel=self.x, ylabel=self.y, title=self.title)
        if "y" in self.log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if "x" in self.log:
            axes.set_xscale("log")
        if "2" in self.log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(x, map(str, x))


@dataclass(frozen=True)
class Report:
    """What a benchmark found: the values of its document, ratios, and the panels of pictures.

    ``part``: the entry of the document in ``reports.yaml``, and the name of the file of ratios;
    ``file``: that of the document. Both are the benchmark's own name where they are not given.
    Reports of one run with the same ``file`` become one document.
    """

    values: Mapping[str, Any]
    ratios: Sequence[Ratio] = ()
    plots: Mapping[str, Sequence[Panel]] = field(default_factory=dict)
    part: str = ""
    file: str = ""


class Kept(BaseModel):
    """The ratios of one run of a benchmark; ``report`` is its Markdown file in the results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    report: str
    date: date
    machine: str
    ratios: list[Ratio]


def keep(
    name: str, ratios: Sequence[Ratio], folder: Path, report: str, packages: Sequence[str] = ()
) -> None:
    """Write ``ratios/NAME.json`` into the folder of results."""
    today = datetime.now(UTC).date()
    kept = Kept(report=report, date=today, machine=machine(*packages), ratios=list(ratios))
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / f"{name}.json").write_text(
        f"{kept.model_dump_json(indent=1, exclude_defaults=True)}\n", encoding="utf-8"
    )


def read(folder: Path) -> list[Kept]:
    """What all benchmarks kept, by the names of their files.

    Raises:
        ConfigError: there is none, or one cannot be read.
    """
    found = []
    for file in sorted((folder / FOLDER).glob("*.json")):
        try:
            found.append(Kept.model_validate_json(file.read_bytes()))
        except ValidationError as error:
            (first, *_) = error.errors()
            where = ".".join(map(str, first["loc"]))
            said = ": ".join(filter(None, (where, first["msg"])))
            raise ConfigError(f"{file}: {said}; run its benchmark again") from error
    if not found:
        raise ConfigError(f"{folder / FOLDER}: no *.json is there; run a benchmark first")
    return found


def machine(*packages: str) -> str:
    import torch  # after the environment of its threads is set

    def named(package: str) -> str:
        try:
            return f", {package} {version(package)}"
        except PackageNotFoundError:  # of a system that was left out
            return f", no {package}"

    versions = "".join(map(named, packages))
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    name = processor()[0]
    return f"{name}, {usable_cores()} cores{card}; Python {platform.python_version()}{versions}"


def table(head: str | Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the titles of its columns in a text are separated by ``|``."""
    titles = head.split("|") if isinstance(head, str) else head
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def write(template: str, values: Mapping[str, Any]) -> str:
    """A Jinja template with its values, each of which must be there."""
    engine = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.filters["f"] = format
    engine.globals["table"] = table
    return engine.from_string(template).render(values).strip()


# --- how it measures ------------------------------------------------------------------------------


def turns(
    ways: Mapping[Key, Callable[[], Value]],
    repeats: int,
    *,
    warm: int = 1,
    rng: random.Random | None = None,
) -> dict[Key, list[Value]]:
    """What each way measures, all ways in turns, whose order ``rng`` draws.

    The first ``warm`` rounds do not count.
    """
    found: dict[Key, list[Value]] = {name: [] for name in ways}
    for number in range(warm + repeats):
        for name in rng.sample(list(ways), len(ways)) if rng else ways:
            value = ways[name]()
            if number >= warm:
                found[name].append(value)
    return found


def medians(found: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The slope of a line through points, its value at 0, and its R²."""
    slope, fixed = statistics.linear_regression(x, y)
    return slope, fixed, statistics.correlation(x, y) ** 2


def core_seconds(work: Callable[[], object]) -> float:
    """Seconds of a core that all threads of this process take; other processes' do not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


# --- how it is run --------------------------------------------------------------------------------


def parser_of(
    name: str, measure: Callable[..., Any], output: Path | None = None
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The command line of a benchmark, and the part of it that all benchmarks have."""
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument(
        "--output", type=Path, default=output, help="folder for documents, ratios and pictures"
    )
    common.add_argument("--beside", type=Path, help="another checkout, which is measured in turns")
    common.add_argument("--rounds", type=int, default=3, help="turns of each checkout")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=measure.__doc__ or sys.modules[measure.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    for one in inspect.signature(measure, eval_str=True).parameters.values():
        if one.name == "output":
            continue
        kind, how = one.annotation, dict[str, Any]()
        if get_origin(kind) is Annotated:
            kind, how["help"] = get_args(kind)
        if get_origin(kind) is UnionType:  # with None
            kind = get_args(kind)[0]
        how["type"] = (*get_args(kind), kind)[0]
        if one.kind is one.VAR_POSITIONAL:
            how["nargs"] = "*"
        elif get_origin(kind) is list:
            how |= {"nargs": "+", "action": "extend"}
        if one.default is one.empty:
            parser.add_argument(one.name, **how)
        else:
            option = f"--{one.name.strip('_').replace('_', '-')}"
            parser.add_argument(option, dest=one.name, default=one.default, **how)
    return parser, common


def run(
    name: str, measure: Callable[..., Any], arguments: Sequence[str], output: Path | None = None
) -> None:
    """Run a benchmark with the arguments of its command line; ``output`` is its default folder."""
    parser, common = parser_of(name, measure, output)
    given = vars(parser.parse_args(arguments))
    shared, own = common.parse_known_args(arguments)
    asked = inspect.signature(measure).parameters
    words = [given.pop(one.name) for one in asked.values() if one.kind is one.VAR_POSITIONAL]
    options = {option: value for option, value in given.items() if option in asked}
    try:
        if shared.beside is not None:
            print(beside(name, own, shared.beside, shared.rounds))
            return
        found = measure(*chain(*words), **options)
        command = " ".join(["python -m benchmarks", *([name] if name != RACE else []), *own])
        reports = [found] if isinstance(found, Report) else found
        publish(reports, name, options, command, shared.output)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def publish(
    reports: Iterable[Report], name: str, options: Mapping[str, Any], command: str, to: Path | None
) -> None:
    """Print documents and verdicts, and write them into a folder if there is one."""
    templates = yaml.safe_load(Path(__file__).with_name("reports.yaml").read_text("utf-8"))
    written: dict[str, list[str]] = defaultdict(list)
    for one in reports:
        part, file = one.part or name, one.file or name
        template, values = templates[part], {**options, **one.values}
        parts, packages = written[file], template["packages"]
        if not parts:
            title, about = (write(template.get(key, ""), values) for key in ("title", "about"))
            where = f"{datetime.now(UTC):%Y-%m-%d}, {machine(*packages)}. Made by `{command}`."
            parts.append(f"# {title}\n\n{where} {about}".rstrip())
            print(f"{parts[0]}\n")
        parts.append(write(template["text"], values))
        print(f"{parts[-1]}\n")
        for ratio in one.ratios:
            marks = {True: "holds", False: "falls short", None: "no goal"}
            print(f"{ratio.measure}: {ratio.figure:.4g}, {marks[ratio.holds]} {ratio.wanted}\n")
        sys.stdout.flush()
        if to is None:
            continue
        to.mkdir(parents=True, exist_ok=True)
        (to / f"{file}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        if one.ratios:
            keep(part, one.ratios, to, f"{file}.md", packages)
        for picture, drawn in one.plots.items():
            with panels(to / f"{picture}.png", len(drawn)) as all_axes:
                for panel, axes in zip(drawn, all_axes, strict=True):
                    panel.draw(axes)


def beside(name: str, arguments: Sequence[str], other: Path, rounds: int) -> str:
    """The medians of each measure here and in another checkout, each with its own code."""
    checkouts = {"here": Path(__file__).parents[1], str(other): other.resolve()}
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for place, checkout in list(checkouts.items())[:: -1 if number % 2 else 1]:
            for one in in_checkout(checkout, name, arguments):
                found[one.measure, one.unit][place].append(one.value)
                if one.ratio is not None:
                    found[one.measure, f"of {one.beside}"][place].append(one.ratio)
    rows = []
    for measure, values in found.items():
        cells = [
            f"{statistics.median(v):.4g} ({min(v):.4g} to {max(v):.4g})" for v in values.values()
        ]
        if len(cells) == len(checkouts):
            ours, theirs = medians(values).values()
            rows.append([*measure, *cells, f"{ours / theirs:.3f}"])
    return table(["measure", "unit", *checkouts, "ratio"], rows)


def in_checkout(checkout: Path, name: str, arguments: Sequence[str]) -> list[Ratio]:
    """The figures of one run of a benchmark in a checkout, with the checkout's own code, and in its
    own environment if it has one."""
    module = ["benchmarks", *([] if name == RACE else [name])]
    if not (checkout / "benchmarks/harness.py").exists():  # from before there was a harness
        module = [".".join(module).replace("-", "_")]
    folders = [checkout, *(checkout / part for part in ("server", "ui", "training"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    with tempfile.TemporaryDirectory() as output:
        own = checkout / ".venv/bin/python"
        python = str(own) if own.is_file() else sys.executable
        command = [python, "-m", *module, *arguments, "--output", output]
        subprocess.run(command, cwd=checkout, env=env, check=True, stdout=sys.stderr)
        return [ratio for kept in read(Path(output)) for ratio in kept.ratios]
