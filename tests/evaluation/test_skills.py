"""Skills of a tiny model and of made ones: controls, counts, intervals, what is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation import command
from mico_chat.evaluation.chat.model import CONTROLS, Answered, Refused, Reply, Unreadable
from mico_chat.evaluation.command import main
from mico_chat.evaluation.items import Item, ItemMedium
from mico_chat.evaluation.skill_scores import answers, plot, score, table
from mico_chat.evaluation.skills import chosen_items, digest, media_shown, run
from mico_chat.messages import Message
from mico_chat.model.config import MicoChatConfig
from tests.evaluation.parrot import Parrot
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
    controls = [control for control in CONTROLS if control != "base-llm"]
    assert "| skill | n | chance | " + " | ".join(controls) + " |" in printed
    assert "| colour | 3 |" in printed
    row = json.loads((output / "results.json").read_text())["skills"]["items"]
    assert row["skills"]["text"]["n"] == 1
    assert list(row["skills"]["colour"]["controls"]) == controls
    assert list(row["skills"]["text"]["controls"]) == ["full"], "the others would ask the same"
    lines = (output / "items" / "answers.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert len(said) == 3 * len(controls) + 1
    assert {answer["id"] for answer in said} == {"red", "green", "blue", "sum"}
    assert row["digest"] in printed
    with Image.open(output / "items.png") as chart:
        assert chart.format == "PNG"
        assert chart.width > 400
    assert (output / "table.md").read_text().strip() == printed.strip()


def seeing(message: Message) -> Reply:
    """Calls every picture red, and cannot but add without one."""
    return Answered("Red." if message.media else "Four.")


def test_accuracy_is_what_the_answers_say(folder: Path, tmp_path: Path) -> None:
    items = chosen_items([folder / "items.jsonl"])
    model = Parrot(seeing)
    run("items", items, model, tmp_path, ["full", "withheld", "swapped"])
    assert model.used == ["full", "withheld", "swapped"]
    # Three pictures and one sum; then the pictures alone, for a sum without media stays the same.
    assert [len(m.media) for m in model.asked] == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert model.limits == [24, 24, 24, 48] + [24] * 6
    row = score(tmp_path)
    colour = row["skills"]["colour"]["controls"]
    third = pytest.approx(1 / 3)
    assert [colour[c]["accuracy"] for c in colour] == [third, 0, third]
    # Wilson's interval of 1 in 3 (Brown, Cai and DasGupta 2001, eq. 4, by hand).
    assert (colour["full"]["low"], colour["full"]["high"]) == pytest.approx(
        (0.0615, 0.7923), abs=1e-4
    )
    assert (colour["withheld"]["low"], colour["withheld"]["high"]) == pytest.approx(
        (0, 0.5615), abs=1e-4
    )
    assert row["skills"]["text"]["controls"]["full"]["accuracy"] == 1
    right = {(a["control"], a["id"]) for a in answers(tmp_path) if a["right"]}
    assert ("full", "red") in right
    assert ("full", "blue") not in right


def test_refused_and_broken_items_are_counted_and_named_and_not_wrong(tmp_path: Path) -> None:
    items = [item("a", "red"), item("b", "red"), item("c", "red"), item("d", "red")]
    says: dict[str, Reply] = {
        "a0": Answered("red"),
        "b0": Answered("blue"),
        "c0": Refused("400: no image"),
    }

    def say(message: Message) -> Reply:
        return says.get(Path(message.media[0].name).stem, Unreadable("d0.png: no such file"))

    run("items", items, Parrot(say), tmp_path, ["full"])
    row = score(tmp_path)
    figures = row["skills"]["colour"]["controls"]["full"]
    assert (figures["accuracy"], figures["n"]) == (0.5, 2)
    assert (figures["refused"], figures["broken"]) == (1, 1)
    text = table("items", row)
    assert "| colour | 4 |  | 50 % (9-91) of 2 |" in text
    assert "1 refused and not counted: c (full): 400: no image" in text
    assert "1 broken and not counted: d (full): d0.png: no such file" in text


def test_a_model_that_refuses_all_has_no_figure(tmp_path: Path) -> None:
    closed = [item(name, "red", choices=("red", "blue")) for name in "abc"]
    run("items", closed, Parrot(lambda _: Refused("no")), tmp_path, ["full", "withheld"])
    row = score(tmp_path)
    assert "3 refused | 3 refused |" in table("items", row)
    plot(tmp_path / "chart.png", "items", row)
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_chance_is_told_where_answers_are_closed(tmp_path: Path) -> None:
    items = [
        item("a", "red", choices=("red", "blue")),
        item("b", "red", choices=("red", "blue", "green", "grey")),
    ]
    run("items", items, Parrot(), tmp_path / "closed", ["full"])
    assert score(tmp_path / "closed")["skills"]["colour"]["chance"] == pytest.approx(0.375)
    run("items", [*items, item("c", "red")], Parrot(), tmp_path / "mixed", ["full"])
    assert score(tmp_path / "mixed")["skills"]["colour"]["chance"] == pytest.approx(0.25)
    run("items", [item("c", "red")], Parrot(), tmp_path / "open", ["full"])
    assert score(tmp_path / "open")["skills"]["colour"]["chance"] is None


class Ended(Exception):
    """The run is ended here."""


def test_a_run_goes_on_where_it_was_ended(folder: Path, tmp_path: Path) -> None:
    items = chosen_items([folder / "items.jsonl"])
    controls = ["full", "withheld", "swapped"]
    run("items", items, Parrot(seeing), tmp_path / "whole", controls)
    left = [6]

    def ending(message: Message) -> Reply:
        left[0] -= 1
        if left[0] < 0:
            raise Ended
        return seeing(message)

    with pytest.raises(Ended):
        run("items", items, Parrot(ending), tmp_path / "cut", controls)
    assert score(tmp_path / "cut")["controls"] == ["full"], "withheld has not finished"
    again = Parrot(seeing)
    run("items", items, again, tmp_path / "cut", controls)
    # Two of three were withheld: the batch of the third, and all that are swapped.
    assert [len(message.media) for message in again.asked] == [0, 1, 1, 1]
    one, other = (score(tmp_path / name) for name in ("whole", "cut"))
    assert one["skills"] == other["skills"]
    more = Parrot(seeing)
    run("items", items, more, tmp_path / "cut", [*controls, "without-grid"])
    assert len(more.asked) == 3, "a control can be added later"


def test_other_items_models_and_media_are_refused(folder: Path, tmp_path: Path) -> None:
    items = chosen_items([folder / "items.jsonl"])
    run("items", items, Parrot(), tmp_path, ["full"])
    with pytest.raises(ConfigError, match="made with digest"):
        run("items", items[1:], Parrot(), tmp_path, ["full"])
    with pytest.raises(ConfigError, match="made with max_tokens null, but this run has 5"):
        run("items", items, Parrot(), tmp_path, ["full"], max_tokens=5)
    other = Parrot()
    other.name = "cockatoo"
    with pytest.raises(ConfigError, match="made with model"):
        run("items", items, other, tmp_path, ["full"])


def test_the_digest_is_of_words_and_bytes_not_of_places(folder: Path, tmp_path: Path) -> None:
    items = chosen_items([folder / "items.jsonl"])
    for name in ("items.jsonl", "red.png", "green.png", "blue.png"):
        shutil.copy(folder / name, tmp_path)
    moved = chosen_items([tmp_path / "items.jsonl"])
    assert digest(moved) == digest(items)
    assert digest(items[:3]) != digest(items)
    shutil.copy(folder / "red.png", tmp_path / "blue.png")
    assert digest(moved) != digest(items)


def test_a_files_own_options_leave_nothing_behind_without_an_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "open_model", lambda _: Parrot())
    assert main([str(folder / "items.jsonl"), "--controls", "full"]) == 0
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(DataError, match="the files hold no items"):
        main([str(tmp_path / "none.jsonl")])


def test_the_untuned_control_needs_a_base_llm(folder: Path) -> None:
    arguments = [str(folder / "items.jsonl"), "--model", str(folder / "model")]
    with pytest.raises(ConfigError, match="base_llm"):
        main([*arguments, "--controls", "base-llm"])


def test_only_the_skills_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(folder / "items.jsonl"), "--model", str(folder / "model"), "--skills", "text"]
    assert main([*arguments, "--controls", "full", "--max-tokens", "2"]) == 0
    assert "colour" not in capsys.readouterr().out
    with pytest.raises(DataError, match="unknown skill 'colours'; the skills are colour, text"):
        main([*arguments[:-1], "colours"])


def test_withheld_items_show_nothing() -> None:
    assert all(shown.media == () for shown in media_shown([item("a", "red")], "withheld"))


def test_swapped_items_show_another_answer() -> None:
    items = [item("a", "red"), item("b", "red"), item("c", "blue"), item("d", "green", media=2)]
    shown = media_shown(items, "swapped")
    for one, other in zip(items[:3], shown[:3], strict=True):
        assert one.accept != other.accept
        assert len(other.media) == 1
    assert shown[3] is items[3], "the only one with two pictures has nothing to swap with"


def test_a_swap_tells_nothing_where_answers_are_closed() -> None:
    """Half of the other media agree with the truth, as half of all do."""
    sides = ("left", "right")
    items = [item(str(n), sides[n % 2], choices=sides) for n in range(40)]
    shown = media_shown(items, "swapped")
    agree = [one.accept == other.accept for one, other in zip(items, shown, strict=True)]
    assert 10 <= sum(agree) <= 30
    assert all(one.id != other.id for one, other in zip(items, shown, strict=True))


def test_full_items_show_their_own() -> None:
    items = [item("a", "red"), item("b", "blue")]
    for control in ("full", "without-concepts", "without-grid"):
        assert media_shown(items, control) == items
