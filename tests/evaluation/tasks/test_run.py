"""Tasks run on small data sets with a tiny model: what is stored, resumed, and computed anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mico_chat.errors import ConfigError
from mico_chat.evaluation.command import main
from mico_chat.evaluation.tasks import predict
from mico_chat.evaluation.tasks.datasets import DATASETS
from mico_chat.evaluation.tasks.loading import MediaPool
from mico_chat.evaluation.tasks.model import EvaluatedModel
from mico_chat.evaluation.tasks.predict import vector_of
from mico_chat.evaluation.tasks.run import RunOptions, run_task
from mico_chat.evaluation.tasks.score import Result, score
from mico_chat.evaluation.tasks.store import PREDICTIONS, Record, read_store
from mico_chat.evaluation.tasks.table import TASKS

OPTIONS = RunOptions(batch_size=2, workers=1)
DATA = {
    "flickr30k-retrieval": "flickr",
    "msvd-qa": "msvd",
    "clothov2-captioning": "clotho",
}


@pytest.fixture(params=DATA)
def task_and_data(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A task of each family and the folder with its data."""
    return request.param, request.getfixturevalue(DATA[request.param])


def of_kind(folder: Path, kind: str) -> list[Record]:
    return [record for record in read_store(folder)[1] if record["kind"] == kind]


def run(name: str, data: Path, model: EvaluatedModel, output: Path, **options: Any) -> Result:
    settings = RunOptions(**{"batch_size": 2, "workers": 1, **options})
    return run_task(TASKS[name], data, model, output, settings)


def test_retrieval(model: EvaluatedModel, flickr: Path, tmp_path: Path) -> None:
    result = run("flickr30k-retrieval", flickr, model, tmp_path)
    assert result.items == 6
    assert [item.id for item in result.broken] == ["3.jpg"]
    assert "3.jpg" in result.broken[0].reason
    assert not (tmp_path / predict.CONTEXTS).exists()
    texts = of_kind(tmp_path, "text")
    assert len(texts) == 12
    assert all(record["media"] != ["3.jpg"] for record in texts)
    vectors = np.stack([vector_of(record) for record in of_kind(tmp_path, "medium")])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    # Fewer than 50 candidates: each pair has been matched.
    assert [len(record["texts"]) for record in of_kind(tmp_path, "matches")] == [12] * 6
    assert len(result.figures) == 12


def test_vectors_and_matches_are_those_of_the_model(
    model: EvaluatedModel, flickr: Path, tmp_path: Path
) -> None:
    run("flickr30k-retrieval", flickr, model, tmp_path)
    entry = DATASETS["flickr30k"].read(flickr).entries[1]
    with MediaPool(TASKS["flickr30k-retrieval"], model.preprocessing, 1) as pool:
        ((units,),) = pool.batches([[entry.media]])
    assert not isinstance(units, Exception)
    pixels = units.units[0]
    one, zero = torch.tensor([1]), torch.tensor([0])
    with torch.inference_mode():
        context, mask, pooled, _, _ = model.model.encode(zero, one, zero, zero, pixels)
    stored = {record["id"]: record for record in of_kind(tmp_path, "medium")}
    assert vector_of(stored[entry.id]) == pytest.approx(pooled[0].numpy(), abs=1e-5)
    matches = {record["id"]: record for record in of_kind(tmp_path, "matches")}[entry.id]
    for text, logit in zip(matches["texts"], matches["logits"], strict=True):
        words = of_kind(tmp_path, "text")[text]["words"]
        ids = torch.tensor(model.tokenize([words], 40))
        with torch.inference_mode():
            wanted = model.model.match(ids, torch.ones_like(ids), zero, context, mask)
        assert logit == pytest.approx(float(wanted), abs=2e-2)  # contexts are kept in float16


def test_captions_have_sound_metrics(
    model: EvaluatedModel, clotho: Path, tmp_path: Path, captions_scored: Callable[..., Any]
) -> None:
    result = run("clothov2-captioning", clotho, model, tmp_path)
    assert result.items == 3
    assert set(result.figures) == {"CIDEr", "SPIDEr"}
    said = of_kind(tmp_path, "caption")
    assert [record["references"] for record in said] == [["a tone"] * 5] * 3
    assert all(isinstance(record["caption"], str) for record in said)


