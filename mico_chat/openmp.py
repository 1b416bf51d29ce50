"""How many threads of OpenMP torch starts, and how they wait where llama.cpp shares the process.

A container may be given less time than it sees cores: torch starts a thread for each it sees.

Where llama.cpp was built with OpenMP, as it is without `make setup`, both use libgomp, which stops
waiting actively as soon as all threads it ever started outnumber the cores: after torch has encoded
one picture, llama.cpp on 2 cores falls from 228 to 141 tokens/s (Q4_0). Waiting actively for a
bounded time keeps it at 205, and an idle process idle; a build without OpenMP stays at 244.
"""

from __future__ import annotations

import os

from mico_chat.allowance import seen_cores, usable_cores

WAIT_POLICY = "active"
SPIN_COUNT = "300000"
"""About 3 ms, libgomp's own time where it waits actively."""


def set_openmp() -> None:
    """Set the environment for OpenMP, unless the user has; before torch is imported."""
    if (cores := usable_cores()) < seen_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = WAIT_POLICY
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
