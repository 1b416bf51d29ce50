"""VQA accuracy against figures of the official evaluation program; the normalisations' corners."""

from __future__ import annotations

import random

import pytest

from mico_chat.errors import DataError
from mico_chat.evaluation.metrics.vqa import exact_match, plain, vqa_accuracy, vqa_normal

WORDS = (
    "yes no the a an two Three none dog dogs red t-shirt 1,000 2.5 don't dont isnt couldntve "
    "couldn'tve somebody'd Ive im youre . , ... ? ! ; / _ - @ ' \" 3.0 u.s. U.S. oclock left,right "
    "a/b (two) [red] {blue} 10% $5 \n \t naïve 日本 10 ten Ten. one. 'twas twas yall'll 5,5,5 .5"
)


def generated(count: int) -> list[tuple[str, list[str]]]:
    """Answers with ten human answers each, of which about one in seven are all the same."""
    chance, words = random.Random(7), WORDS.split(" ")
    found = []
    for _ in range(count):
        phrases = [
            " ".join(chance.choice(words) for _ in range(chance.randint(1, 3)))
            for _ in range(chance.randint(1, 5))
        ]
        phrases += [phrases[0].upper(), f"{phrases[0]}."]
        humans = [chance.choice(phrases) for _ in range(10)]
        if chance.random() < 1 / 7:
            humans = humans[:1] * 10
        found.append((chance.choice([*phrases, chance.choice(words), ""]), humans))
    return found


OFFICIAL_SUM = 556.9
OFFICIAL_WEIGHED_SUM = 278410.7


def test_equals_the_official_program_on_a_thousand_items() -> None:
    """The two sums were computed by GT-Vision-Lab/VQA's vqaEval.py (2021) on the same items."""
    scores = [vqa_accuracy(answer, humans) for answer, humans in generated(1000)]
    assert sum(scores) == pytest.approx(OFFICIAL_SUM, abs=1e-6)
    weighed = sum(index * score for index, score in enumerate(scores))
    assert weighed == pytest.approx(OFFICIAL_WEIGHED_SUM, abs=1e-3)


@pytest.mark.parametrize(
    ("agree", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_counts_how_many_people_agree(agree: int, accuracy: float) -> None:
    humans = ["cat"] * agree + [f"dog{index}" for index in range(10 - agree)]
    assert vqa_accuracy("cat", humans) == pytest.approx(accuracy)


def test_where_all_people_agree_nothing_is_normalised() -> None:
    assert vqa_accuracy("Two", ["two"] * 10) == 0
    assert vqa_accuracy("Two", ["two"] * 9 + ["2"]) == 1


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("a t-shirt", "t shirt"),
        ("left - right", "left right"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("it's 10:30", "it's 10:30"),
        ("none", "0"),
        ("", ""),
        ("the", ""),
    ],
)
def test_normal_form(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


def test_needs_human_answers() -> None:
    with pytest.raises(
        DataError, match=r"VQA accuracy: the human answers to compare 'cat' with are missing"
    ):
        vqa_accuracy("cat", [])


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("Dancing", "dancing", True),
        ("dancing.", "dancing", True),
        ("t-shirt", "T shirt", False),
        ("T-Shirt!", "t-shirt", True),
        (" more  than ten", "more than ten", True),
        ("a dog", "dog", False),
        ("2", "two", False),
        ("", "dog", False),
        ("日本", "日本", True),
    ],
)
def test_exact_match(answer: str, truth: str, right: bool) -> None:
    assert exact_match(answer, truth) is right


def test_plain_is_stable() -> None:
    assert plain(plain(" A  (red) T-Shirt. ")) == "a red tshirt"