def test_a_clip_is_encoded_once_for_all_its_questions(
    model: EvaluatedModel, msvd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = EvaluatedModel.encode

    def counted(self: EvaluatedModel, items: Any) -> Any:
        encoded.extend(items)
        return encode(self, items)

    monkeypatch.setattr(EvaluatedModel, "encode", counted)
    result = run("msvd-qa", msvd, model, tmp_path)
    assert result.items == 5
    assert len(encoded) == 2
    # A "Vis" task: frames alone, all that the clips have of its 14.
    assert [[len(u) for u in item.units] for item in encoded] == [[4], [5]]
    assert [record["id"] for record in of_kind(tmp_path, "answer")] == ["0", "2", "3", "1", "4"]


def test_a_sound_track_is_taken_where_the_task_has_slices(
    model: EvaluatedModel, msvd: Path, tmp_path: Path
) -> None:
    entry = DATASETS["msvd-qa"].read(msvd).entries[0]
    task = RunOptions(slices=2, frames=3).applied(TASKS["msvd-qa"])
    with MediaPool(task, model.preprocessing, 1) as pool:
        ((units,),) = pool.batches([[entry.media]])
    assert not isinstance(units, Exception)
    assert units.kinds == ("video", "audio")
    assert len(units.units[0]) == 3


class Killed(BaseException):
    """Ends a run as nothing may catch it."""


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8])
def test_a_killed_run_goes_on_to_the_same_end(
    after: int,
    task_and_data: tuple[str, Path],
    model: EvaluatedModel,
    tmp_path: Path,
    captions_scored: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, data = task_and_data
    whole = run(name, data, model, tmp_path / "whole")
    calls = 0

    def mortal(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(self: EvaluatedModel, *given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return method(self, *given)

        return called

    with monkeypatch.context() as patch:
        for method in ("encode", "text_vectors", "match", "caption", "answer"):
            patch.setattr(EvaluatedModel, method, mortal(getattr(EvaluatedModel, method)))
        try:
            run(name, data, model, tmp_path / "killed")
        except Killed:
            with (tmp_path / "killed" / PREDICTIONS).open("ab") as file:
                file.write(b'{"kind": "capt')
    resumed = run(name, data, model, tmp_path / "killed")
    assert resumed.figures == whole.figures
    assert resumed.broken == whole.broken
    without_time = [
        [r for r in read_store(tmp_path / folder)[1] if r["kind"] != "seconds"]
        for folder in ("whole", "killed")
    ]
    assert without_time[0] == without_time[1]


def test_lost_contexts_are_made_again(
    model: EvaluatedModel, flickr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("flickr30k-retrieval", flickr, model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(EvaluatedModel, "match", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run("flickr30k-retrieval", flickr, model, tmp_path / "killed")
    contexts = tmp_path / "killed" / predict.CONTEXTS
    assert len(list(contexts.iterdir())) == 6
    for path in contexts.iterdir():
        path.unlink()
    assert run("flickr30k-retrieval", flickr, model, tmp_path / "killed").figures == whole.figures


def test_a_disk_that_is_too_small_is_told_at_once(
    model: EvaluatedModel, flickr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("mico_chat.evaluation.tasks.predict.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"need about 0\.0 GB .* 0\.0 GB are free"):
        run("flickr30k-retrieval", flickr, model, tmp_path)
    assert not of_kind(tmp_path, "medium")


def test_a_finished_run_asks_the_model_nothing(
    task_and_data: tuple[str, Path],
    model: EvaluatedModel,
    tmp_path: Path,
    captions_scored: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, data = task_and_data
    first = run(name, data, model, tmp_path)
    before = (tmp_path / PREDICTIONS).read_bytes()
    monkeypatch.setattr(EvaluatedModel, "encode", None)
    assert run(name, data, model, tmp_path).figures == first.figures
    assert score(tmp_path).figures == first.figures
    assert (tmp_path / PREDICTIONS).read_bytes() == before


@pytest.mark.parametrize("other", [{"limit": 2}, {"frames": 3}, {"slices": 1}])
def test_other_settings_and_weights_are_refused(
    other: dict[str, int], model: EvaluatedModel, msvd: Path, tmp_path: Path
) -> None:
    run("msvd-qa", msvd, model, tmp_path, limit=1)
    with pytest.raises(ConfigError, match=f"made with {next(iter(other))} "):
        run("msvd-qa", msvd, model, tmp_path, **{"limit": 1, **other})
    bias = next(model.model.text.parameters())
    with torch.no_grad():
        bias[0] += 1
        try:
            with pytest.raises(ConfigError, match="made with weights"):
                run("msvd-qa", msvd, model, tmp_path, limit=1)
        finally:
            bias[0] -= 1


def test_batches_of_another_size_say_the_same(
    model: EvaluatedModel, msvd: Path, tmp_path: Path
) -> None:
    said = [
        {record["id"]: record["answer"] for record in of_kind(folder, "answer")}
        for size in (1, 5)
        if run("msvd-qa", msvd, model, folder := tmp_path / str(size), batch_size=size)
    ]
    assert said[0] == said[1]


def test_a_chat_model_that_keeps_its_text_branch_is_evaluated_too() -> None:
    mini = EvaluatedModel.load("mini", device="cpu")
    assert mini.resolution == mini.preprocessing.image_size == 224
    assert mini.preprocessing.image_mean == pytest.approx((127 / 255,) * 3)
    assert mini.fingerprint() == EvaluatedModel.load("mini", device="cpu").fingerprint()


def test_half_precision_is_near(
    model_folder: Path, model: EvaluatedModel, flickr: Path, tmp_path: Path
) -> None:
    half = EvaluatedModel.load(str(model_folder), "bfloat16", "cpu")
    run("flickr30k-retrieval", flickr, model, tmp_path / "whole")
    run("flickr30k-retrieval", flickr, half, tmp_path / "half")
    for one, other in zip(
        of_kind(tmp_path / "whole", "medium"), of_kind(tmp_path / "half", "medium"), strict=True
    ):
        assert float(vector_of(one) @ vector_of(other)) == pytest.approx(1.0, abs=2e-2)


@pytest.mark.slow
def test_sigkill(model_folder: Path, flickr: Path, tmp_path: Path) -> None:
    words = ["flickr30k-retrieval", "--model", str(model_folder), "--data", str(flickr)]
    words += ["--batch-size", "2", "--device", "cpu", "--workers", "1", "--output"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    assert main([*words, str(tmp_path / "whole")]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "mico_chat.cli", "evaluate", *words, str(tmp_path / "killed")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = tmp_path / "killed" / "flickr30k-retrieval" / PREDICTIONS
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if path.is_file() and b'"medium"' in path.read_bytes():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait(60) == -signal.SIGKILL
    assert b'"done"' not in path.read_bytes()
    assert main([*words, str(tmp_path / "killed")]) == 0
    figures = [
        json.loads((tmp_path / name / "results.json").read_text())["tasks"]["flickr30k-retrieval"]
        for name in ("whole", "killed")
    ]
    assert figures[0]["figures"] == figures[1]["figures"]
    assert figures[0]["items"] == figures[1]["items"] == 6
