"""Ear: Whisper's first blocks, which tell sounds apart better than a CNN does.

The CNN sees a sound as a picture. Whisper base learned from 680,000 hours of recordings, with their
noises; its first blocks name about twice as many recordings, and later ones know words only. Its
weights are not part of a checkpoint: ``mico-chat setup`` fetches them for speech, and the ear reads
them when the first sound comes.

Legend: U mel slices, S frames and mel bands of a slice, W Whisper's width, L blocks.
"""

import struct
from functools import cache
from mmap import ACCESS_READ, mmap
from os import SEEK_CUR
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.errors import ModelError
from mico_chat.model.preprocessing import (
    FBANK_MEAN,
    FBANK_STD,
    FRAME,
    N_FFT,
    PREEMPHASIS,
    SAMPLE_RATE,
    mel_matrix,
)
from mico_chat.settings import cache_dir

WIDTH, HEADS, BANDS, WHISPER_FFT = 512, 8, 80, 400
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


class Ear(nn.Module):
    """The first ``blocks`` blocks of Whisper base; a block gives 2 W features of each slice."""

    positions: Tensor

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(BANDS, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.register_buffer("positions", torch.zeros(1500, WIDTH))

    def forward(self, slices: Tensor) -> Tensor:
        """Slices of :class:`Preprocessing` (U, S, S), rows time -> mean and deviation over time of
        each block's output (U, L · 2 W)."""
        x = F.gelu(self.conv1(whisper_mel(slices)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (U, S / 2, W)
        x = x + self.positions[: x.shape[1]]
        heard = []
        for block in self.blocks:
            x = block(x)
            heard += [x.mean(1), x.std(1)]
        return torch.cat(heard, dim=1)


def whisper_mel(slices: Tensor) -> Tensor:
    """Normalised Kaldi log-mel slices (U, S, S), rows time -> Whisper's log-mel (U, 80, S)."""
    energies = (slices * FBANK_STD + FBANK_MEAN).exp() @ _to_whisper(slices.shape[2]).to(slices)
    log = energies.clamp(min=1e-10).log10().transpose(1, 2)
    return (torch.maximum(log, log.amax((1, 2), keepdim=True) - 8) + 4) / 4


@cache
def _to_whisper(n_mels: int) -> Tensor:
    """(n_mels, 80): Kaldi's mel energies to Whisper's.

    An energy, divided by what its filter takes of white noise, is the spectrum at its centre. The
    spectrum between two centres is a line, and Whisper's filters are sums of the spectrum.
    """
    # Imported here, because it brings much of transformers along.
    from transformers.audio_utils import mel_filter_bank

    hertz = torch.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT
    filters = mel_matrix(n_mels)
    gain = 1 + PREEMPHASIS**2 - 2 * PREEMPHASIS * (2 * torch.pi * hertz / SAMPLE_RATE).cos()
    white = gain @ filters
    filled = white > 0  # low filters may lie between two lines of the spectrum
    centres = ((hertz @ filters) / filters.sum(0))[filled]
    lines = torch.arange(WHISPER_FFT // 2 + 1) * SAMPLE_RATE / WHISPER_FFT
    right = torch.searchsorted(centres, lines).clamp(1, len(centres) - 1)
    share = ((lines - centres[right - 1]) / (centres[right] - centres[right - 1])).clamp(0, 1)
    between = torch.zeros(len(lines), len(centres))
    between.scatter_(1, (right - 1).unsqueeze(1), (1 - share).unsqueeze(1))
    between.scatter_(1, right.unsqueeze(1), share.unsqueeze(1))
    theirs = mel_filter_bank(
        len(lines), BANDS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    spectrum = torch.zeros(n_mels, len(lines))
    spectrum[filled] = (between / white[filled]).T
    hann, povey = torch.hann_window(FRAME), torch.hann_window(FRAME, periodic=False).pow(0.85)
    scale = hann.pow(2).sum() / povey.pow(2).sum() / 32768**2
    return spectrum @ torch.from_numpy(theirs).float() * scale


# --- Whisper's weights in CTranslate2's file ------------------------------------------------------


def weights_file() -> Path:
    return cache_dir() / "speech" / "whisper-base" / "model.bin"


@cache
def ear(blocks: int, device: torch.device) -> Ear:
    """The ear with Whisper's weights, one for the process, in float32; it never trains.

    Raises:
        ModelError: the weights are not there, or not Whisper's.
    """
    file = weights_file()
    if not file.is_file():
        raise ModelError(f"the ear's weights are not in {file}: run `mico-chat setup`")
    module = Ear(blocks)
    module.load_state_dict(_state(read_ctranslate2(file), blocks))
    return module.requires_grad_(False).eval().to(device)


def read_ctranslate2(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a model of CTranslate2's format 6 by name, in the file: none is copied."""

    def number(kind: str) -> int:
        return cast(int, struct.unpack(f"<{kind}", data.read(struct.calcsize(kind)))[0])

    def text() -> str:
        return data.read(number("H"))[:-1].decode()  # without the zero at its end

    try:
        with file.open("rb") as opened:
            data = mmap(opened.fileno(), 0, access=ACCESS_READ)
        if (version := number("I")) != 6:
            raise ModelError(f"{file}: CTranslate2's format {version} is not known, only 6")
        text(), number("I")  # the model's kind and revision
        found = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            dtype, size = np.dtype(_DTYPES[number("B")]), number("I")
            values = np.frombuffer(data, dtype, size // dtype.itemsize, data.tell())
            found[name] = values.reshape(shape)
            data.seek(size, SEEK_CUR)
    except (struct.error, IndexError, ValueError) as error:
        raise ModelError(f"{file}: damaged or not a model of CTranslate2") from error
    return found


_LAYERS = {
    "self_attention/linear_0/": "self_attn.in_proj_",
    "self_attention/linear_1/": "self_attn.out_proj.",
    "ffn/linear_0/": "linear1.",
    "ffn/linear_1/": "linear2.",
}
_NORMS = {"self_attention/layer_norm/": "norm1.", "ffn/layer_norm/": "norm2."}


def _state(arrays: dict[str, NDArray[Any]], blocks: int) -> dict[str, Tensor]:
    names = {"positions": "position_encodings/encodings"}
    for conv in ("conv1", "conv2"):
        names |= {f"{conv}.{part}": f"{conv}/{part}" for part in ("weight", "bias")}
    for i in range(blocks):
        for last, norm in (("weight", "gamma"), ("bias", "beta")):
            for theirs, ours in _LAYERS.items():
                names[f"blocks.{i}.{ours}{last}"] = f"layer_{i}/{theirs}{last}"
            for theirs, ours in _NORMS.items():
                names[f"blocks.{i}.{ours}{last}"] = f"layer_{i}/{theirs}{norm}"
    try:
        return {
            ours: torch.from_numpy(arrays[f"encoder/{theirs}"].astype(np.float32))
            for ours, theirs in names.items()
        }
    except KeyError as error:
        raise ModelError(f"{weights_file()}: it has no {error.args[0]}") from error
