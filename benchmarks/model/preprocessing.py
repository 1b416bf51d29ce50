"""Media to the model's tensors: how fast beside other libraries.

It reads pictures beside torchvision and Pillow, makes log-mel rows beside torchaudio and librosa,
and takes frames of clips beside bare PyAV, all in turns in one thread. torchaudio and librosa are
left out where they are not installed. A folder of their own keeps them from everything else, which
torchaudio's newest would break:

    pip install --target .beside --no-deps torchaudio
    pip install --target .beside librosa
    PYTHONPATH=.beside python -m benchmarks preprocessing --output benchmarks/results
"""

import importlib
import io
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from benchmarks.data.decode import seek_each, video_of
from benchmarks.harness import Ratio, Report, core_seconds, medians, turns
from benchmarks.media import RATE, landscape, photograph
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


def pictures(preprocessing: Preprocessing, size: tuple[int, int]) -> dict[str, Way]:
    """Ways from four JPEG files to normalised tensors."""
    files, limits = [photograph(size, seed) for seed in range(4)], MediaLimits()
    side = preprocessing.image_size * preprocessing.detail
    transform = v2.Compose(
        [
            v2.Resize((side, side), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preprocessing.image_mean, preprocessing.image_std),
        ]
    )

    def ours(data: bytes) -> object:
        return preprocessing.units(decode(MediaFile("image", data), limits))

    def theirs(data: bytes) -> object:
        coded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return transform(torchvision.io.decode_jpeg(coded))

    def pillow(data: bytes) -> object:
        with Image.open(io.BytesIO(data)) as picture:
            return transform(v2.functional.pil_to_tensor(picture.convert("RGB")))

    def each(way: Callable[[bytes], object]) -> None:
        for data in files:
            way(data)

    ways = {OURS: ours, "torchvision": theirs, "Pillow + torchvision": pillow}
    return {name: partial(each, way) for name, way in ways.items()}


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
        mel = partial(librosa.feature.melspectrogram, y=samples, **settings)
        ways["librosa"] = lambda: np.log(mel() + 1e-10)
    return ways


def frames(path: Path, size: tuple[int, int], n: int, seconds: int) -> dict[str, Way]:
    """Ways to ``n`` frames of a clip; bare PyAV seeks each, or decodes the clip from end to end."""
    goals = [seconds * (2 * i + 1) / (2 * n) for i in range(n)]
    limits = MediaLimits(max_frames=n)
    width, height = limits.fitted(*size)

    def through() -> list[NDArray[Any]]:
        taken: list[NDArray[Any]] = []
        with video_of(path) as (container, stream):
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


def measure(
    repeats: int = 5, seconds: Annotated[int, "the length of sounds and clips"] = 20
) -> Report:
    torch.set_num_threads(1)
    preprocessing = load_encoder("mini")[1].preprocessing
    rows: list[list[str]] = []
    ratios: list[Ratio] = []

    def per_second(amount: float, way: Way) -> float:
        return amount / core_seconds(way)

    def race(what: str, unit: str, ways: dict[str, Way], amount: float) -> None:
        timed = {name: partial(per_second, amount, way) for name, way in ways.items()}
        rates = medians(turns(timed, repeats))
        ours = rates[OURS]
        for name, rate in rates.items():
            rows.append([what, unit, name, f"{rate:.1f}", f"{ours / rate:.2f}"])
        del rates[OURS]
        if rates:
            best = max(rates, key=lambda name: rates[name])
            goal = 0.9 if what.startswith("JPEG") else 1.0
            ratios.append(Ratio.beside_of(what, ours, unit, best, rates[best], goal))

    for size in PICTURES:
        race(f"JPEG of {_by(size)}", "pictures/s", pictures(preprocessing, size), 4)
    ways = sounds(preprocessing.image_size, seconds)
    race("log-mel rows of a sound", "s of sound/s", ways, seconds)
    with tempfile.TemporaryDirectory() as temporary:
        for size in CLIPS:
            path = landscape(Path(temporary) / f"{size[1]}p.mp4", size, seconds, silent=True)
            for n in TAKEN:
                ways = frames(path, size, n, seconds)
                race(f"{n} frames of a clip of {_by(size)}", "frames/s", ways, n)
    beside = [name for name in ("torchaudio", "librosa") if importlib.util.find_spec(name)]
    more = "".join(f"{name} {version(name)}; " for name in beside)
    return Report({"rows": rows, "more": more, "rate": RATE}, ratios)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
