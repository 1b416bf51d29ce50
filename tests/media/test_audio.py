"""Sounds: every container, rate and channel layout to 16 kHz mono."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mico_chat.errors import MediaError
from mico_chat.media import Audio, MediaFile, MediaLimits, decode


def _sound(path: Path | bytes, **limits: float) -> Audio:
    audio = decode(MediaFile("audio", path), MediaLimits.model_validate(limits))
    assert isinstance(audio, Audio)
    return audio


def _hertz(audio: Audio) -> float:
    spectrum = np.abs(np.fft.rfft(audio.samples))
    return float(np.argmax(spectrum) * audio.sample_rate / len(audio.samples))


@pytest.mark.parametrize(
    ("name", "codec", "fmt", "rate"),
    [
        ("a.wav", "pcm_s16le", "WAV", 44_100),
        ("u8.wav", "pcm_u8", "WAV", 8_000),
        ("s24.wav", "pcm_s24le", "WAV", 96_000),
        ("float.wav", "pcm_f32le", "WAV", 11_025),
        ("a.flac", "flac", "FLAC", 22_050),
        ("a.mp3", "libmp3lame", "MP3", 44_100),
        ("opus.ogg", "libopus", "OGG", 48_000),
        ("a.m4a", "aac", "M4A", 32_000),
        ("a.aiff", "pcm_s16be", "AIFF", 16_000),
        ("a.webm", "libopus", "WebM", 48_000),
    ],
)
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_formats_rates_and_channels(
    make_sound: Callable[..., Path], name: str, codec: str, fmt: str, rate: int, layout: str
) -> None:
    audio = _sound(make_sound(name, codec, rate=rate, layout=layout))
    assert audio.samples.dtype == np.float32
    assert audio.sample_rate == 16_000
    assert audio.seconds == pytest.approx(1.0, abs=0.1)  # codecs pad to whole blocks
    assert _hertz(audio) == pytest.approx(440, abs=3)
    assert np.std(audio.samples) == pytest.approx(0.5 / np.sqrt(2), abs=0.04)
    report = audio.report
    assert (report.format, report.sample_rate) == (fmt, rate)
    assert report.channels == (1 if layout == "mono" else 2)


@pytest.mark.parametrize("channels", [2, 3, 5, 8, 11])
def test_loud_channels_are_averaged_not_clipped(channels: int) -> None:
    loud = np.where(np.arange(16_000) % 100 < 50, 32_000, -32_000)
    frames = np.tile(loud[:, None], (1, channels)).astype("<i2").tobytes()
    audio = _sound(_wav(len(frames), frames, channels=channels))
    assert audio.report.channels == channels
    assert audio.samples == pytest.approx(loud / 32_768, abs=1e-3)


def test_long_sounds_are_cut_and_the_report_says_so(make_sound: Callable[..., Path]) -> None:
    path = make_sound("a.wav", "pcm_s16le", seconds=4.0, rate=8_000)
    audio = _sound(path, max_seconds=1.5)
    assert len(audio.samples) == 24_000
    assert audio.report.seconds == 1.5
    assert audio.report.cut == ["only the first 1.5 s of 4.0 s of sound are used"]


def test_a_clip_as_audio_gives_its_sound_track(make_clip: Callable[..., Path]) -> None:
    assert _sound(make_clip("a.mp4", "libx264", sound="aac")).seconds == pytest.approx(3, abs=0.1)
    with pytest.raises(MediaError, match=r"silent\.mp4: no sound track in this MP4 file"):
        _sound(make_clip("silent.mp4", "libx264"))


def _wav(
    n_claimed: int, payload: bytes, *, rate: int = 16_000, channels: int = 1, floats: bool = False
) -> bytes:
    code, n_bytes = (3, 4) if floats else (1, 2)
    frame = n_bytes * channels
    fmt = struct.pack("<IHHIIHH", 16, code, channels, rate, rate * frame, frame, 8 * n_bytes)
    riff = struct.pack("<4sI8s", b"RIFF", min(n_claimed + 36, 2**32 - 1), b"WAVEfmt ")
    return riff + fmt + struct.pack("<4sI", b"data", n_claimed) + payload


PAYLOAD = (np.sin(np.arange(16_000) / 5) * 9_000).astype("<i2").tobytes()


@pytest.mark.parametrize("claimed", [2**32 - 1, 2**32 - 16, 4_000_000_000, 2 * len(PAYLOAD) + 2])
def test_a_wav_that_claims_more_than_it_holds_is_an_error(claimed: int) -> None:
    with pytest.raises(MediaError, match=rf"audio: .* claims {claimed:,} .* holds 32,000"):
        _sound(_wav(claimed, PAYLOAD))


def test_a_wav_that_is_cut_short_or_that_ffmpeg_wrote_into_a_pipe_is_heard() -> None:
    audio = _sound(_wav(len(PAYLOAD) * 3 // 2, PAYLOAD))
    assert audio.seconds == pytest.approx(1.0, abs=0.01)
    assert len(audio.report.cut) <= 1
    note = b"INFOISFT" + struct.pack("<I", 14) + b"Lavf61.7.100\0\0"
    listed = b"LIST" + struct.pack("<I", len(note)) + note
    plain = _wav(2**32 - 1, PAYLOAD)
    at = plain.index(b"data")
    piped = b"RIFF" + b"\xff" * 4 + plain[8:at] + listed + plain[at:]
    assert _sound(piped).seconds == pytest.approx(1.0, abs=0.01)


def test_a_long_wav_says_its_size_elsewhere() -> None:
    plain = _wav(2**32 - 1, PAYLOAD)
    for claimed, heard in ((len(PAYLOAD), True), (2**33, False)):
        ds64 = b"ds64" + struct.pack("<IQQQI", 28, claimed + 72, claimed, 16_000, 0)
        data = b"RF64" + b"\xff" * 4 + b"WAVE" + ds64 + plain[12:]
        if heard:
            assert _sound(data).seconds == pytest.approx(1.0, abs=0.01)
        else:
            with pytest.raises(MediaError, match=f"claims {claimed:,} "):
                _sound(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_wav(2**32 - 16, b""), "no sound can be decoded from this WAV file"),
        (_wav(3_200, bytes(3_200), rate=2_000_000_000), "audio: "),
        (_wav(320_000, bytes(320_000), channels=5_000), "audio: "),
        (_wav(3_200, bytes(3_200), rate=99), "claims 99 samples a second; it must be 100 to 1000"),
    ],
)
def test_absurd_headers_are_errors(data: bytes, said: str) -> None:
    with pytest.raises(MediaError, match=said):
        _sound(data)


def test_the_lowest_rate_is_heard() -> None:
    assert _sound(_wav(len(PAYLOAD), PAYLOAD, rate=100)).seconds == pytest.approx(160, abs=0.1)


def test_a_wav_of_endless_chunks_is_an_error() -> None:
    plain = _wav(len(PAYLOAD), PAYLOAD)
    junk = b"junk\x00\x00\x00\x00"
    assert _sound(plain[:12] + junk * 1_000 + plain[12:]).seconds == pytest.approx(1, abs=0.01)
    with pytest.raises(MediaError, match="no sound behind the first 10,000 parts of its header"):
        _sound(plain[:12] + junk * 10_000 + plain[12:])


def test_not_finite_samples_become_finite() -> None:
    samples = np.array([np.nan, np.inf, -np.inf, 1e30, 0.25] * 400, "<f4").tobytes()
    audio = _sound(_wav(len(samples), samples, floats=True))
    assert np.isfinite(audio.samples).all()
    assert np.abs(audio.samples).max() <= 1
