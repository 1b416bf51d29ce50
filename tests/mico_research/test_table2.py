"""Fine-tuning as in Table 8: several processes, resuming, augmentation; figures of Table 2."""

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.trainer
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

pytest.importorskip("sklearn")

from mico_chat.errors import ConfigError, DataError
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.preprocessing import Preprocessing
from mico_research.finetune import fit
from mico_research.finetune.augment import Augment, Augmenter
from mico_research.finetune.recipe import FinetuneRun
from mico_research.finetune.report import Report, found_again
from mico_research.modalities.families import PictureInput, TextInput
from mico_research.modalities.media import MediaInput
from mico_research.modalities.model import predict
from mico_research.modalities.samples import Array, Sample, Target
from mico_training.recipe import load_recipe
from tests.mico_research.test_finetune_modality import fitted, write_family, write_run, write_table
from tests.mico_research.test_layouts import listed, opened, targets, write
from tests.mico_research.test_media_classification import clip
from tests.mico_training.scenes import tone
from tests.mico_training.test_parallel import run

QUIET: dict[str, Any] = {"finetune__seeds": [0], "finetune__control": False}
QUIET |= {"finetune__baselines": False, "train__log_steps": 5, "train__save_steps": 10}
QUIET |= {"train__steps": 20}
PICTURES: dict[str, Any] = {
    "modality": "thermal",
    "finetune__augment": {"mixup": 0.8, "cutmix": 1.0},
}


def losses(folder: Path) -> list[float]:
    (log,) = folder.glob("runs/*/log.jsonl")
    return [e["loss"] for e in map(json.loads, log.read_text().splitlines()) if "loss" in e]


# --- processes and breaks -----------------------------------------------------------------------


def work(recipe: Path) -> None:
    fit.main(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_fine_tune_as_one(parallel: str, tmp_path: Path, tiny_chat: Path) -> None:
    """An adapter on rows of a table under DDP; all weights on changed and mixed pictures, FSDP."""
    if parallel == "ddp":
        data = {"train": write_table(tmp_path / "t.csv", 90), "target": "sick"}
        more: dict[str, Any] = {"finetune__lora": {"r": 2, "dropout": 0.0}}
    else:
        data, more = {"train": write_family(tmp_path, "thermal")}, PICTURES
    one, two = tmp_path / "one", tmp_path / "two"
    more = {**more, **QUIET, "train__batch_size": 4}
    work(write_run(one, tiny_chat, data, **more, train__accumulation=2))
    run(2, work, write_run(two, tiny_chat, data, **more, train__parallel=parallel))
    record = json.loads((two / "out/config.json").read_text())["trained_on"]
    assert record[0] == {"stage": str(tiny_chat), "data": None}
    assert record[1:] == [{"stage": "finetune", "data": [str(data["train"])]}]
    assert losses(two / "out") == pytest.approx(losses(one / "out"), abs=2e-5)
    assert Report.read(two / "out").rows[0].figures == Report.read(one / "out").rows[0].figures
    theirs = load_file(one / "out/model.safetensors")
    for name, value in load_file(two / "out/model.safetensors").items():
        # A bias of keys has no gradient but rounding, which AdamW blows up. Each process keeps
        # statistics of its own batches.
        if not name.endswith("qkv.bias") and ".backbone." not in name:
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-4, msg=name)


