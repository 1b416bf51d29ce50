"""SIGKILL in the middle, the same command again: the losses are an uninterrupted run's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mico_training.stages import train_stage2

COMMAND = (
    "import sys; from pathlib import Path; from mico_training.stages import train_stage2 as main;"
    "main(Path(sys.argv[1]))"
)


def recipe(folder: Path, shards: Path, model: Path) -> Path:
    folder.mkdir()
    content = {
        "model": str(model),
        "output": str(folder / "out"),
        "data": [{"path": str(shards / "train-*.tar")}],
        "train": {
            "lr": 1e-3,
            "steps": 40,
            "batch_size": 2,
            "accumulation": 2,
            "warmup_steps": 3,
            "save_steps": 4,
            "log_steps": 2,
            "drop": {"path": 0.3},  # draws from torch's generator, which must be restored
            "arguments": {"use_cpu": True, "disable_tqdm": True},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "out/log.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


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
    assert list(losses(killed)) == list(range(2, 41, 2))
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-6)
