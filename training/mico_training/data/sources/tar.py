"""The samples in a WebDataset tar: all in order, or the one at a place.

A sample's members stand together, and their names are the same up to the first dot.

A damaged tar is read to its end: reading goes on at the next block that is a header with the right
checksum. The sample in front of the damage, which may begin inside it, is bad, and so is the one
behind it, unless its record names all its files.
"""

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from typing import Any, BinaryIO

from mico_chat.errors import DataError
from mico_chat.media.addresses import Location, opened, read_part
from mico_chat.media.file import TarMember
from mico_chat.media.kinds import Kind

Members = dict[str, TarMember]
"""Members by name without the key: ``image.jpg`` stands for ``KEY.image.jpg``."""
Place = tuple[str, int, int, Members]
"""Key, start, size and members of a sample; the texts are read."""

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
CHUNK = 1 << 20
ERRORS: Any = tarfile  # typeshed lacks some
DAMAGE = "bytes {} to {} are no tar: the file is damaged there"


def wrong(shard: Location, key: str, reason: str) -> DataError:
    return DataError(shard, None, f"{key}: the sample {reason}")


def split(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest


def samples_of(shard: Location) -> Iterator[Place]:
    """Each sample of a shard; a DataError at the first that is damaged."""
    for found in found_in(shard):
        if isinstance(found, DataError):
            raise found
        yield found


def found_in(shard: Location) -> Iterator[Place | DataError]:
    """Each sample of a shard in order, and what is damaged as an error that is not raised.

    Raises:
        DataError: nothing in the file is a tar.
    """
    done: set[str] = set()
    last: Place | DataError | None = None
    damaged = False  # in front of the next sample
    with opened(shard) as file:
        for key, group in groupby(_parts(shard, file), lambda part: part[0]):
            parts = [part for _, part in group]
            if key is None:
                if isinstance(last, tuple) and parts[0][0] in ("", last[0]):
                    last = wrong(shard, last[0], "stands in front of damaged bytes")
                yield from filter(None, [last, *(error for _, error in parts)])
                last, damaged = None, True
                continue
            if last is not None:
                yield last
            members = {name: member for _, name, member in parts}
            start, end = parts[0][0], parts[-1][2].offset + parts[-1][2].size
            last = (key, start, end - start, members)
            if key in done:
                last = wrong(shard, key, "has members that do not stand together")
            elif damaged and not ("json" in members and b'"files"' in members["json"].read()):
                last = wrong(shard, key, "stands behind damaged bytes; its first part may be lost")
            done.add(key)
            damaged = False
    if last is not None:
        yield last


class _Header(tarfile.TarInfo):
    """It begins at its first block, which may be one of pax. If the rest is damaged, it is none."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        begin = tar.fileobj.tell()
        try:
            info = super().fromtarfile(tar)
        except (ERRORS.SubsequentHeaderError, ValueError) as error:
            tar.fileobj.seek(begin + BLOCK)
            raise ERRORS.InvalidHeaderError(str(error)) from error
        info.offset = begin
        return info


def _parts(shard: Location, file: BinaryIO) -> Iterator[tuple[str | None, Any]]:
    """A sample's key with the start, name and content of each member.

    None with each damage and the key of the sample in which it is, "" if nobody knows.
    """

    def damage(reason: str, key: str = "") -> tuple[None, tuple[str, DataError]]:
        return None, (key, DataError(shard, None, reason))

    size, end = file.seek(0, os.SEEK_END), 0
    file.seek(0)
    own: Any = {"ignore_zeros": True, "tarinfo": _Header}  # it then skips what is no header
    tar: Any = ()
    with suppress(tarfile.TarError):
        tar = tarfile.TarFile(fileobj=file, **own)
    for info in tar:
        if info.offset > end:
            yield damage(DAMAGE.format(end, info.offset))
        end = tar.offset
        key, name = split(info.name)
        if end > size:
            reason = f"it is cut off at byte {size}, in {info.name}, which ends at byte {end}"
            yield damage(reason, key)
            return
        if info.isfile() and name:
            held = None
            if name in TEXTS:
                file.seek(info.offset_data)
                held = file.read(info.size)
            yield key, (info.offset, name, TarMember(shard, info.offset_data, info.size, held))
    file.seek(end)
    while (rest := file.read(CHUNK)) and not rest.strip(b"\0"):
        pass
    if (rest and not end) or not size:
        raise DataError(shard, None, "this is not a tar file that can be read")
    if rest:
        yield damage(DAMAGE.format(end, size))
    elif size - end < 2 * BLOCK:
        yield damage(f"it lacks its end behind byte {end}: it is cut off")


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
    with open(shard, "rb", buffering=0) as file:

        def read(at: int, n: int) -> bytes:
            file.seek(start + at)
            return file.read(n)

        return _members(shard, start, size, read(0, min(size, HEAD)), read)


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
