"""Sound files that are bombs."""

from __future__ import annotations

import struct
from functools import cache
from random import Random

from tests.server.bombs.bomb import Bomb, riff, zeros
from tests.server.hostile_seeds import sound


def _wav(
    *, rate: int = 8_000, channels: int = 1, bits: int = 16, align: int = 2, claims: int = 16_000
) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate, (rate * align) % 2**32, align, bits)
    data = bytes(16_000)
    return riff(b"WAVE", (b"fmt ", form)) + b"data" + struct.pack("<I", claims) + data


def wav_absurd_rate(random: Random) -> bytes:
    return _wav(rate=random.choice([0, 1, 2**31 - 1, 2**32 - 1, 1_000_001]))


def wav_absurd_channels(random: Random) -> bytes:
    channels = random.choice([0, 65, 1_000, 65_535])
    return _wav(channels=channels, align=2 * channels % 2**16)


def wav_absurd_length(random: Random) -> bytes:
    return _wav(claims=random.choice([2**31, 2**32 - 1, 10**6]))


def wav_of_chunks_without_end(random: Random) -> bytes:
    return riff(b"WAVE") + bytes(random.choice([8_000, 4 << 20]))


def wav_64_absurd(random: Random) -> bytes:
    sizes = struct.pack("<QQQI", 2**64 - 1, random.choice([2**63, 2**64 - 1]), 0, 0)
    riff = _wav(claims=2**32 - 1)
    return b"RF64\xff\xff\xff\xffWAVE" + b"ds64" + struct.pack("<I", 28) + sizes + riff[12:]


def flac_absurd_header(random: Random) -> bytes:
    """A header that claims 2**36 samples at an absurd rate, and nothing behind it."""
    rate = random.choice([0, 655_350, 1_048_575])
    fields = rate << 44 | 7 << 41 | 31 << 36 | (2**36 - 1)
    stream = struct.pack(">HH", 65_535, 65_535) + bytes(6) + fields.to_bytes(8, "big") + bytes(16)
    return b"fLaC\x80\x00\x00\x22" + stream


@cache
def _silence(rate: int, layout: str, copies: int) -> bytes:
    """FLAC packs silence two-thousandfold; its frames may come again and again."""
    data = sound("flac", "flac", hertz=0.0, rate=rate, layout=layout, seconds=1.0)
    first = data.index(b"\xff\xf8", 42)
    frame = data[first : data.index(b"\xff\xf8", first + 2)]
    return data[:first] + frame * copies


def flac_hours_of_silence(random: Random) -> bytes:
    return _silence(96_000, "5.1", 100_000)


def _syncsafe(size: int) -> bytes:
    return bytes((size >> shift) & 0x7F for shift in (21, 14, 7, 0))


def mp3_tag_of_256_mb(random: Random) -> bytes:
    return b"ID3\x04\x00\x00" + _syncsafe(2**28 - 1) + sound("libmp3lame", "mp3")


def mp3_packed_tag(random: Random) -> bytes:
    packed = zeros(16)
    claims = random.choice([16 << 20, 2**28 - 1])
    frame = b"TXXX" + _syncsafe(len(packed) + 4) + b"\x00\x09" + _syncsafe(claims) + packed
    tag = b"ID3\x04\x00\x00" + _syncsafe(len(frame)) + frame
    return tag + sound("libmp3lame", "mp3")


def aiff_absurd_rate(random: Random) -> bytes:
    data = sound("pcm_s16be", "aiff", rate=8_000)
    at = data.index(b"COMM") + 16
    rate = random.choice([b"\x7f\xfe" + b"\xff" * 8, bytes(10), b"\x40\x1d" + b"\xff" * 8])
    return data[:at] + rate + data[at + 10 :]


def ogg_absurd_channels(random: Random) -> bytes:
    data = bytearray(sound("libopus", "ogg", rate=48_000))
    data[data.index(b"OpusHead") + 9] = random.choice([0, 255])
    return bytes(data)


BOMBS = (
    Bomb(wav_absurd_rate, "audio", "wav"),
    Bomb(wav_absurd_channels, "audio", "wav"),
    Bomb(wav_absurd_length, "audio", "wav"),
    Bomb(wav_of_chunks_without_end, "audio", "wav"),
    Bomb(wav_64_absurd, "audio", "wav"),
    Bomb(flac_absurd_header, "audio", "flac"),
    Bomb(flac_hours_of_silence, "audio", "flac", must_fail=False),
    Bomb(mp3_tag_of_256_mb, "audio", "mp3"),
    Bomb(mp3_packed_tag, "audio", "mp3", must_fail=False),
    Bomb(aiff_absurd_rate, "audio", "aiff"),
    Bomb(ogg_absurd_channels, "audio", "ogg"),
)
