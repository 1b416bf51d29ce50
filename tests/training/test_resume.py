"""SIGKILL in the middle, the same command again: the losses are an uninterrupted run's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mico_training.stages import train_stage2
from tests.training.test_runs import logged, losses, write_recipe

COMMAND = (
    "import sys; from pathlib import Path; from mico_training.stages import train_stage2 as main;"
    "main(Path(sys.argv[1]))"
)


def recipe(folder: Path, shards: Path, model: Path) -> Path:
    train: dict[str, Any] = {"steps": 40, "batch_size": 2, "accumulation": 2, "warmup_steps": 3}
    # To drop paths draws from torch's generator, whose state must be restored.
    train |= {"save_steps": 4, "log_steps": 2, "drop": {"path": 0.3}}
    return write_recipe(folder, shards, model, train=train)


def test_a_killed_run_goes_on_at_the_exact_sample(
    tmp_path: Path, shards: Path, tiny_chat: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_stage2(recipe(whole, shards, tiny_chat))

    path = recipe(killed, shards, tiny_chat)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = killed / "out/checkpoint-8/trainer_state.json"
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.is_file()
    assert not (killed / "out/log.jsonl").exists()
    # A kill while a checkpoint is written leaves one without its last file.
    (killed / "out/checkpoint-36").mkdir()

    train_stage2(path)
    assert [entry["step"] for entry in logged(killed)] == list(range(2, 41, 2))
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-6)
