"""The fine-tuning recipes: each parses, says what appendix B.2 says, and finds its data."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.pretrained import MediumUnits, PretrainedModel
from mico_chat.evaluation.task import TASKS
from mico_chat.media import MediaFile, decode
from mico_training.data.benchmarks import TRAINED, main, write_manifest
from mico_training.data.examples import QuestionDataset
from mico_training.data.mixture import Mixture, open_source
from mico_training.data.sources.readers import ManifestSource
from mico_training.recipe import DataRecipe, Stage1Run, load_recipe
from mico_training.stages import train_stage1
from tests.mico_training.scenes import COLOURS, picture
from tests.mico_training.test_runs import write_recipe

RECIPES = Path(__file__).resolve().parents[2] / "training" / "recipes"

B_2 = {
    "coco-retrieval": (1e-5, 256, 5),
    "flickr30k-retrieval": (1e-5, 256, 5),
    "clothov1-retrieval": (2e-5, 64, 10),
    "clothov2-retrieval": (2e-5, 64, 10),
    "audiocaps-retrieval": (2e-5, 64, 10),
    "msrvtt-retrieval": (2e-5, 64, 3.6),
    "youcook2-retrieval": (3e-5, 64, 30),
    "valor32k-retrieval": (2e-5, 64, 10),
    "vatex-retrieval": (2e-5, 64, 2.5),
    "didemo-retrieval": (2e-5, 64, 40),
    "activitynet-retrieval": (2e-5, 64, 20),
    "coco-captioning": (1e-5, 64, 5),
    "coco-captioning-scst": (2.5e-6, 64, 2.5),
    "clothov1-captioning": (2e-5, 64, 10),
    "clothov2-captioning": (2e-5, 64, 10),
    "audiocaps-captioning": (2e-5, 64, 10),
    "msrvtt-captioning": (2e-5, 128, 10),
    "youcook2-captioning": (3e-5, 64, 30),
    "valor32k-captioning": (1e-5, 64, 10),
    "tgif-qa": (2e-5, 64, 10),
    "msvd-qa": (1e-5, 64, 10),
    "vqav2-qa": (2e-5, 128, 20),
    "msrvtt-qa": (2e-5, 64, 4.5),
    "music-avqa": (2e-5, 64, 20),
    "activitynet-qa": (2e-5, 64, 10),
}
"""Learning rate, batch and epochs."""


def test_every_task_that_is_fine_tuned_has_a_recipe() -> None:
    there = {path.stem.removeprefix("finetune-") for path in RECIPES.glob("finetune-*.yaml")}
    needed = {
        name
        for name, task in TASKS.items()
        if task.paper is not None and not task.prompt and not name.endswith("-zeroshot")
    }
    assert there == set(B_2) == needed | {"coco-captioning-scst"}


@pytest.mark.parametrize("name", B_2)
def test_a_recipe_says_what_appendix_b2_says(name: str) -> None:
    path = RECIPES / f"finetune-{name}.yaml"
    recipe = load_recipe(Stage1Run, path)
    lr, batch, epochs = B_2[name]
    task = TASKS[name.removesuffix("-scst")]
    assert (recipe.train.lr, recipe.train.batch_size) == (lr, batch)
    told = re.search(
        r"steps: (\d+)  # ([\d.]+) epochs of ([\d,]+) (?:captions|questions)", path.read_text()
    )
    assert told is not None
    captions = int(told[3].replace(",", ""))
    assert float(told[2]) == epochs
    assert recipe.train.steps == int(told[1]) == round(epochs * captions / batch)
    asked = {key for key, weight in recipe.stage1.weights.model_dump().items() if weight}
    wanted = {"retrieval": {"contrastive", "matching"}}
    assert asked == wanted.get(task.family, {"caption"})
    assert recipe.stage1.questions == (task.family == "qa")
    assert recipe.stage1.caption_length == (10 if task.family == "qa" else task.text_length)
    assert recipe.stage1.most_slices == (task.slices or (0 if task.frames > 1 else None))
    size = round(task.resolution / 14) * 14  # the patch of ViT-g
    start = "mico-g" if size == 224 else f"mico-g-{size}"
    assert recipe.stage1.scst == name.endswith("-scst")
    assert recipe.model.name == (f"runs/finetune-{task.name}" if recipe.stage1.scst else start)
    assert f"benchmarks {task.dataset}\n" in path.read_text()


def coco(data: Path) -> None:
    """Four training pictures of COCO's layout, one of them missing."""
    folder = data / "coco" / "train2014"
    folder.mkdir(parents=True)
    rows = []
    for number in range(4):
        name = f"COCO_train2014_{number:012d}.jpg"
        if number < 3:
            (folder / name).write_bytes(picture(["red", "green", "blue"][number]))
        sentences = [{"raw": f"a square {number}"}, {"raw": f"the picture {number}"}]
        row = {"filepath": "train2014", "filename": name, "split": "train", "cocoid": number}
        rows.append({**row, "sentences": sentences})
    (data / "coco" / "dataset_coco.json").write_text(json.dumps({"images": rows}))


