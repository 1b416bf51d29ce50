"""What of the machine this process may use: cores and memory.

A container or a batch system gives a process less than the machine has, by control groups: two
cores' time of 64, 8 GB of 256. Programs that count what the machine has start 64 threads that take
turns on two cores, or are killed. Both versions of control groups are read, and every group on the
way up to the root, for the tightest limit holds.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def seen_cores() -> int:
    """Cores that the process may be put on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on a Mac
    return os.cpu_count() or 1 if affinity is None else len(affinity(0))


def usable_cores(groups: ControlGroups | None = None) -> int:
    """Threads that can run at the same time: by affinity and by whole cores of the time allowed.

    Half a core more would not help: threads that wait for each other wait for the slowest.
    """
    allowed = (groups or ControlGroups()).cores()
    return seen_cores() if allowed is None else max(1, min(seen_cores(), int(allowed)))


class FreeCores:
    """Cores that other programs leave to this process, by the machine's own counts of time.

    A program of low priority (``nice``) does not count: it makes room.

    Args:
        most: at the most; by default :func:`usable_cores`.
        counts: cores that can be used, and seconds of theirs that others have used so far.
        running: threads of others that run or wait for a core at this moment.
        clock: seconds.
    """

    WINDOW_S = 0.2
    """Systems count in hundredths of a second: a shorter time says little."""

    LONG_S = 1.0
    """After so long without a look, what others did meanwhile says little about now."""

    PART = 0.3
    """A core of which others use no more than this part counts as free."""

    def __init__(
        self,
        most: int | None = None,
        counts: Callable[[], tuple[int, float]] | None = None,
        running: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = self._free = most or usable_cores()
        self._counts = counts or _used_by_others
        self._running = running or _running_now
        self._clock = clock
        self._lock = threading.Lock()
        self._at, (_, self._used) = clock(), self._counts()
        self._taken = 0

    def __call__(self) -> int:
        """How many threads can run now without waiting for a core, at least 1."""
        with self._lock:
            seconds = self._clock() - self._at
            if seconds >= self.WINDOW_S:
                cores, used = self._counts()
                long = seconds >= self.LONG_S
                others = self._running() if long else (used - self._used) / seconds
                self._free = max(1, min(self.most, int(cores - others + self.PART)))
                self._at, self._used = self._at + seconds, used
            return max(1, self._free - self._taken)

    @contextmanager
    def take(self) -> Iterator[int]:
        """All that are free, while a block computes; what else this process computes gets one."""
        number = self()
        with self._lock:
            self._taken += number
        try:
            yield number
        finally:
            with self._lock:
                self._taken -= number


@functools.cache
def free_cores() -> FreeCores:
    """The cores that are free to this process, one count for all parts of it."""
    return FreeCores()


def _used_by_others() -> tuple[int, float]:
    import psutil

    cores = psutil.cpu_times(percpu=True)
    affinity = getattr(os, "sched_getaffinity", None)  # not on a Mac
    if affinity is not None:
        cores = [cores[number] for number in affinity(0) if number < len(cores)] or cores
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests' time is in a user's too
    makes_room = (
        os.getpriority(os.PRIO_PROCESS, 0) <= 0
    )  # otherwise our own time is of low priority
    ours = (*idle, "nice") if makes_room else idle
    used = sum(sum(core) - sum(getattr(core, name, 0.0) for name in ours) for core in cores)
    return len(cores), used - time.process_time()


def _running_now() -> int:
    """0 where the system does not say it: then the next window tells."""
    words = _words(Path("/proc/loadavg"))
    if len(words) < 4:
        return 0
    stats = ("".join(_lines(file)) for file in Path("/proc/self/task").glob("*/stat"))
    ours = sum(stat.rpartition(")")[2].split()[:1] == ["R"] for stat in stats)
    return max(0, int(words[3].partition("/")[0]) - ours)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError, PermissionError, ProcessLookupError):
        return []  # another system, version or kernel has other files


def _words(file: Path) -> list[str]:
    return [word for line in _lines(file) for word in line.split()]


def processor() -> tuple[str, frozenset[str]]:
    """A processor's name, and its flags where the system lists them."""
    if platform.system() == "Darwin":
        command = ("sysctl", "-n", "machdep.cpu.brand_string")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() or platform.machine(), frozenset({"asimd"})
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip().lower(), value.strip())
    flags = info.get("flags") or info.get("features") or ""
    return info.get("model name") or platform.machine(), frozenset(flags.split())
