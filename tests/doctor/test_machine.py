"""The machine and its graphics cards, real and made up."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from mico_chat.cli.doctor.finding import Finding, gigabytes
from mico_chat.cli.doctor.gpu import gpu_findings
from mico_chat.cli.doctor.machine import Gpu, Machine, machine_findings, nvidia_gpus
from mico_chat.engine.cpu import ControlGroups
from tests.doctor.fakes import CARD, GB, machine, torch_facts


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine(tmp_path: Path) -> None:
    here = Machine.here(tmp_path / "not" / "made" / "yet")
    assert 1 <= here.usable_cores <= here.cores
    assert 0 < here.memory_free <= here.memory
    assert here.disk_free > 0
    assert here.cpu


def test_control_groups_bound_the_memory(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.max").write_text(str(2 * GB))
    (tmp_path / "memory.current").write_text(str(GB // 2))
    here = Machine.here(tmp_path, ControlGroups(tmp_path, tmp_path / "own"))
    assert (here.memory_limit, here.memory_free) == (2 * GB, 3 * GB // 2)
    found = by_name(machine_findings(here))["memory"]
    assert "1.5 GB free of" in found.text
    assert "a control group allows 2.0 GB" in found.text


def test_fewer_cores_than_the_machine_has() -> None:
    found = by_name(machine_findings(machine(usable_cores=2)))["processor"]
    assert "2 cores of 8" in found.text
    assert found.facts["usable_cores"] == 2
    assert found.mark == "ok"


def test_no_avx2() -> None:
    found = by_name(machine_findings(machine(instructions=())))["processor"]
    assert found.mark == "warning"
    other = machine(instructions=("NEON",), system="Darwin 25.1 arm64")
    assert by_name(machine_findings(other))["processor"].mark == "ok"


def test_little_disk() -> None:
    found = by_name(machine_findings(machine(disk_free=GB // 2)))["disk"]
    assert found.mark == "warning"
    assert "500 MB free in /cache" in found.text
    assert "MICO_CACHE_DIR" in (found.mend or "")


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (23_040, "23 KB"), (999_700_000, "1.0 GB"),
     (13_477_000_000, "13.5 GB"), (640 * GB, "640 GB")],
)  # fmt: skip
def test_bytes_in_words(n: int, said: str) -> None:
    assert gigabytes(n) == said


# --- graphics cards -----------------------------------------------------------------------------


def nvidia_smi(folder: Path, script: str) -> tuple[str, ...]:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return (str(file),)


def test_cards_by_nvidias_own_program(tmp_path: Path) -> None:
    said = "NVIDIA H100 80GB HBM3, 81559, 81008, 9.0, 570.1\nNVIDIA GB10, [N/A], [N/A], 12.1, 580.9"
    first, second = nvidia_gpus(nvidia_smi(tmp_path, f"cat <<END\n{said}\nEND"))
    assert first == Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 81008 << 20, "9.0", "570.1")
    assert (second.name, second.total) == ("NVIDIA GB10", 0)


@pytest.mark.parametrize("script", ["exit 9", "echo 'NVIDIA-SMI has failed'; exit 0", ""])
def test_no_cards(tmp_path: Path, script: str) -> None:
    assert nvidia_gpus(nvidia_smi(tmp_path, script)) == ()


def test_no_such_program(tmp_path: Path) -> None:
    assert nvidia_gpus((str(tmp_path / "nvidia-smi"),)) == ()


def card(**changes: Any) -> dict[str, Any]:
    facts = {"name": "A card", "total": 24 * GB, "free": 23 * GB, "capability": "8.9"}
    return {**facts, "error": None, **changes}


def test_a_card_that_computes() -> None:
    torch = torch_facts(gpu_build="CUDA 12.8", gpus=[card(), card(name="Another")])
    first, second = gpu_findings(machine(gpus=(CARD, CARD)), torch)
    assert (first.name, first.mark, second.name) == ("GPU 0", "ok", "GPU 1")
    for said in ("A card: 23.0 GB free of 24.0 GB", "capability 8.9", "CUDA 12.8", "driver 550.54"):
        assert said in first.text


def test_a_card_that_this_torch_has_no_kernels_for() -> None:
    error = "CUDA error: no kernel image is available for execution on the device"
    torch = torch_facts(gpu_build="CUDA 12.8", gpus=[card(error=error)])
    (found,) = gpu_findings(machine(gpus=(CARD,)), torch)
    assert found.mark == "problem"  # auto would take the card
    assert error in found.text
    assert "pip install --upgrade torch" in (found.mend or "")


def test_a_card_beside_a_torch_without_cuda() -> None:
    (found,) = gpu_findings(machine(gpus=(CARD,)), torch_facts())
    assert found.mark == "warning"
    assert "RTX 4090 (24.0 GB) is there, but torch 2.13.0+cpu is a CPU build" in found.text
    assert found.mend == "pip install --force-reinstall torch torchvision"


def test_a_card_that_is_hidden() -> None:
    torch = torch_facts(gpu_build="CUDA 12.8", hidden="")
    (found,) = gpu_findings(machine(gpus=(CARD,)), torch)
    assert (found.mark, found.mend) == ("warning", "unset CUDA_VISIBLE_DEVICES")


def test_a_driver_that_is_too_old() -> None:
    old = "The NVIDIA driver on your system is too old"
    torch = torch_facts(gpu_build="CUDA 13.0", gpu_error=old)
    (found,) = gpu_findings(machine(gpus=(CARD,)), torch)
    assert found.mark == "warning"
    assert old in found.text
    assert "550.54" in (found.mend or "")


def test_no_card_apples_and_a_broken_torch() -> None:
    assert gpu_findings(machine(), torch_facts())[0].mark == "note"
    assert "Metal" in gpu_findings(machine(), torch_facts(mps=True))[0].text
    (found,) = gpu_findings(machine(gpus=(CARD,)), None)
    assert "RTX 4090" in found.text
