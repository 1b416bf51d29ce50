"""``mico-chat train init``: a recipe for data in any format, which trains as it is written."""

import json
from pathlib import Path

import pytest

from mico_chat.cli.main import main
from mico_training import stages
from mico_training.data.sources.written import write_shard
from mico_training.estimate import RECIPES
from mico_training.recipe import load_recipe
from tests.mico_training.scenes import picture, scene, tone

ANSWERED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]


def data(folder: Path, form: str) -> Path:
    """Three pictures with captions and conversations, as far as the format has them."""
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        (folder / f"{number}.png").write_bytes(picture(colour))
        (folder / f"{number}.txt").write_text(f"A {colour} square.")
    records = [{"image": f"{n}.png", "caption": f"Square {n}."} for n in range(3)]
    talks = [{"image": f"{n}.png", "conversations": ANSWERED} for n in range(3)]
    lines = [json.dumps(one) for one in records + talks]
    if form == "folder":
        (folder / "2.wav").write_bytes(tone(300))
        (folder / "3.png").write_bytes(picture("red")[:90])  # a damaged one is skipped
        (folder / "3.txt").write_text("A red square.")
        return folder
    path = folder / {"jsonl": "a.jsonl", "csv": "a.csv", "llava": "a.json", "shards": "a.tar"}[form]
    if form == "shards":
        write_shard(path, map(scene, range(3)))
    else:
        rows = [f'{n}.png,"Square, {n}."' for n in range(3)]
        text = {"csv": ["image,caption", *rows], "llava": [json.dumps(talks)], "jsonl": lines}
        path.write_text("\n".join(text[form]))
    return path


@pytest.mark.parametrize(
    ("form", "stage"),
    [("folder", 2), ("csv", 2), ("jsonl", 3), ("llava", 3), ("shards", 1)],
)
def test_the_written_recipe_trains(
    form: str,
    stage: int,
    tiny_chat: Path,
    tiny_pretraining: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path, model = data(tmp_path / "own", form), tiny_pretraining if stage == 1 else tiny_chat
    command = ["train", "init", "--stage", str(stage), "--data", str(path), "--model", str(model)]
    with pytest.raises(SystemExit, match=r"^0$"):
        main(command)
    said, file = capsys.readouterr().out, tmp_path / f"stage{stage}.yaml"
    assert f"mico-chat train-stage{stage} --config stage{stage}.yaml --dry-run" in said
    assert f"{form}, " in said
    assert all("# " in line for line in file.read_text().splitlines())
    train = load_recipe(RECIPES[f"train-stage{stage}"], file).train
    assert (train.steps % train.save_steps, train.save_steps % train.log_steps) == (0, 0)
    assert 0.03 <= train.warmup_steps / train.steps <= 0.1
    with pytest.raises(SystemExit, match=r"^2$"):
        main(command)
    assert "is there already" in capsys.readouterr().err
    if form in ("csv", "llava"):
        return  # the reader of JSON Lines reads all of them
    short = ["train.steps=1", "train.warmup_steps=0", "train.arguments={use_cpu: true}"]
    getattr(stages, f"train_stage{stage}")(file, [*short, "train.workers=0", "train.bf16=false"])
    assert (tmp_path / f"runs/stage{stage}/log.jsonl").is_file()
    if form == "folder":
        assert "3.png" in (tmp_path / "runs/stage2/bad-samples.jsonl").read_text()


def test_data_that_do_not_serve_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = data(tmp_path / "own", "csv")
    path.write_text(path.read_text() + "\ngone.png,x")
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["train", "init", "--stage", "3", "--data", str(path)])
    said, wrong = capsys.readouterr()
    assert "csv, 3 samples, 1 bad" in said
    assert "captions: samples 3, image 3" in said
    assert f"{path}:5: image gone.png: no such file" in said
    assert "no sample has conversations or questions, which stage 3 needs" in wrong
    assert "--stage 1" in wrong
    assert not (tmp_path / "stage3.yaml").exists()
