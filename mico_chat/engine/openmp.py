"""How many threads of OpenMP torch starts, and how they wait for each other.

A container may be given less time than it sees cores: torch starts a thread for each it sees.

A thread that waits looks again and again for a short time, then sleeps. libgomp's own time is 3 ms
where it waits actively: with another program on the machine, whose core such a thread keeps, a
picture takes the mini's encoder 160 to 1,600 ms. With a tenth of a millisecond it takes 100 ms, and
40 ms on a quiet machine either way. A thread that sleeps at once makes it 60 ms there.

Where llama.cpp was built with OpenMP, as it is without `make setup`, it shares libgomp with torch:
libgomp then hardly waits actively as soon as all threads it ever started outnumber the cores. Hence
the policy, without which llama.cpp falls from 228 to 141 tokens/s (Q4_0) after a picture.
"""

from __future__ import annotations

import os

from mico_chat.engine.cores import seen_cores, usable_cores

WAIT_POLICY = "active"
SPIN_COUNT = "10000"
"""About 0.1 ms."""


def set_openmp() -> None:
    """Set the environment for OpenMP, unless the user has; before torch is imported."""
    if (cores := usable_cores()) < seen_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = WAIT_POLICY
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
