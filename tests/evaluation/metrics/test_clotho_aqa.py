"""ClothoAQA's accuracy under each rule."""

from __future__ import annotations

import pytest

from mico_chat.errors import DataError
from mico_chat.evaluation.metrics.clotho_aqa import Questions, Rule, clotho_aqa

HUMANS = {
    "dry": ["yes", "yes", "no"],
    "raining": ["no", "No", "no"],
    "where": ["road", "train", "airport"],
    "animal": ["bird", "bird", "dog"],
}
ANSWERS = {
    "dry": "Yes, it is dry.",
    "raining": "Yes",
    "where": "TRAIN.",
    "animal": "a bird",
}


@pytest.mark.parametrize(
    ("rule", "questions", "each"),
    [
        ("each", "all", {"dry": 2 / 3, "raining": 0, "where": 1 / 3, "animal": 0}),
        ("any", "all", {"dry": 1, "raining": 0, "where": 1, "animal": 0}),
        ("majority", "all", {"dry": 1, "raining": 0, "animal": 0}),
        ("unanimous", "all", {"raining": 0}),
        ("majority", "binary", {"dry": 1, "raining": 0}),
        ("each", "other", {"where": 1 / 3, "animal": 0}),
    ],
)
def test_rules(rule: Rule, questions: Questions, each: dict[str, float]) -> None:
    score = clotho_aqa(ANSWERS, HUMANS, rule, questions)
    assert score.each == pytest.approx(each)
    assert score.mean == pytest.approx(sum(each.values()) / len(each))


def test_the_first_word_counts_of_yes_no_questions_alone() -> None:
    humans = {"1": ["no"] * 3, "2": ["no"] * 3, "3": ["no", "no", "none"]}
    answers = {"1": "No - quiet", "2": "There is no sound", "3": "no sound"}
    assert clotho_aqa(answers, humans).each == {"1": 1, "2": 0, "3": 0}


def test_faults_are_named() -> None:
    with pytest.raises(
        DataError, match=r"1 questions have an answer and 2 .* 1 have only one of the two, .* '2'"
    ):
        clotho_aqa({"1": "yes"}, {"1": ["yes"], "2": ["no"]})
    with pytest.raises(DataError, match="the human answers to '1' are missing"):
        clotho_aqa({"1": "yes"}, {"1": []})
    with pytest.raises(DataError, match="unanimous of other questions: no item to score"):
        clotho_aqa({"1": "yes"}, {"1": ["yes", "yes", "yes"]}, "unanimous", "other")
