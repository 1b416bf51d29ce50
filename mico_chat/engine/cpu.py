"""Which cores and memory this process may use, and how many threads compute a step.

Containers and batch systems limit a process by control groups. A program that counts the machine's
cores instead may start 64 threads for two cores. Both versions of control groups are read, from the
process's own group up to the root; the lowest limit counts.
"""

import ctypes
import functools
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath

from mico_chat import system

_NO_LIMIT = 1 << 60  # bytes; version 1 of control groups writes a huge number for no limit


# --- what this process may use ------------------------------------------------------------------


@dataclass(frozen=True)
class ControlGroups:
    """The limits of the process's control groups; a limit that is not set is None."""

    root: Path = Path("/sys/fs/cgroup")
    own: Path = Path("/proc/self/cgroup")

    def cores(self) -> float | None:
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
        return min((limit for limit, _ in self._memory()), default=None)

    def memory_free(self) -> int | None:
        """Bytes left before a limit is reached. Cached files count as free: they can be dropped."""
        return min((limit - used for limit, used in self._memory()), default=None)

    def _memory(self) -> Iterator[tuple[int, int]]:
        versions = (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        )
        for folder, (most, current, cached) in product(self._folders("memory"), versions):
            limit, used = _words(folder / most), _words(folder / current)
            if not limit or not used or limit[0] == "max" or int(limit[0]) >= _NO_LIMIT:
                continue
            words = _words(folder / "memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=False))
            yield int(limit[0]), max(0, int(used[0]) - int(stat.get(cached, 0)))

    def _folders(self, controller: str) -> Iterator[Path]:
        """Folders of the process's groups for a controller: its own first, the root last.

        In a container the path is often the host's: then only the root, its own group, is found.
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


def memory(groups: ControlGroups | None = None) -> tuple[int, int]:
    """Free bytes of memory, and all bytes that this process may use."""
    import psutil  # not at once: every command imports this module

    machine, groups = psutil.virtual_memory(), groups or ControlGroups()
    limit, within = groups.memory_limit(), groups.memory_free()
    free = machine.available if within is None else min(machine.available, within)
    return free, machine.total if limit is None else min(machine.total, limit)


def seen_cores() -> int:
    return len(system.cores() or ()) or os.cpu_count() or 1


def usable_cores(groups: ControlGroups | None = None) -> int:
    """How many threads can run at the same time, by affinity and by control groups."""
    allowed = (groups or ControlGroups()).cores()
    return seen_cores() if allowed is None else max(1, min(seen_cores(), int(allowed)))


def processor() -> tuple[str, frozenset[str]]:
    """A processor's name, and its flags where the system lists them."""
    if platform.system() == "Darwin":
        command = ("sysctl", "-n", "machdep.cpu.brand_string")
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        return result.stdout.strip() or platform.machine(), frozenset({"asimd"})
    info: dict[str, str] = {}
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        info.setdefault(key.strip().lower(), value.strip())
    flags = info.get("flags") or info.get("features") or ""
    return info.get("model name") or platform.machine(), frozenset(flags.split())


def set_openmp() -> None:
    """Set OpenMP's environment, unless the user has. Call this before torch is imported.

    torch starts a thread for each core that it sees; the environment limits them to the usable
    cores. A thread that waits for other threads spins first and then sleeps. libgomp spins for
    3 ms: while another program runs, the mini's encoder then takes 160 to 1,600 ms for a picture.
    With 0.1 ms it takes 100 ms. Without spinning it takes 60 ms on a quiet machine, instead of 40.

    llama.cpp may share libgomp with torch. Without the wait policy its speed falls from 228 to 141
    tokens/s (Q4_0) after a picture.
    """
    if (cores := usable_cores()) < seen_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "active"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # about 0.1 ms


# --- what other programs leave free -------------------------------------------------------------


class FreeCores:
    """How many cores other programs leave free, from the machine's counts of processor time.

    Programs of low priority (``nice``) do not count: they make room. ``counts`` returns the number
    of usable cores and the seconds that other programs have used them. ``running`` returns how many
    threads of other programs run, or wait for a core, at this moment; one of them may be a client
    that has just asked, so after a long time both must say that there are neighbours.
    """

    WINDOW_S = 0.2  # systems count hundredths of a second: a shorter time is too coarse
    LONG_S = 1.0  # a mean over a longer time does not tell which programs run now
    PART = 0.3  # a core counts as free if other programs use at most this share of it

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
        """How many threads can run now without waiting for a core; at least 1."""
        with self._lock:
            seconds = self._clock() - self._at
            if seconds >= self.WINDOW_S:
                cores, used = self._counts()
                long = seconds >= self.LONG_S
                others = (used - self._used) / (self.LONG_S if long else seconds)
                if long:
                    others = min(others, self._running())
                self._free = max(1, min(self.most, int(cores - others + self.PART)))
                self._at, self._used = self._at + seconds, used
            return max(1, self._free - self._taken)

    @contextmanager
    def take(self, most: int | None = None) -> Iterator[int]:
        """Take all free cores for a block, or at most ``most``; others get at least one."""
        number = self() if most is None else min(self(), most)
        with self._lock:
            self._taken += number
        try:
            yield number
        finally:
            with self._lock:
                self._taken -= number


@functools.cache
def free_cores() -> FreeCores:
    return FreeCores()


def _used_by_others() -> tuple[int, float]:
    import psutil

    cores = psutil.cpu_times(percpu=True)
    own = system.cores() or ()
    cores = [cores[number] for number in own if number < len(cores)] or cores
    left_out = ["idle", "iowait", "guest", "guest_nice"]  # user time includes guest time
    if not system.is_nice():  # else "nice" includes this process's time
        left_out.append("nice")
    used = sum(sum(core) - sum(getattr(core, name, 0.0) for name in left_out) for core in cores)
    return len(cores), used - time.process_time()


def _running_now() -> int:
    """Threads of other programs that run or wait; 0 if the system does not count them."""
    before, words, after = _own_running(), _words(Path("/proc/loadavg")), _own_running()
    if len(words) < 4:
        return 0
    return max(0, int(words[3].partition("/")[0]) - max(before, after))


def _own_running() -> int:
    stats = ("".join(_lines(file)) for file in Path("/proc/self/task").glob("*/stat"))
    return sum(stat.rpartition(")")[2].split()[:1] == ["R"] for stat in stats)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError, PermissionError, ProcessLookupError):
        return []  # not on this system or kernel


