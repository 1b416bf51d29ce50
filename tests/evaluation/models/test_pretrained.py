"""Tasks on small data sets with a tiny model of stage 1: runs are stored, killed and resumed."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mico_chat.errors import ConfigError, MediaError
from mico_chat.evaluation.datasets import DATASETS
from mico_chat.evaluation.pretrained import PretrainedModel
from mico_chat.evaluation.retrieval import CONTEXTS, vector_of
from mico_chat.evaluation.store import PREDICTIONS, Record, read_store
from mico_chat.evaluation.task import TASKS, Item
from mico_chat.media import MediaFile
from mico_chat.model.contrastive import ContrastiveSpace, MediaContext
from tests.evaluation.conftest import ran

DATA = {"flickr30k-retrieval": "flickr", "msvd-qa": "msvd", "clothov2-captioning": "clotho"}


@pytest.fixture(params=DATA)
def task_and_data(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, request.getfixturevalue(DATA[request.param])


def of_kind(folder: Path, kind: str) -> list[Record]:
    return [record for record in read_store(folder)[1] if record["kind"] == kind]


def test_retrieval(model: PretrainedModel, flickr: Path, tmp_path: Path) -> None:
    row = ran("flickr30k-retrieval", flickr, model, tmp_path)
    assert (row["items"], row["broken"], len(row["figures"])) == (6, 1, 12)
    assert row["broken_first"][0].startswith("3.jpg: 3.jpg")
    assert not (tmp_path / CONTEXTS).exists()
    texts = of_kind(tmp_path, "text")
    assert len(texts) == 12
    assert all(record["media"] != ["3.jpg"] for record in texts)
    vectors = np.stack([vector_of(record) for record in of_kind(tmp_path, "medium")])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    # Fewer than 50 candidates: each pair has been matched.
    assert [len(record["texts"]) for record in of_kind(tmp_path, "matches")] == [12] * 6


def test_vectors_and_matches_are_those_of_the_model(
    model: PretrainedModel, flickr: Path, tmp_path: Path
) -> None:
    ran("flickr30k-retrieval", flickr, model, tmp_path)
    item = DATASETS["flickr30k"].read(flickr).items[1]
    ((units,),) = model.decoded(TASKS["flickr30k-retrieval"], [[item]])
    assert not isinstance(units, MediaError)
    one, zero = torch.tensor([1]), torch.tensor([0])
    with torch.inference_mode():
        encoded = model.model.encode(zero, one, zero, 1, units.units[0])
    stored = {record["id"]: record for record in of_kind(tmp_path, "medium")}
    assert vector_of(stored[item.id]) == pytest.approx(encoded.pooled[0].numpy(), abs=1e-5)
    matches = {record["id"]: record for record in of_kind(tmp_path, "matches")}[item.id]
    for text, logit in zip(matches["texts"], matches["logits"], strict=True):
        ids = torch.tensor(model.space.truncated([of_kind(tmp_path, "text")[text]["words"]], 40))
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            wanted = model.model.match(ids, mask, encoded.context, encoded.mask)
        assert logit == pytest.approx(float(wanted), abs=2e-2)  # contexts are kept in float16


def test_a_clip_is_encoded_once_for_all_its_questions(
    model: PretrainedModel, msvd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    encode = PretrainedModel.encode

    def counted(self: PretrainedModel, items: Any) -> list[MediaContext]:
        encoded.extend(items)
        return encode(self, items)

    monkeypatch.setattr(PretrainedModel, "encode", counted)
    assert ran("msvd-qa", msvd, model, tmp_path)["items"] == 5
    # The task has frames without sound; the clips have fewer than its 14.
    assert [[len(u) for u in item.units] for item in encoded] == [[4], [5]]
    assert [record["id"] for record in of_kind(tmp_path, "answer")] == ["0", "2", "3", "1", "4"]
    items = [Item(str(n), (MediaFile("image", Path(name)),)) for n, name in enumerate("abacba")]
    assert model.batches(items) == [[0, 2, 5, 1, 4], [3]]


def test_a_sound_track_is_taken_where_the_task_has_slices(
    model: PretrainedModel, msvd: Path
) -> None:
    item = DATASETS["msvd-qa"].read(msvd).items[0]
    task = TASKS["msvd-qa"].model_copy(update={"slices": 2, "frames": 3})
    ((units,),) = model.decoded(task, [[item]])
    assert not isinstance(units, MediaError)
    assert units.kinds == ("video", "audio")
    assert len(units.units[0]) == 3


class Killed(BaseException):
    """Ends a run; no code may catch this error."""


@contextmanager
def killed_after(calls: int) -> Iterator[None]:
    left = [calls]

    def mortal(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return method(*given)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (PretrainedModel, ("encode", "caption", "answer")),
            (ContrastiveSpace, ("of_texts", "match_logits")),
        ):
            for name in names:
                patch.setattr(owner, name, mortal(getattr(owner, name)))
        with suppress(Killed):
            yield


@pytest.mark.usefixtures("captions_scored")
@pytest.mark.parametrize("after", [2, 5])
def test_a_killed_run_goes_on_to_the_same_end(
    after: int, task_and_data: tuple[str, Path], model: PretrainedModel, tmp_path: Path
) -> None:
    name, data = task_and_data
    whole = ran(name, data, model, tmp_path / "whole")
    with killed_after(after):
        ran(name, data, model, tmp_path / "killed")
    if not any(r["kind"] == "done" for r in read_store(tmp_path / "killed")[1]):
        with (tmp_path / "killed" / PREDICTIONS).open("ab") as file:
            file.write(b'{"kind": "capt')
    resumed = ran(name, data, model, tmp_path / "killed")
    assert resumed["figures"] == whole["figures"]
    assert resumed["broken_first"] == whole["broken_first"]
    without_time = [
        [{**r, "seconds": 0} for r in read_store(tmp_path / folder)[1] if r["kind"] != "seconds"]
        for folder in ("whole", "killed")
    ]
    assert without_time[0] == without_time[1]


def test_lost_contexts_are_made_again(model: PretrainedModel, flickr: Path, tmp_path: Path) -> None:
    whole = ran("flickr30k-retrieval", flickr, model, tmp_path / "whole")
    with killed_after(4 + 6):  # all media and texts, no match
        ran("flickr30k-retrieval", flickr, model, tmp_path / "killed")
    contexts = tmp_path / "killed" / CONTEXTS
    assert len(list(contexts.iterdir())) == 6
    for path in contexts.iterdir():
        path.unlink()
    again = ran("flickr30k-retrieval", flickr, model, tmp_path / "killed")
    assert again["figures"] == whole["figures"]


def test_a_disk_that_is_too_small_is_reported_at_once(
    model: PretrainedModel, flickr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("mico_chat.evaluation.retrieval.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"need about 0\.0 GB .* 0\.0 GB are free"):
        ran("flickr30k-retrieval", flickr, model, tmp_path)
    assert not of_kind(tmp_path, "medium")


@pytest.mark.usefixtures("captions_scored")
def test_a_finished_run_asks_the_model_nothing(
    task_and_data: tuple[str, Path],
    model: PretrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, data = task_and_data
    first = ran(name, data, model, tmp_path)
    before = (tmp_path / PREDICTIONS).read_bytes()
    monkeypatch.setattr(PretrainedModel, "encode", None)
    assert ran(name, data, model, tmp_path)["figures"] == first["figures"]
    assert (tmp_path / PREDICTIONS).read_bytes() == before


def test_other_settings_and_weights_are_refused(
    model: PretrainedModel, msvd: Path, tmp_path: Path
) -> None:
    ran("msvd-qa", msvd, model, tmp_path, limit=1)
    for other in ({"limit": 2}, {"frames": 3}, {"slices": 1}):
        with pytest.raises(ConfigError, match=f"made with {next(iter(other))} "):
            ran("msvd-qa", msvd, model, tmp_path, **{"limit": 1, **other})
    bias = next(model.model.text.parameters())
    with torch.no_grad():
        bias[0] += 1
        try:
            with pytest.raises(ConfigError, match="made with weights"):
                ran("msvd-qa", msvd, model, tmp_path, limit=1)
        finally:
            bias[0] -= 1


def test_a_chat_model_that_keeps_its_text_branch_is_evaluated_too() -> None:
    mini = PretrainedModel("mini", device="cpu")
    assert mini.header()["resolution"] == mini.preprocessing.image_size == 224
    assert mini.preprocessing.image_mean == pytest.approx((127 / 255,) * 3)
    assert mini.header() == PretrainedModel("mini", device="cpu").header()


def test_half_precision_is_near(
    model_folder: Path, model: PretrainedModel, flickr: Path, tmp_path: Path
) -> None:
    half = PretrainedModel(str(model_folder), "bfloat16", "cpu")
    ran("flickr30k-retrieval", flickr, model, tmp_path / "whole")
    ran("flickr30k-retrieval", flickr, half, tmp_path / "half")
    for one, other in zip(
        of_kind(tmp_path / "whole", "medium"), of_kind(tmp_path / "half", "medium"), strict=True
    ):
        assert float(vector_of(one) @ vector_of(other)) == pytest.approx(1.0, abs=2e-2)
