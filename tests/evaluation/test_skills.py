"""Tasks of skills, asked of a tiny model and of fakes: controls, counts, intervals, answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mico_chat.cli import evaluate
from mico_chat.cli.evaluate import main
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.report import plot_skills, skills_table
from mico_chat.evaluation.run import bytes_digest, media_shown, run
from mico_chat.evaluation.scores import answers, score
from mico_chat.evaluation.task import CONTROLS, ITEMS, Contents, Item, Model, Reply, read_items
from mico_chat.media import MediaFile
from mico_chat.messages import Message
from tests.evaluation.conftest import write_chat_model, write_items
from tests.evaluation.parrot import Parrot
from tests.support.tiny import chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model with three pictures and their items."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_chat_model(folder / "model", chat_model())
    rows: list[dict[str, Any]] = []
    for number, colour in enumerate(("red", "green", "blue")):
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[..., number] = 255
        Image.fromarray(pixels).save(folder / f"{colour}.png")
        row = {"id": colour, "skill": "colour", "message": "Which colour?", "accept": [colour]}
        rows.append({**row, "media": [{"kind": "image", "path": f"{colour}.png"}]})
    rows.append({"id": "sum", "skill": "text", "message": "Two and two?", "accept": ["four"]})
    write_items(folder, rows)
    return folder


def item(id: str, accept: str, media: int = 1, choices: tuple[str, ...] = ()) -> Item:
    shown = tuple(MediaFile("image", Path(f"{id}{n}.png")) for n in range(media))
    return Item(id, shown, "Which?", (), (accept,), choices, "colour")


def asked(
    items: list[Item], model: Model, folder: Path, *controls: str, max_tokens: int | None = None
) -> None:
    run(ITEMS, Contents(items), model, folder, controls, max_tokens=max_tokens)


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
    """Answers "Red." to every picture, and "Four." without one."""
    return Reply("answer", "Red." if message.media else "Four.")


def test_accuracy_is_what_the_answers_say(folder: Path, tmp_path: Path) -> None:
    model = Parrot(seeing)
    asked(read_items(folder / "items.jsonl"), model, tmp_path, "full", "withheld", "swapped")
    assert model.used == ["full", "withheld", "swapped"]
    # Three pictures and a sum; then pictures only, because the sum has no media to change.
    assert [len(m.media) for m in model.asked] == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert model.limits == [24, 24, 24, 48] + [24] * 6
    row = score(tmp_path)
    colour = row["skills"]["colour"]["controls"]
    third = pytest.approx(1 / 3)
    assert [colour[c]["accuracy"] for c in colour] == [third, 0, third]
    # Wilson's interval of 1 in 3 (Brown, Cai and DasGupta 2001, eq. 4, by hand).
    ends = [(colour[c]["low"], colour[c]["high"]) for c in ("full", "withheld")]
    assert ends[0] == pytest.approx((0.0615, 0.7923), abs=1e-4)
    assert ends[1] == pytest.approx((0, 0.5615), abs=1e-4)
    assert row["skills"]["text"]["controls"]["full"]["accuracy"] == 1
    right = {(a["control"], a["id"]) for a in answers(tmp_path) if a["right"]}
    assert ("full", "red") in right
    assert ("full", "blue") not in right


def test_an_item_may_be_a_conversation_whose_media_a_control_swaps_together(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for n in range(3):
        earlier = {
            "message": "And?",
            "media": [{"kind": "image", "path": f"a{n}.png"}],
            "answer": "A.",
        }
        row = {"id": f"{n}", "skill": "second", "message": "Which?", "accept": [f"x{n}"]}
        media = [{"kind": "image", "path": f"b{n}.png"}]
        rows.append(
            {**row, "earlier": [{"message": "Hi", "answer": "Ho."}, earlier], "media": media}
        )
    write_items(tmp_path, rows)
    model = Parrot()
    items = read_items(tmp_path / "items.jsonl")
    asked(items, model, tmp_path / "run", "full", "withheld", "swapped")
    full, withheld, swapped = (model.conversations[at : at + 3] for at in (0, 3, 6))
    for number, talk in enumerate(full):
        assert [m.role for m in talk] == ["user", "assistant", "user", "assistant", "user"]
        assert [m.text for m in talk] == ["Hi", "Ho.", "And?", "A.", "Which?"]
        names = [[Path(medium.name).name for medium in m.media] for m in talk]
        assert names == [[], [], [f"a{number}.png"], [], [f"b{number}.png"]]
    assert not any(message.media for talk in withheld for message in talk)
    for number, talk in enumerate(swapped):
        (first,), (second,) = talk[2].media, talk[4].media
        assert Path(first.name).name != f"a{number}.png"
        assert Path(second.name).name == Path(first.name).name.replace("a", "b")
    assert bytes_digest(items) != bytes_digest([replace(one, earlier=()) for one in items])


def test_refused_and_broken_items_are_counted_and_named_and_not_wrong(tmp_path: Path) -> None:
    says = {"a0": Reply("answer", "red"), "b0": Reply("answer", "blue")}
    says["c0"] = Reply("refused", "400: no image")

    none = Reply("broken", "d0.png: no such file")
    model = Parrot(lambda message: says.get(Path(message.media[0].name).stem, none))
    asked([item(name, "red") for name in "abcd"], model, tmp_path / "some", "full")
    row = score(tmp_path / "some")
    figures = row["skills"]["colour"]["controls"]["full"]
    assert (figures["accuracy"], figures["n"]) == (0.5, 2)
    assert (figures["refused"], figures["broken"]) == (1, 1)
    text = skills_table("items", row)
    assert "| colour | 4 |  | 50 % (9-91) of 2 |" in text
    assert "1 refused and not counted: c (full): 400: no image" in text
    assert "1 broken and not counted: d (full): d0.png: no such file" in text
    closed = [item(name, "red", choices=("red", "blue")) for name in "abc"]
    refusing = Parrot(lambda _: Reply("refused", "no"))
    asked(closed, refusing, tmp_path / "none", "full", "withheld")
    row = score(tmp_path / "none")
    assert "3 refused | 3 refused |" in skills_table("items", row)
    plot_skills(tmp_path / "chart.png", "items", row)
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_chance_where_answers_are_closed(tmp_path: Path) -> None:
    two = item("a", "red", choices=("red", "blue"))
    four = item("b", "red", choices=("red", "blue", "green", "grey"))
    free = item("c", "red")
    cases = ([two, four], 0.375), ([two, four, free], 0.25), ([free], None)
    for n, (items, chance) in enumerate(cases):
        asked(items, Parrot(), tmp_path / str(n), "full")
        assert score(tmp_path / str(n))["skills"]["colour"]["chance"] == pytest.approx(chance)


class Ended(Exception):
    """Ends a run."""


def test_a_run_goes_on_where_it_was_ended(folder: Path, tmp_path: Path) -> None:
    items = read_items(folder / "items.jsonl")
    controls = ["full", "withheld", "swapped"]
    asked(items, Parrot(seeing), tmp_path / "whole", *controls)
    left = [6]

    def ending(message: Message) -> Reply:
        left[0] -= 1
        if left[0] < 0:
            raise Ended
        return seeing(message)

    with pytest.raises(Ended):
        asked(items, Parrot(ending), tmp_path / "cut", *controls)
    assert score(tmp_path / "cut")["controls"] == ["full"], "withheld has not finished"
    again = Parrot(seeing)
    asked(items, again, tmp_path / "cut", *controls)
    # Two of three were answered under "withheld": the third is left, and all under "swapped".
    assert [len(message.media) for message in again.asked] == [0, 1, 1, 1]
    one, other = (score(tmp_path / name) for name in ("whole", "cut"))
    assert one["skills"] == other["skills"]
    more = Parrot(seeing)
    asked(items, more, tmp_path / "cut", *controls, "without-grid")
    assert len(more.asked) == 3, "a control can be added later"


def test_other_items_models_and_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    items = read_items(folder / "items.jsonl")
    asked(items, Parrot(), tmp_path, "full")
    with pytest.raises(ConfigError, match="made with digest"):
        asked(items[1:], Parrot(), tmp_path, "full")
    with pytest.raises(ConfigError, match="made with max_tokens null, but this run has 5"):
        asked(items, Parrot(), tmp_path, "full", max_tokens=5)
    other = Parrot()
    other.name = "cockatoo"
    with pytest.raises(ConfigError, match="made with model"):
        asked(items, other, tmp_path, "full")


def test_the_digest_is_of_words_and_bytes_not_of_places(folder: Path, tmp_path: Path) -> None:
    items = read_items(folder / "items.jsonl")
    for name in ("items.jsonl", "red.png", "green.png", "blue.png"):
        shutil.copy(folder / name, tmp_path)
    moved = read_items(tmp_path / "items.jsonl")
    assert bytes_digest(moved) == bytes_digest(items)
    assert bytes_digest(items[:3]) != bytes_digest(items)
    shutil.copy(folder / "red.png", tmp_path / "blue.png")
    assert bytes_digest(moved) != bytes_digest(items)
    words = Item("é\t1", (), 'A "q"\n?', (), ("x", "y\x1f"), ("x",), "s")
    assert bytes_digest([words]) == "de46c6b2cf84b6df", "the digest in older results"


def test_the_items_asked_for(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "open_model", lambda *_, **__: Parrot())
    arguments = [str(folder / "items.jsonl"), "--controls", "full"]
    assert main([*arguments, "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| colour | 1 |" in printed
    assert "| text | 1 |" in printed
    assert "withheld" not in printed
    assert main([*arguments, "--skills", "text"]) == 0
    assert "colour" not in capsys.readouterr().out
    with pytest.raises(DataError, match="unknown skill 'colours'; the skills are colour, text"):
        main([*arguments, "--skills", "colours"])
    assert list(tmp_path.iterdir()) == [], "without --output nothing is left behind"


def test_no_items_and_no_base_llm_are_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="the files hold no items"):
        main([str(tmp_path / "none.jsonl")])
    arguments = [str(folder / "items.jsonl"), "--model", str(folder / "model")]
    with pytest.raises(ConfigError, match="base_llm"):
        main([*arguments, "--controls", "base-llm"])


def test_the_media_of_each_control() -> None:
    items = [item("a", "red"), item("b", "red"), item("c", "blue"), item("d", "green", media=2)]
    assert all(shown.media == () for shown in media_shown(items, "withheld"))
    for control in ("full", "without-concepts", "without-grid"):
        assert media_shown(items, control) == items
    answer = {one.media: one.answers for one in items}
    shown = media_shown(items, "swapped")
    for one, other in zip(items[:3], shown[:3], strict=True):
        assert one.answers != answer[other.media]
        assert (one.question, one.answers) == (other.question, other.answers)
    assert shown[3] is items[3], "the only one with two pictures has nothing to swap with"


def test_a_swap_shows_another_thing_and_another_picture() -> None:
    asked = [("cat", "cat"), ("kitten", "kitten cat"), ("dog", "dog"), ("dog", "ball")]
    items = [replace(item(name, ""), answers=tuple(words.split())) for name, words in asked]
    shown = [item.media[0].name for item in media_shown(items, "swapped")]
    assert shown[:2] == ["dog0.png", "dog0.png"]
    assert {*shown[2:]} <= {"cat0.png", "kitten0.png"}


def test_a_rejected_word_makes_an_answer_wrong(tmp_path: Path) -> None:
    items = [replace(item("a", "four"), reject=words) for words in ((), ("five",), ("four",))]
    items = [replace(one, id=str(number)) for number, one in enumerate(items)]
    asked(items, Parrot(), tmp_path / "some", "full")
    assert [row["right"] for row in answers(tmp_path / "some")] == [True, True, False]
    assert bytes_digest(items[:1]) != bytes_digest([replace(items[1], id="0")])


def test_a_swap_tells_nothing_where_answers_are_closed() -> None:
    """About half of the swapped media have the same answer, as about half of all media do."""
    sides = ("left", "right")
    items = [item(str(n), sides[n % 2], choices=sides) for n in range(40)]
    answer = {one.media: one.answers for one in items}
    shown = media_shown(items, "swapped")
    agree = [one.answers == answer[other.media] for one, other in zip(items, shown, strict=True)]
    assert 10 <= sum(agree) <= 30
    assert all(one.media != other.media for one, other in zip(items, shown, strict=True))