def test_a_training_split_becomes_a_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco(tmp_path)
    assert main(["coco", "--data", str(tmp_path)]) == 0
    assert "3 lines; 1 items cannot be used" in capsys.readouterr().out
    source = ManifestSource(tmp_path / "coco" / "train.jsonl", "caption")
    assert len(source) == 3
    assert source[1].captions == {"image": ("a square 1", "the picture 1")}
    (medium,) = source[1].media.values()
    assert medium.source == tmp_path / "coco" / "train2014" / "COCO_train2014_000000000001.jpg"


def test_what_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="unknown data set 'world'; the data sets are coco, "):
        write_manifest("world", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        write_manifest("vatex", tmp_path)
    assert main(["vatex", "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert "world" not in TRAINED


def vqa(data: Path) -> None:
    """Two questions about a training picture in VQA v2's layout."""
    folder = data / "vqav2" / "train2014"
    folder.mkdir(parents=True)
    (folder / "COCO_train2014_000000000009.jpg").write_bytes(picture("red"))
    asked = [(1, "what colour is it?", ["red"] * 9 + ["pink"]), (2, "is it blue?", ["no"] * 10)]
    questions = [{"question_id": id, "image_id": 9, "question": text} for id, text, _ in asked]
    answers = [
        {"question_id": id, "answers": [{"answer": word} for word in words]}
        for id, _, words in asked
    ]
    (folder.parent / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps({"questions": questions})
    )
    (folder.parent / "v2_mscoco_train2014_annotations.json").write_text(
        json.dumps({"annotations": answers})
    )


def test_questions_are_drawn_with_their_answers(tmp_path: Path) -> None:
    vqa(tmp_path)
    path, _, _ = write_manifest("vqav2", tmp_path)
    drawn = QuestionDataset(Mixture([ManifestSource(path, "question")], [1.0], 0), 400)
    found = Counter((drawn[n].question, *drawn[n].captions) for n in range(len(drawn)))
    assert set(found) == {
        ("what colour is it?", "red"),
        ("what colour is it?", "pink"),  # one in ten people said so
        ("is it blue?", "no"),
    }
    assert 5 < found["what colour is it?", "pink"] < 40
    with pytest.raises(DataError, match="no sample has a caption"):
        open_source(DataRecipe(path=str(path), kind="jsonl"), "caption")


@pytest.mark.parametrize("name", ["coco-retrieval", "vqav2-qa"])
def test_a_recipe_trains(name: str, tmp_path: Path, tiny_pretraining: Path) -> None:
    {"coco": coco, "vqav2": vqa}[TASKS[name].dataset](tmp_path)
    path, _, _ = write_manifest(TASKS[name].dataset, tmp_path)
    shipped = RECIPES / f"finetune-{name}.yaml"
    options = ["train.steps=2", "train.batch_size=2", "train.workers=0", "train.bf16=false"]
    folders = [f"model={tiny_pretraining}", f"output={tmp_path / 'out'}", f"data.0.path={path}"]
    train_stage1(shipped, [*options, *folders])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_answers_are_learnt_as_they_are_asked_for(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    """Training and generation lay a question and its answer out alike; the picture decides."""
    others = ("contrastive", "matching", "tagging", "region", "concept")
    recipe = write_recipe(
        tmp_path,
        shards,
        tiny_pretraining,
        data=[{"path": str(shards / "train-*.tar"), "skills": ["colour"]}],
        train={"lr": 1e-2, "steps": 60, "batch_size": 12, "save_steps": 60},
        stage1={
            "questions": True,
            "weights": dict.fromkeys(others, 0.0),
            "mask_probability": 0.99,
            "caption_length": 10,
        },
    )
    train_stage1(recipe)
    model = PretrainedModel(str(tmp_path / "out"))
    said = []
    for colour in COLOURS:
        picture_file = tmp_path / f"{colour}.png"
        picture_file.write_bytes(picture(colour))
        units = model.preprocessing.units(decode(MediaFile("image", picture_file)))
        context = model.encode([MediumUnits(("image",), (units,))])
        said += model.answer(context, ["What colour is it?"])
    assert said == list(COLOURS)


def test_questions_train_the_caption_objective_alone() -> None:
    with pytest.raises(ConfigError, match="only the objective caption; give matching weight 0"):
        load_recipe(Stage1Run, RECIPES / "finetune-msvd-qa.yaml", ["stage1.weights.matching=1"])
