"""Is an answer right? VQA accuracy equals the official program's; other figures are by hand."""

import random
from pathlib import Path

import pytest
import yaml

from mico_chat.evaluation.metrics.answers import (
    Rule,
    clotho_aqa,
    exact_match,
    is_right,
    normal_words,
    position,
    vqa_accuracy,
    vqa_normal,
)

CASES = yaml.safe_load(Path(__file__).with_name("answers.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("answer", "accept", "choices", "right"), CASES["right"])
def test_answers(answer: str, accept: list[str], choices: list[str], right: bool) -> None:
    assert is_right(answer, accept, choices) is right


def test_an_answer_with_a_rejected_word_is_wrong() -> None:
    assert is_right("A brown dog.", ["dog", "hound"], reject=["cat", "kitten"])
    assert not is_right("A dog beside two cats.", ["dog", "hound"], reject=["cat", "kitten"])


def test_words_and_positions() -> None:
    assert normal_words("2 Gray cats, 11 colors!") == ["two", "grey", "cat", "11", "color"]
    assert normal_words("gas glass bus dogs buses") == ["gas", "glass", "bus", "dog", "buse"]
    assert position("The red ball is left", "left") == 4
    assert position("The red ball", "ball") == 2
    assert position("The red ball", "") is None


@pytest.mark.parametrize(("said", "normal"), CASES["vqa_normal"])
def test_normal_form(said: str, normal: str) -> None:
    assert vqa_normal(said) == normal


@pytest.mark.parametrize(("answer", "truth", "right"), CASES["exact_match"])
def test_exact_match(answer: str, truth: str, right: bool) -> None:
    assert exact_match(answer, truth) is right


WORDS = (
    "yes no the a an two Three none dog dogs red t-shirt 1,000 2.5 don't dont isnt couldntve "
    "couldn'tve somebody'd Ive im youre . , ... ? ! ; / _ - @ ' \" 3.0 u.s. U.S. oclock left,right "
    "a/b (two) [red] {blue} 10% $5 \n \t naïve 日本 10 ten Ten. one. 'twas twas yall'll 5,5,5 .5"
)


def generated(count: int) -> list[tuple[str, list[str]]]:
    """Answers, each with ten human answers; in a seventh of the cases these ten are equal."""
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


def test_equals_the_official_program_on_a_thousand_items() -> None:
    """The two sums were computed by GT-Vision-Lab/VQA's vqaEval.py (2021) on the same items."""
    scores = [vqa_accuracy(answer, humans) for answer, humans in generated(1000)]
    assert sum(scores) == pytest.approx(556.9, abs=1e-6)
    weighed = sum(index * score for index, score in enumerate(scores))
    assert weighed == pytest.approx(278410.7, abs=1e-3)


@pytest.mark.parametrize(
    ("agree", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_counts_how_many_people_agree(agree: int, accuracy: float) -> None:
    humans = ["cat"] * agree + [f"dog{index}" for index in range(10 - agree)]
    assert vqa_accuracy("cat", humans) == pytest.approx(accuracy)


HUMANS = {
    "dry": ["yes", "yes", "no"],
    "raining": ["no", "No", "no"],
    "where": ["road", "train", "airport"],
    "animal": ["bird", "bird", "dog"],
}
ANSWERS = {"dry": "Yes, it is dry.", "raining": "Yes", "where": "TRAIN.", "animal": "a bird"}


@pytest.mark.parametrize(
    ("rule", "each"),
    [
        ("each", {"dry": 2 / 3, "raining": 0, "where": 1 / 3, "animal": 0}),
        ("any", {"dry": 1, "raining": 0, "where": 1, "animal": 0}),
        ("majority", {"dry": 1, "raining": 0, "animal": 0}),
        ("unanimous", {"raining": 0}),
    ],
)
def test_rules(rule: Rule, each: dict[str, float]) -> None:
    assert clotho_aqa(ANSWERS, HUMANS, rule) == pytest.approx(each)


def test_the_first_word_counts_of_yes_no_questions_alone() -> None:
    humans = {"1": ["no"] * 3, "2": ["no"] * 3, "3": ["no", "no", "none"]}
    answers = {"1": "No - quiet", "2": "There is no sound", "3": "no sound"}
    assert clotho_aqa(answers, humans) == {"1": 1, "2": 0, "3": 0}
