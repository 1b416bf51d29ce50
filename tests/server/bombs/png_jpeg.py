"""PNG and JPEG files that are bombs."""

from __future__ import annotations

import struct
import zlib
from random import Random

from tests.server.bombs.bomb import Bomb, resized, zeros
from tests.server.hostile_seeds import jpeg, raster


def _png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


_SMALL = (b"IDAT", zlib.compress(bytes(4 * 13)))  # of 4 x 4 pixels


def png_huge_size(random: Random) -> bytes:
    side = random.choice([7_100, 65_535, 1_000_000, 2**31 - 1])
    return _png(side, random.choice([side, 2**31 - 1]), _SMALL)


def png_allowed_size_without_data(random: Random) -> bytes:
    return _png(random.randint(6_000, 7_000), 7_000, _SMALL)


def png_image_data_unpacks_to_64_mb(random: Random) -> bytes:
    return _png(4, 4, (b"IDAT", zeros(64)))


def png_itxt(random: Random) -> bytes:
    text = b"Comment\x00\x01\x00\x00\x00" + zeros(random.choice([2, 40]))
    return _png(4, 4, (b"iTXt", text), _SMALL)


def png_ztxt(random: Random) -> bytes:
    return _png(4, 4, (b"zTXt", b"Comment\x00\x00" + zeros(random.choice([2, 40]))), _SMALL)


def png_iccp(random: Random) -> bytes:
    return _png(4, 4, (b"iCCP", b"sRGB\x00\x00" + zeros(random.choice([2, 40]))), _SMALL)


def png_many_texts(random: Random) -> bytes:
    text = (b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(1 << 20)))
    return _png(4, 4, *([text] * 80), _SMALL)


def png_many_empty_chunks(random: Random) -> bytes:
    return _png(4, 4, *([(b"IDAT", b"")] * 20_000), _SMALL)


def png_frames_that_are_not_there(random: Random) -> bytes:
    frames = (b"acTL", struct.pack(">II", 2**31 - 1, 0))
    control = (b"fcTL", struct.pack(">IIIIIHHBB", 0, 2**31 - 1, 2**31 - 1, 0, 0, 1, 1, 0, 0))
    return _png(4, 4, frames, control, _SMALL)


def jpeg_huge_size(random: Random) -> bytes:
    return resized(jpeg(8, 8), 65_500, random.choice([1_000, 65_500]))


def jpeg_of_no_height(random: Random) -> bytes:
    return resized(jpeg(8, 8), random.choice([0, 8]), 0)


def jpeg_endless_scans(random: Random) -> bytes:
    """A progressive image of 49 million pixels whose last scan comes thousands of times."""
    data = resized(raster("RGB", "JPEG", progressive=True), 7_000, 7_000)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * random.choice([300, 5_000]) + data[-2:]


def jpeg_many_segments(random: Random) -> bytes:
    data = jpeg(16, 16)
    return data[:2] + (b"\xff\xe1\x00\x08Exif\x00\x00" * 50_000) + data[2:]


def jpeg_two_frame_headers(random: Random) -> bytes:
    data = jpeg(16, 16)
    at = data.index(b"\xff\xc0")
    header = data[at : at + 19]
    return data[:at] + header + data[at:]


BOMBS = (
    Bomb(png_huge_size, "image", "png"),
    Bomb(png_allowed_size_without_data, "image", "png"),
    Bomb(png_image_data_unpacks_to_64_mb, "image", "png", must_fail=False),
    Bomb(png_itxt, "image", "png"),
    Bomb(png_ztxt, "image", "png"),
    Bomb(png_iccp, "image", "png"),
    Bomb(png_many_texts, "image", "png"),
    Bomb(png_many_empty_chunks, "image", "png", must_fail=False),
    Bomb(png_frames_that_are_not_there, "normal", "png"),
    Bomb(jpeg_huge_size, "image", "jpg"),
    Bomb(jpeg_of_no_height, "image", "jpg"),
    Bomb(jpeg_endless_scans, "image", "jpg"),
    Bomb(jpeg_many_segments, "image", "jpg", must_fail=False),
    Bomb(jpeg_two_frame_headers, "image", "jpg", must_fail=False),
)
