"""What the data engine costs for VAST-27M, on paper: hours and money, by stage and by GPU.

It takes the seconds that each stage took on this machine from the tables of a finished build. What
needs a GPU is worked out from the models' FLOPs and bytes. Nothing here was run on a GPU. Prices
change: give yours.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

from benchmarks.capacity import BANDWIDTH, CPU_PRICE, GPU_PRICES, STORAGE_PRICE, prices_of
from benchmarks.harness import Report
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


class OnGpu(NamedTuple):
    """``active``: parameters that one token meets; ``read``: those that a step reads with many
    clips at once. ``seen`` tokens go in for a clip, ``written`` come out."""

    name: str
    active: float
    read: float
    seen: int
    written: int

    def seconds(self, gpu: str) -> float:
        """Of one clip: its tokens at 40 % of the FLOP/s, and its share of each step's reading."""
        prompt = 2 * self.active * self.seen / (REACHED * GPUS[gpu][0])
        return prompt + self.written * 2 * self.read / (BANDWIDTH[gpu] * AT_ONCE)


MODELS = (
    OnGpu("caption, 8 frames: Qwen3-VL-8B", 8.2e9, 8.2e9, 8 * 256 + 40, 60),
    OnGpu("caption, sound: Qwen3-Omni-30B-A3B", 3.3e9, 30e9, 13 * 14 + 40, 60),
    OnGpu("fuse: Qwen3-8B", 8.2e9, 8.2e9, 400, 60),
    OnGpu("depth, 518 x 518: Depth Anything V2 small", 25e6, 0, 37 * 37, 0),
    OnGpu("safety, 4 frames: ViT-B/16", 86e6, 0, 4 * 197, 0),
)
"""Those of ``training/recipes/data-vast.yaml``."""


def per_clip(summary: Summary, length: float) -> dict[str, float]:
    """Seconds of one core for a clip of ``CLIP_SECONDS``, by stage; clips have ``length`` here."""
    watched = sum(amount.seconds for amount in summary.files.values())
    found = {}
    for name, took in summary.stages.items():
        longer = CLIP_SECONDS / length if name in PER_SECOND else 1.0
        clip = watched / CLIP_SECONDS if name == CUTTING else took.count / longer
        found[name] = took.seconds / clip
    return found


def cost_rows(
    seconds: dict[str, float], clips: int, price: float, unit: str
) -> tuple[list[list[str]], float]:
    """The rows of the stages, and the hours of all."""
    hours = {name: one * clips / 3600 for name, one in seconds.items()}
    rows = [
        [name, f"{seconds[name] * 1000:,.1f}", f"{n:,.0f}", f"{n * price:,.0f}"]
        for name, n in hours.items()
    ]
    whole = sum(hours.values())
    rows.append([f"**all, in {unit}**", "", f"**{whole:,.0f}**", f"**{whole * price:,.0f}**"])
    return rows, whole


def measure(
    shards: str,
    clips: int = CLIPS,
    cpu_price: Annotated[float, "of one core for an hour, in US $"] = CPU_PRICE,
    gpu_prices: Annotated[str, "of one GPU for an hour: l4=0.8,..."] = GPU_PRICES,
    storage_price: Annotated[float, "of 1 GB for a month, in US $"] = STORAGE_PRICE,
    days: float = 7.0,
) -> Report:
    summary = summarize(Place(shards))
    kept = sum(amount.count for amount in summary.written.values())
    length = sum(amount.seconds for amount in summary.written.values()) / kept
    stages = per_clip(summary, length)
    apart = {name: stages.pop(name) for name in ("caption", "tags", "depth") if name in stages}
    rows, cores = cost_rows(stages, clips, cpu_price, "hours of a core")
    gpus = [
        (gpu, price, *cost_rows(seconds, clips, price, "hours of a GPU"))
        for gpu, price in prices_of(gpu_prices).items()
        for seconds in ({one.name: one.seconds(gpu) for one in MODELS},)
    ]
    stored = sum(path.stat().st_size for path in Path(shards).glob("*.tar")) / kept
    values = {
        "apart": ", ".join(f"{name} {1000 * one:,.0f} ms" for name, one in apart.items()),
        "stages": rows,
        "cores": cores,
        "gpus": gpus,
        "stored": stored,
        "length": length,
        "whole": stored * clips * CLIP_SECONDS / length,
        "sources": summary.sources,
        "kept": kept,
        "clip_s": CLIP_SECONDS,
    }
    return Report({**values, "reached": REACHED, "at_once": AT_ONCE})
