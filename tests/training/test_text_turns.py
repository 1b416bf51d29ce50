"""Text-only turns: varied requests, and the base LLM's own answers as a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mico_training import text_turns
from mico_training.data.manifest import ManifestSource
from mico_training.text_turns import answers, requests


def test_requests_are_varied_and_seeded() -> None:
    texts = requests(200, seed=1)
    assert len(texts) == len(set(texts)) == 200
    assert texts == requests(200, seed=1)
    assert texts != requests(200, seed=2)
    assert "Hello!" in texts
    assert not [text for text in texts if "{" in text or "}" in text]
    assert len({text.split()[0] for text in texts}) > 8
    assert len(requests(5, seed=0)) == 5


def test_answers_are_the_models_greedy_ones_cut_at_a_sentence(tiny_llm: Path) -> None:
    texts = ["Hello!", "What is a bridge made of?", "Hi"]
    together = list(answers(str(tiny_llm), texts, batch_size=3, tokens=12))
    assert len(together) == 3
    assert all(text == "" or text.endswith(".") for text in together)
    assert together == list(answers(str(tiny_llm), texts, batch_size=3, tokens=12))


def test_a_manifest_that_stage_3_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"Hello!": "Hi there.", "Thank you!": ""}
    monkeypatch.setattr(text_turns, "requests", lambda n, seed: list(said))
    monkeypatch.setattr(text_turns, "answers", lambda llm, texts, *_: [said[t] for t in texts])
    path = tmp_path / "new" / "text.jsonl"
    text_turns.main(path, n=2)
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert row["messages"][1] == {"role": "assistant", "content": "Hi there."}
    source = ManifestSource(path, "conversation")
    assert len(source) == 1
    assert [m.text for m in source[0].conversation] == ["Hello!", "Hi there."]
