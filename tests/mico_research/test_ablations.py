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

import numpy as np
import pytest
import torch
from transformers import BertModel

from mico_chat.checkpoints.assemble import read_encoder
from mico_chat.errors import ConfigError, DataError
from mico_chat.model.config import MicoEncoderConfig, MicoTextConfig
from mico_research.ablations import evaluation
from mico_research.ablations import run as runs
from mico_research.ablations.__main__ import main
from mico_research.ablations.evaluation import (
    Pool,
    Ranked,
    Reranking,
    bits,
    hits_of,
    judged,
    pools,
)
from mico_research.ablations.grid import TABLE, TABLES, Cell, Row, Table, cells
from mico_research.ablations.report import (
    bootstrapped,
    changes,
    estimate,
    markdown,
    report,
    values,
)
from mico_research.ablations.run import (
    Settings,
    all_results,
    as_wide_as_bert,
    prepare,
    run,
)
from mico_training.build_model import pretraining_config
from mico_training.data.mixture import open_source
from mico_training.data.sources.written import write_shard
from mico_training.recipe import DataRecipe, ObjectiveWeights, Stage1Recipe
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
            "weights": {"matching": 0, "tagging": 0, "region": 0, "concept": 0},
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
    assert set(pool) == {"media", "queries", "contrastive", "matching"}
    assert hits_of(pool["matching"], pool["queries"]).shape == (pool["queries"],)
    assert "captions" not in one
    assert len(other["captions"]["image"]) == pool["media"]
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
    assert len(ours) == len(theirs) == 8
    for one, other in zip(ours, theirs, strict=True):
        assert one["cell"] == other["cell"]
        assert len(one["losses"]) == (40 if "longer" in one["cell"] else 20)
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
    assert "objectives g, modalities f, data k, size o, architecture iv'" in table[2]
    assert "encoder_config.depth=6" in table[4]
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
    assert len({cell.name for cell in every}) == len(every) == 27
    described = [runs.described(shipped, cell, 0) for cell in every]
    without_names = [json.dumps(d | {"cell": ""}, sort_keys=True) for d in described]
    assert len(set(without_names)) == len(every)
    assert all(d["recipe"]["stage1"]["weights"]["region"] == 0 for d in described)
    for name, width, depth in (("default", 384, 2), ("giant", 384, 6), ("text-decoder", 256, 0)):
        cell = next(cell for cell in every if cell.name == name)
        encoder = pretraining_config(shipped.load(cell).model, MicoTextConfig()).encoder_config
        assert isinstance(encoder, MicoEncoderConfig)
        assert (encoder.embed_dim, encoder.depth) == (width, depth)
    again = next(cell for cell in every if cell.name == "other-seeds")
    assert {shipped.load(cell, 2).train.seed for cell in every if cell != again} == {2}
    assert shipped.load(again, 2).train.seed == 1002


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


def test_cells_start_from_the_packaged_parts(tmp_path: Path) -> None:
    """Each ViT of a cell has the mini's first blocks and its positions, on a coarser grid; the text
    branch has the mini's layers, but cross-attention of its own."""
    shipped = Settings(ROOT / "training/recipes/ablations.yaml", (), "held-out", tmp_path, 250)
    recipe = shipped.load().model
    start = read_encoder("mini")
    assert start.text is not None
    branch, tokenizer = start.text
    vit: Any = cast(Any, start.source).encoder.vit
    for architecture in ("shared", "per-modality"):
        torch.manual_seed(0)
        model: Any = runs.build(recipe, architecture, tokenizer).model
        for own in getattr(model, "vits", [model.encoder.vit]):
            assert len(own.blocks) == 2
            for n in (0, 1):
                assert torch.equal(own.blocks[n].mlp.fc1.weight, vit.blocks[n].mlp.fc1.weight)
            assert own.pos_embed.shape == (1, 17, 384)
            assert torch.equal(own.pos_embed[:, 0], vit.pos_embed[:, 0])
        stem = cast(Any, start.source).encoder.stem
        assert torch.equal(model.encoder.stem.cnn.conv_stem.weight, stem.cnn.conv_stem.weight)
        layers: Any = (model.text.bert.encoder.layer[1], branch.text.bert.encoder.layer[1])
        mine, theirs = layers
        assert torch.equal(mine.output.dense.weight, theirs.output.dense.weight)
        crosses = (x.crossattention.self.query.weight for x in (mine, theirs))
        assert not torch.equal(*crosses)
    wide = recipe.model_copy(update={"options": recipe.options | {"text_config.hidden_size": 128}})
    with pytest.raises(ConfigError, match=r"its text branch has .* but this cell needs"):
        runs.build(wide, "shared", tokenizer)


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
    assert set(image.queries) <= {"a red square", "a green square", "a blue square"}
    assert len(image.queries) == len(image.relevant)
    assert sum(map(len, image.relevant)) == len(image.media) == len(image.captions) == 10
    assert (audio.queries, audio.relevant) == (("a tone",), (frozenset(range(10)),))


