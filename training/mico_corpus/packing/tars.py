"""Samples copied from shard to shard, byte for byte."""

import tarfile
from collections.abc import Iterable
from typing import BinaryIO

from mico_corpus.places import Place
from mico_training.data.sources.tar import samples_of

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20


def places_in(place: Place, shard: str) -> dict[str, tuple[int, int]]:
    """Where each sample of a shard begins and ends, by its key, in order."""
    path = f"{place.address}/{shard}" if place.folder is None else place.folder / shard
    return {
        key: (start, start + -(-size // BLOCK) * BLOCK) for key, start, size, _ in samples_of(path)
    }


def opened(place: Place, shard: str) -> BinaryIO:
    stream: BinaryIO = place.system.open(place.path(shard), "rb")
    return stream


def copy(source: BinaryIO, target: BinaryIO, parts: Iterable[tuple[int, int]]) -> None:
    for start, end in parts:
        source.seek(start)
        while start < end:
            data = source.read(min(CHUNK, end - start))
            if not data:
                raise EOFError(f"the shard ends at byte {start}, not {end}")
            target.write(data)
            start += len(data)


def finish(target: BinaryIO) -> None:
    """End a tar as Python's tarfile does."""
    target.write(bytes(2 * BLOCK))
    target.write(bytes(-target.tell() % tarfile.RECORDSIZE))
