"""Algorithm 2 of the paper: nested subsets, each with the shares that the whole has.

A stratum is a category, a set of media, the number and the mean length of the captions, a class of
length, a source, and a concept: a tree. Clips of a stratum follow in the order of hashes of their
ids.

The categories take turns: the (k+1)-th of a category's n clips, of T in all, has a place from
``floor(k T / n) + 1`` to ``ceil((k + 1) T / n)``, and the earliest end goes first. These are the
windows of proportionate fair scheduling (Baruah et al., 1996), which one machine can always keep.
So of the first N clips, for each N, a category has less than one clip more or less than
``n N / T``. Independent draws in each stratum would not do: their errors add up. Nor would turns of
all strata: most of them may have one clip alone, and then the larger ones would always go first.

In a category, the strata stand in the order of their names, and clips are drawn at equal distances
from a random start (systematic sampling). So each node of the tree has less than one clip more or
less than its share of the category's, and in the mean none.
"""

import hashlib
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mico_corpus.packing.tables import elements, texts

LENGTHS = (5, 10, 20, 30)
"""A class of lengths ends at each of these seconds."""
CONCEPTS = 500
"""So many of the commonest concepts have strata of their own; the others have one together."""
WORDS = (1, 6, 11, 21, 41)
"""A class of mean lengths of captions begins at each of these numbers of words."""
CLASSES = ("category", "media", "captions", "words", "length", "source", "concept")
"""They are the levels of the tree, from its root; a stratum's name has one of each."""
BETWEEN = " | "
OTHER = "other"


def length_names() -> list[str]:
    edges = [0, *LENGTHS]
    return [f"{a}-{b} s" for a, b in zip(edges, LENGTHS, strict=False)] + [
        f"{edges[-1]} s and more"
    ]


