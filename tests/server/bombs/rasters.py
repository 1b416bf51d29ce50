"""GIF, WebP, BMP and TIFF files that are bombs."""

from __future__ import annotations

import struct
from random import Random

from tests.server.bombs.bomb import Bomb, riff, zeros


def _gif(screen: tuple[int, int], frame: tuple[int, int], n: int = 1) -> bytes:
    one = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00"
    palette = bytes(6)
    return b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + palette + one * n + b";"


def gif_huge_screen(random: Random) -> bytes:
    return _gif((65_535, 65_535), (1, 1))


def gif_frame_beyond_its_screen(random: Random) -> bytes:
    return _gif((1, 1), (65_535, random.choice([1_000, 65_535])))


def gif_many_frames(random: Random) -> bytes:
    return _gif((7_000, 7_000), (1, 1), 50_000)


def _24(value: int) -> bytes:
    return value.to_bytes(3, "little")


def webp_huge_canvas(random: Random) -> bytes:
    side = random.choice([16_383, 65_535])
    canvas = (b"VP8X", b"\x02\x00\x00\x00" + _24(side) + _24(16_383))
    frame = (b"ANMF", _24(0) * 2 + _24(side) + _24(16_383) + _24(1) + b"\x00" + b"VP8L" + bytes(8))
    return riff(b"WEBP", canvas, (b"ANIM", bytes(6)), frame)


def webp_huge_lossless(random: Random) -> bytes:
    return riff(b"WEBP", (b"VP8L", b"\x2f" + b"\xff\xff\xff\x0f" + bytes(40)))


def webp_huge_lossy(random: Random) -> bytes:
    start = b"\x10\x02\x00\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383)
    return riff(b"WEBP", (b"VP8 ", start + bytes(64)))


def _bmp(width: int, height: int, *, bits: int = 24, packing: int = 0, data: bytes = b"") -> bytes:
    colours = 2**31 - 1 if bits == 8 and packing == 0 else 0
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, packing, 0, 1, 1, colours, 0)
    start = 54 + (1024 if bits == 8 else 0)
    body = info + bytes(start - 54) + data
    return b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, start) + body


def bmp_absurd_size(random: Random) -> bytes:
    width = random.choice([0, -1, 50_000, 2**31 - 1])
    return _bmp(width, random.choice([2**31 - 1, -(2**31), 50_000]))


def bmp_absurd_palette(random: Random) -> bytes:
    return _bmp(4, 4, bits=8, data=bytes(8))


def bmp_run_lengths(random: Random) -> bytes:
    """Runs, jumps and line ends over 49 million pixels."""
    run = random.choice([b"\xff\x01", b"\x00\x02\xff\xff", b"\x00\x00", b"\x01\x01"])
    return _bmp(7_000, 7_000, bits=8, packing=1, data=run * 100_000)


_SIZES = {1: "B", 3: "H", 4: "I"}


def _tiff(
    width: int,
    height: int,
    *,
    data: bytes = bytes(64),
    packing: int = 1,
    more: tuple[tuple[int, int, int, int], ...] = (),
    following: int = 0,
) -> bytes:
    """One page of 8-bit grey; ``more`` are tags (tag, type, count, value) that go before ours."""
    tags = {
        256: (256, 4, 1, width),
        257: (257, 4, 1, height),
        258: (258, 3, 1, 8),
        259: (259, 3, 1, packing),
        262: (262, 3, 1, 1),
        273: (273, 4, 1, 8),
        277: (277, 3, 1, 1),
        278: (278, 4, 1, height),
        279: (279, 4, 1, len(data)),
        **{tag[0]: tag for tag in more},
    }
    page = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", *tags[tag]) for tag in sorted(tags)
    )
    at = 8 + len(data)
    return b"II*\x00" + struct.pack("<I", at) + data + page + struct.pack("<I", following or 0)


def tiff_huge_size(random: Random) -> bytes:
    return _tiff(random.choice([2**31 - 1, 2**32 - 1, 60_000]), 2**31 - 1)


def tiff_huge_strip(random: Random) -> bytes:
    return _tiff(5_000, 5_000, more=((279, 4, 1, 2**32 - 1),))


def tiff_count_of_strips(random: Random) -> bytes:
    n = random.choice([2**20, 2**31 - 1, 2**32 - 1])
    return _tiff(5_000, 5_000, more=((273, 4, n, 8), (279, 4, n, 8), (278, 4, 1, 1)))


def tiff_packed_zeros(random: Random) -> bytes:
    return _tiff(20_000, 20_000, data=zeros(64), packing=8)


def tiff_pages_in_a_circle(random: Random) -> bytes:
    return _tiff(8, 8, following=8 + 64)


def tiff_samples_of_a_pixel(random: Random) -> bytes:
    return _tiff(7_000, 7_000, more=((277, 3, 1, 65_535), (258, 3, 65_535, 8)))


def tiff_without_tags(random: Random) -> bytes:
    return b"MM\x00*" + struct.pack(">IH", 8, random.choice([0, 65_535]))


BOMBS = (
    Bomb(gif_huge_screen, "image", "gif"),
    Bomb(gif_frame_beyond_its_screen, "image", "gif"),
    Bomb(gif_many_frames, "image", "gif", must_fail=False),
    Bomb(webp_huge_canvas, "image", "webp"),
    Bomb(webp_huge_lossless, "image", "webp"),
    Bomb(webp_huge_lossy, "image", "webp"),
    Bomb(bmp_absurd_size, "image", "bmp"),
    Bomb(bmp_absurd_palette, "image", "bmp"),
    Bomb(bmp_run_lengths, "image", "bmp", must_fail=False),
    Bomb(tiff_huge_size, "image", "tiff"),
    Bomb(tiff_huge_strip, "image", "tiff"),
    Bomb(tiff_count_of_strips, "image", "tiff"),
    Bomb(tiff_packed_zeros, "depth", "tiff"),
    Bomb(tiff_pages_in_a_circle, "image", "tiff", must_fail=False),
    Bomb(tiff_samples_of_a_pixel, "image", "tiff"),
    Bomb(tiff_without_tags, "image", "tiff"),
)
