"""The evaluation on a tiny model: controls, counts, files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mico_chat.assistant import Answer, Choice
from mico_chat.config import MicoChatConfig
from mico_chat.engine import GenerationOptions
from mico_chat.engine.load import EngineOptions
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.command import main
from mico_chat.evaluation.items import Item, ItemMedium, read_items
from mico_chat.evaluation.report import write_report
from mico_chat.evaluation.skills import CONTROLS, _media_shown, evaluate, table
from mico_chat.messages import Message
from tests.fakes import FakeAssistant
from tests.tiny import chat_model, processor_for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model with three pictures and their items."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = chat_model()
    assert isinstance(model.config, MicoChatConfig)
    model.save_pretrained(folder / "model")
    processor_for(model.config).save_pretrained(folder / "model")
    rows = []
    for number, colour in enumerate(("red", "green", "blue")):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[..., number] = 255
        Image.fromarray(pixels).save(folder / f"{colour}.png")
        rows.append(
            {
                "id": colour,
                "skill": "colour",
                "message": "Which colour?",
                "media": [{"kind": "image", "path": f"{colour}.png"}],
                "accept": [colour],
            }
        )
    rows.append({"id": "sum", "skill": "text", "message": "Two and two?", "accept": ["four"]})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def item(id: str, accept: str, media: int = 1, choices: tuple[str, ...] = ()) -> Item:
    shown = tuple(ItemMedium(kind="image", path=Path(f"{id}{n}.png")) for n in range(media))
    return Item(
        id=id, skill="colour", message="Which?", media=shown, accept=(accept,), choices=choices
    )


def test_the_command_writes_a_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "report"
    arguments = [str(folder / "items.jsonl"), "--model", str(folder / "model"), "--output"]
    arguments += [str(output), "--max-tokens", "4", "--batch-size", "2", "--dtype", "float32"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| skill | n | full | withheld | swapped |")
    assert "| colour | 3 |" in printed
    report = json.loads((output / "results.json").read_text())
    assert report["skills"]["text"]["n"] == 1
    assert set(report["skills"]["colour"]) == {"n", *CONTROLS} - {"base-llm"}
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 * (len(CONTROLS) - 1)
    assert {answer["id"] for answer in answers} == {"red", "green", "blue", "sum"}
    with Image.open(output / "skills.png") as chart:
        assert chart.format == "PNG"
        assert chart.width > 400
    assert (output / "table.md").read_text().strip() == printed.strip()


class Seeing(FakeAssistant):
    """Calls every picture red, and cannot but add without one."""

    async def answer(
        self, messages: Sequence[Message], options: GenerationOptions, **keywords: Any
    ) -> Answer:
        answer = await super().answer(messages, options)
        said = Choice(text="Red." if messages[-1].media else "Four.", finish_reason="stop")
        return answer.model_copy(update={"choices": (said,)})


def test_accuracy_is_what_the_answers_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeing = Seeing()
    monkeypatch.setattr(seeing, "encoder", SimpleNamespace(model=SimpleNamespace()), raising=False)
    monkeypatch.setattr("mico_chat.evaluation.skills.load_assistant", lambda *_: seeing)
    report, answers = evaluate(
        read_items(folder / "items.jsonl"),
        str(folder / "model"),
        EngineOptions(max_running=3),
        controls=["full", "withheld", "swapped"],
    )
    assert seeing.batches == [3, 1] * 3
    assert seeing.closed
    third = pytest.approx(1 / 3)
    assert report["skills"]["colour"] == {"n": 3, "full": third, "withheld": 0, "swapped": third}
    assert report["skills"]["text"] == {"n": 1, "full": 1, "withheld": 1, "swapped": 1}
    right = {(a["control"], a["id"]) for a in answers if a["right"]}
    assert ("full", "red") in right
    assert ("full", "blue") not in right
    assert ("withheld", "sum") in right


def test_limit_takes_the_first_of_each_skill(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder / "items.jsonl"), "--model", str(folder / "model"), "--limit", "1"]
    assert main([*arguments, "--controls", "full", "--max-tokens", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| colour | 1 |" in printed
    assert "withheld" not in printed


def test_no_items_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="no items there"):
        main([str(tmp_path / "none.jsonl")])


def test_the_untuned_control_needs_a_base_llm(folder: Path) -> None:
    arguments = [str(folder / "items.jsonl"), "--model", str(folder / "model")]
    with pytest.raises(ConfigError, match="base_llm"):
        main([*arguments, "--controls", "base-llm"])


def test_only_the_skills_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "items.jsonl"), "--model", str(folder / "model"), "--skills", "text"]
    assert main([*arguments, "--controls", "full", "--max-tokens", "2"]) == 0
    assert "colour" not in capsys.readouterr().out


def test_withheld_items_show_nothing() -> None:
    assert all(shown.media == () for shown in _media_shown([item("a", "red")], "withheld"))


def test_swapped_items_show_another_answer() -> None:
    items = [item("a", "red"), item("b", "red"), item("c", "blue"), item("d", "green", media=2)]
    shown = _media_shown(items, "swapped")
    for one, other in zip(items[:3], shown[:3], strict=True):
        assert one.accept != other.accept
        assert len(other.media) == 1
    assert shown[3] is items[3], "the only one with two pictures has nothing to swap with"


def test_a_swap_tells_nothing_where_answers_are_closed() -> None:
    """Half of the other media agree with the truth, as half of all do."""
    sides = ("left", "right")
    items = [item(str(n), sides[n % 2], choices=sides) for n in range(40)]
    shown = _media_shown(items, "swapped")
    agree = [one.accept == other.accept for one, other in zip(items, shown, strict=True)]
    assert 10 <= sum(agree) <= 30
    assert all(one.id != other.id for one, other in zip(items, shown, strict=True))


def test_full_items_show_their_own() -> None:
    items = [item("a", "red"), item("b", "blue")]
    for control in ("full", "without-concepts", "without-grid"):
        assert _media_shown(items, control) == items


def test_a_report_with_one_skill(tmp_path: Path) -> None:
    report = {"model": "m", "machine": "x", "skills": {"count": {"n": 2, "full": 0.5}}}
    write_report(tmp_path / "new" / "folder", report, [{"id": "1"}], table(report))
    assert (tmp_path / "new" / "folder" / "skills.png").stat().st_size > 1000
    assert "| count | 2 | 50 % |" in (tmp_path / "new" / "folder" / "table.md").read_text()