class Break(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 13:
            raise KeyboardInterrupt


def test_a_run_that_was_ended_goes_on_to_the_same_weights(
    tmp_path: Path, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, stochastic depth and random changes, from step 10 on."""
    path = {"train": write_family(tmp_path, "thermal")}
    more = {**PICTURES, **QUIET, "finetune__drop_path": 0.5, "finetune__dropout": 0.3}
    work(write_run(tmp_path / "whole", tiny_chat, path, **more, train__batch_size=4))
    again = write_run(tmp_path / "again", tiny_chat, path, **more, train__batch_size=4)
    with monkeypatch.context() as broken:
        everywhere = [*transformers.trainer.DEFAULT_CALLBACKS, Break]
        broken.setattr(transformers.trainer, "DEFAULT_CALLBACKS", everywhere)
        with pytest.raises(KeyboardInterrupt):
            work(again)
    work(again)
    whole = load_file(tmp_path / "whole/out/model.safetensors")
    for name, value in load_file(tmp_path / "again/out/model.safetensors").items():
        assert torch.equal(value, whole[name]), name
    assert losses(tmp_path / "again/out") == losses(tmp_path / "whole/out")


# --- what is changed at random ------------------------------------------------------------------

PLAIN = {"crop": None, "flip": 0.0, "jitter": 0.0, "auto": None, "erasing": 0.0}
SMALL = Preprocessing(image_size=32, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
TWO = Target(task="classification", classes=("a", "b"))


def changed(sample: Sample, spec: Any = None, seed: int = 0, **changes: Any) -> Array:
    spec = spec or PictureInput(preprocessing=SMALL, low=0, high=255)
    augmenter = Augmenter(Augment.model_validate(PLAIN | changes), spec, TWO)
    return augmenter.arrays(sample, 7, seed)["pixel_values"]


def test_each_change_of_a_picture() -> None:
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    picture = Sample(np.stack([ramp, 255 - ramp, ramp // 2], -1), "a")
    plain = changed(picture)
    np.testing.assert_allclose(
        plain,
        PictureInput(preprocessing=SMALL, low=0, high=255).arrays(picture)["pixel_values"],
        atol=1e-6,
    )
    np.testing.assert_array_equal(changed(picture, flip=1.0), plain[..., ::-1])
    erased = changed(picture, erasing=1.0) != plain
    assert 0.01 < erased.mean() < 0.5
    rows, columns = np.flatnonzero(erased.any((0, 2))), np.flatnonzero(erased.any((0, 1)))
    assert len(rows) == np.ptp(rows) + 1  # one rectangle
    assert len(columns) == np.ptp(columns) + 1
    assert np.ptp(changed(picture, crop=0.1)[0]) < 0.8 * np.ptp(plain[0])
    for change in (
        {"jitter": 0.4},
        {"auto": "rand-m9-mstd0.5-inc1"},
        {"erasing": 0.5, "crop": 0.5},
    ):
        before = random.getstate(), torch.get_rng_state().clone()
        one, other = (changed(picture, seed=3, **change) for _ in range(2))
        np.testing.assert_array_equal(one, other)
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
        others = [changed(picture, seed=seed, **change) for seed in range(8)]
        assert len({other.tobytes() for other in others}) > 4


def test_frames_change_alike_and_a_sound_keeps_its_times(tmp_path: Path) -> None:
    clip(tmp_path / "x.mp4", [90, 90, 90, 90])
    spec = MediaInput.of("video", SMALL, 4)
    frames = changed(Sample(tmp_path / "x.mp4", "a"), spec, flip=1.0, erasing=1.0, auto="rand-m9")
    assert frames.shape == (4, 3, 32, 32)
    assert np.ptp(frames, axis=0).max() < 0.2  # the codec's
    (tmp_path / "x.wav").write_bytes(tone(440.0, 1.0))
    spec = MediaInput.of("audio", SMALL, 2)
    sound = Sample(tmp_path / "x.wav", "a")
    plain = changed(sound, spec)
    np.testing.assert_array_equal(plain, spec.arrays(sound)["pixel_values"])
    everything: dict[str, Any] = {"crop": 0.1, "flip": 1.0, "jitter": 0.4, "auto": "rand-m9"}
    np.testing.assert_array_equal(changed(sound, spec, **everything), plain)
    erased = (changed(sound, spec, erasing=1.0) != plain).mean()
    assert 0 < erased < 0.5


@pytest.mark.parametrize("task", ["classification", "multi-label"])
def test_labels_are_mixed_as_the_samples_are(task: Any) -> None:
    spec = PictureInput(preprocessing=SMALL, low=0, high=255)
    target = Target(task=task, classes=("a", "b"))
    mix = Augmenter(Augment.model_validate(PLAIN | {"mixup": 1.0}), spec, target)
    values = torch.tensor([0.0, 1, 0, 0]).view(4, 1, 1, 1)
    hot = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]])
    labels = hot if task == "multi-label" else torch.tensor([0, 1, 0, 0])
    batch = {"pixel_values": values.expand(4, 3, 8, 8).clone(), "labels": labels}
    found = mix.mixed(batch, [np.array([0, 5])])
    share = found["pixel_values"][1, 0, 0, 0]  # of the second sample, which is mixed with the third
    assert 0 < share < 1
    torch.testing.assert_close(found["labels"][1], torch.stack([1 - share, share]))
    again = mix.mixed(batch, [np.array([0, 5])])
    torch.testing.assert_close(again["pixel_values"], found["pixel_values"])
    assert target.loss(torch.zeros(4, 2), found["labels"]) == pytest.approx(np.log(2))


def test_blocks_are_left_out_the_more_the_later(tmp_path: Path, tiny_chat: Path) -> None:
    data = {"train": write_table(tmp_path / "t.csv"), "target": "sick"}
    path = write_run(tmp_path / "run", tiny_chat, data)
    recipe, encoder, _, spec, target = fitted(path, ["finetune.drop_path=0.4"])
    encoder.source.config.encoder_config.depth = 3
    encoder.source.encoder = OmniEncoder(encoder.source.config.encoder_config)
    blocks: Any = fit.build(recipe, encoder, spec, target, True).encoder.vit
    found = [(one.drop_path1.drop_prob, one.drop_path2.drop_prob) for one in blocks.blocks]
    assert np.allclose(found, [(0, 0), (0.2, 0.2), (0.4, 0.4)])
    for overrides, said in (
        (["finetune.augment.flip=1"], "augment works for .*, not for tabular"),
        (["modality=image", "finetune.augment.mixup=1", "train.batch_size=3"], "an even train"),
        (["task=re-identification"], "re-identification works for the pictures of a data.dataset"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_recipe(FinetuneRun, path, overrides)


# --- readers and figures ------------------------------------------------------------------------


def test_mmlu_is_read_and_learnt(tmp_path: Path, tiny_chat: Path) -> None:
    root, rng = tmp_path / "mmlu", np.random.default_rng(0)
    for part, ending, n in (
        *(("auxiliary_train", "", 60), ("dev", "_dev", 5)),
        *(("val", "_val", 12), ("test", "_test", 16)),
    ):
        text = io.StringIO()
        for _ in range(n):
            right = int(rng.integers(2))
            words = ["yes" if place == right else "no" for place in range(4)]
            csv.writer(text).writerow(['Which one, "here"?', *words, "ABCD"[right]])
        write(root / part / f"logic{ending}.csv", text.getvalue())
    found = opened("mmlu", root)
    assert [len(listed(x)) for x in (found.train, found.validation, found.test)] == [65, 12, 16]
    assert str(listed(found.test)[0].values).startswith('Which one, "here"?\nA. ')
    data = {"dataset": "mmlu", "root": root}
    more = {**QUIET, "modality": "text", "train__steps": 60, "finetune__baselines": True}
    report = fit.main(write_run(tmp_path / "run", tiny_chat, data, **more))
    assert report.rows[-1].figures[0]["accuracy"] > 0.9
    out = io.StringIO()
    write(tmp_path / "new.csv", "question\nWhich?\n")
    predict(tmp_path / "run/out", tmp_path / "new.csv", out, "cpu")
    assert out.getvalue().startswith("sample,prediction,A,B\n2,")
    write(root / "val/logic_val.csv", "Which?,a,b,c,A\n")
    with pytest.raises(DataError, match=r"logic_val\.csv:1: expected a question, four answers"):
        opened("mmlu", root)
    spec = TextInput(patch=4, max_length=8)
    assert spec.arrays(Sample("0123456789é"))["values"].tolist() == list("456789é".encode())


def test_global_weather_is_measured_in_degrees(tmp_path: Path, tiny_chat: Path) -> None:
    hours = np.arange(120)
    for part in ("train", "val", "test"):  # 15 +- 10 degrees, in tenths; the wind is not read
        temperature = 150 + 100 * np.sin(2 * np.pi * (hours[:, None] + [0, 5]) / 24)
        array = np.stack([temperature, 0 * temperature], -1).astype(np.float32)
        (tmp_path / "w").mkdir(exist_ok=True)
        np.save(tmp_path / "w" / f"temp_global_hourly_{part}.npy", array)
    found = opened("global-temp", tmp_path / "w", limit=50)
    assert len(listed(found.train)) == 50
    first = listed(found.train)[0]
    np.testing.assert_allclose(np.asarray(first.values)[:, 0], array[:3, 0, 0] / 10, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(first.target)[:, 0], array[3:5, 0, 0] / 10, rtol=1e-6)
    data = {"dataset": "global-temp", "root": tmp_path / "w", "lookback": 24, "horizon": 6}
    more = {**QUIET, "modality": "time_series", "task": "forecasting", "finetune__baselines": True}
    report = fit.main(write_run(tmp_path / "run", tiny_chat, data, **more))
    figures = {row.name: row.figures[0] for row in report.rows}
    steps = np.stack([hours[24:115] + ahead for ahead in range(6)])
    wave, last = np.sin(2 * np.pi * steps / 24), np.sin(2 * np.pi * (hours[24:115] - 1) / 24)
    expected = float(np.mean((10 * wave - 10 * last) ** 2))
    assert figures["last value"]["MSE"] == pytest.approx(expected, rel=0.02)


def test_chest_x_rays_have_all_their_findings(tmp_path: Path) -> None:
    rows = "1_000.png,Mass|Edema,0\n1_001.png,No Finding,1\n2_000.png,Hernia,0"
    write(tmp_path / "Data_Entry_2017.csv", f"Image Index,Finding Labels,Follow-up #\n{rows}")
    write(tmp_path / "train_val_list.txt", "1_000.png\n1_001.png\n")
    write(tmp_path / "test_list.txt", "2_000.png\n")
    for name, folder in (("1_000", 1), ("1_001", 1), ("2_000", 2)):
        write(tmp_path / f"images_{folder:03d}/images/{name}.png", "")
    found = opened("chestx-ray14", tmp_path)
    assert targets(found.train) == [("Mass", "Edema"), ()]
    assert targets(found.test) == [("Hernia",)]


def again(rows: list[Any], trials: int = 0) -> dict[str, float]:
    samples, vectors = zip(*rows, strict=True)
    return found_again(samples, vectors, trials)


def test_r1_between_cameras_by_hand() -> None:
    def seen(person: str, camera: str, *vector: float, query: bool = False) -> Any:
        return Sample({}, person, camera=camera, query=query), np.array(vector)

    rows = [
        seen("a", "1", 1, 0, query=True),
        seen("a", "1", 1, 0),  # the same camera: left out
        seen("b", "1", 1, 0.2),  # nearer than the right one
        seen("a", "2", 1, 0.5),
        seen("b", "2", 0, 1, query=True),  # found: by camera 1, though far
        seen("c", "2", 3, 0, query=True),  # nobody else has it
    ]
    # a: the second of two. b: its picture by camera 1 is behind a's by camera 2 and before a's 1.
    assert again(rows) == {"R@1": 0.0, "mAP": pytest.approx((1 / 2 + 1 / 2) / 2)}
    with pytest.raises(DataError, match="no person of a query has a picture by another camera"):
        again(rows[4:])
    many = [seen("a", "1", 1, 0, query=True), *(seen("a", "2", -1, n) for n in range(9))]
    many += [seen("b", "2", 1, 5)]
    assert again(many)["R@1"] == 0
    assert again(many, 5)["mAP"] == 0.5  # one picture of each


def test_persons_are_found_again_by_other_cameras(tmp_path: Path, tiny_chat: Path) -> None:
    """New persons, each with a bright stripe at a height of its own."""
    root, rng = tmp_path / "sysu", np.random.default_rng(0)
    for person in range(1, 9):
        for camera in range(1, 7):
            for shot in range(3):
                pixels = rng.integers(0, 60, (24, 12, 3), dtype=np.uint8) + 20 * (camera in (3, 6))
                pixels[3 * person - 3 : 3 * person] += 160
                name = root / f"cam{camera}/{person:04d}/{shot + 1:04d}.jpg"
                name.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(name, quality=95)
    for part, ids in (("train", "1,2,3,4,5"), ("val", "6"), ("test", "7,8")):
        write(root / f"exp/{part}_id.txt", ids + "\n")
    found = opened("sysu-mm01-reid", root)
    assert len(listed(found.train)) == 6 * 6 * 3
    assert {s.camera for s in listed(found.test)} == {"cam1", "cam2", "cam4", "cam5", "cam6"}
    assert sum(sample.query for sample in listed(found.test)) == 2 * 2 * 3
    more = {**QUIET, "train__steps": 40, "finetune__baselines": True}
    more |= {"modality": "thermal", "task": "re-identification"}
    data = {"dataset": "sysu-mm01-reid", "root": root}
    report = fit.main(write_run(tmp_path / "run", tiny_chat, data, **more))
    assert (report.metric, report.rows[0].name) == ("R@1", "pixels")
    assert report.rows[0].figures[0]["R@1"] == 1
    assert report.rows[1].figures[0]["R@1"] > 0.7  # half are right by chance
    for kind in ("visible", "thermal"):
        (tmp_path / "regdb" / kind.title()).mkdir(parents=True)
        for part, people in (("train", "12"), ("test", "3")):
            rows = "".join(f"{kind.title()}/{n}/m_{kind[0]}_1.bmp {n}\n" for n in people)
            write(tmp_path / f"regdb/idx/{part}_{kind}_1.txt", rows)
    found = opened("regdb-reid", tmp_path / "regdb")
    assert [(s.target, s.camera, s.query) for s in listed(found.test)] == [
        ("3", "visible", True),
        ("3", "thermal", False),
    ]
    assert targets(found.train) == ["1", "2"] * 2
