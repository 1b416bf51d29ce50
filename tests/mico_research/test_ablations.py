"""The ablations on a tiny grid: what a run leaves, what is not run twice, what the tables say."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import BertModel

from mico_chat.errors import ConfigError, DataError
from mico_chat.media import MediaFile
from mico_chat.model.config import MicoEncoderConfig, MicoTextConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_research.ablations import run as runs
from mico_research.ablations.__main__ import main
from mico_research.ablations.evaluation import Pool, Ranked, Reranking, pools, retrieval
from mico_research.ablations.grid import TABLE, TABLES, Cell, Row, Table, cells
from mico_research.ablations.report import changes, markdown, over_seeds, report
from mico_research.ablations.run import (
    CoarseLoader,
    Settings,
    all_results,
    as_wide_as_bert,
    prepare,
    run,
)
from mico_training.build_model import pretraining_config
from mico_training.data.mixture import open_source
from mico_training.data.sources.written import write_shard
from mico_training.recipe import DataRecipe, Stage1Recipe
from mico_training.records import result_of
from tests.mico_training.scenes import scene
from tests.mico_training.test_runs import write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder as ``make mini`` has it: 12 scenes to train on, 6 held out; and the recipe."""
    folder = tmp_path / "data"
    (folder / "shards").mkdir(parents=True)
    write_shard(folder / "shards/train-000000.tar", [scene(n) for n in range(12)])
    write_shard(folder / "shards/validation-000000.tar", [scene(n) for n in range(12, 18)])
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"intermediate_size": 64, "max_position_embeddings": 64, "projection_dim": 16}
    options = {f"text_config.{name}": value for name, value in text.items()}
    write_recipe(
        folder,
        folder / "shards",
        {"name": "tiny", "options": options},
        features={"cache": "unused"},
        train={"steps": 8, "keep_checkpoints": 1, "freeze": ["encoder.stem"]},
        stage1={
            "weights": {"tagging": 0, "region": 0, "concept": 0},
            "vocabulary": 128,
            "caption_length": 12,
            "most_units": 2,
            "most_slices": 1,
        },
    )
    return folder


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Settings:
    """What the command makes of that folder."""
    return Settings(
        recipe=data / "recipe.yaml",
        overrides=(f"data.0.path={data}/shards/train-*.tar", f"features.cache={data}/features"),
        validation=f"{data}/shards/validation-*.tar",
        output=tmp_path / "out",
        pool=5,
    )


