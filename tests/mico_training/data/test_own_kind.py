"""A kind of knowledge that the project lacks joins pretraining: a row of the table, and a reader.

The functions without ``test_`` run in a process of their own, whose table has the row.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from mico_chat.checkpoints.load import load_pretraining
from mico_chat.errors import ConfigError, ModelError
from mico_chat.media import MediaDecoder, MediaFile
from mico_training.build_model import build_pretraining
from mico_training.data.media import MediaLoader
from mico_training.recipe import ModelRecipe
from mico_training.stages import train_stage1
from tests.mico_training.scenes import COLOURS, picture
from tests.mico_training.test_runs import write_recipe

ROW = """
from mico_chat.media.kinds import KindRow

KINDS = {
    "thermal": KindRow(
        noun="thermal picture",
        words="a thermal picture",
        label="Thermal picture: ",
        layout="still",
        decoder="thermal_reader:decode",
        formats=("NPY",),
        endings=(".npy",),
    )
}
"""

READER = """
import numpy as np

from mico_chat.media.maps import read_array
from mico_chat.media.medium import Image


class Thermal(Image):
    kind = "thermal"


def decode(file, limits):
    celsius = read_array(file, file.format, limits)
    grey = (np.clip((celsius - 10) / 40, 0, 1) * 255).astype(np.uint8)  # 10 to 50 degrees
    return Thermal(np.stack([grey] * 3, axis=-1), report=file.report(file.format))
"""

PLACES = {"left": np.s_[:, :16], "right": np.s_[:, 16:], "top": np.s_[:16], "bottom": np.s_[16:]}
ALONE = dict.fromkeys(["matching", "caption", "tagging", "region", "concept"], 0.0)


def measured(path: Path, place: str, seed: int) -> None:
    """Temperatures of 32 x 32 points: 36 degrees at a place, 20 elsewhere."""
    celsius = np.random.default_rng(seed).normal(20, 2, (32, 32))
    celsius[PLACES[place]] += 16
    np.save(path, celsius.astype(np.float32))


def learn(folder: Path, old: Path) -> None:
    """Train a new model and an old one on thermal pictures; print what they have learnt."""
    lines = []
    for number in range(24):
        place = list(PLACES)[number % 4]
        measured(folder / f"{number}.npy", place, number)
        lines.append({"thermal": f"{number}.npy", "caption": f"it is warm on the {place}"})
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
        lines.append({"image": f"{colour}.png", "caption": f"a {colour} square"})
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = [{"path": str(folder / "own.jsonl"), "kind": "jsonl"}]
    train = {"steps": 60, "batch_size": 8, "lr": 3e-3, "save_steps": 60}
    sections: dict[str, Any] = {"data": data, "stage1": {"weights": ALONE, "vocabulary": 200}}
    train_stage1(write_recipe(folder, folder, {"name": "tiny"}, train=train, **sections))
    learnt = build_pretraining(ModelRecipe(name=str(folder / "out")), None)
    model, loader = learnt.model.eval(), MediaLoader(learnt.preprocessing)
    held = []
    for number in range(24):
        measured(path := folder / f"held{number}.npy", list(PLACES)[number % 4], 100 + number)
        held.append([loader.load(MediaFile(cast(Any, "thermal"), path))])
    batch = loader.batch(held)
    media = [batch[name] for name in ("media_kind", "media_units", "media_row")]
    texts = [f"it is warm on the {place}" for place in PLACES]
    ids = learnt.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        shown = model.encode(*media, 24, batch["pixel_values"]).pooled
        scores = shown @ model.encode_text(ids["input_ids"], ids["attention_mask"]).T
    rows = model.rows.by_name
    right = (scores.argmax(1) == torch.arange(24) % 4).float().mean().item()

    before, _ = load_pretraining(old)
    with pytest.raises(ModelError, match="kind 'thermal', only image"):
        before.encode(*media, 24, batch["pixel_values"])
    recipe = ModelRecipe(name=str(old), options={"context_config.kind_rows": rows})
    grown = build_pretraining(recipe, None).model
    for name, value in before.state_dict().items():
        kept = grown.state_dict()[name]
        torch.testing.assert_close(kept[: len(value)] if value.ndim else kept, value)
    with pytest.raises(ConfigError, match=r"only context_config\.kind_rows can be set"):
        build_pretraining(ModelRecipe(name=str(old), options={"temperature": 1.0}), None)
    few = {"model": recipe.model_dump(mode="json"), "steps": 2}
    go_on = write_recipe(folder / "on", folder, few["model"], train=train, **sections)
    train_stage1(go_on, ["train.steps=2", "train.save_steps=2"])
    again, _ = load_pretraining(folder / "on/out")
    with MediaDecoder() as decoder:
        kind = decoder.decode(MediaFile(cast(Any, "thermal"), folder / "0.npy")).kind
    said = {"right": right, "rows": rows, "again": again.rows.by_name, "kind": kind}
    print(json.dumps(said | {"E_M": len(again.context.modality.weight)}))


def test_thermal_pictures_are_learnt_by_a_row_and_a_reader(
    tmp_path: Path, tiny_pretraining: Path
) -> None:
    (tmp_path / "thermal.py").write_text(ROW)
    (tmp_path / "thermal_reader.py").write_text(READER)
    work = f"from {__name__} import learn, Path; import sys; learn(*map(Path, sys.argv[1:]))"
    path = os.pathsep.join([str(tmp_path), *sys.path, str(Path(__file__).parents[3])])
    done = subprocess.run(
        [sys.executable, "-c", work, str(tmp_path), str(tiny_pretraining)],
        env=os.environ | {"PYTHONPATH": path, "MICO_KINDS": "thermal", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    rows = {"image": 0, "audio": 1, "video": 2, "depth": 3, "normal": 4, "thermal": 5}
    assert said["rows"] == said["again"] == rows
    assert (said["E_M"], said["kind"]) == (6, "thermal")
    assert said["right"] > 0.6  # chance is 0.25
