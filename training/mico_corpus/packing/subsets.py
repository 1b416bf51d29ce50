"""``mico-chat data subset``: nested subsets of a build, in shards of their own.

The shards of the smallest subset are ``0-*.tar``; ``1-*.tar`` hold what the next one adds. So the
second subset is ``[01]-*.tar``. The output has an index like a build's, so that its clips can be
looked at and removed. ``subsets.parquet`` is written last.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mico_chat.errors import ConfigError, DataError
from mico_chat.late import late
from mico_corpus.looking.report import plain
from mico_corpus.packing.strata import (
    BETWEEN,
    CLASSES,
    CONCEPTS,
    OTHER,
    classes_of,
    levels_of,
    order_of,
)
from mico_corpus.packing.tables import texts
from mico_corpus.packing.tars import copy, finish, opened, places_in
from mico_corpus.places import Place
from mico_corpus.rows import INDEX, INDEXES, Row

with late():  # it brings torch
    from mico_training import records

SUBSETS, REPORT = "subsets.parquet", "subsets.md"
SCHEMA = pa.schema({"id": pa.string(), "level": pa.int8(), "stratum": pa.string()})
SHARD = re.compile(r"\d-\d{6}\.tar(\.index\.npz)?")
"""It matches a shard, or its index file."""
UNITS = {"": 1, "k": 10**3, "M": 10**6}
MOST = 10
"""There are at most so many subsets: their numbers have one digit, for patterns."""
SHOWN = 20
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """One kind of class, such as the sources: their names, and the number of each clip's."""

    names: list[str]
    of: Integers

    @classmethod
    def read(cls, parts: Sequence[pa.Array], most: int | None = None) -> "Classes":
        """Those beyond the ``most`` common ones are one class together."""
        whole = pa.chunked_array([part.dictionary_encode() for part in parts]).unify_dictionaries()
        names: list[str] = whole.chunk(0).dictionary.to_pylist()
        of = np.concatenate([chunk.indices.to_numpy() for chunk in whole.chunks]).astype(np.int64)
        counts = np.bincount(of, minlength=len(names)).tolist()
        common = sorted(range(len(names)), key=lambda n: (-counts[n], names[n]))[:most]
        if len(common) == len(names):
            return cls(names, of)
        new = np.full(len(names), len(common))
        new[common] = np.arange(len(common))
        return cls([*(names[n] for n in common), OTHER], new[of])


@dataclass(frozen=True)
class Strata:
    """The kept clips in the index's order: their classes, stratum, and the hash of their ids."""

    classes: dict[str, Classes]
    names: list[str]
    of: Integers
    orders: NDArray[np.uint64]


def sizes_of(text: str) -> list[int]:
    """``"1M,10M"`` -> rising numbers."""
    sizes = []
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)([kM]?)\s*", word)
        sizes.append(round(float(found[1]) * UNITS[found[2]]) if found else 0)
        if not sizes[-1]:
            raise ConfigError(f"--sizes {text}: {word!r} is no number such as 500, 10k or 1.5M")
    if sorted(set(sizes)) != sizes or len(sizes) > MOST:
        raise ConfigError(f"--sizes {text}: give at most {MOST} sizes, the smallest first")
    return sizes


def subset(shards: str, sizes: Sequence[int], seed: int, output: str, samples: int = 1000) -> str:
    """Write nested subsets of ``sizes`` clips; returns the table of shares.

    Raises:
        DataError: no build is there.
        ConfigError: a size is larger than the build, or ``output`` holds other shards.
    """
    source, target = Place(shards), Place(output)
    if not source.tables(INDEXES):
        raise DataError(shards, None, f"no build is there: it has no {INDEXES}/*.parquet")
    if target.exists(SUBSETS) or target.address == source.address:
        raise ConfigError(f"{output} holds shards already: give another --output")
    strata = read_strata(source, seed)
    if sizes[-1] > len(strata.of):
        raise ConfigError(
            f"--sizes: a subset of {sizes[-1]:,} clips is asked for, but {shards} has "
            f"{len(strata.of):,}"
        )
    for name in [*filter(SHARD.fullmatch, target.names()), *target.tables(INDEXES)]:
        target.remove(name)  # of a run that was interrupted
    levels = levels_of(strata.of, strata.orders, strata.names, seed, sizes)
    report = shares(strata, levels, sizes, seed)
    with target.scratch() as path:
        path.write_text(report, encoding="utf-8")
        target.put(path, REPORT)
    with target.scratch() as path:
        with pq.ParquetWriter(path, SCHEMA) as table, ExitStack() as open_shards:
            writers = [
                open_shards.enter_context(Writer(target, level, samples))
                for level in range(len(sizes))
            ]
            for rows in _chosen(source, strata, levels, len(sizes)):
                table.write_table(rows.select(SCHEMA.names).cast(SCHEMA))
                _copy(source, rows, writers)
        target.put(path, SUBSETS)
    return report


