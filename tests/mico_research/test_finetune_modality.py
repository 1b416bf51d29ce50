"""``mico-chat finetune``: learns, resumes, reproduces, does not look at the test, compares."""

import csv
import json
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("sklearn")

from mico_chat.checkpoints.assemble import read_encoder
from mico_chat.cli.main import main as cli
from mico_chat.errors import ConfigError, DataError
from mico_research.finetune import fit as command
from mico_research.finetune import packaged
from mico_research.finetune.baselines import baselines
from mico_research.finetune.fit import build, draws_of, fit, fit_specs, main, merge_lora
from mico_research.finetune.recipe import FinetuneRun, Source, Splits
from mico_research.finetune.report import Report, Row, markdown, score, summary
from mico_research.modalities.families import GraphInput, SequenceInput
from mico_research.modalities.model import load_modality
from mico_research.modalities.readers import Series, read_samples
from mico_research.modalities.samples import Graph, Sample, Target
from mico_training.recipe import load_recipe

RNG = np.random.default_rng(1)


def write_table(path: Path, n: int = 120, seed: int = 0) -> Path:
    """Sick where the sum of two columns is positive; a third says nothing."""
    x = np.random.default_rng(seed).normal(size=(n, 3))
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["a", "b", "noise", "sick"])
        lines.writerows([*row, "yes" if row[0] + row[1] > 0 else "no"] for row in x)
    return path


def write_run(folder: Path, model: Path, data: dict[str, Any], **changes: Any) -> Path:
    """A recipe of a short run; a change like ``train__lr`` replaces one key of a section."""
    arguments = {"use_cpu": True, "report_to": []}
    train = {"lr": 3e-3, "steps": 60, "batch_size": 16, "save_steps": 20, "log_steps": 10}
    content: dict[str, Any] = {
        "model": str(model),
        "output": str(folder / "out"),
        "modality": "tabular",
        "task": "classification",
        "data": {name: str(v) if isinstance(v, Path) else v for name, v in data.items()},
        "train": train | {"arguments": arguments},
        "finetune": {"seeds": [0, 1], "dropout": 0.0},
    }
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (content[section] if section else content)[name] = value
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def table(tmp_path: Path, tiny_chat: Path) -> Path:
    data = {"train": write_table(tmp_path / "train.csv"), "target": "sick"}
    return write_run(tmp_path / "run", tiny_chat, data)


def best(report: Report, kind: str, metric: str = "accuracy") -> float:
    found = report.best(kind)
    assert found is not None
    return figure(found, metric)


def figure(row: Row, metric: str = "accuracy") -> float:
    """The mean over the seeds."""
    return fmean(each[metric] for each in row.figures)


# --- the whole command --------------------------------------------------------------------------


