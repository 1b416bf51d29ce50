"""What the data engine costs for VAST-27M, on paper.

``python -m benchmarks.data_cost SHARDS --output benchmarks/results`` takes the seconds that each
stage took on this machine from the tables of a finished build, and works out hours and money for
another number of clips. What needs a GPU is worked out from the model's FLOPs and bytes instead.
Nothing here was run on a GPU. Prices change: give yours.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.systems import machine, publish, table
from mico_chat.errors import ConfigError
from mico_corpus.looking.summary import CUTTING, Summary, summarize
from mico_corpus.places import Place
from mico_training.estimate import GPUS, REACHED

CLIPS = 27_000_000
CLIP_SECONDS = 13.4
"""The mean clip of HD-VILA-100M, from which VAST-27M was taken (371,500 hours, 100 M clips)."""
PER_SECOND = (CUTTING, "speech", "pack")
"""Stages whose time grows with a clip's length; the others take a fixed number of frames."""
AT_ONCE = 64
"""Clips that a language model writes about at once: they share one reading of the weights."""
BANDWIDTH = {"l4": 0.3e12, "a100-80gb": 2.04e12, "h100-80gb": 3.35e12}
"""Bytes a second of the memory, as the maker states them."""
CPU_PRICE, STORAGE_PRICE = 0.05, 0.023
GPU_PRICES = "l4=0.80,a100-80gb=2.70,h100-80gb=6.90"
"""In US $, of a core and of each GPU for an hour, and of 1 GB for a month: round ones of clouds."""


@dataclass(frozen=True)
class OnGpu:
    """``active``: parameters that one token meets; ``read``: those that a step reads with many
    clips at once. ``seen`` tokens go in for a clip, ``written`` come out."""

    stage: str
    model: str
    active: float
    read: float
    seen: int
    written: int

    def seconds(self, gpu: str) -> float:
        """Of one clip: its tokens at 40 % of the FLOP/s, and its share of each step's reading."""
        prompt = 2 * self.active * self.seen / (REACHED * GPUS[gpu][0])
        return prompt + self.written * 2 * self.read / (BANDWIDTH[gpu] * AT_ONCE)


MODELS = (
    OnGpu("caption, 8 frames", "Qwen3-VL-8B", 8.2e9, 8.2e9, 8 * 256 + 40, 60),
    OnGpu("caption, sound", "Qwen3-Omni-30B-A3B", 3.3e9, 30e9, 13 * 14 + 40, 60),
    OnGpu("fuse", "Qwen3-8B", 8.2e9, 8.2e9, 400, 60),
    OnGpu("depth, 518 x 518", "Depth Anything V2 small", 25e6, 0, 37 * 37, 0),
    OnGpu("safety, 4 frames", "ViT-B/16", 86e6, 0, 4 * 197, 0),
)
"""Those of ``training/recipes/data-vast.yaml``."""


def per_clip(summary: Summary) -> dict[str, float]:
    """Seconds of one core for a clip of ``CLIP_SECONDS``, by stage."""
    watched = sum(amount.seconds for amount in summary.files.values())
    found = {}
    for name, took in summary.stages.items():
        if name == CUTTING:
            found[name] = took.seconds / watched * CLIP_SECONDS
        else:
            longer = CLIP_SECONDS / mean_length(summary) if name in PER_SECOND else 1.0
            found[name] = took.seconds / took.count * longer
    return found


def rows_of(
    seconds: dict[str, float], clips: int, price: float, unit: str
) -> tuple[list[list[str]], float]:
    rows, whole = [], 0.0
    for name, one in seconds.items():
        hours = one * clips / 3600
        whole += hours
        rows.append([name, f"{one * 1000:,.1f}", f"{hours:,.0f}", f"{hours * price:,.0f}"])
    rows.append([f"**all, in {unit}**", "", f"**{whole:,.0f}**", f"**{whole * price:,.0f}**"])
    return rows, whole


