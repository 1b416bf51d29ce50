"""Still images: every format, mode and rotation to upright 8-bit RGB, within the limits."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow

from mico_chat.errors import LimitError, MediaError
from mico_chat.media import Image, MediaFile, MediaLimits, decode
from mico_chat.media.file import format_of
from mico_chat.media.image import MAX_SCANS, MAX_SEGMENTS


def _save(picture: Pillow.Image, path: Path, **options: Any) -> None:
    """Save a picture; HEIC without registering Pillow's plugin, which decoding must not need."""
    if path.suffix == ".heic":
        pillow_heif.from_pillow(picture).save(path, quality=95, **options)
    else:
        picture.save(path, **options)


def _image(source: Path | bytes, **limits: int) -> Image:
    file = MediaFile("image", source, "x" if isinstance(source, bytes) else "")
    image = decode(file, MediaLimits.model_validate(limits))
    assert isinstance(image, Image)
    return image


def _pixels(source: Path | bytes) -> NDArray[np.uint8]:
    return _image(source).pixels


def _noise(fmt: str, **options: Any) -> bytes:
    """A picture of 40 x 30 pixels in a format."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Pillow.fromarray(noise).save(stream, fmt, **options)
    return stream.getvalue()


@pytest.fixture
def picture() -> Pillow.Image:
    x, y = np.meshgrid(np.linspace(0, 200, 30), np.linspace(0, 200, 20))
    return Pillow.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "fmt", "tolerance"),
    [
        *(("a.png", "PNG", 0), ("a.bmp", "BMP", 0), ("a.tiff", "TIFF", 0), ("a.jpg", "JPEG", 12)),
        *(("a.webp", "WebP", 24), ("a.gif", "GIF", 40), ("a.heic", "HEIC", 12)),
        ("a.avif", "AVIF", 12),
    ],
)
def test_formats(
    tmp_path: Path, picture: Pillow.Image, name: str, fmt: str, tolerance: int
) -> None:
    _save(picture, tmp_path / name)
    image = _image(tmp_path / name)
    wanted = np.asarray(picture).astype(int)
    assert np.abs(image.pixels - wanted).mean() <= tolerance
    assert image.report.format == fmt
    assert (image.report.width, image.report.height) == (30, 20)
    assert image.report.cut == []
    assert image.report.bytes == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.jpg", "a.heic", "a.avif"])
def test_exif_rotation_is_undone(
    tmp_path: Path, picture: Pillow.Image, orientation: int, name: str
) -> None:
    turns: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    _save(picture, tmp_path / name, exif=exif.tobytes())
    wanted = turns[orientation](np.asarray(picture)).astype(int)
    image = _image(tmp_path / name)
    assert image.pixels.shape == wanted.shape
    assert np.abs(image.pixels - wanted).mean() < 12
    assert (image.report.height, image.report.width) == wanted.shape[:2]
    small = _image(tmp_path / name, max_side=16)
    assert max(small.pixels.shape) == (15 if name == "a.jpg" else 16)  # half is nearly 16
    assert (small.pixels.shape[0] > small.pixels.shape[1]) == (wanted.shape[0] > wanted.shape[1])


def test_a_heic_file_of_several_pictures_gives_its_main_one(tmp_path: Path) -> None:
    made = pillow_heif.from_pillow(Pillow.new("RGB", (64, 64), "red"))
    made.add_from_pillow(Pillow.new("RGB", (64, 64), "blue"))
    made.save(tmp_path / "a.heic", primary_index=1, quality=95)
    image = _image(tmp_path / "a.heic")
    assert np.abs(image.pixels.astype(int) - (0, 0, 255)).max() <= 8
    assert image.report.cut == ["main picture only"]


def test_heic_and_avif_in_files_of_any_codec() -> None:
    for brands, fmt in ((b"mif1heic", "HEIC"), (b"mif1avif", "AVIF"), (b"mif1miaf", "HEIC")):
        head = b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00" + brands + bytes(99)
        assert format_of(head) == fmt


def test_alpha_lies_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, 3:] = (255, 0, 0, 255)
    rgba[:, 2] = (0, 0, 0, 128)
    Pillow.fromarray(rgba).save(tmp_path / "a.png")
    pixels = _pixels(tmp_path / "a.png")
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 3:] == (255, 0, 0)).all()
    assert np.abs(pixels[:, 2].astype(int) - 127).max() <= 1
    image = Pillow.new("P", (4, 4), 0)  # a palette with transparency
    image.putpalette([0, 0, 0, 0, 200, 0])
    image.paste(1, (2, 0, 4, 4))
    image.save(tmp_path / "a.png", transparency=0)
    pixels = _pixels(tmp_path / "a.png")
    assert (pixels[:, :2] == 255).all()
    assert (pixels[:, 2:] == (0, 200, 0)).all()


def test_16_bit_and_float_are_scaled_to_8(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a.png", "a.tiff"):
        Pillow.fromarray(grey).save(tmp_path / name)
        assert (_pixels(tmp_path / name)[..., 1] == grey >> 8).all()
    Pillow.fromarray(grey / np.float32(65535)).save(tmp_path / "a.tiff")
    pixels = _pixels(tmp_path / "a.tiff")
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Pillow.new("RGB", (8, 8), "red"), Pillow.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    image = _image(tmp_path / "a.gif")
    assert (image.pixels == (255, 0, 0)).all()
    assert image.report.cut == ["first frame only"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_large_images_are_scaled_down_and_the_report_says_so(tmp_path: Path, name: str) -> None:
    Pillow.new("RGB", (400, 100), (10, 200, 30)).save(tmp_path / name)
    image = _image(tmp_path / name, max_side=100)
    assert image.pixels.shape == (25, 100, 3)
    assert np.abs(image.pixels.astype(int) - (10, 200, 30)).max() <= 4
    assert image.report.width == 400
    assert image.report.cut == ["scaled down from 400 x 100 to 100 x 25 pixels"]


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True}), ("RGB", {"exif": 6})],
)
@pytest.mark.parametrize(
    ("size", "kept"),
    [
        ((192, 108), (96, 54)),  # half of it is nearly 100: it is not scaled a second time
        ((404, 303), (100, 75)),  # a quarter of it is one too many
        ((179, 91), (100, 51)),  # half of it would lose too much
        ((1000, 4), (100, 1)),
        ((7, 5), (7, 5)),
    ],
)
def test_a_jpeg_is_scaled_by_its_decoder_where_that_is_nearly_enough(
    size: tuple[int, int], kept: tuple[int, int], mode: str, options: dict[str, Any]
) -> None:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    ramp = Pillow.fromarray(np.stack([x, y, (x + y) / 2], -1).astype(np.uint8)).convert(mode)
    exif = Pillow.Exif()
    if turned := options.get("exif"):
        exif[0x0112], options = turned, {}
    stream = io.BytesIO()
    ramp.save(stream, "JPEG", quality=95, subsampling=0, exif=exif.tobytes(), **options)
    image = _image(stream.getvalue(), max_side=100)
    shown = np.rot90(image.pixels) if turned else image.pixels
    assert shown.shape == (kept[1], kept[0], 3)
    wanted = np.asarray(ramp.convert("RGB").resize(kept, Pillow.Resampling.BOX)).astype(int)
    assert np.abs(shown - wanted).mean() < 6
    # The report has the file's upright size, and the size that was kept.
    width, height = size[::-1] if turned else size
    assert (image.report.width, image.report.height) == (width, height)
    words = f"scaled down from {width} x {height} to {image.pixels.shape[1]} x {len(image.pixels)}"
    assert image.report.cut == ([] if size == (7, 5) else [f"{words} pixels"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_cost_the_image(tmp_path: Path, picture: Pillow.Image) -> None:
    for junk in (b"nonsense", b"II*\x00\xff\xff\xff\xff", b"MM\x00*\x00\x00\x00\x08\xff\xff\x01"):
        picture.save(tmp_path / "a.jpg", exif=b"Exif\x00\x00" + junk)
        assert _pixels(tmp_path / "a.jpg").shape == (20, 30, 3)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"save_all": True}, {"exif": b"x"}])
def test_a_webp_is_refused_by_its_size(options: dict[str, Any]) -> None:
    if "save_all" in options:
        options = {**options, "append_images": [Pillow.new("RGB", (40, 30))]}
    data = _noise("WebP", **options)
    assert _image(data, max_pixels=1200).pixels.shape == (30, 40, 3)
    with pytest.raises(LimitError, match="40 x 30 pixels is 1200 pixels"):
        _image(data, max_pixels=1199)
    header = data[:30] + bytes(8)  # the size is known before anything else is looked at
    with pytest.raises(LimitError, match="40 x 30 pixels"):
        _image(header, max_pixels=1199)


@pytest.mark.parametrize("length", range(8, 40, 3))
def test_headers_that_end_early(length: int) -> None:
    for fmt in ("WebP", "PNG", "JPEG"):
        with pytest.raises(MediaError, match=r"^x: (damaged|not a picture)"):
            _image(_noise(fmt)[:length])


@pytest.mark.parametrize("scans", [1, 200, 5_000])
def test_a_jpeg_of_endless_scans(scans: int) -> None:
    data = _noise("JPEG", progressive=True)
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
def test_bytes_after_a_jpeg_are_not_counted_as_scans(progressive: bool) -> None:
    data = _noise("JPEG", progressive=progressive)
    assert _image(data + b"\xff\xda\x00\x02" * 1_000).pixels.shape == (30, 40, 3)


def test_a_jpeg_of_endless_segments() -> None:
    data = _noise("JPEG")
    segment = b"\xff\xe1\x00\x04ab"
    assert _image(data[:2] + segment * 1_000 + data[2:]).pixels.shape == (30, 40, 3)
    with pytest.raises(MediaError, match="no picture behind 10,000 parts of its header"):
        _image(data[:2] + segment * MAX_SEGMENTS + data[2:])


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP", b"iTXt"])
def test_texts_that_unpack_to_many_bytes(name: bytes) -> None:
    packed = zlib.compress(bytes(2 << 20))
    head = b"a\x00\x01\x00\x00\x00" if name == b"iTXt" else b"a\x00\x00"
    body = name + head + packed
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    data = _noise("PNG")
    with pytest.raises(MediaError, match="unpack to more than 1 MiB; save it without them"):
        _image(data[:33] + chunk + data[33:])


def test_a_gif_frame_larger_than_its_screen() -> None:
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\x00;"
    screen = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes(6)
    with pytest.raises(LimitError, match="MICO_MEDIA_MAX_PIXELS"):
        _image(screen + frame)
