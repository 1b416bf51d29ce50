"""Media of items to the encoder's units, decoded in worker processes ahead of the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from mico_chat.errors import MediaError
from mico_chat.evaluation.tasks.model import ItemUnits
from mico_chat.evaluation.tasks.task import ItemMedia, Task
from mico_chat.media import MediaDecoder, MediaFile, MediaLimits, Video
from mico_chat.model.preprocessing import Preprocessing

AHEAD = 2
"""Batches that are decoded while the model has one: what is held in memory is bounded by them."""


class MediaPool:
    """Decodes for one task: its frames, its slices, its sound tracks.

    Args:
        task: says how much of a medium is taken.
        preprocessing: of the model.
        workers: processes that decode.
    """

    def __init__(self, task: Task, preprocessing: Preprocessing, workers: int) -> None:
        limits = MediaLimits().model_copy(update={"max_frames": task.frames})
        self._decoder = MediaDecoder(limits, workers=workers)
        self._threads = ThreadPoolExecutor(workers, "mico-load")
        self._preprocess = preprocessing.model_copy(update={"max_slices": max(1, task.slices)})
        self._with_track = task.slices > 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    def batches(
        self, batches: Sequence[Sequence[ItemMedia]]
    ) -> Iterator[list[ItemUnits | MediaError]]:
        """Of each batch the units of its media; in place of one that cannot be decoded, why."""
        coming: deque[list[Future[ItemUnits]]] = deque()
        for number in range(len(batches) + AHEAD):
            if number < len(batches):
                coming.append([self._threads.submit(self._load, one) for one in batches[number]])
            if number >= AHEAD:
                yield [_outcome(future.result) for future in coming.popleft()]

    def _load(self, media: ItemMedia) -> ItemUnits:
        medium = self._decoder.decode(MediaFile(media.kind, media.source, media.name))
        own = self._preprocess.units(medium)
        if not self._with_track or not isinstance(medium, Video) or medium.audio is None:
            return ItemUnits((medium.kind,), (own,))
        return ItemUnits((medium.kind, "audio"), (own, self._preprocess.units(medium.audio)))


def _outcome(result: Callable[[], ItemUnits]) -> ItemUnits | MediaError:
    try:
        return result()
    except MediaError as error:
        return error
