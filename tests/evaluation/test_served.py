"""A tiny model gives the same answers in this process and over ``mico-chat serve``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mico_chat.cli.evaluate import main
from mico_chat.evaluation.store import PREDICTIONS
from tests.evaluation.conftest import write_chat_model
from tests.evaluation.lmms.drawn import drawn_items
from tests.server.served import Served, served
from tests.tiny import chat_model, letters

LOUD = 8.0
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, and items about media of four kinds, one of which is gone."""
    folder = tmp_path_factory.mktemp("served")
    write_chat_model(folder / "model", talkative(chat_model()))
    drawn_items(folder, n=3)
    (folder / "colour-0.png").unlink()
    return folder


def talkative(model: Any) -> Any:
    """The model with large weights, which give each medium another answer, in letters only."""
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
    """The row of an evaluation, and the answers by control and item."""
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
    assert len(said_here) == 3 * 12 - 3, "an item whose medium is gone can still be withheld"
    assert len(set(said_here.values())) > 3, "a model that always says the same proves nothing"
    assert there["skills"] == here["skills"]
    assert there["digest"] == here["digest"]
    # Swapped, two other items are shown the medium that is gone.
    assert here["broken"]["count"] == there["broken"]["count"] == 1 + 2
    assert "colour-0.png: no such file" in there["broken"]["first"][0]
