"""WebDataset shards: samples as plain tar members, written and read.

A sample ``KEY`` is ``KEY.json`` (all but media) followed by its media, ``KEY.image.jpg`` and so
on. Members carry no time, owner or mode of their own, so equal samples give equal bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mico_chat.errors import DataError
from mico_training.world.sample import Sample, Turn


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write ``samples`` to the tar ``path``; returns how many there were."""
    count = 0
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            _add(tar, f"{sample.id}.json", sample.record().encode())
            for member, data in sample.files.items():
                _add(tar, f"{sample.id}.{member}", data)
            count += 1
    partial.replace(path)
    return count


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def read_shard(path: str | Path) -> Iterator[Sample]:
    """The samples of a shard, in order, with their media.

    Raises DataError naming the shard and the member when a sample is incomplete.
    """
    with tarfile.open(path) as tar:
        record: dict[str, Any] | None = None
        files: dict[str, bytes] = {}
        for info in tar:
            key, _, member = info.name.partition(".")
            opened = tar.extractfile(info)
            if opened is None:
                continue
            data = opened.read()
            if member == "json":
                if record is not None:
                    yield _sample(record, files, path)
                record, files = json.loads(data), {}
            elif record is None or record["id"] != key:
                raise DataError(path, None, f"member {info.name} comes before its .json")
            else:
                files[member] = data
        if record is not None:
            yield _sample(record, files, path)


def _sample(record: dict[str, Any], files: dict[str, bytes], path: str | Path) -> Sample:
    missing = set(record["files"]) - set(files)
    if missing:
        raise DataError(path, None, f"sample {record['id']} lacks {', '.join(sorted(missing))}")
    return Sample(
        id=record["id"],
        split=record["split"],
        files=files,
        captions={k: tuple(v) for k, v in record["captions"].items()},
        turns=tuple(_turn(turn) for turn in record["turns"]),
        concepts=record["concepts"],
        truth=record["truth"],
    )


def _turn(row: dict[str, Any]) -> Turn:
    lists = ("media", "choices", "accept")
    fields: dict[str, Any] = {k: tuple(v) if k in lists else v for k, v in row.items()}
    return Turn(**fields)
