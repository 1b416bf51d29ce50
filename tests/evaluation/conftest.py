"""Tiny models in folders, data sets and items of a few small files, and runs of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mico_chat.checkpoints.folders import PREPROCESSING_FILE
from mico_chat.evaluation.datasets import DATASETS
from mico_chat.evaluation.pretrained import PretrainedModel
from mico_chat.evaluation.run import run
from mico_chat.evaluation.scores import Row, score
from mico_chat.evaluation.task import TASKS, Model
from mico_chat.model.config import MicoConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from tests.support.made import write_clip, write_sound
from tests.support.tiny import SIDE, processor_for

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mico_training.build_model import learn_vocabulary  # not installed beside lmms-eval

    folder = tmp_path_factory.mktemp("tasks") / "model"
    torch.manual_seed(0)
    MicoForPretraining(MicoConfig.tiny(concepts=False)).save_pretrained(folder)
    words = [f"a {colour} square, what is it? a tone" for colour in COLOURS]
    learn_vocabulary(words, size=128).save_pretrained(folder)
    preprocessing = Preprocessing(image_size=SIDE).model_dump_json()
    (folder / PREPROCESSING_FILE).write_text(preprocessing, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> PretrainedModel:
    return PretrainedModel(str(model_folder), device="cpu", batch_size=2)


@pytest.fixture(scope="session")
def flickr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures in Flickr30K's layout; the file of one is broken."""
    data = tmp_path_factory.mktemp("flickr")
    folder = data / "flickr30k"
    rows = []
    for number in range(7):
        colour = list(COLOURS)[number % 3]
        name = f"{number}.jpg"
        path = folder / "flickr30k-images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20, 30, 3), COLOURS[colour], np.uint8)
        pixels[: 2 * number + 2] = 10 * number
        Image.fromarray(pixels).save(path)
        sentences = [{"raw": f"a {colour} square {number}"}, {"raw": f"{number} a {colour} tone"}]
        rows.append({"filename": name, "split": "test", "sentences": sentences})
    (folder / "flickr30k-images" / "3.jpg").write_bytes(b"broken")
    write_json(folder / "dataset_flickr30k.json", {"images": rows})
    return data


@pytest.fixture(scope="session")
def msvd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips and five questions in MSVD-QA's layout."""
    data = tmp_path_factory.mktemp("msvd")
    clips = data / "msvd" / "YouTubeClips"
    clips.mkdir(parents=True)
    for number, name in enumerate(("abc_0_5", "def_1_9")):
        path = clips / f"{name}.avi"
        write_clip(str(path), "mjpeg", n=4 + number, sound="pcm_s16le", container_format="avi")
    (data / "msvd" / "youtube_mapping.txt").write_text("abc_0_5 vid1\ndef_1_9 vid2\n")
    asked = [(1, "what is it"), (2, "what"), (1, "a red square?"), (1, "is it a tone"), (2, "it")]
    rows = [
        {"id": number, "video_id": video, "question": question, "answer": "square"}
        for number, (video, question) in enumerate(asked)
    ]
    write_json(data / "msvd" / "test_qa.json", rows)
    return data


def write_chat_model(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    processor_for(model.config).save_pretrained(folder)
    return folder


def write_items(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A file of items; a row that lacks an id gets its number."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": str(number), **row}) + "\n" for number, row in enumerate(rows)]
    (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "items.jsonl"


def ran(
    name: str,
    data: Path,
    model: Model,
    output: Path,
    limit: int = 0,
    max_tokens: int | None = None,
    **changes: int,
) -> Row:
    """The row of a task on a folder of data; ``changes`` are other settings of the task."""
    task = TASKS[name].model_copy(update=changes)
    contents = DATASETS[task.dataset].read(data).first(limit)
    run(task, contents, model, output, task.controls, limit=limit, max_tokens=max_tokens)
    return score(output)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def empty_files(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


@pytest.fixture
def captions_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the caption metrics: the share of a caption's words that its references have."""

    def overlap(said: Mapping[str, str], people: Mapping[str, Sequence[str]]) -> dict[str, float]:
        known = {id: " ".join(people[id]).split() for id in said}
        words = {id: caption.split() for id, caption in said.items()}
        return {
            id: float(np.mean([word in known[id] for word in words[id]] or [False])) for id in said
        }

    metrics = "mico_chat.evaluation.scores.CAPTION_METRICS"
    monkeypatch.setattr(metrics, {"CIDEr": overlap, "SPIDEr": overlap})


@pytest.fixture(scope="session")
def clotho(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sounds in Clotho's layout."""
    data = tmp_path_factory.mktemp("clotho")
    folder = data / "clothov2"
    (folder / "evaluation").mkdir(parents=True)
    lines = ["file_name," + ",".join(f"caption_{n}" for n in range(1, 6))]
    for number in range(3):
        path = folder / "evaluation" / f"tone {number}.wav"
        write_sound(str(path), "pcm_s16le", seconds=3.0 + number, hertz=200 * (number + 1))
        lines.append(f"tone {number}.wav" + ",a tone" * 5)
    (folder / "clotho_captions_evaluation.csv").write_text("\n".join(lines) + "\n")
    return data
