"""Small good files of every format that the service reads, made on the spot."""

import io
import zipfile
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import Image as Pillow
from scipy.io import wavfile

from mico_chat.media.kinds import Kind
from tests.support.made import REPEATABLE, tone, write_clip, write_pictures, write_sound


@dataclass(frozen=True)
class Good:
    """A file that is answered; ``family`` is what it is, ``kind`` what it is sent as."""

    kind: Kind
    family: str
    extension: str
    data: bytes


ACCEPTED: dict[Kind, frozenset[str]] = {
    "image": frozenset({"raster"}),
    "normal": frozenset({"raster"}),
    "depth": frozenset({"raster", "array"}),
    "audio": frozenset({"sound", "clip"}),
    "video": frozenset({"clip"}),
}
"""The families of files that a kind of medium may come in."""


@cache
def good_files() -> tuple[Good, ...]:
    return (*_images(), *_maps(), *_sounds(), *_clips())


def pixels(width: int = 40, height: int = 30) -> NDArray[np.uint8]:
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    slope = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    return (slope + noise).astype(np.uint8)


def raster(mode: str, fmt: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Pillow.fromarray(pixels()).convert(mode).save(stream, fmt, **options)
    return stream.getvalue()


def heic(**options: Any) -> bytes:
    stream = io.BytesIO()
    picture = Pillow.fromarray(pixels(160, 120) if options else pixels())
    pillow_heif.from_pillow(picture).save(stream, quality=50, **options)
    return stream.getvalue()


def npy(array: NDArray[Any], version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


def npz(packing: int, *members: tuple[str, bytes]) -> bytes:
    """A .npz, or any other zip file, without the time it was made at."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, packing)
    return stream.getvalue()


def sound(codec: str, container_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    options = {"seconds": 0.3, "container_options": REPEATABLE, **options}
    write_sound(stream, codec, container_format=container_format, **options)
    return stream.getvalue()


def clip(codec: str, container_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    options = {"n": 12, **options}
    options["container_options"] = REPEATABLE | options.get("container_options", {})
    write_clip(stream, codec, container_format=container_format, **options)
    return stream.getvalue()


def clip_of(pictures: list[bytes]) -> bytes:
    stream = io.BytesIO()
    write_pictures(stream, pictures, "avi")
    return stream.getvalue()


def jpeg(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Pillow.fromarray(pixels(width, height)).save(stream, "JPEG")
    return stream.getvalue()


def _images() -> list[Good]:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    frames = [Pillow.fromarray(pixels() + i) for i in (1, 2)]
    more: dict[str, Any] = {"save_all": True, "append_images": frames}
    files = [
        ("jpg", raster("RGB", "JPEG", exif=exif)),
        ("jpg", raster("RGB", "JPEG", progressive=True)),
        ("png", raster("RGB", "PNG")),
        ("png", raster("P", "PNG")),
        ("png", raster("RGBA", "PNG", **more)),
        ("gif", raster("P", "GIF", **more)),
        ("webp", raster("RGBA", "WebP", lossless=True, **more)),
        ("bmp", raster("P", "BMP")),
        ("tiff", raster("RGB", "TIFF", compression="tiff_lzw", **more)),
        ("tiff", raster("1", "TIFF", compression="group4")),
        ("avif", raster("RGBA", "AVIF", exif=exif)),
        ("heic", heic()),
        ("heic", heic(tile_size=64)),
    ]
    return [Good("image", "raster", extension, data) for extension, data in files]


def _maps() -> list[Good]:
    millimetres = (np.arange(30 * 40).reshape(30, 40) + 500).astype(np.uint16)
    metres = millimetres.astype(np.float32) / 1000
    png16, tiff = io.BytesIO(), io.BytesIO()
    Pillow.fromarray(millimetres).save(png16, "PNG")
    Pillow.fromarray(metres).save(tiff, "TIFF")
    members = (("other.npy", npy(metres[0])), ("depth.npy", npy(metres)))
    arrays = [
        ("npy", npy(metres)),
        ("npy", npy(np.asfortranarray(metres.astype(">f8")), (3, 0))),
        ("npz", npz(zipfile.ZIP_STORED, members[1])),
        ("npz", npz(zipfile.ZIP_DEFLATED, *members)),
    ]
    return [
        Good("depth", "raster", "png", png16.getvalue()),
        Good("depth", "raster", "png", raster("L", "PNG")),
        Good("depth", "raster", "tiff", tiff.getvalue()),
        *(Good("depth", "array", extension, data) for extension, data in arrays),
        Good("normal", "raster", "png", raster("RGB", "PNG")),
        Good("normal", "raster", "webp", raster("RGB", "WebP")),
    ]


def _sounds() -> list[Good]:
    wav = io.BytesIO()
    wavfile.write(wav, 22_050, tone(0.2, 22_050, 2).T)
    files = [
        ("wav", wav.getvalue()),
        ("flac", sound("flac", "flac")),
        ("ogg", sound("libopus", "ogg", rate=48_000)),
        ("mp3", sound("libmp3lame", "mp3")),
        ("m4a", sound("aac", "ipod")),
        ("aiff", sound("pcm_s16be", "aiff", rate=8_000)),
    ]
    return [Good("audio", "sound", extension, data) for extension, data in files]


def _clips() -> list[Good]:
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    files = [
        ("mp4", clip("libx264", "mp4", sound="aac")),
        ("mp4", clip("libx264", "mp4", container_options=fragments)),
        ("mov", clip("mpeg4", "mov", sound="pcm_s16le")),
        ("webm", clip("libvpx", "webm", sound="libopus")),
        ("avi", clip("mpeg4", "avi", sound="libmp3lame")),
        ("avi", clip("mjpeg", "avi")),
        ("avi", clip_of([jpeg(64, 48), jpeg(80, 60), jpeg(16, 90)])),
    ]
    return [Good("video", "clip", extension, data) for extension, data in files]