def test_a_run_leaves_its_figures_and_its_curve_and_is_not_repeated(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    contrastive, everything = TABLE["objectives"].row("l").cell, TABLE["objectives"].row("n").cell
    prepare(settings)
    one, other = (run(settings, cell, 0) for cell in (contrastive, everything))
    assert [entry["step"] for entry in one["losses"]] == list(range(1, 9))
    assert "matching_loss" not in one["losses"][0]
    assert {"contrastive_loss", "matching_loss", "caption_loss"} <= set(other["losses"][0])
    assert set(one["retrieval"]) == set(other["retrieval"]) == {"image", "audio"}
    assert "matching" not in one["retrieval"]["image"]
    pool = other["retrieval"]["image"]
    assert (pool["media"], pool["queries"]) == (3, 2)
    assert 0 <= pool["matching"]["R@1"] <= pool["matching"]["R@5"] == 100
    assert "reranking" not in one
    chosen = [by for by in other["tuning"]["matching"] if by.items() >= other["reranking"].items()]
    assert [by["R@1"] for by in chosen] == [max(by["R@1"] for by in other["tuning"]["matching"])]
    assert other["parameters"]["all"] > other["parameters"]["encoder"] > 0
    assert not list(settings.folder(everything, 0).glob("checkpoint-*"))

    def fail(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "pretrain", fail)
    assert run(settings, everything, 0) == other
    with pytest.raises(AssertionError):
        run(settings, everything, 1)


def test_a_result_of_other_settings_is_no_result(settings: Settings) -> None:
    cell = Cell("default")
    folder = settings.folder(cell, 0)
    folder.mkdir(parents=True)
    made = runs.described(settings, cell, 0)
    (folder / "result.json").write_text(json.dumps(made))
    assert result_of(folder, made) == made
    estimated = replace(settings, overrides=(*settings.overrides, "expect.units=9"))
    assert result_of(folder, runs.described(estimated, cell, 0)) == made
    longer = replace(settings, overrides=(*settings.overrides, "train.steps=9"))
    with pytest.raises(ConfigError, match=r"made with recipe\.train\.steps 8, but now .* is 9"):
        result_of(folder, runs.described(longer, cell, 0))


def test_a_longer_cell_trains_longer(settings: Settings) -> None:
    train = settings.load(Cell("long", longer=3), 2).train
    assert (train.steps, train.seed) == (24, 2)


def _command(data: Path, output: Path) -> list[str]:
    return [
        *("--data", str(data), "--config", str(data / "recipe.yaml"), "--output", str(output)),
        *("--only", "objectives", "--seeds", "0", "--processes", "2", "--pool", "5"),
        *("--set", "train.steps=20", "--set", "train.save_steps=5"),
        *("--held-out", "validation-*.tar"),
    ]


@pytest.mark.soak
def test_a_killed_command_goes_on_where_it_was(data: Path, tmp_path: Path) -> None:
    """SIGKILL to the command: its processes end too; again, it ends as if nothing had been."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "mico_research.ablations", *_command(data, killed)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    try:
        while not list(killed.glob("runs/*/checkpoint-*/trainer_state.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not list(killed.glob("runs/*/result.json"))
    # The runs' processes end with the command: the same command waits for their locks.
    assert main(_command(data, killed)) == 0
    whole.mkdir()
    (killed / "tokenizer").rename(whole / "tokenizer")  # another learning may order words else
    assert main([*_command(data, whole), "--processes", "1"]) == 0
    ours, theirs = (json.loads((f / "ablations.json").read_text()) for f in (killed, whole))
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one["cell"] == other["cell"]
        assert len(one["losses"]) == (60 if one["cell"] == "contrastive-long" else 20)
        for entry, wanted in zip(one["losses"], other["losses"], strict=True):
            assert entry == pytest.approx(wanted, abs=1.1e-4)
        assert one["retrieval"] == other["retrieval"]
    assert None in [one["seconds"]["training"] for one in ours]
    (whole / "ablations.md").unlink()
    assert main([*_command(data, whole), "--report"]) == 0
    assert "(n) Con+Match+Gen" in (whole / "ablations.md").read_text()


def test_what_cannot_run_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_command(data, tmp_path / "out"), "--set", "train.stepps=3"]) == 1
    assert "did you mean 'steps'" in capsys.readouterr().err


# --- the grid -----------------------------------------------------------------------------------


def test_the_grid_is_printed_and_one_cell_is_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--grid", "--only", "size"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == ["| default", "| large", "| giant"]
    assert "objectives n, modalities f, data k, size o, architecture iv" in table[2]
    assert "encoder_config.depth=4" in table[4]
    monkeypatch.setattr("mico_research.ablations.__main__.prepare", lambda settings: None)
    started: list[Any] = []

    def start(settings: Settings, runs: list[Any], processes: int) -> tuple[()]:
        started.extend(runs)
        return ()

    monkeypatch.setattr("mico_research.ablations.__main__.side_by_side", start)
    of_one = ["--cell", "no-context", "contrastive", "--only", "objectives", "context"]
    assert main([*_command(data, tmp_path / "out"), *of_one]) == 0
    assert [cell.name for cell, seed in started] == ["contrastive", "no-context"]


def test_every_cell_is_a_setting_of_its_own(tmp_path: Path) -> None:
    shipped = Settings(ROOT / "training/recipes/ablations.yaml", (), "held-out", tmp_path, 250)
    every = cells(TABLES)
    assert len({cell.name for cell in every}) == len(every) == 21
    described = [runs.described(shipped, cell, 0) for cell in every]
    without_names = [json.dumps(d | {"cell": ""}, sort_keys=True) for d in described]
    assert len(set(without_names)) == len(every)
    assert all(d["recipe"]["stage1"]["weights"]["region"] == 0 for d in described)
    for name, width, depth in (("default", 64, 2), ("giant", 128, 4), ("text-decoder", 64, 0)):
        cell = next(cell for cell in every if cell.name == name)
        encoder = pretraining_config(shipped.load(cell).model, MicoTextConfig()).encoder_config
        assert isinstance(encoder, MicoEncoderConfig)
        assert (encoder.embed_dim, encoder.depth) == (width, depth)


def test_a_smaller_part_lies_within_a_larger_one(data: Path) -> None:
    recipe = DataRecipe(path=f"{data}/shards/train-*.tar")
    parts = []
    for fraction in (0.25, 0.5, 1.0):
        source = open_source(recipe.model_copy(update={"fraction": fraction}), "caption")
        parts.append({source[n].id for n in range(len(source))})
    assert [len(part) for part in parts] == [3, 6, 12]
    assert parts[0] < parts[1] < parts[2]


def test_of_other_kinds_there_is_neither_medium_nor_caption(data: Path) -> None:
    recipe = DataRecipe(path=f"{data}/shards/train-*.tar", modalities=("audio",))
    source = open_source(recipe, "caption")
    assert len(source) == 12
    assert list(source[3].media) == list(source[3].captions) == ["audio.wav"]
    with pytest.raises(DataError, match="no sample has a caption about a medium of: depth"):
        open_source(recipe.model_copy(update={"modalities": ("depth",)}), "caption")


# --- the model and its features ------------------------------------------------------------------


def test_cells_of_a_coarser_grid_are_means_of_finer_ones() -> None:
    fine = torch.arange(2 * 3 * 16.0).view(2, 3, 4, 4)
    clip = MediaFile("video", b"", "clip")
    cache: Any = {clip: [fine, fine[:1]]}
    loaded = CoarseLoader(Preprocessing(), cache, grid=2).load(clip)
    assert loaded.kind == "video"
    assert loaded.track is not None
    assert (loaded.inputs.shape, loaded.track.shape) == ((2, 3, 2, 2), (1, 3, 2, 2))
    assert loaded.inputs[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
    alone = CoarseLoader(Preprocessing(), cast(Any, {clip: [fine]}), grid=4).load(clip)
    assert torch.equal(alone.inputs, fine)
    assert alone.track is None


def test_a_narrow_bert_begins_with_the_variance_of_a_wide_one() -> None:
    config = MicoTextConfig(hidden_size=128, num_attention_heads=2, intermediate_size=512)
    bert = BertModel(config.bert(), add_pooling_layer=False)
    as_wide_as_bert(bert)
    layer: Any = bert.encoder.layer[0]
    for linear in (layer.attention.self.query, layer.output.dense):
        spread = float(linear.weight.detach().std()) * linear.in_features**0.5
        assert spread == pytest.approx(0.02 * 768**0.5, rel=0.05)
    assert float(bert.embeddings.position_embeddings.weight.detach().std()) == pytest.approx(
        0.02, rel=0.05
    )


# --- retrieval ----------------------------------------------------------------------------------


def test_media_of_one_caption_share_a_query(data: Path) -> None:
    source = open_source(DataRecipe(path=f"{data}/shards/train-*.tar"), "caption")
    (_, image), (_, audio) = pools(source, most=100)
    assert (image.kind, audio.kind) == ("image", "audio")
    assert set(image.queries) == {"a red square", "a green square", "a blue square"}
    assert len(image.queries) == len(image.relevant) == 3
    assert sum(map(len, image.relevant)) == len(image.media) == 6
    assert (audio.queries, audio.relevant) == (("a tone",), (frozenset(range(6)),))


def test_no_reported_medium_is_in_the_half_that_tunes(data: Path) -> None:
    source = open_source(DataRecipe(path=f"{data}/shards/*.tar"), "caption")
    for most, sizes in ((100, 9), (4, 4)):
        for tuning, reported in pools(source, most):
            assert tuning.kind == reported.kind
            assert len(tuning.media) == len(reported.media) == sizes
            assert not {m.name for m in tuning.media} & {m.name for m in reported.media}
    again = pools(source, 4)
    assert [one.media for pair in again for one in pair] == [
        one.media for pair in pools(source, 4) for one in pair
    ]


def test_figures_are_of_the_reported_half_and_the_choice_of_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one half the matching head is right about the second of two media, in the other wrong."""
    scores = torch.tensor([[0.8, 0.4, 0.0]])
    media: Any = ("a", "b", "c")
    right = {half: Pool("image", media, (half,), (frozenset({1}),)) for half in ("tune", "report")}
    matches = {"tune": [{0: 0.0, 1: 9.0, 2: 1.0}], "report": [{0: 9.0, 1: 0.0, 2: 1.0}]}

    def rank(parts: Any, loader: Any, recipe: Any, pool: Pool) -> Ranked:
        return Ranked(pool, scores, matches[pool.queries[0]])

    monkeypatch.setattr("mico_research.ablations.evaluation.rank", rank)
    parts: Any = SimpleNamespace(model=torch.nn.Identity())
    found = retrieval(parts, None, Stage1Recipe(), [(right["tune"], right["report"])])  # type: ignore[arg-type]
    assert found["reranking"] == {"candidates": 2, "weight": 1.0}
    assert found["tuning"]["contrastive"] == 0
    assert found["tuning"]["matching"][0] == {"candidates": 2, "weight": 1.0, "R@1": 100}
    assert found["retrieval"]["image"]["contrastive"]["R@1"] == 0
    assert found["retrieval"]["image"]["matching"]["R@1"] == 0
    swapped = retrieval(parts, None, Stage1Recipe(), [(right["report"], right["tune"])])  # type: ignore[arg-type]
    assert swapped["retrieval"]["image"]["matching"]["R@1"] == 100


@pytest.mark.parametrize(
    ("by", "right"),
    [(None, 0), (Reranking(2, 1.0), 1), (Reranking(3, 1.0), 2), (Reranking(3, 0.25), 0)],
)
def test_only_the_best_candidates_are_ranked_again(by: Reranking | None, right: int) -> None:
    """Matching likes the third of four most, contrast the first, and the fourth is never tried."""
    media: Any = ("a", "b", "c", "d")
    pool = Pool("image", media, ("q",), (frozenset({right}),))
    scores = torch.tensor([[0.8, 0.6, 0.4, -0.4]])
    ranked = Ranked(pool, scores, [{0: 0.0, 1: 2.0, 2: 4.0}], temperature=0.1)
    assert ranked.recalls(by)["R@1"] == 100
    assert torch.equal(scores, torch.tensor([[0.8, 0.6, 0.4, -0.4]]))


# --- what the tables say ------------------------------------------------------------------------


def _results(**of_cells: list[float]) -> dict[str, list[dict[str, Any]]]:
    """Results whose R@1 of every kind, re-ranked, is given for each seed."""

    def result(name: str, seed: int, value: float) -> dict[str, Any]:
        pool = {
            "media": 5,
            "queries": 4,
            "contrastive": {"R@1": 1.0, "R@10": 10.0},
            "matching": {"R@1": value, "R@10": 2 * value},
        }
        return {
            "cell": name,
            "seed": seed,
            "recipe": {"train": {"steps": 8, "batch_size": 4}},
            "retrieval": {kind: dict(pool) for kind in ("image", "audio", "video")},
            "losses": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0 + value}],
            "seconds": {"building": 1.0, "training": 2.0, "evaluation": 3.0},
            "parameters": {"all": 1000},
            "device": "cpu",
            "machine": "a laptop",
        }

    return {
        name: [result(name, seed, value) for seed, value in enumerate(values)]
        for name, values in of_cells.items()
    }


