"""Hand-made hostile files, one for each guard of the media layer."""

import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np

from mico_chat.media.kinds import Kind
from tests.server.support.hostile_seeds import clip, npy, npz, raster, sound


@dataclass(frozen=True)
class Bomb:
    """A file that costs a decoder far more than its size, or leads it astray.

    A file that need not fail is harmless once the trick is seen through; it may still be refused.
    """

    make: Callable[[Random], bytes]
    kind: Kind
    extension: str
    must_fail: bool = True

    @property
    def name(self) -> str:
        return self.make.__name__


@cache
def zeros(megabytes: int) -> bytes:
    """So many zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    million = bytes(1 << 20)
    return b"".join([*(packer.compress(million) for _ in range(megabytes)), packer.flush()])


# --- PNG and JPEG ---


def _png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


_SMALL = (b"IDAT", zlib.compress(bytes(4 * 13)))  # of 4 x 4 pixels


def png_image_data_unpacks_to_64_mb(random: Random) -> bytes:
    return _png(4, 4, (b"IDAT", zeros(64)))


def png_itxt(random: Random) -> bytes:
    text = b"Comment\x00\x01\x00\x00\x00" + zeros(random.choice([2, 40]))
    return _png(4, 4, (b"iTXt", text), _SMALL)


def jpeg_endless_scans(random: Random) -> bytes:
    """A progressive image of 49 million pixels whose last scan comes thousands of times."""
    data = raster("RGB", "JPEG", progressive=True)
    at = data.find(b"\xff\xc2") + 5
    data = data[:at] + struct.pack(">HH", 7_000, 7_000) + data[at + 4 :]
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * random.choice([300, 5_000]) + data[-2:]


# --- GIF and WebP, BMP and TIFF ---


def gif_many_frames(random: Random) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 7_000, 7_000, 0x80, 0, 0) + bytes(6)  # a palette
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return screen + frame * 50_000 + b";"


# --- NumPy's .npy and .npz ---


def _shaped(shape: str, descr: str = "'<f4'", version: int = 1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"
    header = text.encode("utf-8" if version == 3 else "latin1")
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + bytes(64)


def npy_absurd_shape(random: Random) -> bytes:
    shapes = ["(-4, 4)", "(-1, -16)", "(0, 4)", f"({2**62}, 4)", f"({10**900}, 2)", "(1e3, 4)"]
    shapes += ["(True, 4)", "(" + "1," * 3_000 + ")", "(7000, 7000)", "()", "(None, 3)", "16"]
    return _shaped(random.choice(shapes), version=random.choice([1, 2, 3]))


def npy_absurd_type(random: Random) -> bytes:
    fields = ", ".join(f"('f{n}', '<f4')" for n in range(400))
    types = ["'|O'", "'<U1000000000'", "'|V2147483647'", f"[{fields}]", "'<M8[s]'", "'|b1'", "'f0'"]
    types += ["('<f4', (100000, 100000))", "[('a', '|O')]", "'<c16'", "{}", "'i4,i4'", "'\\x00'"]
    return _shaped("(4, 4)", random.choice(types), random.choice([1, 3]))


def npy_huge_header(random: Random) -> bytes:
    length = random.choice([10**6, 2**31 - 1, 2**32 - 1])
    return b"\x93NUMPY\x03\x00" + struct.pack("<I", length) + b"{" * 100_000


def npy_pickle(random: Random) -> bytes:
    return _shaped("(1, 1)", "'|O'") + b"cos\nsystem\n(S'touch /tmp/owned'\ntR."


def npz_overlapping(random: Random) -> bytes:
    """Members whose directory entries all lead to the same, packed place."""
    large = _shaped("(20000, 10000)") + bytes(16 << 20)
    data = npz(zipfile.ZIP_DEFLATED, ("depth.npy", large))
    directory = data.rindex(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    n = 2_000
    entries = data[directory:end] * n
    counts = struct.pack("<HHII", n, n, len(entries), directory)
    return data[:directory] + entries + data[end : end + 8] + counts + data[-2:]


def npz_of_paths(random: Random) -> bytes:
    name = random.choice(["../../../../tmp/owned.npy", "/etc/owned.npy", "C:\\owned.npy"])
    return npz(zipfile.ZIP_STORED, (name, npy(np.full((8, 8), 2.0))))


# --- Sounds ---


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


def mp3_packed_tag(random: Random) -> bytes:
    packed = zeros(16)
    claims = random.choice([16 << 20, 2**28 - 1])
    frame = b"TXXX" + _syncsafe(len(packed) + 4) + b"\x00\x09" + _syncsafe(claims) + packed
    tag = b"ID3\x04\x00\x00" + _syncsafe(len(frame)) + frame
    return tag + sound("libmp3lame", "mp3")


# --- Clips ---


@cache
def _mp4() -> bytes:
    return clip("libx264", "mp4", n=6)


def _box(name: bytes, at: int, value: bytes, data: bytes | None = None) -> bytes:
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


def webm_absurd_clock(random: Random) -> bytes:
    data = clip("libvpx", "webm", n=6)
    at = data.index(b"\x2a\xd7\xb1\x83") + 4
    return data[:at] + random.choice([b"\x00\x00\x00", b"\xff\xff\xff"]) + data[at + 3 :]


# --- No media at all ---


_OTHER = [
    b"",
    b"\x00",
    b"\xff",
    b"hello, this is no medium\n",
    b"<svg xmlns='http://www.w3.org/2000/svg' width='99999999' height='99999999'/>",
    b"<!DOCTYPE html><html>",
    b"%PDF-1.7",
    b"\x1f\x8b" + bytes(100),
    b"\x7fELF" + bytes(100),
    b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile /etc/passwd\n",
    b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
    b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100),
    bytes(4_000),
]


def no_medium(random: Random) -> bytes:
    return random.choice(_OTHER)


BOMBS = (
    Bomb(png_image_data_unpacks_to_64_mb, "image", "png", must_fail=False),
    Bomb(png_itxt, "image", "png"),
    Bomb(jpeg_endless_scans, "image", "jpg"),
    Bomb(gif_many_frames, "image", "gif", must_fail=False),
    Bomb(npy_absurd_shape, "depth", "npy"),
    Bomb(npy_absurd_type, "depth", "npy"),
    Bomb(npy_huge_header, "depth", "npy"),
    Bomb(npy_pickle, "depth", "npy"),
    Bomb(npz_overlapping, "depth", "npz"),
    Bomb(npz_of_paths, "depth", "npz", must_fail=False),
    Bomb(flac_hours_of_silence, "audio", "flac", must_fail=False),
    Bomb(mp3_packed_tag, "audio", "mp3", must_fail=False),
    Bomb(mp4_absurd_counts, "video", "mp4", must_fail=False),
    Bomb(mp4_frames_of_no_size, "video", "mp4", must_fail=False),
    Bomb(mov_packed_header, "video", "mov"),
    Bomb(mp4_boxes_in_boxes, "video", "mp4"),
    Bomb(webm_absurd_clock, "video", "webm", must_fail=False),
    Bomb(no_medium, "image", "jpg"),
    Bomb(no_medium, "audio", "mp3"),
    Bomb(no_medium, "video", "mp4"),
    Bomb(no_medium, "depth", "npy"),
)
