"""The machine as this process meets it: processor, cores, memory, disk, graphics cards."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mico_chat.cli.doctor.finding import Finding, gigabytes
from mico_chat.engine.cores import ControlGroups, processor, usable_cores

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "bf16",
    "i8mm": "i8mm",
}
"""What matters of a processor's flags, as /proc/cpuinfo has them."""

LITTLE_DISK = 1_000_000_000
"""Bytes: the mini's base LLM, its converted copy and its GGUF file take half of it."""

_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free,compute_cap,driver_version",
    "--format=csv,noheader,nounits",
)
_NVIDIA_SMI_S = 10.0


@dataclass(frozen=True)
class Gpu:
    """A graphics card; sizes in bytes. ``capability`` such as "9.0"."""

    name: str
    total: int
    free: int
    capability: str
    driver: str


@dataclass(frozen=True)
class Machine:
    """What there is and how much of it this process may use; sizes in bytes.

    ``gpus`` are those that the driver tells, whether torch can use them or not.
    """

    system: str
    cpu: str
    instructions: tuple[str, ...]
    cores: int
    usable_cores: int
    memory: int
    memory_free: int
    memory_limit: int | None
    cache: Path
    disk_free: int
    shm: int | None
    gpus: tuple[Gpu, ...]

    @classmethod
    def here(cls, cache: Path, groups: ControlGroups | None = None) -> Machine:
        """This machine; ``cache`` is the cache folder, which need not exist."""
        groups = groups or ControlGroups()
        cpu, flags = processor()
        memory = psutil.virtual_memory()
        limit, within = groups.memory_limit(), groups.memory_free()
        shm = Path("/dev/shm")
        return cls(
            system=f"{platform.system()} {platform.release()} {platform.machine()}",
            cpu=cpu,
            instructions=tuple(name for flag, name in INSTRUCTIONS.items() if flag in flags),
            cores=os.cpu_count() or 1,
            usable_cores=usable_cores(groups),
            memory=memory.total,
            memory_free=memory.available if within is None else min(memory.available, within),
            memory_limit=None if limit is None or limit >= memory.total else limit,
            cache=cache,
            disk_free=shutil.disk_usage(existing(cache)).free,
            shm=shutil.disk_usage(shm).total if shm.is_dir() else None,
            gpus=nvidia_gpus(),
        )


def existing(path: Path) -> Path:
    """The path, or the nearest folder on the way to it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def nvidia_gpus(command: Sequence[str] = _NVIDIA_SMI) -> tuple[Gpu, ...]:
    """What NVIDIA's own program tells of its cards; nothing where it is not or does not work."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_NVIDIA_SMI_S
        )
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return ()
    rows = csv.reader(result.stdout.splitlines() if result.returncode == 0 else [])
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 5]
    return tuple(
        Gpu(name, _mebibytes(total), _mebibytes(free), capability, driver)
        for name, total, free, capability, driver in cells
    )


def _mebibytes(number: str) -> int:
    return int(number) << 20 if number.isdecimal() else 0  # "[N/A]" on cards that share memory


def machine_findings(machine: Machine) -> list[Finding]:
    """What is said of the machine itself; of its graphics cards see :mod:`.gpu`."""
    return [
        Finding("system", "note", machine.system),
        _cpu(machine),
        _memory(machine),
        _disk(machine),
    ]


def _cpu(machine: Machine) -> Finding:
    n, of = machine.usable_cores, machine.cores
    cores = f"{n} core{'s' * (n != 1)}" + (f" of {of}" if n < of else "")
    facts = {
        "model": machine.cpu,
        "cores": of,
        "usable_cores": n,
        "instructions": list(machine.instructions),
    }
    text = ", ".join([f"{machine.cpu}: {cores}", *machine.instructions])
    if machine.system.endswith("x86_64") and "AVX2" not in machine.instructions:
        text += "; without AVX2 every engine is slow, and some builds do not start"
        return Finding("processor", "warning", text, facts=facts)
    return Finding("processor", "ok", text, facts=facts)


def _memory(machine: Machine) -> Finding:
    facts = {
        "total": machine.memory,
        "free": machine.memory_free,
        "limit": machine.memory_limit,
    }
    text = f"{gigabytes(machine.memory_free)} free of {gigabytes(machine.memory)}"
    if machine.memory_limit is not None:
        text += f"; a control group allows {gigabytes(machine.memory_limit)}"
    return Finding("memory", "ok", text, facts=facts)


def _disk(machine: Machine) -> Finding:
    facts = {"folder": str(machine.cache), "free": machine.disk_free}
    text = f"{gigabytes(machine.disk_free)} free in {machine.cache}"
    if machine.disk_free < LITTLE_DISK:
        mend = "MICO_CACHE_DIR=/a/larger/disk, or make room there"
        return Finding("disk", "warning", f"{text}: little", mend, facts)
    return Finding("disk", "ok", text, facts=facts)
