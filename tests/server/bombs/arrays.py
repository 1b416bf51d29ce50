"""NumPy's .npy and .npz files that are bombs."""

from __future__ import annotations

import struct
import zipfile
from functools import cache
from random import Random

import numpy as np

from tests.server.bombs.bomb import Bomb
from tests.server.hostile_seeds import npy, npz


def _npy_header(text: str, version: int = 1) -> bytes:
    encoded = text.encode("utf-8" if version == 3 else "latin1")
    length = struct.pack("<H" if version == 1 else "<I", len(encoded))
    return b"\x93NUMPY" + bytes([version, 0]) + length + encoded


def _shaped(shape: str, descr: str = "'<f4'", version: int = 1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"
    return _npy_header(text, version) + bytes(64)


def npy_absurd_shape(random: Random) -> bytes:
    shapes = ["(-4, 4)", "(-1, -16)", "(0, 4)", f"({2**62}, 4)", f"({10**900}, 2)", "(1e3, 4)"]
    shapes += ["(True, 4)", "(" + "1," * 3_000 + ")", "(7000, 7000)", "()", "(None, 3)", "16"]
    return _shaped(random.choice(shapes), version=random.choice([1, 2, 3]))


def npy_absurd_type(random: Random) -> bytes:
    fields = ", ".join(f"('f{n}', '<f4')" for n in range(400))
    types = ["'|O'", "'<U1000000000'", "'|V2147483647'", f"[{fields}]", "'<M8[s]'", "'|b1'", "'f0'"]
    types += ["('<f4', (100000, 100000))", "[('a', '|O')]", "'<c16'", "{}", "'i4,i4'", "'\\x00'"]
    return _shaped("(4, 4)", random.choice(types), random.choice([1, 3]))


def npy_header_that_nests(random: Random) -> bytes:
    depth = random.choice([50, 150, 4_900])
    text = random.choice(["(" * depth + ")" * depth, "-" * 2 * depth + "1", "[" * depth])
    return _npy_header(text) + bytes(64)


def npy_huge_header(random: Random) -> bytes:
    length = random.choice([10**6, 2**31 - 1, 2**32 - 1])
    return b"\x93NUMPY\x03\x00" + struct.pack("<I", length) + b"{" * 100_000


def npy_pickle(random: Random) -> bytes:
    return _shaped("(1, 1)", "'|O'") + b"cos\nsystem\n(S'touch /tmp/owned'\ntR."


def _large(rows: int, columns: int, megabytes: int) -> bytes:
    return _shaped(f"({rows}, {columns})") + bytes(megabytes << 20)


@cache
def _packed(packing: int, rows: int, columns: int, megabytes: int) -> bytes:
    return npz(packing, ("depth.npy", _large(rows, columns, megabytes)))


def npz_bomb(random: Random) -> bytes:
    packing = random.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    return _packed(packing, 20_000, 10_000, 48)


def npz_bomb_of_an_allowed_size(random: Random) -> bytes:
    return _packed(zipfile.ZIP_DEFLATED, 7_000, 7_000, 48)


def npz_bomb_behind_a_small_array(random: Random) -> bytes:
    array = npy(np.full((8, 8), 2.0, np.float32)) + bytes(32 << 20)
    return npz(zipfile.ZIP_DEFLATED, ("depth.npy", array))


def npz_in_npz(random: Random) -> bytes:
    inner = _packed(zipfile.ZIP_DEFLATED, 20_000, 10_000, 16)
    for _ in range(random.choice([1, 5])):
        inner = npz(zipfile.ZIP_DEFLATED, ("depth.npy", inner))
    return inner


def npz_overlapping(random: Random) -> bytes:
    """Members whose directory entries all lead to the same, packed place."""
    data = _packed(zipfile.ZIP_DEFLATED, 20_000, 10_000, 16)
    directory = data.rindex(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    n = 2_000
    entries = data[directory:end] * n
    counts = struct.pack("<HHII", n, n, len(entries), directory)
    return data[:directory] + entries + data[end : end + 8] + counts + data[-2:]


def npz_of_paths(random: Random) -> bytes:
    name = random.choice(["../../../../tmp/owned.npy", "/etc/owned.npy", "C:\\owned.npy"])
    return npz(zipfile.ZIP_STORED, (name, npy(np.full((8, 8), 2.0))))


def npz_of_many(random: Random) -> bytes:
    one = npy(np.full((2, 2), 2.0))
    return npz(zipfile.ZIP_STORED, *((f"{n}.npy", one) for n in range(3_000)))


def npz_pickle(random: Random) -> bytes:
    return npz(zipfile.ZIP_STORED, ("depth.npy", npy_pickle(random)))


def npz_locked(random: Random) -> bytes:
    data = bytearray(npz(zipfile.ZIP_STORED, ("depth.npy", npy(np.ones((4, 4))))))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1  # encrypted
    return bytes(data)


def npy_distances_out_of_this_world(random: Random) -> bytes:
    value = random.choice([1e30, 3e38, 1e-30, 1e300])
    return npy(np.full((8, 8), value, np.float64))


BOMBS = (
    Bomb(npy_absurd_shape, "depth", "npy"),
    Bomb(npy_absurd_type, "depth", "npy"),
    Bomb(npy_header_that_nests, "depth", "npy"),
    Bomb(npy_huge_header, "depth", "npy"),
    Bomb(npy_pickle, "depth", "npy"),
    Bomb(npz_bomb, "depth", "npz"),
    Bomb(npz_bomb_of_an_allowed_size, "depth", "npz"),
    Bomb(npz_bomb_behind_a_small_array, "depth", "npz", must_fail=False),
    Bomb(npz_in_npz, "depth", "npz"),
    Bomb(npz_overlapping, "depth", "npz"),
    Bomb(npz_of_paths, "depth", "npz", must_fail=False),
    Bomb(npz_of_many, "depth", "npz"),
    Bomb(npz_pickle, "depth", "npz"),
    Bomb(npz_locked, "depth", "npz"),
    Bomb(npy_distances_out_of_this_world, "depth", "npy", must_fail=False),
)
