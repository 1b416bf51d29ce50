"""Runs side by side, each process with its share of the cores.

Not in ``__main__``: a process that begins anew does not import that.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from mico_training.research.ablations.grid import Cell
from mico_training.research.ablations.run import Settings, run


def side_by_side(
    settings: Settings, runs: Sequence[tuple[Cell, int]], processes: int
) -> Iterator[tuple[Cell, int, BaseException | None]]:
    """Do runs, so many at a time; gives each as it ends, and why if it failed."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_begin, initargs=(os.getpid(), threads)
    ) as pool:
        begun = {pool.submit(run, settings, cell, seed): (cell, seed) for cell, seed in runs}
        for done in as_completed(begun):
            yield *begun[done], done.exception()


def _begin(parent: int, threads: int) -> None:
    """A process of the pool: its share of the cores, and no life of its own."""
    import torch

    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent was killed, and could not end it."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