def test_it_learns_and_compares_and_its_folder_predicts(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(["finetune", "--config", str(table)])
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    output = tmp_path / "run/out"
    report = Report.read(output)
    names = [row.name for row in report.rows]
    assert names[:3] == ["most frequent class", "logistic regression", "gradient boosting"]
    assert [row.kind for row in report.rows[3:]] == ["pretrained", "random"]
    assert [len(row.figures) for row in report.rows] == [2] * 5
    assert best(report, "pretrained") > 0.8  # half of them are sick
    assert best(report, "baseline") > 0.9
    assert figure(report.rows[0]) < 0.65
    assert (output / "results.png").stat().st_size > 5000
    assert "| MiCo, pretrained blocks |" in (output / "results.md").read_text()
    assert shown.strip() == (output / "results.md").read_text().strip()

    new = read_samples("tabular", write_table(tmp_path / "new.csv", 60, seed=9), "sick")
    found = [str(prediction.value) for prediction in load_modality(output, "cpu").predict(new)]
    assert score("classification", new, found)["accuracy"] > 0.8
    with pytest.raises(SystemExit):
        cli(["predict", str(output), str(tmp_path / "train.csv")])
    assert capsys.readouterr().out.startswith("sample,prediction,no,yes\n2,")


def test_the_same_seeds_give_the_same_figures_also_after_a_break(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["finetune.control=false", "train.steps=20"]
    whole = main(table, overrides)

    trained: list[Path] = []

    def breaks_once(recipe: Any, model: Any, splits: Any, output: Path) -> float:
        trained.append(output)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fit(recipe, model, splits, output)

    again = [*overrides, f"output={tmp_path / 'again'}"]
    monkeypatch.setattr(command, "fit", breaks_once)
    with pytest.raises(KeyboardInterrupt):
        main(table, again)
    assert len(list((tmp_path / "again/runs").glob("*/result.json"))) == 1
    report = main(table, again)
    runs = [f"pretrained-seed{seed}-lr0.003" for seed in (0, 1, 1)]
    assert [path.name for path in trained] == runs
    assert [row.figures for row in report.rows] == [row.figures for row in whole.rows]
    main(table, again)
    assert len(trained) == 3
    with pytest.raises(
        ConfigError, match=r"with recipe\.train\.lr 0\.003, but now .* is 1\.0; give"
    ):
        main(table, [*again, "train.lr=1"])


def test_a_forecast_beats_the_last_value(tmp_path: Path, tiny_chat: Path) -> None:
    time = np.arange(300)
    wave = 50 + 10 * np.sin(2 * np.pi * time / 12) + RNG.normal(scale=0.5, size=300)
    lines = ["time,level", *(f"{t},{v}" for t, v in zip(time, wave, strict=True))]
    (tmp_path / "wave.csv").write_text("\n".join(lines))
    data = {"train": tmp_path / "wave.csv", "columns": ["level"], "lookback": 24, "horizon": 6}
    changes = {"modality": "time_series", "task": "forecasting", "train__steps": 120}
    changes |= {"finetune__seeds": [0], "finetune__control": False, "finetune__patch": 6}
    report = main(write_run(tmp_path / "run", tiny_chat, data | {"season": 12}, **changes))
    rows = {row.name: figure(row, "MSE") for row in report.rows}
    assert rows["MiCo, pretrained blocks"] < 0.5 * rows["last value"]
    assert rows["seasonal naive"] < 0.1
    assert report.n == (166, 40, 55)


FAMILIES = ["imu", "hyperspectral", "graph", "thermal"]


def write_family(folder: Path, family: str) -> Path:
    """Sixty samples of two classes that differ in their values."""
    rng = np.random.default_rng(0)
    up = np.arange(60) % 2
    path = folder / ("x.jsonl" if family == "graph" else "x.npz")
    if family == "graph":
        nodes = rng.normal(size=(60, 4, 1)) + 3 * up[:, None, None]
        lines = [
            {"nodes": n.tolist(), "edges": [[0, 1], [1, 2]], "y": int(u)}
            for n, u in zip(nodes, up, strict=True)
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
    elif family == "imu":
        x = rng.normal(size=(60, 20, 2)) + 2 * up[:, None, None]
        np.savez(path, x=x, y=up, lengths=rng.integers(9, 21, 60))
    elif family == "hyperspectral":
        np.savez(path, x=rng.normal(size=(60, 3, 3, 24)) + 0.5 * up[:, None, None, None], y=up)
    else:
        x = rng.normal(8000, 50, size=(60, 32, 32))
        x[up == 1, :16] += 500  # warm above
        x[up == 0, 16:] += 500
        np.savez(path, x=x.astype(np.uint16), y=up)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_end_to_end(family: Any, tmp_path: Path, tiny_chat: Path) -> None:
    path = write_family(tmp_path, family)
    changes = {"modality": family, "finetune__seeds": [0], "finetune__control": False}
    report = main(write_run(tmp_path / "run", tiny_chat, {"train": path}, **changes))
    assert best(report, "pretrained") > 0.8
    assert figure(report.rows[0]) == 0.5
    assert len([row for row in report.rows if row.kind == "baseline"]) >= 3
    assert best(report, "baseline") > 0.9
    found = load_modality(tmp_path / "run/out", "cpu").predict(read_samples(family, path))
    assert sum(1 for _ in found) == 60


# --- what trains --------------------------------------------------------------------------------


def fitted(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Recipe, encoder, splits of seed 0, and what is fitted to the training samples."""
    recipe = load_recipe(FinetuneRun, path, overrides)
    encoder = read_encoder(recipe.model.name)
    splits = Source(recipe).splits(0)
    return recipe, encoder, splits, *fit_specs(recipe, encoder, splits)


def built(path: Path, overrides: Sequence[str], pretrained: bool = True) -> Any:
    recipe, encoder, splits, spec, target = fitted(path, overrides)
    torch.manual_seed(0)
    return build(recipe, encoder, spec, target, pretrained), encoder, splits


def test_pretrained_and_control_differ_in_the_blocks(table: Path) -> None:
    model, encoder, _ = built(table, ["train.freeze=[encoder]"])
    control, _, _ = built(table, ["train.freeze=[encoder]"], pretrained=False)
    source = encoder.source.encoder.state_dict()
    own, other = model.encoder.state_dict(), control.encoder.state_dict()
    assert all(torch.equal(value, source[name]) for name, value in own.items())
    weight = "vit.blocks.0.mlp.fc1.weight"
    assert not torch.equal(own[weight], other[weight])
    trains = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"tokenizer", "modality_embed", "head"}


def test_adapters_train_alone_and_merge_away(table: Path) -> None:
    model, encoder, splits = built(table, ["finetune.lora.r=4", "finetune.lora.dropout=0"])
    trains = [n for n, p in model.named_parameters() if p.requires_grad and "encoder" in n]
    assert trains
    assert all("lora_" in name for name in trains)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = [p.probabilities for p in model.predict(splits.test)]
    merge_lora(model.encoder)
    after = [p.probabilities for p in model.predict(splits.test)]
    for one, other in zip(before, after, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert set(model.encoder.state_dict()) <= set(encoder.source.encoder.state_dict())
    message = "the layer 'fc9' does not exist; the layers are fc1, fc2, proj, qkv"
    with pytest.raises(ConfigError, match=message):
        built(table, ["finetune.lora.targets=[fc9]"])


def test_every_epoch_has_every_sample() -> None:
    arrays = [{"x": np.array(i)} for i in range(5)]
    draws = draws_of(arrays, 12, 3)
    drawn = [int(draws[place]["x"]) for place in range(len(draws))]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert drawn[:5] != drawn[5:10]


# --- splits -------------------------------------------------------------------------------------


def test_splits_share_nothing_keep_every_class_and_give_statistics(table: Path) -> None:
    recipe = load_recipe(FinetuneRun, table)
    source = Source(recipe)
    splits = source.splits(3)
    parts = (splits.train, splits.validation, splits.test)
    lines = [{sample.line for sample in part} for part in parts]
    assert sum(map(len, lines)) == 120 == len(set.union(*lines))
    assert all({sample.target for sample in part} == {"yes", "no"} for part in parts)
    again, other = ([s.line for s in source.splits(seed).test] for seed in (3, 4))
    assert again == [sample.line for sample in splits.test] != other
    spec, _ = fit_specs(recipe, read_encoder(recipe.model.name), splits)
    values = [float(s.values["a"]) for s in splits.train if isinstance(s.values, dict)]
    assert spec.numbers[0].mean == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    ("content", "test", "message"),
    [
        ("x,sick\n" + "1,no\n" * 6, None, "all . training samples are of class 'no'"),
        ("x,sick\n1,no\n", None, "1 sample is not enough"),
        ("x,sick\n", None, "no samples"),
        (
            "x,sick\n" + "1,no\n2,yes\n" * 9,
            "x,sick\n2,yes\n1,perhaps\n",
            r"test\.csv:3: the class 'perhaps' is not among .* no, yes",
        ),
    ],
)
def test_data_too_poor_to_learn_from(
    tmp_path: Path, tiny_chat: Path, content: str, test: str | None, message: str
) -> None:
    data: dict[str, Any] = {"train": tmp_path / "t.csv", "target": "sick"}
    data["train"].write_text(content)
    if test is not None:
        data["test"] = tmp_path / "test.csv"
        data["test"].write_text(test)
    with pytest.raises(DataError, match=message):
        main(write_run(tmp_path / "run", tiny_chat, data))


def test_a_series_too_short_to_cut(tmp_path: Path, tiny_chat: Path) -> None:
    (tmp_path / "s.csv").write_text("x\n" + "1\n" * 20)
    data = {"train": tmp_path / "s.csv", "lookback": 12, "horizon": 6}
    changes = {"modality": "time_series", "task": "forecasting"}
    message = "20 steps are too few for one training window of lookback 12"
    with pytest.raises(DataError, match=message):
        main(write_run(tmp_path / "run", tiny_chat, data, **changes))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.target=null"], "a table needs data.target"),
        (["task=forecasting"], "forecasting works for time_series and imu, not for tabular"),
        (["modality=imu", "task=forecasting"], "needs data.lookback and data.horizon"),
        (["data.package=diabetes"], "give one of package, dataset and train"),
        (["train.freeze=[encoder]", "finetune.lora.r=4"], "train.freeze freezes the encoder"),
        (["finetune.layer=2"], "did you mean 'layers'?"),
        (["modality=smell"], "modality"),
    ],
)
def test_recipes_that_make_no_sense(table: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(FinetuneRun, table, overrides)


# --- packages -----------------------------------------------------------------------------------


def test_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    read = packaged.open_package
    with pytest.raises(ConfigError, match="unknown package 'iris'; the packages are breast-cancer"):
        read("iris", "tabular", "classification")
    with pytest.raises(ConfigError, match="it is for tabular regression, not for tabular class"):
        read("diabetes", "tabular", "classification")
    monkeypatch.setattr(packaged, "_file", lambda *_: distribution("no-such-package"))
    with pytest.raises(ConfigError, match="is a part of the package no-such-package, which"):
        read("basic-motions", "imu", "classification")


def test_packages_of_scikit_learn_are_whole() -> None:
    table = packaged.open_package("breast-cancer", "tabular", "classification").train or []
    assert len(table) == 569
    assert {sample.target for sample in table} == {"malignant", "benign"}
    numbers = packaged.open_package("diabetes", "tabular", "regression").train or []
    assert isinstance(numbers[0].target, float)
    pictures = packaged.open_package("digits", "image", "classification").train or []
    assert {np.asarray(sample.values).shape for sample in pictures} == {(8, 8, 3)}


def test_a_ts_file_is_channels_and_class() -> None:
    first, second = packaged.parse_ts(
        "#x\n@dimensions 2\n@data\n1,2,3:4,5,6:up\n7,8:9,0:down\n", "f"
    )
    assert np.asarray(first.values).tolist() == [[1, 4], [2, 5], [3, 6]]
    assert (first.target, second.target) == ("up", "down")
    assert np.asarray(second.values).shape == (2, 2)


# --- baselines ----------------------------------------------------------------------------------


def thirds(samples: list[Sample]) -> Splits:
    n = len(samples) // 3
    return Splits(samples[:n], samples[n : 2 * n], samples[2 * n :])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_baselines_of_each_family_learn_numbers_too(
    family: str, tmp_path: Path, tiny_chat: Path
) -> None:
    path = write_family(tmp_path, family)
    changes = {"modality": family, "task": "regression"}
    run = write_run(tmp_path / "run", tiny_chat, {"train": path}, **changes)
    _, _, splits, spec, target = fitted(run)
    found = baselines(spec, target, splits, None, 0)
    floor, *others = (score("regression", splits.test, values)["RMSE"] for values in found.values())
    assert len(others) >= 2
    assert min(others) < 0.6 * floor


def test_neighbourhoods_of_a_graph_tell_a_ring_from_a_chain() -> None:
    samples = []
    for n in range(30):
        edges = np.array([(0, 1), (1, 2), (2, 0)][: 2 + n % 2])
        samples.append(Sample(Graph(np.ones((3, 1)), edges, np.ones((len(edges), 1))), "ab"[n % 2]))
    splits = thirds(samples)
    target = Target.fit("classification", splits.train)
    found = baselines(GraphInput.fit(splits.train), target, splits, None, 0)
    assert found["Weisfeiler-Lehman, logistic regression"] == [s.target for s in splits.test]


def test_forecast_baselines_are_exact_where_they_must_be() -> None:
    values = np.stack([np.tile([1.0, 5, 2, 7], 30), np.arange(120.0)], 1).astype(np.float32)
    windows = Series(values, ("cycle", "trend"), "s").windows(0, 120, 8, 6)
    splits = thirds(windows)
    spec = SequenceInput.fit(splits.train, 4)
    target = Target.fit("forecasting", splits.train, ["cycle", "trend"])
    found = baselines(spec, target, splits, 4, 0)
    truth = np.stack([spec.standardise(np.asarray(s.target)) for s in splits.test])
    assert list(found) == ["last value", "seasonal naive", "linear (ridge)"]
    np.testing.assert_allclose(np.stack(found["seasonal naive"])[..., 0], truth[..., 0], atol=1e-5)
    np.testing.assert_allclose(np.stack(found["linear (ridge)"]), truth, atol=0.05)
    assert "seasonal naive" not in baselines(spec, target, splits, None, 0)


# --- figures ------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    classes = [Sample({}, c) for c in "aabb"]
    figures = score("classification", classes, list("aaba"))
    assert figures["accuracy"] == 0.75
    assert figures["macro F1"] == pytest.approx((0.8 + 2 / 3) / 2)
    numbers = [Sample({}, float(v)) for v in (1, 2, 3)]
    assert score("regression", numbers, [1, 2, 6]) == {
        "RMSE": pytest.approx(3**0.5),
        "MAE": pytest.approx(1),
        "R2": pytest.approx(1 - 9 / 2),
    }
    steps = [Sample({}, np.array([[1.0], [3.0]]))]
    assert score("forecasting", steps, [np.array([[1.0], [1.0]])]) == {"MSE": 2.0, "MAE": 1.0}


def report_of(figures: dict[str, tuple[float, ...]], task: Any, metric: str) -> Report:
    kinds = ("baseline", "pretrained", "random")
    others = ("macro F1", "MAE", "R2")
    rows = [
        {
            "name": name,
            "kind": kind,
            "figures": [dict.fromkeys((metric, *others), value) for value in values],
            "seconds": 1.0,
        }
        for (name, values), kind in zip(figures.items(), kinds, strict=True)
    ]
    head = {"name": "r", "modality": "tabular", "task": task, "data": "Set, of things"}
    head |= {"n": (9, 3, 3), "seeds": (0, 1), "layers": 3, "trains": "all"}
    return Report.model_validate(head | {"rows": rows, "machine": "a laptop"})


def test_the_summary_shows_who_wins_also_where_it_is_the_baseline() -> None:
    lost = report_of({"ridge": (1.0, 1.2), "MiCo": (2, 2), "Random": (3, 3)}, "regression", "RMSE")
    won = report_of({"knn": (0.5, 0.5), "MiCo": (1, 1), "R": (0, 0)}, "classification", "accuracy")
    text = summary([lost, won])
    assert "| RMSE ↓ | 3 | **1.100 ± 0.141**<br>ridge | 2.000 ± 0.000 | 3.000 ± 0.000 |" in text
    assert "| accuracy ↑ | 3 | 50.0 ± 0.0<br>knn | **100.0 ± 0.0** | 0.0 ± 0.0 |" in text
    assert markdown(lost) in text


def test_results_of_another_folder_are_missing(table: Path) -> None:
    with pytest.raises(ConfigError, match=r"results\.json is missing"):
        Report.read(table.parent)
