"""Algorithm 2 of the paper: nested subsets, each with the shares that the whole has.

A stratum is a source, a class of length, a set of media, and a concept. Clips of a stratum follow
in the order of hashes of their ids. The strata take turns: the (k+1)-th of a stratum's n clips, of
T in all, has a place from ``floor(k T / n) + 1`` to ``ceil((k + 1) T / n)``, and the earliest end
goes first. These are the windows of proportionate fair scheduling (Baruah et al., 1996), which one
machine can always keep. So of the first N clips, for each N, a stratum has less than one clip more
or less than ``n N / T``. Independent draws in each stratum would not do: their errors add up.
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
CLASSES = ("source", "length", "media", "concept")
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
    return {
        "source": texts(batch, "source"),
        "length": pa.array(length_names()).take(pa.array(lengths)),
        "media": pc.utf8_trim_whitespace(media),
        "concept": _concepts(len(batch), rows, role, fields),
    }


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


def levels_of(
    strata: NDArray[np.int64],
    orders: NDArray[np.uint64],
    names: Sequence[str],
    seed: int,
    ends: Sequence[int],
) -> NDArray[np.int8]:
    """The number of the smallest subset that each clip is in; ``len(ends)`` if it is in none.

    ``strata``: each clip's, a number of ``names``. ``orders``: hashes of the clips' ids.
    """
    rank = np.argsort(np.array([order_of(name, seed) for name in names], np.uint64))
    sizes = np.bincount(strata, minlength=len(names))
    counts = counts_at(sizes[rank].tolist(), ends)
    by_stratum = np.lexsort((orders, strata))
    first = np.cumsum(sizes) - sizes
    within = np.empty(len(strata), np.int64)
    within[by_stratum] = np.arange(len(strata)) - np.repeat(first, sizes)
    level = np.full(len(strata), len(ends), np.int8)
    for number in reversed(range(len(ends))):
        taken = np.empty(len(names), np.int64)
        taken[rank] = counts[number]
        level[within < taken[strata]] = number
    return level
