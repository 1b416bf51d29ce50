"""The samples in a WebDataset tar: all in order, or the one at a place.

A sample's members stand together, and their names are the same up to the first dot.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from itertools import groupby

from mico_chat.errors import DataError
from mico_chat.media.addresses import Location, opened, read_part
from mico_chat.media.file import TarMember
from mico_chat.media.kinds import Kind

Members = dict[str, TarMember]
"""Members by name without the key: ``image.jpg`` stands for ``KEY.image.jpg``."""

ENDINGS: dict[Kind, tuple[str, ...]] = {
    "video": ("mp4", "webm", "mov", "mkv", "avi"),
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("wav", "flac", "mp3", "m4a", "ogg", "opus", "aac"),
}
"""A file's ending names its kind. A sample's caption describes the first kind that it has."""
TEXTS = ("json", "txt")
"""Members of these endings are read together with the headers."""
HEAD = 8192
"""So many bytes of a sample in a folder are read at once: often its texts are among them."""
BLOCK = tarfile.BLOCKSIZE


def wrong(shard: Location, key: str, reason: str) -> DataError:
    return DataError(shard, None, f"{key}: the sample {reason}")


def split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest


def samples_of(shard: Location) -> Iterator[tuple[str, int, int, Members]]:
    """Key, start, size and members of each sample of a shard; the texts are read."""
    done: set[str] = set()
    try:
        with opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            files = (info for info in tar if info.isfile() and split(info.name)[1])
            for key, group in groupby(files, lambda info: split(info.name)[0]):
                if key in done:
                    raise wrong(shard, key, "has members that do not stand together")
                done.add(key)
                infos = list(group)
                members = {}
                for info in infos:
                    name, held = split(info.name)[1], None
                    if name in TEXTS:
                        file.seek(info.offset_data)
                        held = file.read(info.size)
                    members[name] = TarMember(shard, info.offset_data, info.size, held)
                start = infos[0].offset
                yield key, start, infos[-1].offset_data + infos[-1].size - start, members
    except (tarfile.TarError, EOFError) as error:
        raise DataError(shard, None, "this is not a tar file that can be read") from error


def members_of(shard: Location, start: int, size: int) -> tuple[str, Members]:
    """The key and the members of the sample at a place.

    At an address, one request brings all members.

    Raises:
        OSError: the shard cannot be read.
        ValueError: no sample is there.
    """
    if isinstance(shard, str):
        whole = read_part(shard, start, size)
        return _members(shard, start, size, whole, lambda at, n: whole[at : at + n])
    file = os.open(shard, os.O_RDONLY)
    try:
        head = os.pread(file, min(size, HEAD), start)
        return _members(shard, start, size, head, lambda at, n: os.pread(file, n, start + at))
    finally:
        os.close(file)


def _members(
    shard: Location, start: int, size: int, head: bytes, read: Callable[[int, int], bytes]
) -> tuple[str, Members]:
    """``head`` is the beginning of the sample; ``read`` reads other parts."""
    at, key = 0, ""
    members: Members = {}
    while at < size:
        data = at + BLOCK
        header = head[at:data] if data <= len(head) else read(at, BLOCK)
        if len(header) < BLOCK:
            raise ValueError("the shard is shorter than its index says")
        kind, n = header[156:157], int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        if kind in (b"0", b"\0"):
            own, name = split(_name(header))
            if name:
                key, end = own, data + n
                held = None
                if end <= len(head) and (name in TEXTS or len(head) == size):
                    held = head[data:end]
                members[name] = TarMember(shard, start + data, n, held)
        elif kind not in b"5xg" or any(key in read(data, n) for key in (b"path=", b"size=")):
            return _by_tarfile(shard, start, read(0, size))
        at = data + -(-n // BLOCK) * BLOCK
    if not members:
        raise ValueError("no member is there")
    return key, members


def _name(header: bytes) -> str:
    name = header[: header.index(b"\0") if b"\0" in header[:100] else 100]
    if header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode(errors="surrogateescape")


def _by_tarfile(shard: Location, start: int, content: bytes) -> tuple[str, Members]:
    padded = content + bytes(-len(content) % BLOCK + 2 * BLOCK)
    members: Members = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(padded), mode="r:") as tar:
        for info in tar:
            if info.isfile() and split(info.name)[1]:
                key, name = split(info.name)
                held = content[info.offset_data : info.offset_data + info.size]
                members[name] = TarMember(shard, start + info.offset_data, info.size, held)
    return key, members