def test_no_reported_medium_is_in_the_part_that_tunes(data: Path) -> None:
    source = open_source(DataRecipe(path=f"{data}/shards/*.tar"), "caption")
    for most, reports in ((100, 15), (4, 4)):
        for tuning, reported in pools(source, most):
            assert tuning.kind == reported.kind
            assert (len(tuning.media), len(reported.media)) == (3, reports)
            assert not {m.name for m in tuning.media} & {m.name for m in reported.media}
    again = pools(source, 4)
    assert [one.media for pair in again for one in pair] == [
        one.media for pair in pools(source, 4) for one in pair
    ]


def test_a_query_is_ranked_among_its_own_part_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "RANKED", 3)
    media: Any = tuple("abcdef")
    right = (frozenset({0}), frozenset({1}), frozenset({2, 3}))
    pool = Pool("image", media, (("x",),) * 6, ("one", "two", "three"), right)
    found = evaluation.among(pool)
    assert found.tolist() == [[True, False] * 3, [False, True] * 3, [True, False] * 3]
    whole = replace(pool, media=media[:4], relevant=right)
    assert evaluation.among(whole).all()


def test_figures_are_of_the_reported_half_and_the_choice_of_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one half the matching head is right about the second of two media, in the other wrong."""
    scores = torch.tensor([[0.8, 0.4, 0.0]])
    media: Any = ("a", "b", "c")
    captions = (("tune", "report"),) * 3
    right = {
        half: Pool("image", media, captions, (half,), (frozenset({1}),))
        for half in ("tune", "report")
    }
    matches = {"tune": [{0: 0.0, 1: 9.0, 2: 1.0}], "report": [{0: 9.0, 1: 0.0, 2: 1.0}]}

    def rank(parts: Any, loader: Any, recipe: Any, pool: Pool) -> tuple[Ranked, list[Any]]:
        return Ranked(pool, scores, matches[pool.queries[0]]), []

    monkeypatch.setattr("mico_research.ablations.evaluation.rank", rank)
    parts: Any = SimpleNamespace(model=torch.nn.Identity())
    recipe = Stage1Recipe(weights=ObjectiveWeights(caption=0))
    found = judged(parts, None, recipe, [(right["tune"], right["report"])])  # type: ignore[arg-type]
    assert found["reranking"] == {"candidates": 2, "weight": 1.0}
    assert found["tuning"]["contrastive"] == 0
    assert found["tuning"]["matching"][0] == {"candidates": 2, "weight": 1.0, "R@1": 100}
    assert hits_of(found["retrieval"]["image"]["contrastive"], 1).tolist() == [0]
    assert hits_of(found["retrieval"]["image"]["matching"], 1).tolist() == [0]
    swapped = judged(parts, None, recipe, [(right["report"], right["tune"])])  # type: ignore[arg-type]
    assert hits_of(swapped["retrieval"]["image"]["matching"], 1).tolist() == [1]


@pytest.mark.parametrize(
    ("by", "right"),
    [(None, 0), (Reranking(2, 1.0), 1), (Reranking(3, 1.0), 2), (Reranking(3, 0.25), 0)],
)
def test_only_the_best_candidates_are_ranked_again(by: Reranking | None, right: int) -> None:
    """Matching likes the third of four most, contrast the first, and the fourth is never tried."""
    media: Any = ("a", "b", "c", "d")
    pool = Pool("image", media, (("q",),) * 4, ("q",), (frozenset({right}),))
    scores = torch.tensor([[0.8, 0.6, 0.4, -0.4]])
    ranked = Ranked(pool, scores, [{0: 0.0, 1: 2.0, 2: 4.0}], temperature=0.1)
    assert ranked.hits(by).tolist() == [True]
    assert torch.equal(scores, torch.tensor([[0.8, 0.6, 0.4, -0.4]]))


# --- what the tables say ------------------------------------------------------------------------


QUERIES = 400


def _results(**of_cells: list[float]) -> dict[str, list[dict[str, Any]]]:
    """Results whose R@1 of every kind, re-ranked, is given for each seed; the hits are at random,
    and the same for the same figure and seed."""

    def result(name: str, seed: int, value: float) -> dict[str, Any]:
        chances = np.random.default_rng(seed).permutation(QUERIES)
        pool = {
            "media": QUERIES,
            "queries": QUERIES,
            "contrastive": bits(torch.from_numpy(chances < 4)),
            "matching": bits(torch.from_numpy(chances < QUERIES * value / 100)),
        }
        return {
            "cell": name,
            "seed": seed,
            "recipe": {"train": {"steps": 8, "batch_size": 4}},
            "retrieval": {kind: dict(pool) for kind in ("image", "audio", "video")},
            "losses": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0 + value}],
            "curve": [{"step": n, "R@1": value * n / 8} for n in (2, 4, 6, 8)],
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
        ([10, 11, 12], [20, 21, 22], "agrees"),
        ([20, 21, 22], [10, 11, 12], "**differs**"),
        ([20, 5, 20], [5, 25, 25], "not decided"),  # the seeds disagree
        ([20, 21, 22], [20, 21, 22], "no difference"),
    ],
)
def test_signs(low: list[float], high: list[float], verdict: str) -> None:
    found = changes(PAPER, "x", "y", _results(low=low, high=high))
    assert [change.figure for change in found] == ["video", "audio", "image", "average"]
    assert {change.verdict for change in found} == {verdict}
    assert found[0].paper == 10
    assert found[0].ours.mean == pytest.approx(sum(high) / len(high) - sum(low) / len(low))
    assert found[0].ours.low <= found[0].ours.mean <= found[0].ours.high


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    """200 times: two cells of four seeds that truly differ in nothing, though each seed and each
    query has its own chances. About 95 % of the intervals hold zero, and no interval is idle."""
    rng = np.random.default_rng(0)
    held, width = 0, []
    for _ in range(200):
        hard = rng.normal(0, 1, (1, 300))
        of_seeds = rng.normal(0, 0.3, (2, 4, 1))
        hits = (rng.random((2, 4, 300)) < 1 / (1 + np.exp(hard + of_seeds))) * 100.0
        found = bootstrapped([hits[1] - hits[0]])
        held += found.low <= 0 <= found.high
        width.append(found.high - found.low)
    assert 0.86 <= held / 200 <= 0.99
    assert 5 < float(np.mean(width)) < 30


def test_pairs_of_queries_decide_what_means_do_not() -> None:
    """One query in fifty is gained everywhere: the means' own intervals overlap by far."""
    results = _results(low=[40, 40, 40], high=[42, 42, 42])
    (change,) = [c for c in changes(PAPER, "x", "y", results) if c.figure == "image"]
    low, high = (estimate(results, cell, "image", "R@1") for cell in ("low", "high"))
    assert low is not None
    assert high is not None
    assert low.high > high.low
    assert change.verdict == "agrees"


