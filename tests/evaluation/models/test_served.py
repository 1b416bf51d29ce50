"""A tiny model gives the same answers in this process and behind our own server."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mico_chat.cli.evaluate import main
from mico_chat.evaluation.store import read_store
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder
from mico_server.settings import ServerSettings
from tests.evaluation.conftest import write_chat_model
from tests.evaluation.lmms.drawn import drawn_items
from tests.server.support.running import running, wait_until_ready
from tests.support.tiny import chat_model, letters

LOUD = 8.0
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>")


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


def results(items: Path, output: Path, *flags: str) -> tuple[dict[str, Any], dict[Any, str]]:
    """The row of an evaluation, and the answers by control and item."""
    words = [str(items), *flags, "--output", str(output), "--max-tokens", "6"]
    words += ["--controls", "full", "withheld", "swapped", "--batch-size", "4", "--workers", "1"]
    assert main(words) == 0
    row = json.loads((output / "results.json").read_text())["skills"]["items"]
    records = [record for record in read_store(output / "items")[1] if record["kind"] == "answer"]
    return row, {(record["control"], record["id"]): record["answer"] for record in records}


def test_the_same_words_and_figures_in_process_and_over_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    model = write_chat_model(tmp_path / "model", talkative(chat_model()))
    items = drawn_items(tmp_path / "items", n=3)
    (tmp_path / "items" / "colour-0.png").unlink()
    here, said_here = results(items, tmp_path / "here", "--model", str(model), "--dtype", "float32")
    options = EngineOptions("transformers", None, "float32")
    with (
        MediaDecoder() as decoder,
        running(
            lambda: load_assistant(model, decoder, options),
            ServerSettings(data_dir=tmp_path / "data"),
        ) as client,
    ):
        wait_until_ready(client)
        over = ["--model", "model", "--base-url", str(client.base_url.join("v1"))]
        there, said_there = results(items, tmp_path / "there", *over)
    assert said_there == said_here
    assert len(said_here) == 3 * 12 - 3, "an item whose medium is gone can still be withheld"
    assert len(set(said_here.values())) > 3, "a model that always says the same proves nothing"
    assert there["skills"] == here["skills"]
    assert here["confidence"]["n"] == 12 - 1
    assert there["confidence"] == here["confidence"]
    assert there["digest"] == here["digest"]
    # Swapped, two other items are shown the medium that is gone.
    assert here["broken"]["count"] == there["broken"]["count"] == 1 + 2
    assert "colour-0.png: no such file" in there["broken"]["first"][0]
