"""WebDataset shards with random access.

A tar is a list of members with known offsets. The headers are read once, and the offsets are kept
in a small ``.idx`` file beside the shard (in memory if the folder is read-only). Each member of a
sample is then one seek away. So a seeded permutation can visit the samples, and a resumed run goes
on at the exact sample, which streaming cannot do.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mico_chat.errors import DataError
from mico_chat.media.file import MediaFile, TarMember
from mico_chat.media.kinds import KINDS
from mico_training.data.regions import regions_of
from mico_training.data.sample import Need, TrainingSample
from mico_training.world.sample import Turn, kind_of

logger = logging.getLogger(__name__)

INDEX_FORMAT = 1
_TURN = TypeAdapter(Turn)


@dataclass(frozen=True)
class ShardEntry:
    """The members of a sample (name -> offset, size), and the texts in its record."""

    key: str
    members: Mapping[str, Sequence[int]]
    skills: Sequence[str]
    captioned: bool


def shard_paths(pattern: str) -> list[Path]:
    """The shards that a path or glob pattern names, sorted; a DataError if there is none."""
    paths = sorted(Path(path) for path in glob.glob(pattern))
    if not paths:
        raise DataError(pattern, None, "this shard does not exist")
    return paths


def fingerprint(path: Path) -> str:
    """A name for one state of a file: its size and time of modification."""
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def index_shard(path: Path) -> list[ShardEntry]:
    """The samples of a shard, from its ``.idx`` if that is up to date, else from the tar."""
    beside = path.with_name(path.name + ".idx")
    state = fingerprint(path)
    if beside.is_file():
        cached = json.loads(beside.read_text(encoding="utf-8"))
        if cached.get("format") == INDEX_FORMAT and cached.get("fingerprint") == state:
            return [ShardEntry(*sample) for sample in cached["samples"]]
    entries = _walk(path)
    samples = [[e.key, e.members, e.skills, e.captioned] for e in entries]
    content = {"format": INDEX_FORMAT, "fingerprint": state, "samples": samples}
    partial = beside.with_name(f"{beside.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(beside)
    except OSError as error:
        logger.info(
            "%s: its index could not be written, so it is kept in memory (%s)", path, error.strerror
        )
    return entries


def _walk(path: Path) -> list[ShardEntry]:
    members: dict[str, dict[str, Sequence[int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                # WebDataset's rule: the key ends at the first dot of the base name.
                folder, slash, base = info.name.rpartition("/")
                stem, dot, name = base.partition(".")
                if info.isfile() and dot:
                    place = [info.offset_data, info.size]
                    members.setdefault(folder + slash + stem, {})[name] = place
    except (tarfile.TarError, EOFError) as error:
        raise DataError(path, None, "this is not a tar file that can be read") from error
    entries = []
    for key, files in members.items():
        record = _record(path, key, files)
        skills = sorted({turn.get("skill", "") for turn in record.get("turns", ())})
        entries.append(ShardEntry(key, files, skills, any(record.get("captions", {}).values())))
    return entries


def _record(path: Path, key: str, members: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    if "json" not in members:
        raise _wrong(path, key, f"lacks {key}.json; it has {', '.join(sorted(members))}")
    try:
        record = json.loads(TarMember(path, *members["json"]).read())
    except ValueError as error:
        raise _wrong(path, key, f"has a {key}.json that is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise _wrong(path, key, f"has a {key}.json that is a {type(record).__name__}, no object")
    return record


def _wrong(path: Path, key: str, reason: str) -> DataError:
    return DataError(path, None, f"{key}: the sample {reason}")


class ShardSource:
    """The samples of some shards that have the texts of a stage, by index."""

    def __init__(self, pattern: str, need: Need, skills: tuple[str, ...] = ()) -> None:
        self.shards = shard_paths(pattern)
        self.skills = frozenset(skills)
        self.entries = [
            (number, entry)
            for number, path in enumerate(self.shards)
            for entry in index_shard(path)
            if (not skills or self.skills & set(entry.skills))
            and (entry.captioned if need == "caption" else entry.skills)
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> TrainingSample:
        number, entry = self.entries[index]
        path = self.shards[number]
        record = _record(path, entry.key, entry.members)
        media = {}
        for name in record.get("files", ()):
            if name not in entry.members:
                raise _wrong(path, entry.key, f"names {name}, which the shard lacks")
            media[name] = shard_medium(path, entry, name)
        try:
            turns = tuple(
                _TURN.validate_python(turn)
                for turn in record.get("turns", ())
                if not self.skills or turn.get("skill") in self.skills
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _wrong(path, entry.key, f"has a bad turn: {where}: {first['msg']}") from error
        for name in (name for turn in turns for name in turn.media):
            if name not in media:
                raise _wrong(path, entry.key, f"has a question about {name}, which it lacks")
        return TrainingSample(
            id=entry.key,
            media=media,
            captions={k: tuple(v) for k, v in record.get("captions", {}).items() if k in media},
            concepts={k: v for k, v in record.get("concepts", {}).items() if k in media},
            regions={k: regions_of(m.kind, record.get("truth", {})) for k, m in media.items()},
            turns=turns,
        )


def shard_medium(path: Path, entry: ShardEntry, name: str) -> MediaFile:
    """One medium of a shard, named shard/member; a DataError if the name has no known kind."""
    kind = kind_of(name)
    if kind not in KINDS:
        reason = f"has {name} of an unknown kind; the kinds are {', '.join(KINDS)}"
        raise _wrong(path, entry.key, reason)
    source = TarMember(path, *entry.members[name])
    return MediaFile(kind, source, f"{path.name}/{entry.key}.{name}")
