"""What the frames of a clip cost, from the file to context tokens: seconds and memory.

``python -m benchmarks.frames --output benchmarks/results`` decodes and encodes 8 to 512 frames of a
clip, each number in a new process, and fits a line to the seconds and one to the memory.
"""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
import typer

from benchmarks.decode import RATE, make
from benchmarks.summary import Ratio, keep
from benchmarks.systems import machine, publish, table
from mico_chat.adapters.mico import MicoAdapter
from mico_chat.checkpoints.load import load_encoder
from mico_chat.media import MediaFile, MediaLimits, decode
from mico_training.records import panels

SIZE = (640, 360)
FRAMES = (8, 16, 32, 64, 128, 256, 512)
LINEAR = 0.99
"""The least R² of a line through seconds that grow with the number of frames, and no faster."""

Cost = tuple[float, float, float]
"""Seconds of decoding and of encoding, and the bytes that both take at most."""


def cost(path: Path, n: int, repeats: int) -> Cost:
    """Medians for ``n`` frames; the memory is that above the loaded model's."""
    model, processor = load_encoder("mini")
    adapter = MicoAdapter(model, processor)

    def run(count: int) -> tuple[float, float]:
        start = time.perf_counter()
        clip = decode(MediaFile("video", path), MediaLimits(max_frames=count))
        decoded = time.perf_counter()
        adapter.encode([adapter.prepare(clip, ("video",))])
        return decoded - start, time.perf_counter() - decoded

    run(FRAMES[0])  # warms up
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on: proc(5)
    decoding, encoding = zip(*(run(n) for _ in range(repeats)), strict=True)
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return statistics.median(decoding), statistics.median(encoding), peak - before


def report(found: Mapping[int, Cost], about: str, plot: Path | None) -> tuple[str, list[Ratio]]:
    x = [float(n) for n in found]
    curves = {
        "seconds": [decoding + encoding for decoding, encoding, _ in found.values()],
        "MB": [peak / 1e6 for *_, peak in found.values()],
    }
    lines = {name: statistics.linear_regression(x, y) for name, y in curves.items()}
    fit = {name: statistics.correlation(x, y) ** 2 for name, y in curves.items()}
    if plot is not None:
        with panels(plot, len(curves)) as drawn:
            for axes, (name, y) in zip(drawn, curves.items(), strict=True):
                slope, fixed = lines[name]
                axes.plot(x, y, "o", label="measured")
                axes.plot(x, [fixed + slope * n for n in x], color="0.6", label="a line")
                axes.set(xlabel="frames", ylabel=name, ylim=(0, None))
    rows = [
        [f"{n}", f"{a:.2f}", f"{b:.2f}", f"{a + b:.2f}", f"{peak / 1e6:,.0f}"]
        for n, (a, b, peak) in found.items()
    ]
    head = ["frames", "decode, s", "encode, s", "both, s", "memory above the model's, MB"]
    (slope, fixed), (more, held) = lines.values()
    name = f"{min(found)} to {max(found)} frames of a clip: R² of a line through the seconds"
    unit = "ms a frame"
    return (
        f"# Frames of a clip\n\n{about}\n\n{table(head, rows)}\n\nA line through the seconds: "
        f"{1e3 * slope:.2f} ms a frame and {fixed:.2f} s, R² {fit['seconds']:.4f}. Through the "
        f"memory: {more:.2f} MB a frame and {held:.0f} MB, R² {fit['MB']:.4f}.\n\n"
        "![Seconds and memory against frames](frames.png)\n"
    ), [Ratio(measure=name, value=1e3 * slope, unit=unit, ratio=fit["seconds"], goal=LINEAR)]


def main(output: Path | None = None, repeats: int = 3, most: int = FRAMES[-1]) -> None:
    spawn = multiprocessing.get_context("spawn")
    found: dict[int, Cost] = {}
    seconds = -(-most // RATE) + 2
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as alone,
    ):
        path = make(Path(temporary) / "clip.mp4", SIZE, seconds, silent=True)
        for n in (n for n in FRAMES if n <= most):
            found[n] = alone.submit(cost, path, n, repeats).result()
            print(f"{n} frames: {found[n]}", flush=True)
    packages = ("torch", "av")
    about = (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine(*packages)}; {torch.get_num_threads()} threads. "
        f"Made by `python -m benchmarks.frames`. The mini's encoder; H.264, {SIZE[0]} x {SIZE[1]}, "
        f"{seconds} s without sound; medians of {repeats}, each row a process of its own."
    )
    text, ratios = report(found, about, output and output / "frames.png")
    publish(text, "frames.md", output)
    keep("frames", ratios, output, "frames.md", packages)


if __name__ == "__main__":
    typer.run(main)
