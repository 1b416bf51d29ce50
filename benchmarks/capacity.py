"""What MiCo-Chat-7B costs to serve, worked out from its bytes and FLOPs; docs/capacity.md explains.

``python -m benchmarks.capacity --output benchmarks/results`` counts the model's parameters and
FLOPs on torch's meta device, measures on this machine what the service costs beside the GPU, and
simulates the queue of a replica on each card. ``--set peak=3`` changes an assumption. Nothing here
runs on a GPU.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure

from benchmarks import capacity_tables as tables
from benchmarks.assumptions import Assumptions
from benchmarks.fleet import Capacity, measured
from benchmarks.queueing import run_at
from benchmarks.systems import machine, publish, table
from mico_chat.errors import ConfigError


def report(found: Capacity) -> str:
    given, parts = found.given, [
        "# MiCo-Chat-7B on cards, on paper\n",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine('torch', 'av', 'numpy')}. Made by `python -m "
        "benchmarks.capacity`, which counts, measures and simulates. **Nothing here was run on a "
        "GPU.** [docs/capacity.md](../../docs/capacity.md) explains the figures.\n",
    ]  # fmt: skip
    fields = type(given).model_fields.items()
    values = {name: getattr(given, name) for name in type(given).model_fields}
    shown = {n: v if isinstance(v, str) else f"{v:,}".removesuffix(".0") for n, v in values.items()}
    rows = [[f"`{name}`", shown[name], field.description or ""] for name, field in fields]
    sections = [
        ("Assumed", ["assumption", "value", "where it comes from"], rows),
        ("Counted", tables.FORMULA, tables.counted(found)),
        ("Measured on this machine", tables.FORMULA, tables.service(found)),
        ("A medium on each card", *tables.media(found)),
        ("One replica", *tables.cards(found)),
        ("Money", *tables.money(found)),
        ("The queue", *tables.queue(given)),
        ("What is shown or said again", *tables.again(found)),
        ("A day", *tables.days(found)),
        (f"{given.users:,.0f} users a day: replicas", *tables.needed(found)),
        (f"{given.users:,.0f} users a day: beside them", tables.FORMULA, tables.beside(found)),
    ]
    for title, head, cells in sections:
        parts += [f"## {title}\n", table(head, cells) + "\n"]
    return "\n".join(parts)


def plot(found: Capacity) -> Figure:
    """Both limited times against the rate, by card."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for one in tables.serving(found):
        rates = one.rate * np.linspace(0.1, 1.15, 8)
        runs = (run_at(one.card, one.traffic, rate, found.given.seed, 6000) for rate in rates)
        times = [run.p99() for run in runs]
        for axes, seconds in zip((left, right), zip(*times, strict=True), strict=True):
            axes.plot(rates, seconds, marker=".", label=one.name)
    for axes, limit, what in (
        (left, found.given.first, "first token"),
        (right, found.given.token, "between tokens"),
    ):
        axes.axhline(limit, color="0.5", linestyle="--")
        axes.set(
            xlabel="answers/s of a replica",
            ylabel=f"{what}, s, 99 of 100",
            xscale="log",
            yscale="log",
        )
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    return figure


def main(
    output: Path | None = None,
    database_url: Annotated[
        str | None, typer.Option(help="An empty PostgreSQL database; otherwise SQLite.")
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option("--set", help="An assumption: name=value.")
    ] = None,
) -> None:
    try:
        found = measured(database_url, Assumptions.read(assume or []))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    publish(report(found), "capacity.md", output)
    if output is not None:
        plot(found).savefig(output / "capacity.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
