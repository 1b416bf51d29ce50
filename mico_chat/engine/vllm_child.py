"""vLLM's processes end with the one that started them, however that ends.

vLLM ends them when it is told to. A service that is killed tells nobody, and what it left would
keep the GPU's memory from the next one. vLLM loads this as a plugin in each of its processes
(``vllm.general_plugins`` in pyproject.toml); those of other programs are left alone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT = "MICO_VLLM_PARENT"
"""Process that started vLLM, in the environment of its children."""

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def mark_parent() -> None:
    """Let processes that are started from here on know whose they are."""
    os.environ[PARENT] = str(os.getpid())


def end_with_parent() -> None:
    """In a child of a marked process: be killed when that ends. vLLM's workers follow by a pipe."""
    if sys.platform == "linux" and os.environ.get(PARENT) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