PAPER = Table(
    "data",
    "A table",
    (
        Row(Cell("low"), "x", "X", "", (10.0, 10.0, 10.0, 10.0)),
        Row(Cell("high"), "y", "Y", "", (20.0, 20.0, 20.0, 20.0)),
        Row(Cell("ours"), "z", "Z", "", None),
    ),
    (("x", "y"),),
)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        ([1, 2, 3], [4, 5, 6], "agrees"),
        ([1, 2, 3], [3, 4, 5], "agrees, within the seeds"),
        ([4, 5, 6], [1, 2, 3], "**differs**"),
        ([4, 5, 6], [1, 2, 4.5], "differs, within the seeds"),
        ([1], [9], "agrees, one seed"),
        ([2, 2], [2, 2], "differs, within the seeds"),
    ],
)
def test_signs(low: list[float], high: list[float], verdict: str) -> None:
    found = changes(PAPER, "x", "y", _results(low=low, high=high))
    assert [change.figure for change in found] == ["video", "audio", "image", "average"]
    assert {change.verdict for change in found} == {verdict}
    assert found[0].paper == 10
    assert found[0].ours == pytest.approx(sum(high) / len(high) - sum(low) / len(low))


def test_without_a_difference_in_the_paper_there_is_no_sign() -> None:
    equal = replace(PAPER, rows=(PAPER.rows[0], replace(PAPER.rows[1], paper=PAPER.rows[0].paper)))
    results = _results(low=[1, 2], high=[3, 4], ours=[3, 4])
    for table, after in ((equal, "y"), (PAPER, "z")):
        assert {change.verdict for change in changes(table, "x", after, results)} == {"clear"}
    assert not changes(PAPER, "x", "y", _results(low=[1, 2]))


