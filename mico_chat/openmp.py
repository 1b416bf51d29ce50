"""How threads of OpenMP wait for each other, where torch and llama.cpp share a process.

Where llama.cpp was built with OpenMP, as it is without `make setup`, both use libgomp, which stops
waiting actively as soon as all threads it ever started outnumber the cores: after torch has encoded
one picture, llama.cpp on 2 cores falls from 228 to 141 tokens/s (Q4_0). Waiting actively for a
bounded time keeps it at 205, and an idle process idle; a build without OpenMP stays at 244.
"""

from __future__ import annotations

import os

WAIT_POLICY = "active"
SPIN_COUNT = "300000"
"""About 3 ms, libgomp's own time where it waits actively."""


def set_wait_policy() -> None:
    """Set the environment for libgomp, unless the user has; before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = WAIT_POLICY
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
