"""Raster files are refused by what their headers claim, and good ones never are."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from mico_chat.errors import LimitError, MediaError
from mico_chat.media import Image, MediaFile, MediaLimits, decode
from mico_chat.media.image import MAX_SCANS, MAX_SEGMENTS


def _picture(fmt: str, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Pillow.fromarray(noise).save(stream, fmt, **options)
    return stream.getvalue()


def _image(data: bytes, **limits: int) -> Image:
    image = decode(MediaFile("image", data, "x"), MediaLimits.model_validate(limits))
    assert isinstance(image, Image)
    return image


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"save_all": True}, {"exif": b"x"}])
def test_a_webp_is_refused_by_its_size(options: dict[str, Any]) -> None:
    if "save_all" in options:
        options = {**options, "append_images": [Pillow.new("RGB", (40, 30))]}
    data = _picture("WebP", **options)
    assert _image(data, max_pixels=1200).pixels.shape == (30, 40, 3)
    with pytest.raises(LimitError, match="40 x 30 pixels is 1200 pixels"):
        _image(data, max_pixels=1199)
    header = data[:30] + bytes(8)  # the size is known before anything else is looked at
    with pytest.raises(LimitError, match="40 x 30 pixels"):
        _image(header, max_pixels=1199)


@pytest.mark.parametrize("length", range(8, 40, 3))
def test_headers_that_end_early(length: int) -> None:
    for fmt in ("WebP", "PNG", "JPEG"):
        with pytest.raises(MediaError, match=r"^x: (truncated|damaged|not an image)"):
            _image(_picture(fmt)[:length])


@pytest.mark.parametrize("scans", [1, 200, 5_000])
def test_a_jpeg_of_endless_scans(scans: int) -> None:
    data = _picture("JPEG", progressive=True)
    own = data.count(b"\xff\xda")
    assert 5 < own < 20
    last = data.rindex(b"\xff\xda")
    data = data[:last] + data[last:-2] * scans + data[-2:]
    if own + scans - 1 <= MAX_SCANS:
        assert _image(data).pixels.shape == (30, 40, 3)
        return
    with pytest.raises(MediaError, match=f"{own + scans - 1} scans in a progressive JPEG"):
        _image(data)


@pytest.mark.parametrize("progressive", [False, True])
def test_what_follows_a_jpeg_is_none_of_its_scans(progressive: bool) -> None:
    data = _picture("JPEG", progressive=progressive)
    assert _image(data + b"\xff\xda\x00\x02" * 1_000).pixels.shape == (30, 40, 3)


def test_a_jpeg_of_endless_segments() -> None:
    data = _picture("JPEG")
    segment = b"\xff\xe1\x00\x04ab"
    assert _image(data[:2] + segment * 1_000 + data[2:]).pixels.shape == (30, 40, 3)
    with pytest.raises(MediaError, match="no picture behind 10,000 parts of its header"):
        _image(data[:2] + segment * MAX_SEGMENTS + data[2:])


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_texts_that_unpack_to_much(name: bytes) -> None:
    packed = zlib.compress(bytes(2 << 20))
    head = b"a\x00\x01\x00\x00\x00" if name == b"iTXt" else b"a\x00\x00"
    body = name + head + packed
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = _picture("PNG")
    with pytest.raises(MediaError, match="unpack to more than 1 MiB; save it without them"):
        _image(data[:33] + chunk + data[33:])


def test_a_gif_frame_larger_than_its_screen() -> None:
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\x00;"
    screen = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes(6)
    with pytest.raises(LimitError, match="MICO_MEDIA_MAX_PIXELS"):
        _image(screen + frame)
