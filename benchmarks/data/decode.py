"""How fast does the data engine read videos, beside PyAV alone and torchcodec?

``python -m benchmarks decode --output benchmarks/results [VIDEO...]`` cuts each file into clips,
and decodes its frames in a loop that does nothing else; then it takes 8 frames of parts of 10
seconds, beside a loop that seeks each frame, and beside torchcodec where it can be loaded. All take
turns, with one thread each; rates are of a second of one core, which other processes do not get.
Without a file, it makes three.
"""

import importlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Ratio, Report, core_seconds, medians
from benchmarks.media import RATE, landscape
from mico_chat.errors import ConfigError
from mico_corpus.cutting.cuts import cut
from mico_corpus.cutting.footage import frames_of
from mico_corpus.cutting.sources import rows_of
from mico_corpus.recipe import BuildRecipe
from mico_corpus.rows import Row

SIZES = ((640, 360), (1280, 720), (1920, 1080))
CLIP = 10.0
"""Seconds of the parts of which frames are taken."""
FRAMES = 8
SIDE = 448


@contextmanager
def video_of(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A file and its video, which one thread decodes."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield container, stream


def decode_all(path: Path) -> range:
    """PyAV's own loop; the numbers of the frames."""
    with video_of(path) as (container, stream):
        return range(sum(1 for _ in container.decode(stream)))


def times_of(start: float) -> list[float]:
    return [start + CLIP * (2 * i + 1) / (2 * FRAMES) for i in range(FRAMES)]


def seek_each(path: Path, goals: Sequence[float], size: tuple[int, int]) -> list[NDArray[Any]]:
    """PyAV, a seek for each frame, scaled as ours are."""
    taken = []
    with video_of(path) as (container, stream):
        assert stream.time_base is not None
        for goal in goals:
            container.seek(round(goal / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time + 1 / RATE > goal:
                    shown = frame.reformat(*size, "rgb24", interpolation="AREA")
                    taken.append(shown.to_ndarray())
                    break
    return taken


def torchcodec() -> tuple[Callable[[Path, float], Sized] | None, str]:
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
    found: list[Sized] = []
    seconds = core_seconds(lambda: found.append(work()))
    return len(found[0]) / seconds


def rates_of(path: Path, repeats: int) -> tuple[Row, dict[str, float]]:
    """What the file is, and the median rate of each way to read it."""
    recipe = BuildRecipe()
    (row,) = rows_of([str(path)], recipe)
    about = cut(row, recipe)
    if about["reason"]:
        raise ConfigError(f"{path}: {about['reason']}: {about['detail']}")
    if about["seconds"] < 2 * CLIP:
        raise ConfigError(f"{path}: {about['seconds']:.0f} s; it needs {2 * CLIP:.0f} s")
    frames, (codec, _) = decode_all(path), torchcodec()
    scale = min(1.0, SIDE / max(about["width"], about["height"]))
    size = round(about["width"] * scale), round(about["height"] * scale)
    ways: dict[str, Callable[[float], Sized]] = {
        "seeking": lambda start: seek_each(path, times_of(start), size),
        "frames_of": lambda start: (
            frames_of({**about, "start": start, "end": start + CLIP}, FRAMES, SIDE).frames
        ),
    }
    if codec:
        ways["torchcodec"] = partial(codec, path)
    rates: dict[str, list[float]] = defaultdict(list)
    starts = np.linspace(0, about["seconds"] - CLIP, 3 * repeats).tolist()
    for number in range(repeats):
        rates["bare"].append(per_second(lambda: decode_all(path)))
        rates["cut"].append(per_second(lambda: (cut(row, recipe), frames)[1]))
        for start in starts[number::repeats]:
            for name, way in ways.items():
                rates[name].append(per_second(partial(way, start)))
    return about, medians(rates)


RACED = (
    ("cutting", "cut", "bare", "PyAV that only decodes"),
    ("frames of parts", "frames_of", "seeking", "PyAV, seeking each"),
    ("frames of parts", "frames_of", "torchcodec", "torchcodec"),
)
"""What is compared, our way, the other way, and its name."""


def measure(*files: Path, seconds: int = 30, repeats: int = 5) -> Report:
    os.environ["OMP_NUM_THREADS"] = "1"
    found_of, kept = list[tuple[str, dict[str, float]]](), []
    with tempfile.TemporaryDirectory() as folder:
        made = [(Path(folder) / f"{height}p.mp4", (width, height)) for width, height in SIZES]
        for path in files or [landscape(path, size, seconds) for path, size in made]:
            about, found = rates_of(path, repeats)
            name = f"{path.name}, {about['width']} x {about['height']}"
            found_of.append((name, found))
            for what, way, other, beside in RACED:
                if other in found:
                    pair = found[way], "frames/s", beside, found[other]
                    kept.append(Ratio.beside_of(f"{what}, {name}", *pair, 0.9))
    values = {"found_of": found_of, "frames": FRAMES, "clip": CLIP, "side": SIDE}
    return Report({**values, "why": torchcodec()[1]}, kept)
