"""Which frames of a clip, and which slices of a sound, are taken when not all are.

As in temporal segment networks (arXiv 1608.00859) and in the released MiCo: equal runs, and one
place of each. Training draws the place, evaluation takes the middle one.
"""

from typing import Literal

import numpy as np

Sampling = Literal["uniform", "segments"]
"""``"uniform"``: at even distances in time, from end to end. ``"segments"``: the middle one of each
of equal runs of frames or slices."""


def of_segments(n: int, segments: int, generator: np.random.Generator | None = None) -> list[int]:
    """The middle one of each of equal ``segments`` of ``n`` places, or a random one.

    The first segments are one longer where ``n`` is no multiple. ``n`` is at least ``segments``.
    """
    runs = [(int(run[0]), len(run)) for run in np.array_split(np.arange(n), segments)]
    if generator is None:
        return [first + (length - 1) // 2 for first, length in runs]
    return [first + int(generator.integers(length)) for first, length in runs]