def read_strata(source: Place, seed: int) -> Strata:
    parts: dict[str, list[pa.Array]] = {name: [] for name in CLASSES}
    orders: list[NDArray[np.uint64]] = []
    columns = ["id", "reason", "category", "source", "text", "start", "end", "files", "annotations"]
    for batch in source.batches(INDEXES, columns):
        kept = batch.filter(pc.equal(texts(batch, "reason"), ""))
        for name, found in classes_of(kept).items():
            parts[name].append(found)
        hashes = [order_of(one, seed) for one in kept.column("id").to_pylist()]
        orders.append(np.array(hashes, np.uint64))
    classes = {
        name: Classes.read(found, CONCEPTS if name == "concept" else None)
        for name, found in parts.items()
    }
    code = np.zeros(sum(map(len, orders)), np.int64)
    for kind in classes.values():
        code = code * len(kind.names) + kind.of
    codes, of = np.unique(code, return_inverse=True)
    names = []
    for one in codes.tolist():
        words: list[str] = []
        for kind in reversed(classes.values()):
            one, place = divmod(one, len(kind.names))
            words.insert(0, kind.names[place])
        names.append(BETWEEN.join(words))
    return Strata(classes, names, of.astype(np.int64), np.concatenate(orders))


def _chosen(
    source: Place, strata: Strata, levels: NDArray[np.int8], n_levels: int
) -> Iterator[pa.Table]:
    first = 0
    for batch in source.batches(INDEXES, INDEX.names):
        kept = pa.table(batch.filter(pc.equal(texts(batch, "reason"), "")))
        part = slice(first, first + len(kept))
        first += len(kept)
        names = pa.array(strata.names).take(pa.array(strata.of[part]))
        kept = kept.append_column("level", pa.array(levels[part])).append_column("stratum", names)
        yield kept.filter(pa.array(levels[part] < n_levels))


def _copy(source: Place, rows: pa.Table, writers: Sequence["Writer"]) -> None:
    by_shard: dict[str, dict[str, Row]] = {}
    for row in rows.to_pylist():
        by_shard.setdefault(row["shard"], {})[row["id"]] = row
    for shard, wanted in by_shard.items():
        found = places_in(source, shard)
        if lost := wanted.keys() - found.keys():
            raise DataError(f"{source.address}/{shard}", None, f"it lacks the clip {min(lost)}")
        with opened(source, shard) as stream:
            for key in (key for key in found if key in wanted):
                writers[wanted[key]["level"]].add(stream, found[key], wanted[key])


class Writer:
    def __init__(self, place: Place, level: int, samples: int) -> None:
        self.place, self.level, self.samples = place, level, samples
        self.shards = 0
        self._rows: list[Row] = []
        self._open = ExitStack()
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._open:
            if kind is None:
                self._finish()

    def add(self, source: BinaryIO, part: tuple[int, int], row: Row) -> None:
        if self._file is None:
            self._path = self._open.enter_context(self.place.scratch())
            self._file = self._open.enter_context(self._path.open("wb"))
        copy(source, self._file, [part])
        shard = f"{self.level}-{self.shards:06d}.tar"
        self._rows.append({name: row.get(name) for name in INDEX.names} | {"shard": shard})
        if len(self._rows) == self.samples:
            self._finish()

    def _finish(self) -> None:
        if self._file is None:
            return
        finish(self._file)
        self._file.close()
        shard = self._rows[0]["shard"]
        self.place.put(self._path, shard)
        self.place.write_rows(f"{INDEXES}/{shard.removesuffix('.tar')}.parquet", INDEX, self._rows)
        self.shards += 1
        self._rows, self._file = [], None
        self._open.close()


def shares(strata: Strata, levels: NDArray[np.int8], sizes: Sequence[int], seed: int) -> str:
    """Markdown: what each subset and the whole have of each class."""
    parts = [
        f"# Subsets of {', '.join(f'{size:,}' for size in sizes)} clips\n\nOf {len(strata.of):,} "
        f"clips in {len(strata.names):,} strata, by seed {seed}. Of a category, a subset has "
        "less than one clip more or less than its share."
    ]
    files = [f"[0-{n}]-*.tar" if n else "0-*.tar" for n in range(len(sizes))]
    for kind, classes in strata.classes.items():
        n = len(classes.names)
        whole = np.bincount(classes.of, minlength=n)
        within = [
            np.bincount(classes.of[levels <= level], minlength=n) for level in range(len(sizes))
        ]
        order = np.argsort(-whole, kind="stable")
        rows = [
            [plain(classes.names[c] or "none"), _share(whole, c)] + [_share(w, c) for w in within]
            for c in order[:SHOWN].tolist()
        ]
        titles = [kind, f"all {len(strata.of):,}"]
        titles += [f"{size:,} (`{file}`)" for size, file in zip(sizes, files, strict=True)]
        more = f"\n\nand {n - SHOWN:,} more" if n > SHOWN else ""
        parts.append(f"## By {kind}\n\n{records.markdown_table(titles, rows, 1)}{more}")
    return "\n\n".join(parts) + "\n"


def _share(counts: Integers, place: int) -> str:
    return f"{counts[place]:,} ({100 * counts[place] / max(1, counts.sum()):.2f} %)"
