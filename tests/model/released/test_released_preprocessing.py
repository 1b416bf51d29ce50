"""Real files through the converted model's preprocessing, beside what the release's code does.

The release resizes with torchvision 0.15, which does not antialias tensors, cuts frames and slices
into equal runs, and takes its log-mel energies from torchaudio. The references below are made of
torchvision, of PyAV's frames, and of torchaudio's published definitions (its wheels on PyPI load
only beside PyTorch's CUDA builds). The files come with Gradio, matplotlib and SciPy.
"""

import math
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from mico_chat.media import Audio, MediaFile, MediaLimits, decode
from mico_chat.model.preprocessing import Preprocessing, released_preprocessing

WHOLE = MediaLimits(max_side=100_000, max_frames=8)
"""The release scales nothing down before it resizes."""

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PREPROCESSING = released_preprocessing(224, slices=3)


def of(package: str, *names: str) -> list[Path]:
    """Files of an installed package."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return [Path(spec.origin).parent / name for name in names]


PICTURES = of("matplotlib", "mpl-data/sample_data/grace_hopper.jpg")
PICTURES += of("gradio", *(f"media_assets/images/{n}" for n in ("cheetah1.jpg", "groot.jpeg")))
CLIPS = of("gradio", "media_assets/videos/a.mp4", "media_assets/videos/world.mp4")
SOUNDS = of("gradio", *(f"media_assets/audio/{n}.wav" for n in ("cantina", "sax", "recording1")))
TRANSFORM = Compose([Resize((224, 224), antialias=False), Normalize(MEAN, STD)])


def named(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", PICTURES, ids=named)
def test_a_photograph_is_the_releases_tensor(path: Path) -> None:
    with Pillow.open(path) as picture:
        pixels = ToTensor()(picture.convert("RGB"))
    found = PREPROCESSING.units(decode(MediaFile("image", path), WHOLE))
    torch.testing.assert_close(found[0], TRANSFORM(pixels), rtol=0, atol=1e-4)
    # The test would see another way of resizing.
    for other in (Resize((224, 224), antialias=True), Compose([Resize(224), CenterCrop(224)])):
        assert (Normalize(MEAN, STD)(other(pixels)) - found[0]).abs().max() > 0.1


@pytest.mark.parametrize("path", CLIPS, ids=named)
def test_the_frames_of_a_clip_are_the_releases(path: Path) -> None:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    longer, shorter = divmod(len(frames), 8)
    runs, first = [], 0
    for number in range(8):
        runs.append(range(first, first + longer + (number < shorter)))
        first = runs[-1].stop
    numbers = [run[(len(run) + 1) // 2 - 1] for run in runs]
    video = decode(MediaFile("video", path, sampling=PREPROCESSING.sampling), WHOLE)
    found = PREPROCESSING.units(video)
    assert len(found) == 8
    for unit, number in zip(found, numbers, strict=True):
        expected = TRANSFORM(ToTensor()(frames[number]))
        torch.testing.assert_close(unit, expected, rtol=0, atol=1e-4)


def log_mel(samples: Tensor, n_mels: int) -> Tensor:
    """``torchaudio.compliance.kaldi.fbank`` with 25 ms frames, 10 ms shift, and no dither."""
    frames = (samples * 2**15).unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    shifted = torch.nn.functional.pad(frames.unsqueeze(0), (1, 0), mode="replicate")[0, :, :-1]
    frames = (frames - 0.97 * shifted) * torch.hann_window(400, periodic=False).pow(0.85)
    power = torch.fft.rfft(torch.nn.functional.pad(frames, (0, 112))).abs().pow(2)
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (20, 8000))
    step = (high - low) / (n_mels + 1)
    at = 1127 * (1 + 16000 / 512 * torch.arange(256) / 700).log()
    filters = torch.zeros(n_mels, 257)
    for n, row in enumerate(filters):
        left, centre, right = (torch.tensor(low) + torch.tensor(n + i) * step for i in range(3))
        row[:256] = torch.minimum((at - left) / (centre - left), (right - at) / (right - centre))
    energies: Tensor = power @ filters.clamp(min=0).T
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


def slices(samples: Tensor, wanted: int) -> Tensor:
    """The release's slices of 224 rows: padded, cut into runs, the middle one of each."""
    mel = (log_mel(samples, 224) - 15.41663) / (6.55582 * 2)
    more = max(224 * wanted - len(mel), 224 - len(mel) % 224)
    mel = torch.cat([mel, torch.zeros(more, 224)])
    numbers = np.array_split(np.arange(len(mel) // 224), wanted)
    middles = [int(run[(len(run) + 1) // 2 - 1]) for run in numbers]
    return torch.stack([mel[224 * n : 224 * (n + 1)] for n in middles])


def noise(slices: float) -> Audio:
    """A sound so many slices long; a whole number has an empty one behind them in the release."""
    n = 400 + int(slices * 224 - 1) * 160
    return Audio(np.random.default_rng(0).uniform(-0.5, 0.5, n).astype(np.float32))


@pytest.mark.parametrize("source", [*SOUNDS, 0.5, 1.25, 2, 7.5], ids=str)
@pytest.mark.parametrize("wanted", [1, 3])
def test_the_slices_of_a_sound_are_the_releases(source: Path | float, wanted: int) -> None:
    """Files that FFmpeg decodes to 16 kHz mono, and noise of so many slices."""
    given = MediaFile("audio", source) if isinstance(source, Path) else noise(source)
    sound = decode(given, WHOLE) if isinstance(given, MediaFile) else given
    assert isinstance(sound, Audio)
    preprocessing = PREPROCESSING.model_copy(update={"max_slices": wanted})
    found = preprocessing.units(sound)
    expected = slices(torch.from_numpy(sound.samples), wanted)
    assert found.shape == (wanted, 3, 224, 224)
    for channel in found.unbind(1):
        torch.testing.assert_close(channel, expected, rtol=0, atol=1e-4)
    spread = Preprocessing(max_slices=wanted).units(sound)
    assert len(spread) != wanted or (spread[:, 0] - expected).abs().max() > 0.1
