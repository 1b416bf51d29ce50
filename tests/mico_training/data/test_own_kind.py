"""A kind of knowledge that the project lacks joins pretraining: a row of the table, and a reader.

:func:`learn` runs in a process of its own, whose table has the row.
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

from mico_chat.errors import ConfigError, ModelError
from mico_chat.media import MediaDecoder, MediaFile
from mico_training.build_model import Pretraining, build_pretraining
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
    grey = (np.clip((celsius + 10) / 80, 0, 1) * 255).astype(np.uint8)  # -10 to 70 degrees
    return Thermal(np.stack([grey] * 3, axis=-1), report=file.report(file.format))
"""

DEGREES = {"ice": 0, "water": 20, "a hand": 34, "hot tea": 60}
TEXTS = list(DEGREES)
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WIDE = {"intermediate_size": 64, "projection_dim": 512}
SIZES = {f"text_config.{k}": v for k, v in (SMALL | WIDE).items()}
STAGE = {"weights": dict.fromkeys(["matching", "caption", "tagging", "region", "concept"], 0.0)}


def measured(folder: Path, number: int) -> Path:
    """Temperatures of 32 x 32 points: those of a thing in the middle, and 20 degrees around it."""
    celsius = np.random.default_rng(number).normal(20, 2, (32, 32))
    celsius[8:24, 8:24] += DEGREES[TEXTS[number % 4]] - 20
    np.save(path := folder / f"{number}.npy", celsius.astype(np.float32))
    return path


def built(name: Path, **options: Any) -> Pretraining:
    return build_pretraining(ModelRecipe(name=str(name), options=options), None)


def learn(folder: Path, old: Path) -> None:
    """Train a new model, and one that is older than the kind, on thermal pictures."""
    lines = [{"thermal": measured(folder, n).name, "caption": TEXTS[n % 4]} for n in range(24)]
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
        lines.append({"image": f"{colour}.png", "caption": f"a {colour} square"})
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = [{"path": str(folder / "own.jsonl"), "kind": "jsonl"}]
    train = {"steps": 80, "batch_size": 8, "lr": 3e-3, "save_steps": 80}
    new = {"name": "tiny", "options": SIZES}
    train_stage1(write_recipe(folder, folder, new, train=train, data=data, stage1=STAGE))
    learnt = built(folder / "out")
    model, loader = learnt.model.train(False), MediaLoader(learnt.preprocessing)
    files = [MediaFile(cast(Any, "thermal"), measured(folder, n)) for n in range(100, 124)]
    batch = loader.batch([[loader.load(file)] for file in files])
    kinds, units, row = (batch[f"media_{name}"] for name in ("kind", "units", "row"))
    media = (kinds, units, row, 24, batch["pixel_values"])
    ids = learnt.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        shown = model.encode(*media).pooled
        scores = shown @ model.encode_text(ids["input_ids"], ids["attention_mask"]).T
    right = (scores.argmax(1) == torch.arange(24) % 4).float().mean().item()
    rows, before = model.rows.by_name, built(old).model
    with pytest.raises(ModelError, match="kind 'thermal', only image"):
        before.encode(*media)
    with pytest.raises(ConfigError, match=r"only context_config\.kind_rows can be set"):
        built(old, temperature=1.0)
    grown = built(old, **{"context_config.kind_rows": rows}).model.state_dict()
    for name, value in before.state_dict().items():
        torch.testing.assert_close(grown[name][: len(value)] if value.ndim else grown[name], value)
    more = {"name": str(old), "options": {"context_config.kind_rows": rows}}
    few = {"steps": 2, "batch_size": 8, "save_steps": 2}
    train_stage1(write_recipe(folder / "on", folder, more, train=few, data=data, stage1=STAGE))
    again = built(folder / "on/out").model
    with MediaDecoder() as decoder:  # a process that is told of the kind
        kind = decoder.decode(files[0]).kind
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
    assert said["right"] > 0.5  # chance is 0.25
