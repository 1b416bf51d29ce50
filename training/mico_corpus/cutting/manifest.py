"""The manifest: all clips of all files in one order, and which of them are left out.

The order is that of the sources' ids, whatever part of the first job a file is in. Of clips that
are alike, the first in this order is kept.
"""

import hashlib
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mico_corpus.cutting.container import name_of
from mico_corpus.cutting.near import duplicates
from mico_corpus.places import Place, known_ids
from mico_corpus.recipe import BuildRecipe, ClipsRecipe
from mico_corpus.rows import CLIP, CLIPS, FILE, FILES, MEASURES, Row

AT_ONCE = 32_768
"""So many files are sorted in memory."""
CARRIED = [field.name for field in FILE if field.name in CLIP.names and field.name != "id"]


def select(place: Place, recipe: BuildRecipe) -> dict[str, int]:
    """Write ``clips.parquet`` of the rows of ``files/``; returns the number of rows by reason."""
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(place, Path(folder))
        counts: Counter[str] = Counter()
        place.write_rows(CLIPS, CLIP, _counted(_marked(files, recipe.clips), counts))
    return dict(counts)


def _counted(rows: Iterator[Row], counts: Counter[str]) -> Iterator[Row]:
    for row in rows:
        counts[row["reason"]] += 1
        yield row


def _marked(files: "_Files", recipe: ClipsRecipe) -> Iterator[Row]:
    compared = (row["hash"] for row in files.clips(recipe) if not row["reason"])
    hashes = array("Q", (int.from_bytes(one) for one in compared if one))
    same = duplicates(np.frombuffer(hashes, np.uint64), recipe.near)
    named = {int(place): "" for place in same[same >= 0]}  # the ids of those that are kept
    number = 0
    for row in files.clips(recipe):
        if not row["reason"] and row["hash"]:
            if same[number] >= 0:
                row["reason"] = "duplicate"
                row["detail"] = f"looks like clip {named[int(same[number])]} (clips.near)"
            elif number in named:
                named[number] = row["id"]
            number += 1
        yield row


class _Files:
    """The rows of all parts in the order of their ids, sorted on disk."""

    def __init__(self, place: Place, folder: Path) -> None:
        ids = known_ids(place, FILES)
        bounds = ids[::AT_ONCE]
        self.runs = [folder / f"{number:06d}" for number in range(len(bounds))]
        writers = [pa.ipc.new_stream(str(path), FILE) for path in self.runs]
        contents = array("Q")
        for table in _tables(place):
            asked = np.array(table["id"].to_pylist(), dtype="S")
            runs = np.searchsorted(bounds, asked, side="right") - 1
            for run in np.unique(runs):
                writers[run].write_table(table.take(np.flatnonzero(runs == run)))
            contents.extend(int(one[:16] or "0", 16) for one in table["content"].to_pylist())
        for writer in writers:
            writer.close()
        self.repeated = _repeated(np.frombuffer(contents, np.uint64))

    def __iter__(self) -> Iterator[Row]:
        last = None
        for path in self.runs:
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
                table = stream.read_all().sort_by("id")
            for batch in table.to_batches(1024):
                for row in batch.to_pylist():
                    if row["id"] != last:
                        yield row
                    last = row["id"]

    def clips(self, recipe: ClipsRecipe) -> Iterator[Row]:
        """A row each clip; a file that is left out as a whole is one row, from 0 to 0."""
        first: dict[str, str] = {}
        for row in self:
            content = row["content"]
            about = {name: row[name] for name in CARRIED}
            if not row["reason"] and int(content[:16] or "0", 16) in self.repeated:
                if content in first:
                    about["reason"] = "same file"
                    about["detail"] = f"has the same bytes as {first[content]}"
                else:
                    first[content] = name_of(row)
            if about["reason"]:
                nothing = dict.fromkeys(MEASURES)
                yield {**about, "id": row["id"], "start": 0.0, "end": 0.0, **nothing}
                continue
            for clip in row["clips"]:
                of = f"{content},{clip['start']},{clip['end']}"
                name = hashlib.sha256(of.encode()).hexdigest()[:16]
                yield {**about, **clip, "id": name, "detail": _detail(clip, recipe)}


def _tables(place: Place) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    n = 0
    for batch in place.batches(FILES, FILE.names):
        held.append(batch)
        n += len(batch)
        if n >= AT_ONCE:
            yield _whole(held)
            held, n = [], 0
    if held:
        yield _whole(held)


def _whole(parts: list[pa.RecordBatch]) -> pa.Table:
    """The rows as one table; a part that was written before a column came is without values."""
    tables = [FILE.empty_table(), *(pa.table(part) for part in parts)]
    return pa.concat_tables(tables, promote_options="permissive").cast(FILE)


def _repeated(contents: NDArray[np.uint64]) -> frozenset[int]:
    """The beginnings of hashes that occur more than once."""
    ordered = np.sort(contents)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    return frozenset(int(one) for one in np.unique(again)) - {0}


def _detail(clip: Row, recipe: ClipsRecipe) -> str:
    match clip["reason"]:
        case "too short":
            seconds = clip["end"] - clip["start"]
            return f"a scene of {seconds:.2f} s; the least is {recipe.shortest:g} (clips.shortest)"
        case "too long":
            seconds = clip["end"] - clip["start"]
            return f"a span of {seconds:.2f} s; the most is {recipe.longest:g} (clips.longest)"
        case "dark":
            least = f"the least is {recipe.darkest:g} (clips.darkest)"
            return f"its brightness is {clip['brightness']:.3f}; {least}"
        case "still":
            least = f"the least is {recipe.least_motion:g} (clips.least_motion)"
            return f"its motion is {clip['motion']:.4f}; {least}"
        case "silent":
            found = clip["loudness"]
            what = "it has no sound" if found != found else f"its loudness is {found:.0f} dB"
            return f"{what}; the least is {recipe.quietest} dB (clips.quietest)"
        case "damaged":
            return "some of its frames cannot be decoded"
    return ""
