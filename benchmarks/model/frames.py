"""What the frames of a clip cost, from the file to context tokens: seconds and memory.

It decodes and encodes 8 to 512 frames of a clip, each number in a new process, and fits a line to
the seconds and one to the memory.
"""

import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.harness import Panel, Ratio, Report, line
from benchmarks.media import RATE, landscape
from benchmarks.processes import forget_peak, memory
from mico_chat.adapters.mico import MicoAdapter
from mico_chat.checkpoints.load import load_encoder
from mico_chat.media import MediaFile, MediaLimits, decode

SIZE = (640, 360)
FRAMES = (8, 16, 32, 64, 128, 256, 512)
LINEAR = 0.99
"""The least R² of a line through seconds that grow with the number of frames, and no faster."""

Cost = tuple[float, float, float]
"""Seconds of decoding and of encoding, and the bytes that both take at most."""


def cost(path: Path, n: int, repeats: int) -> Cost:
    """Medians for ``n`` frames; the memory is that above the loaded model's."""
    adapter = MicoAdapter(*load_encoder("mini"))

    def run(count: int) -> tuple[float, float]:
        start = time.perf_counter()
        clip = decode(MediaFile("video", path), MediaLimits(max_frames=count))
        decoded = time.perf_counter()
        adapter.encode([adapter.prepare(clip, ("video",))])
        return decoded - start, time.perf_counter() - decoded

    run(FRAMES[0])  # warms up
    before = memory(["VmRSS"])
    forget_peak()
    decoding, encoding = map(statistics.median, zip(*(run(n) for _ in range(repeats)), strict=True))
    return decoding, encoding, memory(["VmHWM"]) - before


def measure(repeats: int = 3, most: int = FRAMES[-1]) -> Report:
    spawn = multiprocessing.get_context("spawn")
    x = [n for n in FRAMES if n <= most]
    seconds = -(-most // RATE) + 2
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as alone,
    ):
        path = landscape(Path(temporary) / "clip.mp4", SIZE, seconds, silent=True)
        found = [alone.submit(cost, path, n, repeats).result() for n in x]
    took = [decoding + encoding for decoding, encoding, _ in found]
    held = [peak / 1e6 for *_, peak in found]
    (slope, fixed, fit), (more, base, fit_memory) = line(x, took), line(x, held)
    rows = [
        [f"{n}", f"{a:.2f}", f"{b:.2f}", f"{a + b:.2f}", f"{peak / 1e6:,.0f}"]
        for n, (a, b, peak) in zip(x, found, strict=True)
    ]
    name = f"{x[0]} to {x[-1]} frames of a clip: R² of a line through the seconds"
    ratio = Ratio(measure=name, value=1e3 * slope, unit="ms a frame", ratio=fit, goal=LINEAR)
    values = {"rows": rows, "slope": slope, "fixed": fixed, "fit": fit, "more": more, "held": base}
    values |= {"fit_memory": fit_memory, "threads": torch.get_num_threads(), "seconds": seconds}
    curves = {"seconds": took, "MB": held}
    return Report(
        {**values, "side": f"{SIZE[0]} x {SIZE[1]}"},
        [ratio],
        {"frames": [Panel("frames", y, {y: (x, ys)}, fit=True) for y, ys in curves.items()]},
    )
