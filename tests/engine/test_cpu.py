"""Cores and memory by control groups; cores that other programs leave; threads of a step."""

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mico_chat.engine.cpu import Alarm, ControlGroups, FreeCores, Threads, usable_cores

MB = 1 << 20


def groups(folder: Path, own: str, files: dict[str, object]) -> ControlGroups:
    """Control groups in a folder."""
    (folder / "own").write_text(own)
    for name, content in files.items():
        file = folder / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return ControlGroups(folder / "root", folder / "own")


def test_no_control_groups(tmp_path: Path) -> None:
    found = ControlGroups(tmp_path / "nowhere", tmp_path / "nothing")
    assert (found.cores(), found.memory_limit(), found.memory_free()) == (None, None, None)


def test_version_2_takes_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "0::/slice/job\n",
        {
            "slice/cpu.max": "150000 100000",
            "slice/memory.max": 800 * MB,
            "slice/memory.current": 700 * MB,
            "slice/memory.stat": f"anon {100 * MB}\ninactive_file {300 * MB}",
            "slice/job/cpu.max": "max 100000",
            "slice/job/memory.max": 500 * MB,
            "slice/job/memory.current": 50 * MB,
            "slice/job/memory.stat": "",
        },
    )
    assert found.cores() == 1.5
    assert found.memory_limit() == 500 * MB
    assert found.memory_free() == 400 * MB  # of the slice, whose other jobs have the rest
    assert usable_cores(found) == 1


def test_version_1(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        {
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "cpu/docker/abc/cpu.cfs_quota_us": "25000",
            "cpu/docker/abc/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "1",
            "memory/docker/abc/memory.limit_in_bytes": 2000 * MB,
            "memory/docker/abc/memory.usage_in_bytes": 500 * MB,
            "memory/docker/abc/memory.stat": f"cache 1\ntotal_inactive_file {100 * MB}",
        },
    )
    assert found.cores() == 0.25
    assert found.memory_limit() == 2000 * MB
    assert found.memory_free() == 1600 * MB
    assert usable_cores(found) == 1  # a quarter of a core runs one thread


def test_a_path_of_the_host_leads_to_the_containers_own_group(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "0::/../../kubepods/pod1\n",
        {
            "cpu.max": "400000 100000",
            "memory.max": 64 * MB,
            "memory.current": 65 * MB,
        },
    )
    assert found.cores() == 4
    assert found.memory_free() == -1 * MB  # what is over the limit is told as it is


def test_affinity_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert usable_cores(groups(tmp_path, "0::/\n", {"cpu.max": "800000 100000"})) == 3
    assert usable_cores(groups(tmp_path, "0::/\n", {"cpu.max": "200000 100000"})) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(ControlGroups(tmp_path / "nowhere", tmp_path / "nothing")) == 6


@dataclass
class Machine:
    """A machine with ``cores`` cores; other programs use as much time as ``others`` cores have."""

    cores: int = 2
    others: float = 0.0
    now: float = 100.0
    used: float = 0.0
    free: FreeCores = field(init=False)

    def __post_init__(self) -> None:
        self.free = FreeCores(
            self.cores,
            lambda: (self.cores, self.used),
            lambda: math.ceil(self.others),
            lambda: self.now,
        )

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.used += self.others * seconds

    def threads(self) -> Threads:
        return Threads(free=self.free, clock=lambda: self.now)


@pytest.mark.parametrize(
    ("cores", "others", "free"),
    [(2, 0.0, 2), (2, 0.25, 2), (2, 0.6, 1), (2, 1.3, 1), (2, 2.0, 1), (8, 1.0, 7), (8, 7.9, 1)],
)
def test_cores_free_of_other_programs(cores: int, others: float, free: int) -> None:
    machine = Machine(cores, others)
    machine.passes(0.5)
    assert machine.free() == free
    machine.others = 0.0
    machine.passes(0.1)
    assert machine.free() == free  # too short a time to tell
    machine.passes(0.2)
    assert machine.free() > free or free == cores


def test_use_by_others_long_ago_is_ignored() -> None:
    machine = Machine(2, 2.0)
    machine.passes(60.0)
    machine.others = 0.0
    assert machine.free() == 2
    machine.passes(60.0)
    machine.others = 1.0
    machine.passes(1.0)
    assert machine.free() == 1


