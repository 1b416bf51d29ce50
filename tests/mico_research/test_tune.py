"""``mico-chat tune``: kept only where it is better; a split by medium; lines that cannot serve."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mico_chat.checkpoints.load import load_encoder
from mico_chat.errors import DataError, TrainingError
from mico_chat.evaluation.task import Item
from mico_chat.media import MediaFile
from mico_research import tune as tuning
from mico_research.tune import split
from mico_training import stages
from tests.support.tiny import command

ASKED = "What is this?"


def picture(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(path)
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes JSON Lines about ``n`` pictures, each with all of the answers."""

    def write(name: str, *answers: str, n: int = 12) -> Path:
        media = [picture(tmp_path / f"{number}.png", number).name for number in range(n)]
        rows = [{"image": m, "question": ASKED, "answer": a} for m in media for a in answers]
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A guard of few shapes, and of questions without a picture, to which "a" is right.

    Random weights learn as a whole: an adapter beside them would change little.
    """
    few = {"single": 2}
    item = {"skill": "text only", "message": ASKED, "accept": ["a"]}
    text = tmp_path / "guard.jsonl"
    text.write_text((json.dumps(item) + "\n") * 10)
    for name, value in (
        ("SHAPES", {"train": few, "validation": few}),
        ("TEXT", text),
        ("TIMES", 20),
    ):
        monkeypatch.setattr(tuning, name, value)
    train = stages.train_stage3

    def whole(file: Path, values: Sequence[str]) -> None:
        rest = [one for one in values if not one.startswith("stage3")]
        train(file, [*rest, "stage3={full: true}", "train.lr=0.01", "train.bf16=false"])

    monkeypatch.setattr(stages, "train_stage3", whole)


def tune(file: Path, model: Path, output: Path, *more: str, code: int = 0) -> None:
    command("tune", str(file), "--model", str(model), "--output", str(output), *more, code=code)


def test_a_better_model_is_written_and_a_worse_one_is_not(
    lines: Callable[..., Path],
    tiny_chat: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = tmp_path / "mine"
    tune(lines("a.jsonl", "A."), tiny_chat, mine)
    said = capsys.readouterr().out
    assert "held out: 0 of 3 right before, 3 after" in said
    assert "elsewhere: " in said
    assert not (tmp_path / "mine.tune").exists()
    assert not [*mine.glob("checkpoint-*")]
    # The folder answers as others do, and names that were taught before mean what they meant.
    command("ask", ASKED, "--image", str(tmp_path / "3.png"), "--model", str(mine))
    assert capsys.readouterr().out.startswith("A")
    before, after = (load_encoder(one)[0].concepts for one in (tiny_chat, mine))
    assert before is not None
    assert after is not None
    assert before.space == after.space
    tune(lines("a.jsonl", "A."), tiny_chat, mine, code=2)
    assert "it is there already" in capsys.readouterr().err

    # Each picture has two answers, of which the model is right about one, whatever it learns.
    other = tmp_path / "other"
    tune(lines("both.jsonl", "A.", "B."), mine, other, code=1)
    said = capsys.readouterr().err
    assert "held out: 3 of 6 right before, 3 after" in said
    assert "as it is not better at what was held out" in said
    # "B." is learnt, and "A.", which is right elsewhere, is lost.
    tune(lines("b.jsonl", "B."), mine, other, "--keep", code=1)
    said = capsys.readouterr().err
    assert "held out: 0 of 3 right before, 3 after" in said
    assert "other is not written, as it is worse elsewhere" in said
    assert not other.exists()
    assert (tmp_path / "other.tune" / "trained" / "loss.png").is_file()


def test_an_interrupted_command_goes_on(
    lines: Callable[..., Path], tiny_chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, mine, train = lines("a.jsonl", "A."), tmp_path / "mine", stages.train_stage3

    def stopped(*given: Any) -> None:
        raise TrainingError("stopped", 130)

    monkeypatch.setattr(stages, "train_stage3", stopped)
    with pytest.raises(TrainingError, match="stopped"):
        tuning.tune([file], str(tiny_chat), mine)
    before = tmp_path / "mine.tune" / "before" / "held out" / "predictions.jsonl"
    was = before.read_bytes()
    monkeypatch.setattr(stages, "train_stage3", train)
    tuning.tune([file], str(tiny_chat), mine, keep=True)
    assert before.read_bytes() == was, "what was measured is not measured again"
    assert (mine / "config.json").is_file()


def test_lines_that_cannot_serve_are_named(
    lines: Callable[..., Path], tiny_chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, reason in (
        ("", "few.jsonl: no sample has a conversation"),
        ('{"image": "0.png", "question": "?"}\n', "few.jsonl:1: has 1 'question' and 0 'answers'"),
        ('{"image": "no.png", "question": "?", "answer": "A."}\n', "few.jsonl:1: image no.png"),
        ("{\n", "few.jsonl:1: not JSON"),
        (lines("few.jsonl", "A.", "B.", n=11).read_text(), "about 11 media, and 12 or more"),
    ):
        file = tmp_path / "few.jsonl"
        file.write_text(content)
        tune(file, tiny_chat, tmp_path / "mine", code=2)
        assert reason in capsys.readouterr().err
    assert not list(tmp_path.glob("mine*")), "nothing was begun"


def test_all_lines_of_a_medium_are_on_one_side_and_things_on_both(tmp_path: Path) -> None:
    def shown(*numbers: int, answer: str) -> Item:
        files = [picture(tmp_path / f"{n}-{answer}-{numbers[0]}.png", n) for n in numbers]
        media = tuple(MediaFile("image", file) for file in files)
        return Item(f"{answer}{numbers}", media, ASKED, answers=(answer,))

    # Ten things with four pictures each; some pictures are asked about again, or beside others.
    items = [shown(n, answer=f"thing {n // 4}") for n in range(40)]
    items += [shown(n, answer="yes") for n in range(0, 40, 3)]
    items += [shown(0, 5, 9, answer="no")]
    for seed in range(3):
        sides = split(items, seed)
        assert sorted(one.id for side in sides for one in side) == sorted(one.id for one in items)
        trained, held = ({m.read() for one in side for m in one.media} for side in sides)
        assert not trained & held
        assert 8 <= len(held) <= 14
        assert sum(f"thing {n}" in {one.answers[0] for one in sides[1]} for n in range(10)) >= 8
    assert split(items, 0) == split(items, 0) != split(items, 1)
    alone = [shown(n, answer=f"thing {n}") for n in range(12)]
    assert len(split(alone)[1]) == 3
    with pytest.raises(DataError, match="about 11 media, and 12 or more are needed"):
        split([*alone[:11], *alone[:11]])
