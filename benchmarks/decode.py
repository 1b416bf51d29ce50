"""How fast does the data engine read videos, beside PyAV alone and torchcodec?

``python -m benchmarks.decode --output benchmarks/results [VIDEO...]`` cuts each file into clips,
and decodes its frames in a loop that does nothing else; then it takes 8 frames of parts of 10
seconds, beside a loop that seeks each frame, and beside torchcodec where it can be loaded. All take
turns, with one thread each; rates are of a second of one core, which other processes do not get.
Without a file, it makes three.
"""

import importlib
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence, Sized
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from benchmarks.summary import Ratio, keep
from benchmarks.systems import machine, publish, table
from mico_corpus.cutting.cuts import cut
from mico_corpus.cutting.footage import frames_of
from mico_corpus.cutting.sources import rows_of
from mico_corpus.recipe import BuildRecipe
from mico_corpus.rows import Row

SIZES = ((640, 360), (1280, 720), (1920, 1080))
RATE = 30
CLIP = 10.0
"""Seconds of the parts of which frames are taken."""
FRAMES = 8
SIDE = 448


def make(path: Path, size: tuple[int, int], seconds: int, *, silent: bool = False) -> Path:
    """A camera that pans over a landscape, with the noise of a sensor; H.264 and AAC."""
    width, height = size
    draw = np.random.default_rng(0)
    small = draw.integers(0, 256, (12, 48, 3), dtype=np.uint8)
    wide = Image.fromarray(small).resize((4 * width, height), Image.Resampling.BICUBIC)
    land = np.asarray(wide).astype(np.int16) + draw.integers(-25, 25, (height, 4 * width, 1))
    noise = draw.normal(0, 4, (height + 64, width + 64, 1)).astype(np.int16)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast"})
        sound = None if silent else container.add_stream("aac", rate=44_100, layout="stereo")
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * RATE):
            at, (y, x) = 3 * number % (3 * width), draw.integers(0, 64, 2)
            shown = land[:, at : at + width] + noise[y : y + height, x : x + width]
            pixels = shown.clip(0, 255).astype(np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        if isinstance(sound, av.AudioStream):
            for start in range(0, seconds * 44_100, 1024):
                samples = draw.normal(0, 0.1, (2, 1024)).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
                frame.sample_rate, frame.pts = 44_100, start
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def decode_all(path: Path) -> range:
    """PyAV's own loop; the numbers of the frames."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return range(sum(1 for _ in container.decode(stream)))


def times_of(start: float) -> list[float]:
    return [start + CLIP * (2 * i + 1) / (2 * FRAMES) for i in range(FRAMES)]


def seek_each(path: Path, goals: Sequence[float], size: tuple[int, int]) -> list[NDArray[Any]]:
    """PyAV, a seek for each frame, scaled as ours are."""
    taken = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.time_base is not None
        for goal in goals:
            container.seek(round(goal / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time + 1 / RATE > goal:
                    shown = frame.reformat(*size, "rgb24", interpolation="AREA")
                    taken.append(shown.to_ndarray())
                    break
    return taken


def ours(part: Row) -> NDArray[Any]:
    return frames_of(part, FRAMES, SIDE).frames


def torchcodec() -> tuple[Callable[[Path, float], Any] | None, str]:
    """How it takes the same frames, which it does not scale; or why it cannot."""
    try:
        decoders = importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        return None, f"torchcodec cannot be loaded here: {reason}"

    def take(path: Path, start: float) -> Any:
        decoder = decoders.VideoDecoder(str(path), num_ffmpeg_threads=1)
        return decoder.get_frames_played_at(times_of(start))

    return take, ""


def per_second(work: Callable[[], Sized]) -> float:
    """Frames in a second of one core."""
    start = time.process_time()
    n = len(work())
    return n / (time.process_time() - start)


def measure(path: Path, repeats: int) -> tuple[Row, dict[str, float]]:
    """What the file is, and the median rate of each way to read it."""
    recipe = BuildRecipe()
    (row,) = rows_of([str(path)], recipe)
    about = cut(row, recipe)
    if about["reason"]:
        raise typer.BadParameter(f"{path}: {about['reason']}: {about['detail']}")
    frames = decode_all(path)
    if about["seconds"] < 2 * CLIP:
        raise typer.BadParameter(f"{path}: {about['seconds']:.0f} s; it needs {2 * CLIP:.0f} s")
    starts = np.linspace(0, about["seconds"] - CLIP, 3 * repeats)
    scale = min(1.0, SIDE / max(about["width"], about["height"]))
    size = round(about["width"] * scale), round(about["height"] * scale)
    codec, _ = torchcodec()

    def cut_all() -> range:
        cut(row, recipe)
        return frames

    rates: dict[str, list[float]] = defaultdict(list)
    for number in range(repeats):
        rates["bare"].append(per_second(partial(decode_all, path)))
        rates["cut"].append(per_second(cut_all))
        for start in map(float, starts[number::repeats]):
            part = {**about, "start": start, "end": start + CLIP}
            ways: dict[str, Callable[[], Sized]] = {
                "seeking": partial(seek_each, path, times_of(start), size),
                "frames_of": partial(ours, part),
            }
            if codec:
                ways["torchcodec"] = partial(codec, path, start)
            for name, way in ways.items():
                rates[name].append(per_second(way))
    return about, {name: statistics.median(found) for name, found in rates.items()}


def main(
    files: Annotated[list[Path] | None, typer.Argument()] = None,
    output: Path | None = None,
    seconds: int = 30,
    repeats: int = 5,
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    whole, parts, kept = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        made = [(Path(folder) / f"{height}p.mp4", (width, height)) for width, height in SIZES]
        for path in files or [make(path, size, seconds) for path, size in made]:
            about, found = measure(path, repeats)
            name = f"{path.name}, {about['width']} x {about['height']}"
            rates = [f"{found[way]:,.0f}" for way in ("bare", "cut")]
            whole.append([name, *rates, f"{found['cut'] / found['bare']:.2f}"])
            taken = [f"{found[way]:,.1f}" if way in found else "-" for way in WAYS]
            parts.append([name, *taken, f"{found['frames_of'] / found['seeking']:.2f}"])
            for what, way, other, beside in RACED:
                if other in found:
                    rates_of = found[way], "frames/s", beside, found[other]
                    kept.append(Ratio.beside_of(f"{what}, {name}", *rates_of, 0.9))
    _, why = torchcodec()
    publish(text(whole, parts, why), "decode.md", output)
    keep("decode", kept, output, "decode.md", PACKAGES)


PACKAGES = ("av", "scenedetect-headless", "imagehash")
WAYS = ("seeking", "torchcodec", "frames_of")
RACED = (
    ("cutting", "cut", "bare", "PyAV that only decodes"),
    ("frames of parts", "frames_of", "seeking", "PyAV, seeking each"),
    ("frames of parts", "frames_of", "torchcodec", "torchcodec"),
)
"""What is compared, our way, the other way, and its name."""


def text(whole: Sequence[Sequence[str]], parts: Sequence[Sequence[str]], why: str) -> str:
    about = machine(*PACKAGES)
    return (
        "# Reading videos\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, {about}. Made by `python -m benchmarks.decode`. "
        "Frames in a second of one core, one thread each, median.\n\n"
        "Every frame of a file. `cut` also decodes the sound, finds scenes and measures:\n\n"
        f"{table(['file', 'PyAV alone', '`cut`', 'ratio'], whole)}\n\n"
        f"{FRAMES} frames of parts of {CLIP:g} s, scaled to {SIDE} pixels, "
        "except those of torchcodec:\n\n"
        f"{table(['file', 'PyAV, seeking each', 'torchcodec', '`frames_of`', 'ratio'], parts)}\n"
        + (f"\n{why}.\n" if why else "")
    )


if __name__ == "__main__":
    typer.run(main)
