"""What control groups of both versions allow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mico_chat.engine.cores import ControlGroups, usable_cores

MB = 1 << 20


def groups(folder: Path, own: str, **files: str) -> ControlGroups:
    """Control groups in a folder; ``__`` in a name is a ``/``, ``_DOT_`` a dot."""
    (folder / "own").write_text(own)
    for name, text in files.items():
        file = folder / "root" / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "root").mkdir(exist_ok=True)
    return ControlGroups(folder / "root", folder / "own")


def test_no_control_groups(tmp_path: Path) -> None:
    found = ControlGroups(tmp_path / "nowhere", tmp_path / "nothing")
    assert (found.cores(), found.memory_limit(), found.memory_free()) == (None, None, None)


def test_version_2_takes_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "0::/slice/job\n",
        slice__cpu_DOT_max="150000 100000\n",
        slice__memory_DOT_max=f"{800 * MB}\n",
        slice__memory_DOT_current=f"{700 * MB}\n",
        slice__memory_DOT_stat=f"anon {100 * MB}\ninactive_file {300 * MB}\n",
        slice__job__cpu_DOT_max="max 100000\n",
        slice__job__memory_DOT_max=f"{500 * MB}\n",
        slice__job__memory_DOT_current=f"{50 * MB}\n",
        slice__job__memory_DOT_stat="",
    )
    assert found.cores() == 1.5
    assert found.memory_limit() == 500 * MB
    assert found.memory_free() == 400 * MB  # of the slice, whose other jobs have the rest
    assert usable_cores(found) == 1


def test_version_1(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        cpu__cpu_DOT_cfs_quota_us="-1\n",
        cpu__cpu_DOT_cfs_period_us="100000\n",
        cpu__docker__abc__cpu_DOT_cfs_quota_us="25000\n",
        cpu__docker__abc__cpu_DOT_cfs_period_us="100000\n",
        memory__memory_DOT_limit_in_bytes="9223372036854771712\n",
        memory__memory_DOT_usage_in_bytes="1\n",
        memory__docker__abc__memory_DOT_limit_in_bytes=f"{2000 * MB}\n",
        memory__docker__abc__memory_DOT_usage_in_bytes=f"{500 * MB}\n",
        memory__docker__abc__memory_DOT_stat=f"cache 1\ntotal_inactive_file {100 * MB}\n",
    )
    assert found.cores() == 0.25
    assert found.memory_limit() == 2000 * MB
    assert found.memory_free() == 1600 * MB
    assert usable_cores(found) == 1  # a quarter of a core runs one thread


def test_a_path_of_the_host_leads_to_the_containers_own_group(tmp_path: Path) -> None:
    found = groups(
        tmp_path,
        "0::/../../kubepods/pod1\n",
        cpu_DOT_max="400000 100000",
        memory_DOT_max=f"{64 * MB}",
        memory_DOT_current=f"{65 * MB}",
    )
    assert found.cores() == 4
    assert found.memory_free() == -1 * MB  # what is over the limit is told as it is


def test_affinity_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert usable_cores(groups(tmp_path, "0::/\n", cpu_DOT_max="800000 100000")) == 3
    assert usable_cores(groups(tmp_path, "0::/\n", cpu_DOT_max="200000 100000")) == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(ControlGroups(tmp_path / "nowhere", tmp_path / "nothing")) == 6