def _words(file: Path) -> list[str]:
    return [word for line in _lines(file) for word in line.split()]


# --- the threads of a step ----------------------------------------------------------------------


class Threads:
    """How many threads compute a step of llama.cpp: one for each free core, unless ``fixed``.

    The threads of llama.cpp wait for each other some hundred times in a step, and spin while they
    wait. If another program uses one of two cores, two threads need seconds for a step that usually
    takes 8 ms. Such a step is given up and computed again with fewer threads.
    """

    SLOW = 3.0  # a step is given up after this many times its usual time,
    SLACK_S = 0.01  # and this many seconds more: one turn of another program
    FORGET = 0.99  # after a step, the usual times of more threads are multiplied by this
    HOLD_S = (0.1, 16.0)
    """Seconds with fewer threads after a step was given up: at first, and at most. The time doubles
    with each such step, until ``WELL`` steps of more threads have ended."""

    WELL = 30

    def __init__(
        self,
        fixed: int | None = None,
        *,
        free: FreeCores | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed, self._free, self._clock = fixed, free or free_cores(), clock
        self._usual: dict[tuple[int, int], float] = {}  # seconds by size and threads
        self._held_at = 1
        self._held_until = -float("inf")
        self._hold_s = self.HOLD_S[0] / 2
        self._well = 0

    def number(self, tokens: int) -> int:
        if self._fixed is not None:
            return self._fixed
        most = self._free()
        if self._clock() < self._held_until:
            most = min(most, self._held_at)
        usual = {n: s for (size, n), s in self._usual.items() if size == _size(tokens)}
        faster = [n for n, s in usual.items() if n < most and s < usual.get(most, 0.0)]
        return min(faster, key=usual.__getitem__, default=most)

    def limit(self, tokens: int, threads: int) -> float | None:
        """Seconds after which a step is given up; None for a step that must run to its end."""
        if threads in (1, self._fixed):
            return None
        usual = self._usual.get((_size(tokens), threads))
        if usual is None:  # at most the time of fewer threads, scaled from steps of other sizes
            known = ((size, s) for (size, n), s in self._usual.items() if n <= threads)
            scaled = (seconds * max(1.0, tokens / 2**size) for size, seconds in known)
            usual = min(scaled, default=float("inf"))
        return self.SLOW * usual + self.SLACK_S

    def observe(self, tokens: int, threads: int, seconds: float, *, given_up: bool = False) -> None:
        """Note the time of a step; after one that was given up, use fewer threads for a while."""
        size = _size(tokens)
        usual = self._usual.get((size, threads), seconds)
        self._usual[size, threads] = 0.7 * usual + 0.3 * seconds
        # Known times of more threads shrink, so that more threads are tried again.
        for (other, n), slower in self._usual.items():
            if other == size and n > threads:
                best = seconds * threads / n
                self._usual[other, n] = max(self.FORGET * slower, min(slower, best))
        if given_up:
            first, most = self.HOLD_S
            self._hold_s = first if self._well >= self.WELL else min(2 * self._hold_s, most)
            self._held_at, self._held_until = threads // 2, self._clock() + self._hold_s
            self._well = 0
        elif threads > self._held_at:
            self._well += 1


def _size(tokens: int) -> int:
    """A class of steps that take about the same time: 1 token, 2 to 3, 4 to 7 and so on."""
    return tokens.bit_length() - 1


class Alarm:
    """Ends a computation of llama.cpp that takes too long.

    Between two operations llama.cpp calls a C function, which returns whether to end. A Python
    function would wait for Python's lock each time. So the function is C's ``strlen``, of a text
    that is empty until a thread here writes one byte.
    """

    TICK_S = 0.01
    REST_S = 1.0  # after this time without a limit, the thread sleeps until the next limit

    def __init__(self) -> None:
        self._text = ctypes.create_string_buffer(2)  # empty, or "!" to end the computation
        self._lock = threading.Lock()
        self._limit: float | None = None
        self._needed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="mico-alarm", daemon=True)
        self._thread.start()

    @property
    def callback(self) -> tuple[int, int]:
        """Addresses of a C function, ``bool (*)(void *)``, and of its argument."""
        function = ctypes.cast(system.LIBC.strlen, ctypes.c_void_p).value or 0
        return function, ctypes.addressof(self._text)

    @contextmanager
    def after(self, seconds: float | None) -> Iterator[None]:
        self._set(None if seconds is None else time.monotonic() + seconds)
        if seconds is not None and not self._needed.is_set():
            self._needed.set()
        try:
            yield
        finally:
            self._set(None)

    def close(self) -> None:
        self._closed = True
        self._needed.set()
        self._thread.join()

    def _set(self, limit: float | None) -> None:
        with self._lock:
            self._limit = limit
            self._text.value = b""

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed:
            time.sleep(self.TICK_S)
            now = time.monotonic()
            with self._lock:
                if self._limit is not None:
                    last = now
                    if now > self._limit:
                        self._text.value = b"!"
                elif now - last > self.REST_S and not self._closed:
                    self._needed.clear()
            self._needed.wait()