def test_a_client_that_has_just_asked_is_no_neighbour() -> None:
    machine = Machine(2)
    machine.passes(5.0)
    machine.used, machine.others = 0.2, 1.0
    assert machine.free() == 2
    machine.passes(0.5)
    assert machine.free() == 1, "it goes on"


def test_two_computations_of_a_process_share_its_cores() -> None:
    machine = Machine(4)
    with machine.free.take() as first:
        assert (first, machine.free()) == (4, 1)
    assert machine.free() == 4


def test_the_real_machine_has_cores() -> None:
    assert 1 <= FreeCores()() <= FreeCores().most


def run(machine: Machine, threads: Threads, took: Callable[[int], float], tokens: int = 1) -> int:
    while True:
        number = threads.number(tokens)
        limit = threads.limit(tokens, number)
        seconds, given_up = took(number), False
        if limit is not None and seconds > limit:
            seconds, given_up = limit, True
        machine.passes(seconds)
        threads.observe(tokens, number, seconds, given_up=given_up)
        if not given_up:
            return number


def quiet(number: int) -> float:
    return 0.016 / number


def busy(number: int) -> float:
    return 0.02 if number == 1 else 4.5


def experienced(machine: Machine, steps: int = 5) -> Threads:
    """Threads that have computed steps on a quiet machine."""
    threads = machine.threads()
    for _ in range(steps):
        run(machine, threads, quiet)
    return threads


def test_all_threads_on_a_quiet_machine() -> None:
    machine = Machine()
    threads = machine.threads()
    assert [run(machine, threads, quiet) for _ in range(100)] == [2] * 100


def test_a_program_that_starts_costs_one_step_not_seconds() -> None:
    machine = Machine()
    threads = experienced(machine, 20)
    machine.others = 1.0
    before = machine.now
    used = [run(machine, threads, busy) for _ in range(100)]
    assert used == [1] * 100
    assert machine.now - before < 100 * 0.02 * 1.05 + 0.05
    # And when it ends, all threads are back within a window of counting.
    machine.others = 0.0
    used = [run(machine, threads, quiet) for _ in range(100)]
    assert used[-50:] == [2] * 50


def test_slow_threads_are_tried_again_later_and_later_where_cores_look_free() -> None:
    machine = Machine()  # such as beside programs whose low priority does not count
    threads = experienced(machine, 1)
    before = machine.now
    used = [run(machine, threads, busy) for _ in range(2000)]
    assert set(used) == {1}
    assert machine.now - before < 2000 * 0.02 * 1.05
    # Even after hours of it, the next quiet time is found.
    for _ in range(20_000):
        run(machine, threads, busy)
    for _ in range(2_000):
        last = run(machine, threads, quiet)
    assert last == 2


def test_slightly_slower_threads_are_not_used() -> None:
    machine = Machine()
    threads = experienced(machine, 1)
    run(machine, threads, busy)
    machine.passes(1.0)
    used = [run(machine, threads, lambda n: 0.01 if n == 1 else 0.025) for _ in range(500)]
    assert used.count(2) < 60


def test_half_the_threads_after_a_step_is_given_up() -> None:
    machine = Machine(8)
    threads = experienced(machine)
    assert run(machine, threads, lambda n: 5.0 if n == 8 else 0.004) == 4


def test_a_long_prompt_has_a_longer_limit() -> None:
    threads = experienced(Machine())
    short, long = threads.limit(1, 2), threads.limit(500, 2)
    assert short is not None
    assert long is not None
    assert long > 100 * short


def test_a_number_that_was_asked_for_never_changes() -> None:
    threads = Threads(3)
    assert (threads.number(1), threads.limit(1, 3)) == (3, None)


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    alarm = Alarm()
    yield alarm
    alarm.close()


def asked(alarm: Alarm) -> bool:
    function, argument = alarm.callback
    return bool(ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(function)(argument))


@pytest.mark.parametrize("rested", [False, True])
def test_alarm_rings_after_its_time(alarm: Alarm, rested: bool) -> None:
    alarm.REST_S = 0.0 if rested else 60.0
    for _ in range(2):
        with alarm.after(0.02):
            while not asked(alarm):
                time.sleep(0.005)
        assert not asked(alarm)
    with alarm.after(None):
        assert not asked(alarm)
    with alarm.after(3600.0):
        time.sleep(0.05)
        assert not asked(alarm)