def main(
    shards: str,
    output: Path | None = None,
    clips: int = CLIPS,
    cpu_price: Annotated[float, typer.Option(help="Of one core for an hour, in US $.")] = CPU_PRICE,
    gpu_prices: Annotated[
        str, typer.Option(help="Of one GPU for an hour: l4=0.8,...")
    ] = GPU_PRICES,
    storage_price: Annotated[
        float, typer.Option(help="Of 1 GB for a month, in US $.")
    ] = STORAGE_PRICE,
    days: float = 7.0,
) -> None:
    place = Place(shards)
    summary = summarize(place)
    stored = sum(path.stat().st_size for path in Path(shards).glob("*.tar"))
    kept = sum(amount.count for amount in summary.written.values())
    measured = per_clip(summary)
    by_model: dict[str, float] = {
        name: measured.pop(name) for name in ("caption", "tags", "depth") if name in measured
    }
    cells, cores = rows_of(measured, clips, cpu_price, "hours of a core")
    title = ["stage", "ms a clip", "hours", "US $"]
    parts = [
        f"# Data for {clips / 1e6:g} million clips, on paper\n",
        f"{datetime.now(UTC):%Y-%m-%d}, {machine('av')}. Made by `python -m benchmarks.data_cost "
        f"SHARDS` from the tables of a build of {summary.sources} files with {kept} clips. A clip "
        f"has {CLIP_SECONDS} s. Prices are round ones of a cloud's machines on demand, and "
        "options of the command.\n",
        "## Processors\n",
        f"Measured on one core of this machine; US $ {cpu_price:g} an hour. {named(by_model)}\n",
        table(title, cells) + "\n",
        f"In {days:g} days: {cores / (24 * days):,.0f} cores.\n",
        "## GPUs\n",
        "Worked out, not measured. Seconds of a clip = 2 x parameters x tokens in / "
        f"({REACHED:g} x FLOP/s) + tokens out x 2 bytes x parameters read / (bytes a second x "
        f"{AT_ONCE} clips at once).\n",
    ]
    for gpu, price in prices_of(gpu_prices).items():
        seconds = {f"{one.stage}: {one.model}": one.seconds(gpu) for one in MODELS}
        found, whole = rows_of(seconds, clips, price, "hours of a GPU")
        parts += [
            f"### {gpu}, US $ {price:g} an hour\n",
            table(title, found) + "\n",
            f"In {days:g} days: {whole / (24 * days):,.0f} of them.\n",
        ]
    size = stored / kept * clips * CLIP_SECONDS / mean_length(summary)
    parts += [
        "## Storage\n",
        f"{stored / kept / 1e6:.2f} MB a clip of {mean_length(summary):.1f} s here; "
        f"{size / 1e12:,.1f} TB in all, US $ {size / 1e9 * storage_price:,.0f} a month.\n",
    ]
    publish("\n".join(parts), "data-cost.md", output)


def mean_length(summary: Summary) -> float:
    written = summary.written.values()
    return sum(one.seconds for one in written) / sum(one.count for one in written)


def named(left_out: dict[str, float]) -> str:
    if not left_out:
        return ""
    told = ", ".join(f"{name} {1000 * seconds:,.0f} ms" for name, seconds in left_out.items())
    return f"The mini's own stages are left out ({told} a clip): GPUs do them here."


def prices_of(text: str) -> dict[str, float]:
    """The price of each GPU in ``l4=0.8,h100-80gb=6.9``."""
    found = {}
    for one in text.split(","):
        gpu, _, price = one.partition("=")
        if gpu not in BANDWIDTH:
            raise ConfigError(f"gpu_prices: {gpu!r} is none of the GPUs {', '.join(BANDWIDTH)}")
        try:
            found[gpu] = float(price)
        except ValueError:
            found[gpu] = 0.0
        if not 0 < found[gpu] < math.inf:
            raise ConfigError(f"gpu_prices: {one!r}: write it as {gpu}=0.8, in US $")
    return found


if __name__ == "__main__":
    typer.run(main)
