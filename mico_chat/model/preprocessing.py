"""Decoded media to units, the (3, H, W) pictures that the encoder sees (paper 4.1).

Pictures, frames and normal maps are resized whole, not cropped: a question may be about an edge.
A sound becomes log-mel slices, rows time and columns frequency, three equal channels. A depth map
becomes three views of the same distances; holes are zero in all of them.

The released MiCo resizes whole too, but without ``antialias``, its ``sampling`` is ``"segments"``,
and its depth maps are pictures: :func:`released_preprocessing` has its settings.
"""

from collections.abc import Callable
from functools import lru_cache
from math import log
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from mico_chat.errors import MediaError
from mico_chat.media import Audio, Depth, Image, Medium, Normal, Pages, Video
from mico_chat.media.sampling import Sampling, of_segments

PART = 32
"""Units that are computed at a time: a long clip needs little more memory than its frames have."""

SAMPLE_RATE = 16_000
FRAME, SHIFT, N_FFT = 400, 160, 512  # 25 ms window, 10 ms shift
PREEMPHASIS = 0.97
FBANK_MEAN, FBANK_STD = 15.41663, 2 * 6.55582  # of the released model's training sounds
NEAREST, FARTHEST = 0.25, 32.0  # metres at the ends of the absolute depth channel


def in_parts(compute: Callable[..., Tensor], *units: Tensor) -> Tensor:
    """What ``compute`` makes of the units (U, ...), ``PART`` at a time."""
    n = len(units[0])
    first = compute(*(x[:PART] for x in units))
    if n <= PART:
        return first
    found = first.new_empty(n, *first.shape[1:])
    found[:PART] = first
    for at in range(PART, n, PART):
        found[at : at + PART] = compute(*(x[at : at + PART] for x in units))
    return found


