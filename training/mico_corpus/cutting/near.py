"""Which of many perceptual hashes are near an earlier one: exact, without comparing all pairs.

Cut the 64 bits into ``near + t`` bands. Two hashes that differ in at most ``near`` bits are equal
in at least ``t`` of them. So only hashes that are equal in some ``t`` bands are compared: those
that stand together when all are sorted by these bands.
"""

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

BITS = 64


def duplicates(hashes: NDArray[np.uint64], near: int) -> NDArray[np.int64]:
    """Of each hash the place of the earlier one that it duplicates; -1 if it is kept.

    It is a duplicate if it differs in at most ``near`` bits from an earlier one that is kept.
    """
    places = np.arange(len(hashes))
    if near < 0 or not len(hashes):
        return np.full(len(hashes), -1)
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    values, first = values[order], first[order]
    kept = np.arange(len(values))  # of each value the one that stands for it
    for earlier, later in _pairs(values, near):
        if kept[later] == later and kept[earlier] == earlier:
            kept[later] = earlier
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    found: NDArray[np.int64] = first[kept[rank[inverse]]]
    return np.where(found == places, -1, found)


def _pairs(values: NDArray[np.uint64], near: int) -> Iterator[tuple[int, int]]:
    if not near:
        return
    size = len(values)
    found = np.empty(0, np.int64)
    for mask in _masks(size, near):
        keys = values & mask
        order = np.argsort(keys)
        keys, ordered = keys[order], values[order]
        at, apart = np.arange(size), 1
        while len(at := at[at < size - apart]):
            at = at[keys[at] == keys[at + apart]]
            close = at[np.bitwise_count(ordered[at] ^ ordered[at + apart]) <= near]
            one, other = order[close], order[close + apart]
            pairs = np.maximum(one, other) * size + np.minimum(one, other)
            found = np.concatenate((found, pairs)) if len(pairs) else found
            apart += 1
        found = np.unique(found)
    for pair in found:
        later, earlier = divmod(int(pair), size)
        yield earlier, later


def _masks(size: int, near: int) -> Iterator[np.uint64]:
    """The bits of each ``t`` bands; the ``t`` that costs least."""

    def cost(t: int) -> float:
        together = size / 2 ** (BITS * t / (near + t))
        return comb(near + t, t) * (40 + together)  # sorting one, and comparing it

    t = min(range(1, 8), key=cost)
    edges = [BITS * i // (near + t) for i in range(near + t + 1)]
    bands = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    for chosen in combinations(bands, t):
        yield np.uint64(sum(chosen))
