"""One's own held-out data: each task in one command, with interval, control and chance."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mico_chat.cli import evaluate as command
from mico_chat.cli.evaluate import main
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.scores import interval
from mico_chat.evaluation.store import read_store
from mico_chat.evaluation.task import Reply
from mico_chat.messages import Message
from tests.evaluation.parrot import Parrot
from tests.evaluation.tasks.test_datasets import write_tar
from tests.mico_training.scenes import COLOURS, picture, tone


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six pictures on six lines without an id: a caption, a concept, a question with answers."""
    lines = []
    for number in range(6):
        colour = list(COLOURS)[number % 3]
        (tmp_path / f"{number}.png").write_bytes(picture(colour))
        row: dict[str, Any] = {
            "image": f"{number}.png",
            "caption": f"a {colour} square",
            "concept": colour,
        }
        row |= {"question": "Which colour?", "answers": [colour, f"{colour} it is"]}
        lines.append(json.dumps(row))
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    return tmp_path / "test.jsonl"


def results(task: str, model: Path | str, data: Path | str, *more: str) -> dict[str, Any]:
    """The row of a task that one command measures."""
    output = Path(data).parent / f"out-{task}"
    words = [task, "--data", str(data), "--model", str(model), "--output", str(output)]
    assert (
        main([*words, "--workers", "1", *(["--device", "cpu"] if more != ("chat",) else [])]) == 0
    )
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return dict((found.get("skills") or found["tasks"])[task])


@pytest.mark.usefixtures("captions_scored")
def test_a_stage_1_folder_retrieves_describes_answers_and_names(
    data: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = results("own-retrieval", model_folder, data)
    assert {f"R@{k}{to}" for k in (1, 5, 10) for to in ("", " to text")} < {*row["figures"]}
    beside = row["beside"]["R@1"]
    assert beside["interval"][0] <= row["figures"]["R@1"] <= beside["interval"][1]
    # Each of three captions is right for two of six media; each medium has one of three texts.
    assert beside["chance"] == pytest.approx(100 / 3)
    assert row["beside"]["R@1 to text"]["chance"] == pytest.approx(100 / 3)
    assert row["beside"]["R@10"]["chance"] == 100  # of six
    assert f"swapped {beside['swapped']:.1f}, chance 33.3)" in capsys.readouterr().out
    ids = [r["id"] for r in read_store(data.parent / "out-own-retrieval/own-retrieval")[1][:6]]
    assert ids == [f"test.jsonl:{line}.image" for line in range(1, 7)]
    assert results("own-captioning", model_folder, data)["beside"]["CIDEr"]["swapped"] >= 0
    for task, skill, chance in (
        ("own-questions", "questions", None),
        ("own-classification", "names", 1 / 3),
    ):
        of_skill = results(task, model_folder, data)["skills"][skill]
        assert (list(of_skill["controls"]), of_skill["n"]) == (["full", "swapped"], 6)
        assert of_skill["chance"] == chance


def sees(message: Message) -> Reply:
    """Knows a medium's colour by its name; without a medium it says red."""
    number = int(message.files[0].source.stem) if message.files else 0  # type: ignore[union-attr]
    return Reply("answer", list(COLOURS)[number % 3])


@pytest.mark.usefixtures("captions_scored")
def test_a_chat_model_falls_to_chance_without_its_media(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Parrot(sees)
    monkeypatch.setattr(command, "open_model", lambda *_, **__: model)
    monkeypatch.setattr(command, "_check_controls", lambda o: setattr(o, "controls", CONTROLS))
    for task, skill in (("own-questions-chat", "questions"), ("own-classification-chat", "names")):
        row = results(task, "mini", data, "chat")["skills"][skill]
        right = {name: figures["accuracy"] for name, figures in row["controls"].items()}
        assert right["full"] == 1.0
        assert right["withheld"] == pytest.approx(1 / 3)
        assert right["swapped"] < 0.7
    assert (
        model.asked[-1].text == "Which of these is it: blue, green, red? Answer with one of them."
    )
    row = results("own-captioning-chat", "mini", data, "chat")
    assert row["figures"]["CIDEr"] == 100
    assert row["beside"]["CIDEr"]["swapped"] < 70


CONTROLS = ["full", "withheld", "swapped"]


def test_names_are_given_or_read(data: Path, model_folder: Path) -> None:
    names = data.with_name("names.txt")
    names.write_text("red\ngreen\n")
    lines = [line for line in data.read_text().splitlines() if "blue" not in line]
    data.write_text("\n".join(lines).replace('"concept"', '"other"'))
    words = ["own-classification", "--data", str(data), "--model", str(model_folder)]
    words += ["--output", str(data.parent / "out"), "--workers", "1", "--device", "cpu"]
    assert main([*words, "--names", str(names)]) == 0
    row = json.loads((data.parent / "out/results.json").read_text())["skills"]
    assert row["own-classification"]["skills"]["names"]["chance"] == 0.5
    with pytest.raises(ConfigError, match="two names or more: give --names A,B"):
        main(words)
    with pytest.raises(ConfigError, match="is a stage 1 model: take the task without -chat"):
        main(["own-captioning-chat", *words[1:]])
    with pytest.raises(ConfigError, match="own-retrieval needs --data"):
        main(["own-retrieval"])


def test_a_wrong_line_is_named(data: Path, model_folder: Path) -> None:
    data.write_text(data.read_text() + '\n{"image": "gone.png", "caption": "x"}')
    with pytest.raises(DataError, match=r"test\.jsonl:7: image gone\.png: no such file"):
        results("own-retrieval", model_folder, data)


def test_shards_need_no_ids(tmp_path: Path, model_folder: Path) -> None:
    """Those of the data engine, of img2dataset, and records without an id."""
    record = {"files": ["image.png", "audio.wav"], "captions": {"image.png": ["a red square"]}}
    members = {"s1.json": json.dumps(record).encode(), "s1.image.png": picture("red")}
    members |= {"s1.audio.wav": tone(300), "s2.png": picture("blue"), "s2.txt": b"a blue square"}
    write_tar(tmp_path / "shards/validation-000000.tar", members)
    row = results("world-retrieval", model_folder, tmp_path)
    assert (row["items"], row["broken"]) == (2, 0)
    assert (
        results("own-retrieval", model_folder, tmp_path / "shards/*.tar")["figures"]
        == row["figures"]
    )


def test_the_interval_is_that_of_a_share() -> None:
    hits = np.array([1.0] * 60 + [0.0] * 40)
    low, high = interval(hits, np.ones(100))
    assert (low, high) == pytest.approx((50.4, 69.6), abs=2)
