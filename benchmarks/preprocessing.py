"""Media to the model's tensors: how fast beside other libraries.

``python -m benchmarks.preprocessing --output benchmarks/results`` reads pictures beside torchvision
and Pillow, makes log-mel rows beside torchaudio and librosa, and takes frames of clips beside bare
PyAV, all in turns in one thread. torchaudio and librosa are left out where they are not installed.
A folder of their own keeps them from everything else, which torchaudio's newest would break:

    pip install --target .beside --no-deps torchaudio
    pip install --target .beside librosa
    PYTHONPATH=.beside python -m benchmarks.preprocessing --output benchmarks/results
"""

import importlib
import io
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import torch
import torchvision
import typer
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from benchmarks.decode import RATE, make, seek_each
from benchmarks.summary import Ratio, keep
from benchmarks.systems import machine, publish, table
from mico_chat.checkpoints.load import load_encoder
from mico_chat.media import MediaFile, MediaLimits, decode
from mico_chat.media.medium import SAMPLE_RATE
from mico_chat.model.preprocessing import FRAME, N_FFT, SHIFT, Preprocessing, fbank

OURS = "mico-chat"
PICTURES = ((640, 480), (1920, 1080), (4000, 3000))
CLIPS = ((640, 360), (1920, 1080))
TAKEN = (8, 64)
"""Frames taken of a clip."""

Way = Callable[[], object]


def race(ways: dict[str, Way], amount: float, repeats: int) -> dict[str, float]:
    """What each way does in a second of one core, which other processes do not get; medians."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats + 1):  # the first warms up
        for name, way in ways.items():
            start = time.process_time()
            way()
            found[name].append(amount / (time.process_time() - start))
    return {name: statistics.median(rates[1:]) for name, rates in found.items()}


# --- pictures, sounds, frames ---------------------------------------------------------------------


def photograph(size: tuple[int, int], seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = pixels + draw.integers(-12, 13, pixels.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def pictures(preprocessing: Preprocessing, size: tuple[int, int]) -> dict[str, Way]:
    """Ways from four JPEG files to normalised tensors."""
    files = [photograph(size, seed) for seed in range(4)]
    side = preprocessing.image_size * preprocessing.detail
    transform = v2.Compose(
        [
            v2.Resize((side, side), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.image_mean, preprocessing.image_std),
        ]
    )

    def ours(data: bytes) -> object:
        return preprocessing.units(decode(MediaFile("image", data)))

    def theirs(data: bytes) -> object:
        coded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return transform(torchvision.io.decode_jpeg(coded))

    def pillow(data: bytes) -> object:
        with Image.open(io.BytesIO(data)) as picture:
            return transform(v2.functional.pil_to_tensor(picture.convert("RGB")))

    ways = {OURS: ours, "torchvision": theirs, "Pillow + torchvision": pillow}
    return {name: partial(_each, way, files) for name, way in ways.items()}


def _each(way: Callable[[bytes], object], files: Iterable[bytes]) -> None:
    for data in files:
        way(data)


def sounds(n_mels: int, seconds: int) -> dict[str, Way]:
    """Ways from samples to log-mel rows; torchaudio's equal ours, librosa's do not."""
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(seconds * SAMPLE_RATE)).astype(np.float32)
    wave = torch.from_numpy(samples)
    ways: dict[str, Way] = {OURS: lambda: fbank(wave, n_mels)}
    if importlib.util.find_spec("torchaudio"):
        # Its Kaldi code is Python over torch. Its own library needs the torch of one release.
        without = mock.MagicMock(_IS_TORCHAUDIO_EXT_AVAILABLE=False)
        sys.modules.setdefault("torchaudio._extension", without)
        kaldi: Any = importlib.import_module("torchaudio.compliance.kaldi")
        ways["torchaudio"] = lambda: kaldi.fbank(wave[None] * 32768, num_mel_bins=n_mels)
    if importlib.util.find_spec("librosa"):
        librosa: Any = importlib.import_module("librosa")
        settings: dict[str, Any] = {
            "sr": SAMPLE_RATE,
            "n_fft": N_FFT,
            "win_length": FRAME,
            "hop_length": SHIFT,
        }
        settings |= {"n_mels": n_mels, "fmin": 20.0, "htk": True, "center": False}
        ways["librosa"] = lambda: np.log(
            librosa.feature.melspectrogram(y=samples, **settings) + 1e-10
        )
    return ways


def frames(path: Path, size: tuple[int, int], n: int, seconds: int) -> dict[str, Way]:
    """Ways to ``n`` frames of a clip; bare PyAV seeks each, or decodes the clip from end to end."""
    goals = [seconds * (2 * i + 1) / (2 * n) for i in range(n)]
    limits = MediaLimits(max_frames=n)
    width, height = limits.fitted(*size)

    def through() -> list[NDArray[Any]]:
        taken: list[NDArray[Any]] = []
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                if len(taken) < n and frame.time is not None and frame.time >= goals[len(taken)]:
                    shown = frame.reformat(width, height, "rgb24", interpolation="AREA")
                    taken.append(shown.to_ndarray())
        return taken

    return {
        OURS: lambda: decode(MediaFile("video", path), limits),
        "PyAV, seeking each": lambda: seek_each(path, goals, (width, height)),
        "PyAV, from end to end": through,
    }


def main(output: Path | None = None, repeats: int = 5, seconds: int = 20) -> None:
    """``seconds`` is the length of sounds and clips."""
    torch.set_num_threads(1)
    preprocessing = load_encoder("mini")[1].preprocessing
    rows: list[list[str]] = []
    ratios: list[Ratio] = []

    def measure(what: str, unit: str, ways: dict[str, Way], amount: float) -> None:
        rates = race(ways, amount, repeats)
        ours = rates[OURS]
        for name, rate in rates.items():
            rows.append([what, unit, name, f"{rate:.1f}", f"{ours / rate:.2f}"])
        print(f"{what}: {rates}", flush=True)
        others = {name: rate for name, rate in rates.items() if name != OURS}
        if others:
            best, rate = max(others.items(), key=lambda item: item[1])
            ratios.append(Ratio.beside_of(what, ours, unit, best, rate, 1.0))

    for size in PICTURES:
        measure(f"JPEG of {_by(size)}", "pictures/s", pictures(preprocessing, size), 4)
    ways = sounds(preprocessing.image_size, seconds)
    measure("log-mel rows of a sound", "s of sound/s", ways, seconds)
    with tempfile.TemporaryDirectory() as temporary:
        for size in CLIPS:
            path = make(Path(temporary) / f"{size[1]}p.mp4", size, seconds, silent=True)
            for n in TAKEN:
                ways = frames(path, size, n, seconds)
                measure(f"{n} frames of a clip of {_by(size)}", "frames/s", ways, n)
    packages = ["torch", "torchvision", "pillow", "av", "numpy"]
    packages += [name for name in ("torchaudio", "librosa") if importlib.util.find_spec(name)]
    publish(
        "# Preprocessing\n\n"
        f"{datetime.now(UTC):%Y-%m-%d}, {machine(*packages)}. Made by `python -m "
        "benchmarks.preprocessing`.\n\nIn a second of one core, one thread, in turns; medians of "
        f"{repeats}. Pictures are decoded, resized and normalised as the mini's are; clips are "
        f"H.264, {seconds} s of {RATE} frames a second, without sound.\n\n"
        f"{table(['what', 'unit', 'way', 'rate', 'ours over it'], rows)}\n",
        "preprocessing.md",
        output,
    )
    keep("preprocessing", ratios, output, "preprocessing.md", packages)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


if __name__ == "__main__":
    typer.run(main)
