"""The mark below which an answer is unsure: made-up answers, and a run that is scored anew."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mico_chat.cli.evaluate import main
from mico_chat.evaluation.report import skills_table
from mico_chat.evaluation.run import run
from mico_chat.evaluation.scores import mark_of, score
from mico_chat.evaluation.task import ITEMS, Contents, Item, Reply
from mico_chat.media import MediaFile
from mico_chat.messages import Message
from tests.evaluation.parrot import Parrot

SURE = [(0.9, True)] * 17


@pytest.mark.parametrize(
    ("rated", "mark"),
    [
        ([], None),
        ([(0.9, False), (0.5, False)], None),
        ([(0.9, True), (0.2, True)], 0.2),
        ([*SURE, *[(0.5, False)] * 3], 0.5),  # 17 of 20 are 85 %
        ([*SURE, *[(0.5, False)] * 4], 0.9),
        # Below a stretch of wrong answers there may be many right ones: the lowest mark counts.
        ([*SURE, *[(0.5, False)] * 4, *[(0.3, True)] * 20], 0.3),
        # The surest answer may be wrong.
        ([(0.99, False), *SURE], 0.9),
        # Answers of equal confidence are above the mark together, or none of them is.
        ([(0.7, True)] * 3 + [(0.7, False)], None),
        ([(0.9, True), (0.7, False), (0.7, True)], 0.9),
        ([(0.123_49, True)], 0.1234),  # rounded down: the answer itself is above it
        ([(0.6, True), (0.500_09, False), (0.500_01, True)], 0.6),
        ([(0.0, True), (1.0, True)], 0.0),
    ],
)
def test_the_lowest_mark_above_which_85_per_cent_are_right(
    rated: list[tuple[float, bool]], mark: float | None
) -> None:
    assert mark_of(rated) == mark
    assert mark_of(rated[::-1]) == mark


def asked(folder: Path, replies: dict[str, Reply], *controls: str) -> None:
    """Ask for a colour of each name; "red" is right. A name's letter is the item's skill."""
    items = [
        Item(name, (MediaFile("image", Path(name)),), "Which?", (), ("red",), (), name[0])
        for name in replies
    ]

    def say(message: Message) -> Reply:
        return replies[message.media[0].name] if message.media else Reply("answer", "red", 0.1)

    run(ITEMS, Contents(items), Parrot(say), folder, controls)


def test_a_stored_run_tells_its_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = {
        "a1": Reply("answer", "Red.", 0.95),
        "a2": Reply("answer", "Blue.", 0.4),
        "b1": Reply("answer", "A red one.", 0.8),
        "b2": Reply("answer", "Red.", 0.3),
        "b3": Reply("refused", "no"),
    }
    asked(tmp_path / "items", replies, "full", "withheld")
    # The records are enough: no model is asked.
    assert main(["--rescore", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert '`"unsure_below": 0.8` in generation_config.json' in printed
    rows = [line for line in printed.splitlines() if line.startswith(("| a |", "| b |", "| all"))]
    assert rows[-4:-1] == [
        "| a | 2 | 50 % (1 of 2) | 50 % (1 of 2) | 100 % (1 of 1) |",
        "| b | 2 | 100 % (2 of 2) | 50 % (1 of 2) | 100 % (1 of 1) |",
        "| all | 4 | 75 % (3 of 4) | 50 % (2 of 4) | 100 % (2 of 2) |",
    ]
    row = json.loads((tmp_path / "results.json").read_text())["skills"]["items"]["confidence"]
    assert (row["mark"], row["n"], row["kept"]) == (0.8, 4, 2)
    assert [one["n"] for one in row["bins"]] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    stored = (tmp_path / "items" / "answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["confidence"] for line in stored} == {0.95, 0.4, 0.8, 0.3, 0.1}
    with Image.open(tmp_path / "items-confidence.png") as picture:
        assert picture.width > 400


def test_no_mark_where_all_are_wrong_and_no_table_without_confidences(tmp_path: Path) -> None:
    asked(tmp_path / "wrong", {"a1": Reply("answer", "Blue.", 1.0)}, "full")
    table = skills_table("items", score(tmp_path / "wrong"))
    assert "no mark: of the surest answers about media, fewer than 85 % are right" in table
    assert "| all | 1 | 0 % (0 of 1) | 0 % (0 of 1) |  |" in table
    asked(tmp_path / "unknown", {"a1": Reply("answer", "Red.")}, "full")
    asked(tmp_path / "withheld", {"a1": Reply("answer", "Red.", 0.5)}, "withheld")
    for name in ("unknown", "withheld"):
        row = score(tmp_path / name)
        assert row["confidence"] is None
        assert "unsure" not in skills_table("items", row)


def test_each_kind_of_answer_has_its_mark_and_is_judged_by_the_other_half(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sure of "yes" without being right more often: one mark for all would keep the wrong kind."""
    replies: dict[str, Reply] = {}
    for n in range(20):
        replies[f"y{n}"] = Reply("answer", "Yes, a red one." if n % 2 else "Yes.", 0.9 + 0.001 * n)
        replies[f"n{n}"] = Reply("answer", "A red thing." if n >= 4 else "A hat.", 0.3 + 0.01 * n)
        replies[f"c{n}"] = Reply("answer", "It is red.", 0.5)
    asked(tmp_path / "items", replies, "full")
    assert main(["--rescore", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    row = json.loads((tmp_path / "results.json").read_text())["skills"]["items"]["confidence"]
    found = row["answers"]
    assert found["yes"]["mark"] == 0.919, "only the surest one is right"
    assert found["name"] == {"mark": 0.32, "n": 20, "right": 16, "kept": 17, "kept_right": 16}
    assert found["colour"] == {"mark": 0.5, "n": 20, "right": 20, "kept": 20, "kept_right": 20}
    assert '`"unsure_below": {"^yes\\\\b": 0.919, ' in printed
    assert f"| colour | 20 | 0.5 |{3 * ' 100 % (20 of 20) |'}" in printed
