"""Is a free answer right?"""

from __future__ import annotations

import pytest

from mico_chat.evaluation.scoring import is_right, position, words

SIDES = ("left", "right")
COUNTS = ("one", "two", "three", "four")


@pytest.mark.parametrize(
    ("answer", "accept", "choices", "right"),
    [
        ("A cat.", ["cat"], (), True),
        ("It shows two cats on a sofa.", ["cat"], (), True),
        ("A cat", ["cats"], (), True),
        ("A catalogue.", ["cat"], (), False),
        ("A bobcat.", ["cat"], (), False),
        ("", ["cat"], (), False),
        ("A dog.", ["cat", "dog"], (), True),
        ("A bald eagle!", ["eagle"], (), True),
        ("An eagle that is bald.", ["bald eagle"], (), False),
        ("A FRENCH HORN", ["french horn"], (), True),
        ("two french horns", ["french horn"], (), True),
        ("Glass.", ["glass"], (), True),
        ("A bus", ["buses"], (), False),
        # numbers
        ("2", ["two"], COUNTS, True),
        ("There are 2 dogs.", ["two"], COUNTS, True),
        ("There are two dogs.", ["2"], COUNTS, True),
        ("12", ["two"], COUNTS, False),
        ("There are three, not two.", ["two"], COUNTS, False),
        # one spelling
        ("It is gray.", ["grey"], (), True),
        ("The color is gray", ["colour"], (), True),
        ("The ball is nearer.", ["closer"], (), True),
        # the first choice counts
        ("Left.", ["left"], SIDES, True),
        ("To the right.", ["left"], SIDES, False),
        ("Left, not right.", ["left"], SIDES, True),
        ("Right, so not left.", ["left"], SIDES, False),
        ("I do not know.", ["left"], SIDES, False),
        ("Yes, they do.", ["yes"], ("yes", "no"), True),
        ("No, yes.", ["yes"], ("yes", "no"), False),
        ("I know, yes.", ["yes"], ("yes", "no"), True),
    ],
)
def test_answers(answer: str, accept: list[str], choices: tuple[str, ...], right: bool) -> None:
    assert is_right(answer, accept, choices) is right


def test_words_have_one_form() -> None:
    assert words("2 Gray cats, 11 colors!") == ["two", "grey", "cats", "11", "colors"]


def test_position_counts_words() -> None:
    assert position("The red ball is left", "left") == 4
    assert position("The red ball", "ball") == 2
    assert position("The red ball", "") is None
