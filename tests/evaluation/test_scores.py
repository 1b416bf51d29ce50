"""Figures from stored records: retrieval with re-ranking, answers, captions, missing figures."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation import scores
from mico_chat.evaluation.report import tasks_table
from mico_chat.evaluation.scores import Row, score
from mico_chat.evaluation.store import Record, Store, UnfinishedError
from mico_chat.evaluation.task import TASKS

HEADER = {"model": "m", "frames": 1, "slices": 0, "resolution": 64, "limit": 0}


def scored(folder: Path, task: str, records: Sequence[Record], done: bool = True) -> Row:
    with Store(folder, {"task": task, **HEADER}) as store:
        store.add([*records, *([{"kind": "done"}] if done else [])])
    return score(folder)


def packed(vector: Sequence[float]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def retrieval(
    media: Mapping[str, Sequence[float]],
    texts: Sequence[tuple[Sequence[str], Sequence[float]]],
    matches: Mapping[str, Mapping[int, float]],
) -> list[Record]:
    records: list[Record] = [
        {"kind": "medium", "id": id, "number": number, "vector": packed(vector)}
        for number, (id, vector) in enumerate(media.items())
    ]
    records += [
        {"kind": "text", "text": n, "words": f"text {n}", "media": of, "vector": packed(vector)}
        for n, (of, vector) in enumerate(texts)
    ]
    records += [
        {"kind": "matches", "id": id, "texts": list(of), "logits": list(of.values())}
        for id, of in matches.items()
    ]
    return records


def test_the_matching_head_has_the_last_word_among_the_top(tmp_path: Path) -> None:
    # By cosine, each text finds the other text's medium; by matching, its own medium.
    media = {"a": (1.0, 0.0), "b": (0.0, 1.0)}
    texts = [(["a"], (0.6, 0.8)), (["b"], (0.8, 0.6))]
    matches = {"a": {0: 2.0, 1: -900.0}, "b": {0: 1.0, 1: -800.0}}
    figures = scored(tmp_path, "coco-retrieval", retrieval(media, texts, matches))["figures"]
    assert figures["R@1 contrastive"] == figures["R@1 to text contrastive"] == 0
    assert figures["R@5 contrastive"] == 100
    assert figures["R@1"] == 100
    # The best text of b is text 0, which belongs to a.
    assert figures["R@1 to text"] == 50
    assert tuple(figures) == TASKS["coco-retrieval"].metrics


def test_what_is_beyond_the_top_stays_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mico_chat.evaluation.retrieval.RERANKED", 2)
    monkeypatch.setattr("mico_chat.evaluation.retrieval.QUERIES_AT_ONCE", 2)
    media = {str(n): (np.cos(n / 10), np.sin(n / 10)) for n in range(6)}
    # All texts are nearest to medium 0. Only media 0 and 1 are ranked again, by their logits.
    texts = [([str(n)], (1.0, 0.0)) for n in (2, 4, 1, 0, 3, 5)]
    matches = {id: dict.fromkeys(range(6), 100.0 * int(id)) for id in media}
    figures = scored(tmp_path, "coco-retrieval", retrieval(media, texts, matches))["figures"]
    assert figures["R@1"] == pytest.approx(100 / 6)  # the text of medium 1 finds it
    assert figures["R@1 contrastive"] == pytest.approx(100 / 6)  # the text of medium 0 finds it
    assert figures["R@5"] == pytest.approx(500 / 6)
    assert figures["R@10"] == pytest.approx(100.0)


def test_answers(tmp_path: Path) -> None:
    def answer(id: int, said: str, *people: str) -> Record:
        record = {"kind": "answer", "id": str(id), "question": "?", "answer": said}
        return {**record, "references": people}

    asked = [answer(1, "Two dogs.", "two dogs"), answer(2, "cat", "dog"), answer(3, "a", "a")]
    assert scored(tmp_path / "a", "msvd-qa", asked)["figures"]["accuracy"] == pytest.approx(200 / 3)
    people = ["red"] * 2 + ["blue"] * 8
    row = scored(tmp_path / "b", "vqav2-qa", [answer(1, "red", *people)])
    assert row["figures"]["accuracy"] == pytest.approx(60.0)


@pytest.mark.usefixtures("captions_scored")
def test_captions_and_a_metric_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any) -> Any:
        raise ConfigError("SPICE is not here: fetch it")

    monkeypatch.setitem(scores.CAPTION_METRICS, "SPIDEr", absent)
    said: Record = {"kind": "caption", "caption": "a tone", "references": ["a tone", "b"]}
    lost: Record = {"kind": "broken", "id": "c|d.wav", "reason": "no file"}
    took: Record = {"kind": "seconds", "seconds": 1.5}
    records = [{**said, "id": "1"}, {**said, "id": "2", "caption": "a bell"}, lost, took, took]
    result = scored(tmp_path, "clothov2-captioning", records)
    assert result["figures"] == {"CIDEr": 75.0}
    assert result["missing"] == {"SPIDEr": "SPICE is not here: fetch it"}
    assert (result["items"], result["seconds"]) == (2, 3.0)
    shown = tasks_table({"clothov2-captioning": result})
    assert "| clothov2-captioning | CIDEr | 75.0 | 50.8 | 2 | unknown | 1 | 3 | m |" in shown
    assert "no SPIDEr: SPICE is not here: fetch it" in shown
    assert "1 broken and not counted: c|d.wav: no file" in shown


def test_a_row_says_what_departs_from_the_paper(tmp_path: Path) -> None:
    answer = {"kind": "answer", "id": "1", "answer": "a", "question": "?", "references": ["a"]}
    header = {"task": "msrvtt-qa", **HEADER, "frames": 2, "slices": 1, "limit": 7}
    with Store(tmp_path, header) as store:
        store.add([answer, {"kind": "done"}])
    protocol = score(tmp_path)["protocol"]
    assert "2 frames instead of 8" in protocol
    assert "1 slices of sound" in protocol
    assert "64 px (the paper's model has 224)" in protocol
    assert protocol.endswith("only the first 7 items")


def test_nothing_to_score_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnfinishedError, match="has not finished"):
        scored(tmp_path / "a", "msvd-qa", [], done=False)
    with pytest.raises(DataError, match="no item could be used"):
        scored(tmp_path / "b", "msvd-qa", [{"kind": "broken", "id": "1", "reason": "x"}])
