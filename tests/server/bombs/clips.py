"""MP4, MOV, WebM and AVI files that are bombs."""

from __future__ import annotations

import struct
from functools import cache
from random import Random

from tests.server.bombs.bomb import Bomb, resized, zeros
from tests.server.hostile_seeds import clip, clip_of, jpeg


@cache
def _mp4() -> bytes:
    return clip("libx264", "mp4", n=6)


def _box(name: bytes, at: int, value: bytes, data: bytes | None = None) -> bytes:
    """An MP4 with ``value`` at byte ``at`` of a box, counted from its name's end."""
    data = _mp4() if data is None else data
    start = data.index(name) + 4 + at
    return data[:start] + value + data[start + len(value) :]


def _absurd(random: Random) -> bytes:
    return struct.pack(">I", random.choice([0, 10**7, 2**28 - 1, 2**31 - 1, 2**32 - 1]))


def mp4_absurd_counts(random: Random) -> bytes:
    """Of samples, times, offsets or chunks in the tables of a track."""
    name, at = random.choice([(b"stsz", 8), (b"stts", 4), (b"ctts", 4), (b"stco", 4), (b"stsc", 4)])
    return _box(name, at, _absurd(random))


def mp4_frames_of_no_size(random: Random) -> bytes:
    """Millions of frames of one size and one time each, which take no room in the tables."""
    n = struct.pack(">I", random.choice([10**6, 10**7, 5 * 10**7]))
    size = struct.pack(">I", random.choice([0, 1]))
    data = _box(b"stsz", 4, size + n)
    data = _box(b"stts", 8, n, data)
    return _box(b"stsc", 12, n, data)


def mp4_absurd_times(random: Random) -> bytes:
    """Units and lengths of the clip's clock."""
    name, at = random.choice([(b"mvhd", 12), (b"mdhd", 12), (b"mvhd", 16), (b"mdhd", 16)])
    return _box(name, at, _absurd(random))


def mp4_absurd_frame_length(random: Random) -> bytes:
    return _box(b"stts", 12, _absurd(random))


def mp4_absurd_frame_size(random: Random) -> bytes:
    size = random.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x3f\xff\x3f\xff"])
    return _box(b"avc1", 24, size)


def mov_packed_header(random: Random) -> bytes:
    packed = struct.pack(">I", random.choice([2**31 - 1, 2**26])) + zeros(64)

    def box(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", 8 + len(body)) + name + body

    inner = box(b"dcom", b"zlib") + box(b"cmvd", packed)
    return box(b"ftyp", b"qt  " + bytes(4)) + box(b"moov", box(b"cmov", inner))


def mp4_boxes_in_boxes(random: Random) -> bytes:
    body = b""
    for _ in range(10_000):
        body = struct.pack(">I", min(8 + len(body), 2**32 - 1)) + b"moov" + body
    return b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00" + body


def _ebml(name: bytes, body: bytes) -> bytes:
    return name + (len(body) | 1 << 56).to_bytes(8, "big") + body


def _webm(info: bytes, tracks: bytes) -> bytes:
    head = _ebml(b"\x42\x82", b"webm")
    segment = _ebml(b"\x15\x49\xa9\x66", info) + _ebml(b"\x16\x54\xae\x6b", tracks)
    segment += _ebml(b"\x1f\x43\xb6\x75", _ebml(b"\xe7", b"\x00"))  # a cluster without a frame
    return _ebml(b"\x1a\x45\xdf\xa3", head) + _ebml(b"\x18\x53\x80\x67", segment)


def _track(number: int, width: int, height: int) -> bytes:
    video = _ebml(b"\xb0", width.to_bytes(4, "big")) + _ebml(b"\xba", height.to_bytes(4, "big"))
    fields = _ebml(b"\xd7", bytes([number % 255 + 1])) + _ebml(b"\x83", b"\x01")
    return _ebml(b"\xae", fields + _ebml(b"\x86", b"V_VP8") + _ebml(b"\xe0", video))


def webm_many_tracks(random: Random) -> bytes:
    n = random.choice([900, 5_000])
    return _webm(b"", b"".join(_track(i, 16_000, 16_000) for i in range(n)))


def webm_absurd_size(random: Random) -> bytes:
    side = random.choice([0, 16_000, 2**32 - 1])
    return _webm(b"", _track(1, side, side))


def webm_absurd_clock(random: Random) -> bytes:
    data = clip("libvpx", "webm", n=6)
    at = data.index(b"\x2a\xd7\xb1\x83") + 4
    return data[:at] + random.choice([b"\x00\x00\x00", b"\xff\xff\xff"]) + data[at + 3 :]


def avi_absurd_header(random: Random) -> bytes:
    """Rate, scale, length or frame size of the video stream."""
    data = clip("mpeg4", "avi", n=6)
    name, at = random.choice([(b"strh", 24), (b"strh", 28), (b"strh", 36), (b"strf", 8)])
    start = data.index(name) + 4 + at
    return data[:start] + _absurd(random) + data[start + 4 :]


def avi_of_huge_pictures(random: Random) -> bytes:
    """Frames that claim to be far larger than the header says."""
    side = random.choice([9_000, 65_500])
    return clip_of([resized(jpeg(64, 48), side, side)] * 12)


def avi_of_growing_pictures(random: Random) -> bytes:
    return clip_of([resized(jpeg(64, 48), 64 * n * n, 48 * n * n) for n in range(1, 12)])


BOMBS = (
    Bomb(mp4_absurd_counts, "video", "mp4", must_fail=False),
    Bomb(mp4_frames_of_no_size, "video", "mp4", must_fail=False),
    Bomb(mp4_absurd_times, "video", "mp4", must_fail=False),
    Bomb(mp4_absurd_frame_length, "video", "mp4", must_fail=False),
    Bomb(mp4_absurd_frame_size, "video", "mp4", must_fail=False),
    Bomb(mov_packed_header, "video", "mov"),
    Bomb(mp4_boxes_in_boxes, "video", "mp4"),
    Bomb(webm_many_tracks, "video", "webm"),
    Bomb(webm_absurd_size, "video", "webm"),
    Bomb(webm_absurd_clock, "video", "webm", must_fail=False),
    Bomb(avi_absurd_header, "video", "avi", must_fail=False),
    Bomb(avi_of_huge_pictures, "video", "avi"),
    Bomb(avi_of_growing_pictures, "video", "avi", must_fail=False),
)
