"""What of the machine this process may use: cores and memory.

A container or a batch system gives a process less than the machine has, by control groups: two
cores' time of 64, 8 GB of 256. Programs that count what the machine has start 64 threads that take
turns on two cores, or are killed. Both versions of control groups are read, and every group on the
way up to the root, for the tightest limit holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 60
"""Version 1 writes "no limit" as the largest number of whole pages."""


@dataclass(frozen=True)
class ControlGroups:
    """The control groups of a process: ``root`` is where they are mounted, ``own`` names its own.

    Where there are none (a Mac), every limit is None.
    """

    root: Path = Path("/sys/fs/cgroup")
    own: Path = Path("/proc/self/cgroup")

    def cores(self) -> float | None:
        """Cores' worth of time, such as 1.5; None where it is not limited."""
        found = []
        for folder in self._folders("cpu"):
            words = _words(folder / "cpu.max") or [
                *_words(folder / "cpu.cfs_quota_us"),
                *_words(folder / "cpu.cfs_period_us"),
            ]
            if len(words) == 2 and words[0] not in ("max", "-1"):
                found.append(int(words[0]) / int(words[1]))
        return min(found, default=None)

    def memory_limit(self) -> int | None:
        """Bytes; None where they are not limited."""
        return min((limit for limit, _ in self._memory()), default=None)

    def memory_free(self) -> int | None:
        """Bytes up to the nearest limit, what can be dropped of files counted as free."""
        return min((limit - used for limit, used in self._memory()), default=None)

    def _memory(self) -> Iterator[tuple[int, int]]:
        """Limit and use of every group that has a limit."""
        for folder in self._folders("memory"):
            version_2 = (folder / "memory.max").is_file()
            limit_file = "memory.max" if version_2 else "memory.limit_in_bytes"
            used_file = "memory.current" if version_2 else "memory.usage_in_bytes"
            limit, used = _words(folder / limit_file), _words(folder / used_file)
            if not limit or not used or limit[0] == "max" or int(limit[0]) >= _NO_LIMIT:
                continue
            dropped = "inactive_file" if version_2 else "total_inactive_file"
            words = _words(folder / "memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=False))
            yield int(limit[0]), max(0, int(used[0]) - int(stat.get(dropped, 0)))

    def _folders(self, controller: str) -> Iterator[Path]:
        """Folders of the process's groups for a controller, its own first, the root last.

        Inside a container the group's path is often one of the host, which leads nowhere here: the
        container's own group is then the root.
        """
        for line in _lines(self.own):
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            base = self.root if not controllers else self.root / controller
            inside = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
            for depth in range(len(inside), -1, -1):
                folder = base.joinpath(*inside[:depth])
                if folder.is_dir():
                    yield folder


def usable_cores(groups: ControlGroups | None = None) -> int:
    """Threads that can run at the same time: by affinity and by whole cores of the time allowed.

    Half a core more would not help: threads that wait for each other wait for the slowest.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on a Mac
    cores = os.cpu_count() or 1 if affinity is None else len(affinity(0))
    allowed = (groups or ControlGroups()).cores()
    return cores if allowed is None else max(1, min(cores, int(allowed)))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # another system, version or kernel has other files


def _words(file: Path) -> list[str]:
    return [word for line in _lines(file) for word in line.split()]
