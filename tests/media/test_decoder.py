"""The worker process: each hostile file gets one clear error, and the next file works."""

import io
import os
import signal
import struct
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image as Pillow

from mico_chat.errors import LimitError, MediaError, MicoError, MissingFileError
from mico_chat.media import Image, Kind, MediaDecoder, MediaFile, MediaLimits, decode
from mico_chat.media.medium import Medium

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def _encoded(fmt: str, size: tuple[int, int] = (64, 64)) -> bytes:
    noise: NDArray[np.uint8] = np.random.default_rng(0).integers(
        0, 255, (size[1], size[0], 3), np.uint8
    )
    stream = io.BytesIO()
    Pillow.fromarray(noise).save(stream, fmt)
    return stream.getvalue()


def _png_header(width: int, height: int) -> bytes:
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))


def _heic(size: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    pillow_heif.from_pillow(Pillow.new("RGB", (64, 64))).save(stream)
    whole = stream.getvalue()
    at = whole.index(b"ispe") + 8
    return whole if size is None else whole[:at] + struct.pack(">II", *size) + whole[at + 8 :]


HOSTILE: list[tuple[Kind, str, bytes, str]] = [
    ("image", "broken.jpg", _encoded("JPEG")[:900], "damaged JPEG (image data cannot"),
    ("image", "broken.png", _encoded("PNG")[:900], "damaged PNG (image data cannot"),
    ("image", "broken.webp", _encoded("WebP")[:900], "damaged WebP (image data cannot"),
    ("image", "broken.bmp", _encoded("BMP")[:900], "damaged BMP (image data cannot"),
    ("image", "broken.heic", _heic()[:-9], "damaged HEIC (image data cannot"),
    ("image", "broken.avif", _encoded("AVIF")[:900], "damaged AVIF (image data cannot"),
    ("image", "other.heic", _heic((16, 16)), "damaged HEIC (image data cannot"),
    ("image", "huge.heic", _heic((60_000, 60_000)), "60000 x 60000 pixels is 3600000000 pixels, "),
    ("image", "stub.jpg", b"\xff\xd8\xff\xe0", "damaged JPEG (image data cannot"),
    ("image", "empty.jpg", b"", "file is empty (0 bytes)"),
    ("image", "x.png", b"hello, this is no image\n", "not a picture: the bytes look like text"),
    ("image", "x.png", b"<!DOCTYPE html><html>", "not a picture: the bytes look like HTML"),
    ("image", "x.jpg", bytes(range(7, 200)), "not a picture: the bytes are of no known format"),
    ("audio", "x.wav", _encoded("PNG"), "not a sound: the bytes are a picture (PNG)"),
    ("video", "x.mp4", _encoded("PNG"), "not a clip: the bytes are a picture (PNG)"),
    ("depth", "x.npy", b"%PDF-1.7", "not a depth map: the bytes are a document (PDF)"),
    ("image", "huge.png", _png_header(100_000, 100_000), "100000 x 100000 pixels is 10000000000 "),
    ("video", "x.mp4", b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00", "damaged MP4 "),
    ("video", "x.mp4", b"\x00\x00\x00\x14ftypisom" + bytes(5000), "damaged MP4 "),
    ("video", "x.webm", b"\x1aE\xdf\xa3" + bytes(500), "damaged WebM "),
    ("audio", "x.flac", b"fLaC" + bytes(500), ""),
    ("audio", "x.mp3", b"ID3\x04\x00\x00\x00\x00\x00\x00" + bytes(500), ""),
    ("audio", "x.ogg", b"OggS" + bytes(500), ""),
    ("image", "x.tiff", b"II*\x00\xff\xff\xff\xff", "damaged TIFF"),
    ("image", "x.gif", b"GIF89a\xff\xff", "damaged GIF"),
]


@pytest.mark.parametrize(("kind", "name", "data", "reason"), HOSTILE)
def test_hostile_files_give_one_clear_line(
    decoder: MediaDecoder, kind: Kind, name: str, data: bytes, reason: str
) -> None:
    for decode_it in (decoder.decode, decode):
        with pytest.raises(MediaError) as caught:
            decode_it(MediaFile(kind, data, name))
        assert str(caught.value).startswith(f"{name}: {reason}")
        assert "\n" not in str(caught.value)
    assert isinstance(decoder.decode(MediaFile("image", _encoded("PNG"))), Image)


def test_paths_other_than_files(decoder: MediaDecoder, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"^missing\.jpg: no such file$") as caught:
        decoder.decode(MediaFile("image", "missing.jpg"))
    assert caught.value.status == 404
    with pytest.raises(MediaError, match="is a folder, not a file"):
        decoder.decode(MediaFile("image", tmp_path))
    with pytest.raises(MediaError, match="is not a regular file"):
        decoder.decode(MediaFile("image", os.devnull))
    with pytest.raises(MediaError, match="cannot be read"):
        decoder.decode(MediaFile("image", "a\0b.png"))


def test_max_bytes_names_value_maximum_and_setting() -> None:
    with pytest.raises(LimitError) as caught, MediaDecoder(MediaLimits(max_bytes=100)) as small:
        small.decode(MediaFile("image", bytes(200), "a.png"))
    assert str(caught.value) == (
        "a.png: 200 bytes, more than the limit of 100 "
        "(max_bytes; raise it with MICO_MEDIA_MAX_BYTES)"
    )
    assert caught.value.status == 413


@needs_signals
def test_a_killed_worker_costs_one_error_and_is_replaced() -> None:
    with MediaDecoder(MediaLimits(timeout_s=30)) as decoder:
        decoder.decode(MediaFile("image", _encoded("PNG")))
        (pid,) = decoder.pids()
        os.kill(pid, signal.SIGSTOP)  # as if deep in a decoder
        killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(MediaError, match=r"^a\.png: the decoder process was killed by SIGKILL"):
            decoder.decode(MediaFile("image", _encoded("PNG"), "a.png"))
        killer.join()
        assert isinstance(decoder.decode(MediaFile("image", _encoded("PNG"))), Image)
        assert decoder.pids() != [pid]


@needs_signals
def test_a_hang_ends_at_the_time_limit() -> None:
    with MediaDecoder(MediaLimits(timeout_s=0.4)) as decoder:
        decoder.decode(MediaFile("image", _encoded("PNG", (8, 8))))
        os.kill(decoder.pids()[0], signal.SIGSTOP)
        with pytest.raises(
            LimitError, match=r"longer than the limit of 0\.4 s .*MICO_MEDIA_TIMEOUT"
        ):
            decoder.decode(MediaFile("image", _encoded("PNG", (600, 600)), "slow.png"))
        assert isinstance(decoder.decode(MediaFile("image", _encoded("PNG", (8, 8)))), Image)


@needs_signals
def test_slow_decoding_stops_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mico_chat.media.decoder._GRACE_S", 60.0)  # a busy machine may be late
    text = b"tEXta\x00b"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    png = _encoded("PNG")
    with MediaDecoder(MediaLimits(timeout_s=1)) as decoder:
        decoder.decode(MediaFile("image", png))
        pids = decoder.pids()
        with pytest.raises(LimitError, match=r"^long\.png: .* longer than the limit of 1 s"):
            decoder.decode(MediaFile("image", png[:33] + chunk * 2_000_000 + png[33:], "long.png"))
        assert isinstance(decoder.decode(MediaFile("image", png)), Image)
        assert decoder.pids() == pids


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_memory_is_limited() -> None:
    image = io.BytesIO()
    Pillow.new("RGB", (9_000, 5_000)).save(image, "PNG", compress_level=1)
    with MediaDecoder(MediaLimits(memory_mb=350)) as decoder:
        with pytest.raises(MediaError, match=r"^big\.png: .*memory_mb; raise it with MICO_MEDIA"):
            decoder.decode(MediaFile("image", image.getvalue(), "big.png"))
        assert isinstance(decoder.decode(MediaFile("image", _encoded("PNG"))), Image)


def test_threads_share_a_decoder(decoder: MediaDecoder) -> None:
    def is_right(colour: int) -> bool:
        stream = io.BytesIO()
        Pillow.new("RGB", (20 + colour, 20), (colour,) * 3).save(stream, "PNG")
        image = decoder.decode(MediaFile("image", stream.getvalue()))
        return isinstance(image, Image) and bool((image.pixels == colour).all())

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(is_right, [*range(6)] * 5))


def test_a_closed_decoder_says_so() -> None:
    decoder = MediaDecoder()
    decoder.close()
    with pytest.raises(MicoError, match="closed"):
        decoder.decode(MediaFile("image", _encoded("PNG")))


def test_no_process_starts_while_the_decoder_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = MediaDecoder()
    worker = decoder._workers[0]
    decode = worker.decode

    def late(file: MediaFile) -> Medium:
        decoder.close()
        return decode(file)

    monkeypatch.setattr(worker, "decode", late)
    with pytest.raises(MicoError, match="closed"):
        decoder.decode(MediaFile("image", _encoded("PNG")))
    assert not decoder.pids()
