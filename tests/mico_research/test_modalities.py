"""Tokenizers and model: padding, order, missing values, folders; what does not fit is named."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mico_chat.errors import ConfigError, DataError, ModelError
from mico_chat.model.config import MicoConfig, MicoEncoderConfig
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.preprocessing import Preprocessing
from mico_research.modalities.families import (
    GraphInput,
    GraphTokenizer,
    PictureInput,
    SequenceInput,
    walk_returns,
)
from mico_research.modalities.model import (
    MicoForModality,
    MicoModalityConfig,
    embed_pictures,
    load_modality,
    predict,
    prefix_tokens,
    run_blocks,
)
from mico_research.modalities.samples import Graph, Sample, Target
from mico_research.modalities.table import TableInput

RNG = np.random.default_rng(0)
PREPROCESSING = Preprocessing(image_size=64)


def model_of(modality: str, spec: Any, target: Target, **options: Any) -> MicoForModality:
    torch.manual_seed(0)
    config = MicoModalityConfig(
        encoder_config=MicoConfig.tiny().encoder_config,
        modality=modality,
        input_spec=spec.model_dump(mode="json"),
        target_spec=target.model_dump(mode="json"),
        **options,
    )
    model = MicoForModality(config)
    model.train(False)
    return model


def sequences(n: int = 8, steps: int = 20, channels: int = 3) -> list[Sample]:
    return [Sample(RNG.normal(size=(steps, channels)) + 3, "ab"[i % 2]) for i in range(n)]


def rows(n: int = 12) -> list[Sample]:
    return [
        Sample({"age": str(20 + i), "city": "xyz"[i % 3], "income": f"{i * 1.5}"}, "yn"[i % 2])
        for i in range(n)
    ]


def graphs(n: int = 6) -> list[Sample]:
    made = []
    for i in range(n):
        edges = np.array([(a, a + 1) for a in range(2 + i)])
        graph = Graph(RNG.normal(size=(3 + i, 2)), edges, RNG.normal(size=(2 + i, 1)))
        made.append(Sample(graph, "ab"[i % 2]))
    return made


def pictures(n: int = 4) -> list[Sample]:
    return [Sample(RNG.integers(7000, 9000, (40, 30)), "ab"[i % 2]) for i in range(n)]


def of(family: str) -> tuple[MicoForModality, list[Sample]]:
    """A model and samples of a family."""
    samples: list[Sample]
    spec: Any
    match family:
        case "imu":
            samples = sequences()
            spec = SequenceInput.fit(samples, 6)
        case "hyperspectral":
            samples = sequences(steps=31, channels=9)
            spec = SequenceInput.fit(samples, 5, by_step=True)
        case "tabular":
            samples = rows()
            spec = TableInput.fit(samples)
        case "graph":
            samples = graphs()
            spec = GraphInput.fit(samples)
        case _:
            samples = pictures()
            spec = PictureInput.fit(samples, PREPROCESSING)
    return model_of(family, spec, Target.fit("classification", samples)), samples


FAMILIES = ["imu", "hyperspectral", "tabular", "graph", "thermal"]


def logits(model: MicoForModality, samples: Sequence[Sample]) -> torch.Tensor:
    with torch.inference_mode():
        found = model(**model.batch([model.arrays(sample) for sample in samples])).logits
    assert isinstance(found, torch.Tensor)
    return found


# --- the encoder's blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True], ids=["hybrid", "eva"])
def test_embedded_pictures_through_the_blocks_are_the_encoder(plain: bool) -> None:
    torch.manual_seed(0)
    config = MicoConfig.tiny().encoder_config
    if plain:
        options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "token"}
        config = MicoEncoderConfig(
            architecture="eva_giant_patch14_clip_224", architecture_options=options, image_size=56
        )
    encoder = OmniEncoder(config).train(False)
    features = encoder.features(torch.randn(2, 3, config.image_size, config.image_size))
    tokens, rotary = embed_pictures(encoder, features)
    prefix = prefix_tokens(encoder, 2)
    assert torch.equal(tokens[:, : encoder.n_prefix], prefix)
    torch.testing.assert_close(run_blocks(encoder, tokens, rotary=rotary), encoder(features))


def test_layers_beyond_the_encoder_are_refused() -> None:
    _, samples = of("imu")
    spec, target = SequenceInput.fit(samples, 6), Target.fit("classification", samples)
    with pytest.raises(ModelError, match="layers 2: this encoder has 1 to 1"):
        model_of("imu", spec, target, layers=2)


# --- every family -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_what_each_sample_gives_alone(family: str) -> None:
    model, samples = of(family)
    together = logits(model, samples)
    assert together.shape == (len(samples), 2)
    alone = torch.cat([logits(model, [sample]) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(0).min() > 0  # the input plays a part


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_same_model_whose_parts_all_learn(family: str, tmp_path: Path) -> None:
    model, samples = of(family)
    model.save_pretrained(tmp_path)
    loaded = load_modality(tmp_path, "cpu")
    torch.testing.assert_close(logits(model, samples), logits(loaded, samples))
    values = [prediction.value for prediction in loaded.predict(samples, 3)]
    assert values == [prediction.value for prediction in model.predict(samples)]
    arrays = [model.arrays(sample, labelled=True) for sample in samples]
    model(**model.batch(arrays)).loss.backward()
    assert model.modality_embed.grad is not None
    names = [name for name, _ in model.named_parameters()]
    pictured = [name for name in names if "stem" in name or "patch_embed" in name]
    assert bool(pictured) == (model.tokenizer is None)
    if model.tokenizer is not None:
        grads = [p.grad for p in model.tokenizer.parameters() if p.numel()]
        assert any(g is not None and bool(g.abs().sum() > 0) for g in grads)


def graph(nodes: Any, edges: list[tuple[int, int]], features: Any) -> Graph:
    return Graph(nodes, np.array(edges, dtype=np.int64).reshape(-1, 2), features)


ROW = {"age": "1", "city": "x", "income": "1"}


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("imu", np.zeros((20, 2)), "2 channels, but the model has 3"),
        ("imu", np.zeros((21, 3)), "21 steps, but the model takes 1 to 20"),
        ("imu", np.zeros((0, 3)), "0 steps, but the model takes 1 to 20"),
        ("imu", np.zeros(20), "the shape is .20,., expected 2 dimensions"),
        ("imu", np.full((20, 3), np.nan), "at .0, 0. is nan"),
        ("imu", np.full((20, 3), np.inf), "at .0, 0. is inf"),
        ("tabular", {"age": "1", "city": "x"}, "column 'income' is missing; .* are age, city"),
        ("tabular", ROW | {"age": "old"}, "column 'age': 'old' is not a finite number"),
        ("tabular", ROW | {"age": "inf"}, "column 'age': 'inf' is not a finite number"),
        ("tabular", np.zeros((20, 3)), "expected a row"),
        ("graph", graph(np.zeros((2, 2)), [(0, 2)], np.zeros((1, 1))), "node 2, but .* 0 to 1"),
        ("graph", graph(np.zeros((2, 3)), [(0, 1)], np.zeros((1, 1))), "3 features, but .* 2"),
        ("graph", graph(np.zeros((0, 2)), [], np.empty((0, 1))), "at least one node"),
        ("graph", graph(np.zeros((2, 2)), [(0, 1)], np.zeros((2, 1))), "1 edges, but .* for 2"),
        ("graph", graph(np.full((1, 2), np.nan), [], np.empty((0, 1))), "is nan; every value"),
        ("graph", ROW, "expected a graph"),
        ("thermal", np.zeros((5, 5, 4)), r"\(5, 5, 4\), expected \(H, W\) or \(H, W, 3\)"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(family: str, values: Any, message: str) -> None:
    model, _ = of(family)
    with pytest.raises(DataError, match=f"some.file:4: .*{message}"):
        model.arrays(Sample(values, file="some.file", line=4))


# --- sequences ----------------------------------------------------------------------------------


def test_padding_changes_nothing() -> None:
    model, samples = of("imu")
    short = dataclasses.replace(samples[0], values=np.asarray(samples[0].values)[:7])
    batch = model.batch([model.arrays(short), model.arrays(samples[1])])
    batch["values"][0, 7:] = 1e4  # whatever stands behind the end
    with torch.inference_mode():
        found = model(**batch).logits[0]
    torch.testing.assert_close(found, logits(model, [short])[0], rtol=1e-4, atol=1e-5)


def test_a_constant_channel_stays_finite() -> None:
    samples = [Sample(np.full((10, 2), 5.0), "ab"[i % 2]) for i in range(4)]
    spec = SequenceInput.fit(samples, 5)
    assert np.array_equal(spec.arrays(samples[0])["values"], np.zeros((10, 2)))


def forecaster() -> tuple[MicoForModality, list[Sample]]:
    series = RNG.normal(size=(60, 2)).cumsum(0)
    windows = [
        Sample(series[t - 12 : t], series[t : t + 4], "series.csv")
        for t in range(12, len(series) - 4)
    ]
    target = Target.fit("forecasting", windows, ["one", "two"])
    return model_of("time_series", SequenceInput.fit(windows, 4), target), windows


def forecast(model: MicoForModality, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    (found,) = model.predict([Sample(values)])
    return np.asarray(found.value)


def test_a_forecast_takes_each_channel_on_its_own() -> None:
    model, windows = forecaster()
    values = np.asarray(windows[0].values)
    # The scale of either channel is its own, so they are the same for this.
    assert isinstance(model.spec, SequenceInput)
    model.spec = model.spec.model_copy(update={"mean": ((0.0, 0.0),), "std": ((1.0, 1.0),)})
    both, swapped = forecast(model, values), forecast(model, values[:, ::-1].copy())
    assert both.shape == (4, 2)
    np.testing.assert_allclose(both[:, ::-1], swapped, rtol=1e-4, atol=1e-5)


def test_a_forecast_follows_level_and_scale() -> None:
    model, windows = forecaster()
    values = np.asarray(windows[0].values)
    moved = forecast(model, values * 10 + 500)
    np.testing.assert_allclose(moved, forecast(model, values) * 10 + 500, rtol=1e-2)
    np.testing.assert_allclose(forecast(model, np.full((12, 2), 7.0)), 7.0, atol=0.1)
    with pytest.raises(DataError, match="11 steps, but this model forecasts from exactly 12"):
        forecast(model, np.zeros((11, 2)))


# --- tables -------------------------------------------------------------------------------------


def test_columns_are_bound_to_names_not_places() -> None:
    model, samples = of("tabular")
    turned = [
        dataclasses.replace(s, values=dict(reversed(list(s.values.items()))))  # type: ignore[union-attr]
        for s in samples
    ]
    torch.testing.assert_close(logits(model, samples), logits(model, turned))


def test_a_missing_number_is_not_the_mean_and_a_new_category_counts_as_missing() -> None:
    model, _ = of("tabular")
    assert isinstance(model.spec, TableInput)
    mean = next(c.mean for c in model.spec.numbers if c.name == "age")
    base = {"age": f"{mean}", "city": "x", "income": "1"}
    gone = [{**base, "age": text} for text in ("", "NA", "nan")]
    mean_row, *missing = logits(model, [Sample(row) for row in (base, *gone)])
    for one in missing:
        torch.testing.assert_close(one, missing[0])
        assert not torch.allclose(one, mean_row)
    rows = [Sample({**base, "city": city}) for city in ("nowhere", "", "x")]
    new, empty, known = logits(model, rows)
    torch.testing.assert_close(new, empty)
    assert not torch.allclose(new, known)


def test_text_and_named_numbers_are_categories() -> None:
    samples = rows()
    assert [c.name for c in TableInput.fit(samples).numbers] == ["age", "income"]
    spec = TableInput.fit(samples, ["age"])
    assert [c.name for c in spec.categories] == ["age", "city"]


def test_a_column_of_names_is_refused() -> None:
    samples = [Sample({"id": f"p{i}", "x": str(i)}, "ab"[i % 2]) for i in range(300)]
    with pytest.raises(DataError, match="'id' has 300 different texts in 300 rows"):
        TableInput.fit(samples)
    with pytest.raises(ConfigError, match="the column 'z' is missing; the columns are id, x"):
        TableInput.fit(samples, ["z"])


# --- graphs -------------------------------------------------------------------------------------


def renumbered(sample: Sample, seed: int) -> Sample:
    """The same graph: nodes in another order, edges in another order, ends turned."""
    graph = sample.values
    assert isinstance(graph, Graph)
    rng = np.random.default_rng(seed)
    place = rng.permutation(len(graph.nodes))
    nodes = np.empty_like(graph.nodes)
    nodes[place] = graph.nodes
    order = rng.permutation(len(graph.edges))
    edges = place[graph.edges[order]][:, ::-1].copy()
    return dataclasses.replace(sample, values=Graph(nodes, edges, graph.edge_features[order]))


@pytest.mark.parametrize("seed", range(3))
def test_a_renumbered_graph_is_the_same_graph(seed: int) -> None:
    model, samples = of("graph")
    turned = [renumbered(sample, seed) for sample in samples]
    torch.testing.assert_close(logits(model, samples), logits(model, turned), rtol=1e-4, atol=1e-5)


def test_edges_are_seen() -> None:
    """Two graphs of the same nodes and as many edges, joined otherwise."""
    nodes, features = np.ones((6, 1)), np.zeros((6, 1))
    ring = np.array([(i, (i + 1) % 6) for i in range(6)])
    triangles = np.array([(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)])
    samples = [
        Sample(Graph(nodes, edges, features), label)
        for edges, label in ((ring, "ring"), (triangles, "triangles"))
    ]
    model = model_of("graph", GraphInput.fit(samples), Target.fit("classification", samples))
    found = logits(model, samples)
    assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_walk_returns_are_those_of_a_pair_and_a_triangle() -> None:
    edges = torch.tensor([[[0, 1], [0, 0], [0, 0]], [[0, 1], [1, 2], [2, 0]]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    found = walk_returns(edges, mask, 3, 3)
    assert found[0, 0].tolist() == [0, 1, 0]
    assert found[0, 2].tolist() == [0, 0, 0]  # no node
    torch.testing.assert_close(found[1, 0], torch.tensor([0, 0.5, 0.25]))


def test_a_graph_without_edges_is_a_graph() -> None:
    lonely = Sample(Graph(np.zeros((2, 2)), np.empty((0, 2)), np.empty((0, 1))), "a")
    model, samples = of("graph")
    assert logits(model, [lonely, samples[-1]]).isfinite().all()
    alone = GraphInput.fit([lonely])
    assert GraphTokenizer(alone, 8)(**alone.batch([alone.arrays(lonely)]))[0].shape == (1, 2, 8)


# --- pictures -----------------------------------------------------------------------------------


def test_a_sensors_range_is_that_of_training() -> None:
    samples = pictures()
    spec = PictureInput.fit(samples, PREPROCESSING)
    assert 7000 <= spec.low < spec.high <= 9000
    pixels = spec.arrays(samples[0])["pixel_values"]
    assert pixels.shape == (3, 64, 64)
    mean, std = np.array(PREPROCESSING.image_mean), np.array(PREPROCESSING.image_std)
    shown = pixels * std[:, None, None] + mean[:, None, None]
    np.testing.assert_allclose(shown[0], shown[2], atol=1e-5)
    assert shown.min() >= -1e-5
    assert shown.max() <= 1 + 1e-5
    hotter = spec.arrays(Sample(np.asarray(samples[0].values) + 300))["pixel_values"]
    assert hotter.mean() > pixels.mean()


def test_a_flat_picture_stays_finite() -> None:
    flat = Sample(np.full((5, 5), 3))
    spec = PictureInput.fit([flat], PREPROCESSING)
    assert np.isfinite(spec.arrays(flat)["pixel_values"]).all()


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "targets", "message"),
    [
        ("classification", ["a", "a"], "all 2 training samples are of class 'a'"),
        ("regression", [None], "the target is missing; regression needs one"),
        ("regression", ["tall"], "'tall' is not a finite number"),
    ],
)
def test_targets_that_teach_nothing(task: Any, targets: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Target.fit(task, [Sample({}, target) for target in targets])


def test_a_class_that_training_lacked_is_named() -> None:
    message = r"x\.csv:5: the class 'c' was not in training; the classes are a, b"
    with pytest.raises(DataError, match=message):
        Target(task="classification", classes=("a", "b")).label(Sample({}, "c", "x.csv", 5), None)


def test_a_regression_is_in_the_units_of_its_targets() -> None:
    samples = [dataclasses.replace(s, target=1000.0 + i) for i, s in enumerate(sequences())]
    model = model_of("imu", SequenceInput.fit(samples, 6), Target.fit("regression", samples))
    assert all(abs(float(p.value) - 1003.5) < 20 for p in model.predict(samples))
    labels = [float(model.arrays(s, labelled=True)["labels"]) for s in samples]
    assert abs(np.mean(labels)) < 1e-5


# --- predict ------------------------------------------------------------------------------------


def test_predictions_are_a_table(tmp_path: Path) -> None:
    model, _ = of("tabular")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "new.csv").write_text("city,note,age,income\nx,any,30,4\ny,thing,,2\n")
    out = io.StringIO()
    predict(tmp_path / "model", tmp_path / "new.csv", out, "cpu")
    header, *lines = out.getvalue().splitlines()
    assert header == "sample,prediction,n,y"
    assert [line.split(",")[0] for line in lines] == ["2", "3"]
    chances = [float(cell) for cell in lines[0].split(",")[2:]]
    assert sum(chances) == pytest.approx(1, abs=1e-4)


def test_a_forecast_goes_on_behind_the_end(tmp_path: Path) -> None:
    model, _ = forecaster()
    model.save_pretrained(tmp_path / "model")
    lines = ["day,two,one", *(f"d{i},{i},{-i}" for i in range(20))]
    (tmp_path / "new.csv").write_text("\n".join(lines))
    out = io.StringIO()
    predict(tmp_path / "model", tmp_path / "new.csv", out, "cpu")
    assert out.getvalue().splitlines()[0] == "step,one,two"
    assert len(out.getvalue().splitlines()) == 5
    (tmp_path / "few.csv").write_text("\n".join(lines[:6]))
    with pytest.raises(DataError, match="5 steps, but this model needs 12"):
        predict(tmp_path / "model", tmp_path / "few.csv", out, "cpu")


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_modality(tmp_path)
    MicoConfig.tiny().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="type is 'mico', expected 'mico_modality'"):
        load_modality(tmp_path)