def test_the_matching_heads_ranking_counts_where_it_was_trained() -> None:
    (result,) = _results(default=[7.0])["default"]
    assert over_seeds([result], "image") == [7.0]
    assert over_seeds([result], "image", k=10) == [14.0]
    assert over_seeds([result], "image", "contrastive") == [1.0]
    assert over_seeds([result], "depth") == []
    del result["retrieval"]["audio"]["matching"]
    assert over_seeds([result], "average") == [pytest.approx(5.0)]
    assert over_seeds([result], "average", "matching") == []


def test_the_report_of_what_is_there(tmp_path: Path) -> None:
    results = _results(contrastive=[10.0, 12.0], default=[30.0, 33.0])
    text, data, *pictures = report(results, tmp_path)
    said = text.read_text()
    assert "4 runs" in said
    assert "(a laptop)" in said
    assert "11.0 ± 1.4" in said
    assert "+20.5 (paper +3.2): agrees" in said
    assert "## Pretraining process (Table 7 l-n)" in said
    assert "| (n) Con+Match+Gen | equations 4, 5, 6 | 2 |" in said
    assert "## Model scale" not in said  # the default alone compares with nothing
    assert len(json.loads(data.read_text())) == 4
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.name in said
    assert "No run has finished yet" in markdown({}, [])
    assert report({}, tmp_path / "empty")


def test_results_are_those_of_their_cell(settings: Settings) -> None:
    for name in ("image", "image-audio"):
        folder = settings.folder(Cell(name), 0)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"cell": name, "seed": 0}))
    found = all_results(settings, [Cell("image"), Cell("image-audio"), Cell("giant")])
    assert [len(results) for results in found.values()] == [1, 1, 0]
