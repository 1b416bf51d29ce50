"""A machine that there is not, for the doctor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mico_chat.cli.doctor.machine import Gpu, Machine

GB = 10**9

CARD = Gpu("NVIDIA RTX 4090", 24 * GB, 23 * GB, "8.9", "550.54")

_MACHINE = Machine(
    system="Linux 6.1 x86_64",
    cpu="A processor",
    instructions=("AVX2",),
    cores=8,
    usable_cores=8,
    memory=32 * GB,
    memory_free=30 * GB,
    memory_limit=None,
    cache=Path("/cache"),
    disk_free=100 * GB,
    shm=16 * GB,
    gpus=(),
)


def machine(**changes: Any) -> Machine:
    """Eight cores, 32 GB, no card; and what is otherwise."""
    return replace(_MACHINE, **changes)


def torch_facts(**changes: Any) -> dict[str, Any]:
    """What torch's probe says on that machine; and what is otherwise."""
    facts = {
        "version": "2.13.0+cpu",
        "threads": 8,
        "kernels": "AVX2",
        "openmp": True,
        "mps": False,
        "gpu_build": None,
        "gpu_error": None,
        "hidden": None,
        "gpus": [],
    }
    return {**facts, **changes}
