"""The clips that people look at: those of a build with its tables, or the samples of any source.

A build's tables have every filter, and the clips that were left out. Other sources have one filter,
the kind of medium that is described, which their index holds.
"""

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mico_chat.errors import DataError
from mico_chat.media.addresses import Location, located, matching
from mico_chat.media.kinds import KINDS
from mico_corpus.looking.filters import KEPT, LEFT_OUT, ClipFilter, passing_rows
from mico_corpus.packing.tables import elements, rows_at, texts
from mico_corpus.places import Place
from mico_corpus.rows import CLIPS, INDEXES, Row
from mico_training.data.sources.contents import contents
from mico_training.data.sources.manifests import form_of
from mico_training.data.sources.sample import TrainingSample
from mico_training.data.sources.shards import sample_of
from mico_training.data.sources.tar import found_in, members_of

MOST = 500
"""The filter offers so many sources, the largest ones."""
REMEMBERED = 64
"""The rows of so many filters stay in memory: 8 bytes for each row that they find."""


@dataclass(frozen=True)
class ClipEntry:
    """A clip. ``sample`` is what the shard holds of it, ``row`` what the tables say, if any.

    ``number`` is its row in the tables, or its number in the shards.
    """

    id: str
    number: int
    row: Row
    sample: TrainingSample | None = None
    annotations: Sequence[Row] = ()
    problem: str = ""


def open_store(shards: str) -> "Plain | BuildStore":
    """The clips of a build, or a source's samples; a DataError if there are none."""
    form = form_of(shards)
    if form not in ("shards", "folder"):
        return Plain(shards)
    is_folder = "*" not in shards and not shards.endswith(".tar")
    pattern = f"{shards.rstrip('/')}/*.tar" if is_folder else shards
    place = Place(shards if is_folder else str(_parent(shards)))
    found = matching(pattern)
    if place.tables(CLIPS) or place.tables(INDEXES):
        return BuildStore(place, list(found), whole=is_folder)
    if not found and form == "shards":
        raise DataError(pattern, None, "no shard and no build is there")
    return Plain(pattern if found else shards)


def _parent(pattern: str) -> Location:
    location = located(pattern)
    return location.parent if isinstance(location, Path) else location.rpartition("/")[0]


class Plain:
    """Samples without tables. ``reasons``, ``sources``, ``annotators`` and ``media`` are what the
    filters may name, as in a build; the first two with the number of clips. ``about``: counts."""

    def __init__(self, path: str) -> None:
        self.found = contents(path)
        self.about, self.index = self.found.lines(), self.found.source.index
        self.reasons = {KEPT: len(self.found.numbers)}
        self.sources: Mapping[str, int] = {}
        self.annotators: Sequence[str] = ()
        captioned = {kind for profile in self.index.profiles for kind in profile.captioned}
        self.media: Sequence[str] = [kind for kind in KINDS if kind in captioned]

    def find(self, asked: ClipFilter) -> NDArray[np.int64]:
        if not asked.medium:
            return self.found.numbers
        runs = self.index.offering(lambda profile: asked.medium in profile.captioned)
        return np.flatnonzero(np.concatenate([*runs, np.zeros(0, bool)]))

    def entries(self, numbers: NDArray[np.int64]) -> Sequence[ClipEntry]:
        return [self._entry(int(number)) for number in numbers]

    def _entry(self, number: int) -> ClipEntry:
        file, start, size = self.index.place(number)
        if self.found.form == "shards":
            return _of_shard(number, {"shard": _name(file), "reason": ""}, file, start, size)
        sample = self.found.sample(number)
        return ClipEntry(sample.id, number, {}, sample, _said(sample))