class Preprocessing(BaseModel):
    """Settings of a unit's pixels; part of the processor's config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = 224
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    detail: int = 1
    """A unit has so many times ``image_size`` pixels a side: the encoder sees the mean of each
    ``detail`` x ``detail`` of them, a closer look at a part of the picture sees them all."""
    max_slices: int = 4
    """At most so many mel slices of 2.24 s are taken."""
    # Written only where they differ, so that the file of an older checkpoint stays the same.
    sampling: Sampling = Field("uniform", exclude_if=lambda value: value == "uniform")
    """Which frames and slices are taken. ``"uniform"``: slices are spread evenly over the sound
    and may overlap; one that is too short is repeated. ``"segments"``: there are always
    ``max_slices``, each the middle one of a run of slices side by side, padded with zeros."""
    antialias: bool = Field(True, exclude_if=lambda value: value is True)
    """Pictures that shrink are filtered first, as in torchvision since 0.17."""
    depth: Literal["views", "picture"] = Field("views", exclude_if=lambda value: value == "views")
    """A unit of a depth map. ``"views"``: three views of the distances. ``"picture"``: the 8-bit
    grey picture that DPT writes, near is bright. Relative maps keep their values, so that an 8-bit
    file is its own pixels; of metres the inverse is stretched from 0 to 255."""

    def units(self, medium: Medium, generator: np.random.Generator | None = None) -> Tensor:
        """A medium's units (n, 3, S, S), S = image_size · detail; an empty one is a MediaError.

        With a ``generator`` the slices of a sound are drawn, one of each of equal runs.
        """
        match medium:
            case Image() | Normal():
                return self._normalise(self._pixels(medium.pixels[None]))
            case Video():
                return self._normalise(self._pixels(medium.frames))
            case Depth():
                return self._normalise(self._depth(medium))
            case Audio():
                return self._sound(medium, generator)
            case Pages():
                raise ValueError(f"{medium.name}: a medium made of pages has no units of its own")

    def _normalise(self, pixels: Tensor) -> Tensor:
        """Values in [0, 1], (n, 3, H, W). They are overwritten, for new memory takes time."""
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        return pixels.sub_(mean).div_(torch.tensor(self.image_std).view(3, 1, 1))

    def _pixels(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(n, H, W, 3) uint8 -> (n, 3, S, S) float in [0, 1]."""
        whole = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        kept = torch.contiguous_format
        return in_parts(
            lambda x: self._resize(x.to(torch.float32, memory_format=kept)).div_(255), whole
        )

    def _resize(self, x: Tensor) -> Tensor:
        size = [self.image_size * self.detail] * 2
        return F.interpolate(x, size, mode="bilinear", antialias=self.antialias)

    def _depth(self, depth: Depth) -> Tensor:
        """Nearness, nearness on a log scale, and absolute distance; (1, 3, S, S) in [0, 1].

        As a picture all three are the nearness in 256 steps.
        """
        values = torch.from_numpy(depth.values)
        valid = ~values.isnan()
        if not bool(valid.any()):
            reason = "the depth map has no distances: every pixel is empty"
            raise MediaError(depth.report.name, reason)
        if self.depth == "picture" and not depth.metric:
            return self._grey(1 - values.nan_to_num(1.0))
        known = values[valid].numpy()
        near, far = (float(v) for v in np.percentile(known, (1, 99)))
        if depth.metric:
            near = max(near, 1e-3)
            far = max(far, near + 1e-3)
            clipped = values.nan_to_num(far).clamp(near, far)
            nearness = (1 / clipped - 1 / far) / (1 / near - 1 / far)
            if self.depth == "picture":
                return self._grey(nearness * valid)
            log = (far / clipped).log() / np.log(far / near)
            absolute = (values.nan_to_num(far).clamp(NEAREST, FARTHEST) / NEAREST).log()
            absolute = absolute / np.log(FARTHEST / NEAREST)
        else:
            far = max(far, near + 1e-6)
            nearness = log = 1 - (values.nan_to_num(far).clamp(near, far) - near) / (far - near)
            absolute = torch.full_like(values, 0.5)
        x = torch.stack([nearness, log, absolute]) * valid
        return self._resize(x[None].float())

    def _grey(self, nearness: Tensor) -> Tensor:
        """(H, W) in [0, 1] -> (1, 3, S, S), of values that 8 bits can hold."""
        levels = nearness.float().clamp(0, 1).mul(255).round() / 255
        return self._resize(levels.expand(1, 3, -1, -1).contiguous())

    def _sound(self, audio: Audio, generator: np.random.Generator | None) -> Tensor:
        """Log-mel slices (n, 3, S, S) of a sound."""
        samples = torch.from_numpy(audio.samples)
        if len(samples) == 0:
            raise MediaError(audio.report.name, "the sound has no samples")
        size = self.image_size
        need = (size - 1) * SHIFT + FRAME
        if self.sampling == "segments":
            starts, mels = self._starts_in_segments(len(samples), generator), torchaudio_mels(size)
        else:
            mels = mel_matrix(size)
            if len(samples) < need:
                samples = samples.repeat(-(-need // len(samples)))[:need]
            starts = self._starts(len(samples) - need, generator)
        slices = torch.stack([_slice(samples[s : s + need], mels) for s in starts])
        slices = slices.repeat_interleave(self.detail, 1).repeat_interleave(self.detail, 2)
        return slices.unsqueeze(1).expand(-1, 3, -1, -1).contiguous()

    def _starts(self, last: int, generator: np.random.Generator | None) -> list[int]:
        """The first samples of slices between 0 and ``last``, spread evenly or drawn."""
        # The last frame of a slice reaches 240 samples into the next, which need no new slice.
        step = self.image_size * SHIFT
        n = min(self.max_slices, -(-(last + step) // step))
        if generator is not None:
            places = (np.arange(n) + generator.random(n)) / n * (last + 1)
        elif n == self.max_slices == 1:  # the middle of a sound says more of it than its beginning
            places = np.array([last / 2])
        else:
            places = np.linspace(0, last, n)
        return [int(place) for place in places]

    def _starts_in_segments(self, n: int, generator: np.random.Generator | None) -> list[int]:
        """The first samples of slices of ``n`` samples; like the release's, one may be empty."""
        frames = max(0, (n - FRAME) // SHIFT + 1)
        slices = max(self.max_slices, frames // self.image_size + 1)
        chosen = of_segments(slices, self.max_slices, generator)
        return [place * self.image_size * SHIFT for place in chosen]


def released_preprocessing(image_size: int, slices: int) -> Preprocessing:
    """The preprocessing of the released MiCo: its code pins torchvision 0.15, whose ``Resize`` of
    tensors has no antialiasing. It opens depth maps as RGB pictures, which DPT has written."""
    usual = Preprocessing(image_size=image_size, max_slices=slices, sampling="segments")
    return usual.model_copy(update={"antialias": False, "depth": "picture"})


def _slice(samples: Tensor, mels: Tensor) -> Tensor:
    """The log-mel slice (S, S) of samples, normalised; a short one ends in zeros."""
    size = mels.shape[1]
    if len(samples) < FRAME:
        return torch.zeros(size, size)
    mel = (_log_mel(samples, mels) - FBANK_MEAN) / FBANK_STD
    return F.pad(mel, (0, 0, 0, size - len(mel)))


@lru_cache(maxsize=4)
def mel_matrix(n_mels: int) -> Tensor:
    """(257, n_mels) triangular filters in the mel domain, 20 Hz to 8 kHz, as in Kaldi."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log(1.0 + hertz / 700.0)

    low, high = mel(torch.tensor(20.0)), mel(torch.tensor(SAMPLE_RATE / 2))
    edges = low + torch.arange(n_mels + 2) * (high - low) / (n_mels + 1)
    at = mel(torch.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT).unsqueeze(1)
    up = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return torch.minimum(up, down).clamp(min=0)


@lru_cache(maxsize=4)
def torchaudio_mels(n_mels: int) -> Tensor:
    """The same filters in torchaudio's order of operations, with which the released model trained.

    Their weights differ by 3e-5, and a quiet bin of a unit by up to 1.5e-4.
    """
    low, high = (1127.0 * log(1.0 + hertz / 700.0) for hertz in (20.0, SAMPLE_RATE / 2))
    step, number = (high - low) / (n_mels + 1), torch.arange(n_mels)
    left, centre, right = (low + (number + more) * step for more in (0.0, 1.0, 2.0))
    hertz = SAMPLE_RATE / N_FFT * torch.arange(N_FFT // 2)
    at = (1127.0 * (1.0 + hertz / 700.0).log()).unsqueeze(1)
    up, down = (at - left) / (centre - left), (right - at) / (right - centre)
    return F.pad(torch.minimum(up, down).clamp(min=0), (0, 0, 0, 1))


def fbank(samples: Tensor, n_mels: int) -> Tensor:
    """Kaldi-compatible log-mel energies (frames, n_mels) of mono 16 kHz samples in [-1, 1]."""
    return _log_mel(samples, mel_matrix(n_mels))


def _log_mel(samples: Tensor, mels: Tensor) -> Tensor:
    frames = (samples * 32768).unfold(0, FRAME, SHIFT)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    povey = torch.hann_window(FRAME, periodic=False).pow(0.85)
    frames = (frames - PREEMPHASIS * before) * povey
    power = torch.fft.rfft(frames, N_FFT).abs().pow(2)
    energies: Tensor = power @ mels
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()
