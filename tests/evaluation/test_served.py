"""A tiny model asked in process and over ``mico-chat serve``: the same words, the same figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mico_chat.cli.evaluate import main
from mico_chat.evaluation.store import PREDICTIONS
from mico_chat.model.config import MicoChatConfig
from tests.made import write_clip, write_sound
from tests.server.served import Served, served
from tests.tiny import chat_model, letters, processor_for

LOUD = 8.0
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, and an item about a medium of each kind."""
    folder = tmp_path_factory.mktemp("served")
    model = talkative(chat_model())
    assert isinstance(model.config, MicoChatConfig)
    model.save_pretrained(folder / "model")
    processor_for(model.config).save_pretrained(folder / "model")
    colours = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    for number, pixels in enumerate(colours):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 20).save(folder / f"{number}.depth.png")
        write_sound(str(folder / f"{number}.wav"), "pcm_s16le", hertz=200 * (number + 1))
        write_clip(str(folder / f"{number}.mp4"), "libx264", n=10 + number, sound="aac")
    rows = []
    for kind, ending in (
        ("image", "png"),
        ("depth", "depth.png"),
        ("audio", "wav"),
        ("video", "mp4"),
    ):
        for number in range(3):
            media = [{"kind": kind, "path": f"{number}.{ending}"}]
            rows.append((f"{kind}{number}", kind, f"What is {number}?", media))
    rows += [
        ("text", "text", "What?", []),
        ("gone", "image", "?", [{"kind": "image", "path": "x"}]),
    ]
    lines = [
        json.dumps({"id": i, "skill": s, "message": q, "media": m, "accept": ["e"]})
        for i, s, q, m in rows
    ]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def talkative(model: Any) -> Any:
    """The model with weights so large that each medium is something else to it, and that says only
    what its tokenizer can write."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and name.startswith(("llm.", "bridge.")):
                weight.mul_(LOUD)
        head = model.llm.get_output_embeddings().weight
        head[: len(SPECIAL)] = 0
        head[len(letters()) :] = 0
    return model


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ["--model", str(folder / "model"), "--engine", "transformers", "--dtype", "float32"]
    with served(tmp_path_factory.mktemp("data"), *flags) as service:
        yield service


def results(folder: Path, output: Path, *flags: str) -> tuple[dict[str, Any], dict[Any, str]]:
    """The row of an evaluation, and what was said by control and item."""
    words = [str(folder / "items.jsonl"), *flags, "--output", str(output), "--max-tokens", "6"]
    words += ["--controls", "full", "withheld", "swapped", "--batch-size", "4", "--workers", "1"]
    assert main(words) == 0
    row = json.loads((output / "results.json").read_text())["skills"]["items"]
    lines = (output / "items" / PREDICTIONS).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    said = {(r["control"], r["id"]): r["answer"] for r in records if r.get("kind") == "answer"}
    return row, said


def test_the_same_words_and_figures_in_process_and_over_the_server(
    folder: Path, service: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", service.key)
    model = str(folder / "model")
    here, said_here = results(folder, tmp_path / "here", "--model", model, "--dtype", "float32")
    over = ["--model", "model", "--base-url", f"{service.url}/v1"]
    there, said_there = results(folder, tmp_path / "there", *over)
    assert said_there == said_here
    assert len(said_here) == 3 * 12 + 1 + 1  # a medium that is gone can still be withheld
    assert len(set(said_here.values())) > 3, "a model that always says the same proves nothing"
    assert there["skills"] == here["skills"]
    assert there["digest"] == here["digest"]
    assert here["broken"]["count"] == there["broken"]["count"] == 2  # full and swapped
    assert "x: no such file" in there["broken"]["first"][0]