class BuildStore:
    """The clips of a build by its tables; of a pattern's shards only, if one was given."""

    def __init__(self, place: Place, shards: Sequence[Location], whole: bool) -> None:
        self.place = place
        self.shards = {_name(shard): shard for shard in shards}
        self.media: Sequence[str] = ()
        self.about: list[str] = []
        self._of_pattern = None if whole else pa.array(["", *self.shards])
        clips = place.tables(CLIPS)
        self._tables = [*place.tables(INDEXES), *clips]
        self._manifest = set(clips)
        self._ends = np.cumsum([0, *(place.count(name) for name in self._tables)])
        self._found: OrderedDict[ClipFilter, NDArray[np.int64]] = OrderedDict()
        self._places = lru_cache(16)(_places)
        reasons: Counter[str] = Counter()
        sources: Counter[str] = Counter()
        annotators: set[str] = set()
        for name, _, batch in self._batches():
            shown = batch.filter(self._shown(name, batch))
            for one in pc.value_counts(texts(shown, "reason")).to_pylist():
                reasons[one["values"] or KEPT] += one["counts"]
            for one in pc.value_counts(texts(shown, "source")).to_pylist():
                sources[one["values"]] += one["counts"]
            if name not in self._manifest:
                _, fields = elements(shown, "annotations")
                annotators |= {text for text in pc.unique(fields["annotator"]).to_pylist() if text}
        kept = reasons.pop(KEPT, 0)
        self.reasons = {KEPT: kept, LEFT_OUT: reasons.total(), **dict(reasons.most_common())}
        self.sources = dict(sources.most_common(MOST))
        self.annotators = sorted(annotators)

    def _batches(self) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """A table's name, the number of the first row, and the columns that filters need."""
        for name, first in zip(self._tables, self._ends, strict=False):
            columns = ["reason", "source", "text"]
            if name not in self._manifest:
                columns += ["shard", "annotations"]
            number = int(first)
            for batch in self.place.batches(name, columns):
                yield name, number, batch
                number += len(batch)

    def _shown(self, name: str, batch: pa.RecordBatch) -> pa.Array:
        """Kept clips are in the index; the manifest has those that were left out before."""
        if name in self._manifest:
            return pc.not_equal(texts(batch, "reason"), "")
        if self._of_pattern is None:
            return pa.array(np.ones(len(batch), bool))
        return pc.is_in(texts(batch, "shard"), self._of_pattern)

    def find(self, asked: ClipFilter) -> NDArray[np.int64]:
        if asked not in self._found:
            found = [np.zeros(0, np.int64)]
            for name, first, batch in self._batches():
                passing = pc.and_(self._shown(name, batch), passing_rows(asked, batch))
                found.append(first + np.flatnonzero(passing.to_numpy(zero_copy_only=False)))
            self._found[asked] = np.concatenate(found)
        while len(self._found) > REMEMBERED:
            self._found.popitem(last=False)
        return self._found[asked]

    def entries(self, numbers: NDArray[np.int64]) -> Sequence[ClipEntry]:
        found = []
        which = self._ends.searchsorted(numbers, side="right") - 1
        for table in np.unique(which):
            wanted = numbers[which == table]
            rows = rows_at(self.place, self._tables[table], wanted - self._ends[table]).to_pylist()
            found += [self._entry(int(n), row) for n, row in zip(wanted, rows, strict=True)]
        return found

    def _entry(self, number: int, row: Row) -> ClipEntry:
        annotations = row.get("annotations") or []
        shard = row.get("shard") or ""
        if row["reason"] or not shard:
            return ClipEntry(row["id"], number, row, annotations=annotations)
        location = self.shards.get(shard)
        place = None if location is None else self._places(location).get(row["id"])
        if location is None or place is None:
            problem = f"the shard {shard} {'is missing' if location is None else 'lacks this clip'}"
            return ClipEntry(row["id"], number, row, annotations=annotations, problem=problem)
        return _of_shard(number, row, location, *place)


def _name(shard: Location) -> str:
    return str(shard).rpartition("/")[2]


def _places(shard: Location) -> dict[str, tuple[int, int]]:
    found = (one for one in found_in(shard) if not isinstance(one, DataError))
    return {key: (start, size) for key, start, size, _ in found}


def _of_shard(number: int, row: Row, shard: Location, start: int, size: int) -> ClipEntry:
    """A sample of a shard; one that cannot be read is an entry with a problem."""
    key = str(row.get("id", ""))
    annotations = row.get("annotations") or []
    try:
        key, members = members_of(shard, start, size)
        record = json.loads(members["json"].read()) if "json" in members else {}
        sample = sample_of(shard, key, members)
    except (OSError, ValueError, DataError) as error:
        return ClipEntry(key, number, row, None, annotations, problem=str(error))
    if "annotations" not in row:
        row = _known(record) | row
        annotations = _told(record) or _said(sample)
    return ClipEntry(key, number, row, sample, annotations)


def _known(record: Mapping[str, Any]) -> Row:
    """What a record says of its clip; anybody may have written it."""
    names = {"source", "licence", "address", "member", "start", "end"}
    return {name: record[name] for name in names & record.keys() if _fits(name, record[name])}


def _told(record: Mapping[str, Any]) -> list[Row]:
    said = record.get("annotations")
    return [
        {name: value for name, value in one.items() if _fits(name, value)}
        for one in (said if isinstance(said, list) else ())
        if isinstance(one, dict)
    ]


def _fits(name: str, value: object) -> bool:
    if name in ("start", "end", "score"):
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, str)


def _said(sample: TrainingSample) -> list[Row]:
    said = [
        {"role": "caption", "medium": name.partition(".")[0], "text": text}
        for name, texts in sample.captions.items()
        for text in texts
    ]
    if sample.subtitle:
        said.append({"role": "speech", "medium": "audio", "text": sample.subtitle})
    talk = [f"{turn.question} → {turn.answer}" for turn in sample.turns]
    talk += [f"{one.role}: {one.text}" for one in sample.conversation]
    return said + [{"role": "question", "medium": "", "text": text} for text in talk]