def classes_of(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    seconds = pc.subtract(batch.column("end"), batch.column("start")).to_numpy()
    lengths = np.searchsorted(np.array(LENGTHS), seconds, side="right")
    rows, fields = elements(batch, "annotations")
    role = fields["role"]
    spoken = np.zeros(len(batch), bool)
    spoken[rows[pc.equal(role, "speech").to_numpy(zero_copy_only=False)]] = True
    kinds = pc.binary_join(pc.fill_null(batch.column("files"), []), " ")
    for ending in (r"\d*\.[^ ]*", r"\bjson ?"):
        kinds = pc.replace_substring_regex(kinds, ending, "")
    media = pc.binary_join_element_wise(kinds, pa.array(np.where(spoken, "speech", "")), " ")
    n, words = _captions(batch, rows, role, fields)
    return {
        "category": texts(batch, "category"),
        "media": pc.utf8_trim_whitespace(media),
        "captions": pa.array([f"{one} captions" for one in n.tolist()], pa.string()),
        "words": pa.array(["0 words", *(f"from {n} words" for n in WORDS)]).take(pa.array(words)),
        "length": pa.array(length_names()).take(pa.array(lengths)),
        "source": texts(batch, "source"),
        "concept": _concepts(len(batch), rows, role, fields),
    }


def _captions(
    batch: pa.RecordBatch, rows: NDArray[np.int64], role: pa.Array, fields: dict[str, pa.Array]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each clip the number of captions, its own text with them, and the class of their words."""
    said = pc.equal(role, "caption").to_numpy(zero_copy_only=False)
    of = np.concatenate([rows[said], np.arange(len(batch))])
    found = pa.concat_arrays([fields["text"].filter(pa.array(said)), texts(batch, "text")])
    words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(found)))
    lengths = np.where(pc.equal(found, ""), 0, words.to_numpy(zero_copy_only=False))
    n = np.bincount(of, lengths > 0, minlength=len(batch)).astype(np.int64)
    mean = np.bincount(of, lengths, minlength=len(batch)) / np.maximum(1, n)
    return n, np.searchsorted(np.array(WORDS), mean, side="right")


def _concepts(
    n: int, rows: NDArray[np.int64], role: pa.Array, fields: dict[str, pa.Array]
) -> pa.Array:
    tags = np.flatnonzero(pc.equal(role, "tag").to_numpy(zero_copy_only=False))
    score = np.nan_to_num(fields["score"].to_numpy(zero_copy_only=False)[tags], nan=-np.inf)
    order = tags[np.lexsort((-score, rows[tags]))]
    first = np.ones(len(order), bool)
    first[1:] = rows[order][1:] != rows[order][:-1]
    best = order[first]
    which = np.full(n, -1)
    which[rows[best]] = best
    found = fields["text"].take(pa.array(which, mask=which < 0))
    return pc.fill_null(found, "")


def order_of(text: str, seed: int) -> int:
    """A number that depends on the seed and the text alone."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def counts_at(sizes: Sequence[int], ends: Iterable[int]) -> list[NDArray[np.int64]]:
    """How many of each stratum are among the first N clips, for each N of rising ``ends``.

    ``sizes``: the clips of each stratum, in the order in which ties are broken.
    """
    total = sum(sizes)
    taken = [0] * len(sizes)
    ready: list[tuple[int, int]] = []
    waiting = [(1, stratum) for stratum, size in enumerate(sizes) if size]
    found, place = [], 0
    for end in ends:
        while place < end < total:
            place += 1
            while waiting and waiting[0][0] <= place:
                stratum = heappop(waiting)[1]
                last = -(-(taken[stratum] + 1) * total // sizes[stratum])
                heappush(ready, (last, stratum))
            stratum = heappop(ready)[1]
            taken[stratum] += 1
            if taken[stratum] < sizes[stratum]:
                heappush(waiting, (taken[stratum] * total // sizes[stratum] + 1, stratum))
        found.append(np.array(sizes if end >= total else taken, np.int64))
    return found


def shared(
    sizes: NDArray[np.int64], ends: Sequence[int], starts: Sequence[int]
) -> list[NDArray[np.int64]]:
    """How many clips of each of a category's strata are in nested subsets of ``ends`` clips.

    The largest is drawn of all, and each other one of the next larger one; ``starts`` are random
    numbers, one an end.
    """
    found: list[NDArray[np.int64]] = []
    have = sizes
    for end, start in zip(reversed(ends), reversed(starts), strict=True):
        before = np.concatenate([[0], np.cumsum(have)])
        total = max(1, int(before[-1]))
        have = np.diff((before * end + start % total) // total)
        found.insert(0, have)
    return found


def levels_of(
    strata: NDArray[np.int64],
    orders: NDArray[np.uint64],
    names: Sequence[str],
    seed: int,
    ends: Sequence[int],
) -> NDArray[np.int8]:
    """The number of the smallest subset that each clip is in; ``len(ends)`` if it is in none.

    ``strata``: each clip's, a number of ``names``, which begin with the category. ``orders``:
    hashes of the clips' ids.
    """
    sizes = np.bincount(strata, minlength=len(names))
    counts = np.empty((len(ends), len(names)), np.int64)
    of_category: dict[str, list[int]] = {}
    for stratum in sorted(range(len(names)), key=names.__getitem__):
        of_category.setdefault(names[stratum].partition(BETWEEN)[0], []).append(stratum)
    order = sorted(of_category, key=lambda name: order_of(name, seed))
    firsts = counts_at([int(sizes[of_category[name]].sum()) for name in order], ends)
    for place, name in enumerate(order):
        own = of_category[name]
        starts = [order_of(f"{name}{BETWEEN}{number}", seed) for number in range(len(ends))]
        counts[:, own] = shared(sizes[own], [int(first[place]) for first in firsts], starts)
    by_stratum = np.lexsort((orders, strata))
    first = np.cumsum(sizes) - sizes
    within = np.empty(len(strata), np.int64)
    within[by_stratum] = np.arange(len(strata)) - np.repeat(first, sizes)
    level = np.full(len(strata), len(ends), np.int8)
    for number in reversed(range(len(ends))):
        level[within < counts[number][strata]] = number
    return level