def test_without_a_difference_in_the_paper_there_is_no_sign() -> None:
    equal = replace(PAPER, rows=(PAPER.rows[0], replace(PAPER.rows[1], paper=PAPER.rows[0].paper)))
    results = _results(low=[10, 20], high=[30, 40], ours=[30, 40])
    for table, after in ((equal, "y"), (PAPER, "z")):
        assert {change.verdict for change in changes(table, "x", after, results)} == {"decided"}
    assert not changes(PAPER, "x", "y", _results(low=[10, 20]))


def test_the_matching_heads_ranking_counts_where_it_was_trained() -> None:
    results = _results(default=[7.0])
    (result,) = results["default"]
    assert estimate(results, "default", "image", "R@1").mean == 7.0  # type: ignore[union-attr]
    assert values(result, "image", "R@1 by contrast").mean() == 1.0  # type: ignore[union-attr]
    assert estimate(results, "default", "depth", "R@1") is None
    assert estimate(results, "default", "image", "CIDEr") is None
    del result["retrieval"]["audio"]["matching"]
    assert estimate(results, "default", "average", "R@1").mean == 5.0  # type: ignore[union-attr]


def test_the_report_of_what_is_there(tmp_path: Path) -> None:
    results = _results(contrastive=[10.0, 12.0], **{"matching-0.1": [30.0, 33.0]})
    text, data, *pictures = report(results, tmp_path)
    said = text.read_text()
    assert "4 runs" in said
    assert "(a laptop)" in said
    assert "| 11.0 ± " in said
    assert "+20.5 [" in said
    assert "] (paper +3.2): agrees" in said
    assert "| +7.9 |" in said  # 31.5 of which a quarter came in the last quarter
    assert "## Pretraining process (Table 7 l-n)" in said
    assert "| (n) Con+Match+Gen | equations 4, 5, 6; 0.1 for matching | 2 |" in said
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
