"""ClothoAQA (Lipping et al. 2022): a question about a sound, answered by three people in one word.

The three often differ ("Is the area dry?" - yes, yes, no), so an accuracy needs a rule, and papers
take different ones. MiCo's Table 5 (63.9) says "Acc." and no more, beside baselines of several
rules; ``each`` is the default, and the only one that weighs every answer given. A figure should go
with the name of its rule and of its questions.

* ``each``: the three are three items, as the test file lists them and Qwen-Audio scores them. The
  people's own disagreement bounds it well below 1.
* ``majority``, ``unanimous``: one item a question, the answer that two (all three) gave; questions
  without one are left out. The data set's paper has both for its yes-no questions.
* ``any``: one item a question, right with any of the three (Audio Flamingo, but for yes-no).

``questions``: ``all``, ``binary`` (the three all said yes or no), or ``other``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from mico_chat.errors import DataError
from mico_chat.evaluation.metrics.score import Score
from mico_chat.evaluation.metrics.vqa import plain

Rule = Literal["each", "majority", "unanimous", "any"]
Questions = Literal["all", "binary", "other"]
YES_NO = frozenset(("yes", "no"))


def clotho_aqa(
    answers: Mapping[str, str],
    humans: Mapping[str, Sequence[str]],
    rule: Rule = "each",
    questions: Questions = "all",
) -> Score:
    """Accuracy over the questions that the rule takes; ``each`` holds those alone.

    Answers are compared in lower case without punctuation. Of an answer to a yes-no question the
    first word counts ("No, it is quiet." is no), as a chat model seldom leaves it at that.

    Args:
        answers: question -> the model's answer.
        humans: the same questions -> the people's answers.

    Raises:
        DataError: other questions in one than in the other, a question without human answers, or
            none left by the rule.
    """
    if answers.keys() != humans.keys():
        alone = sorted(answers.keys() ^ humans.keys())
        raise DataError(
            "ClothoAQA",
            None,
            f"{len(answers)} questions have an answer and {len(humans)} have human answers; "
            f"{len(alone)} have only one of the two, such as {alone[0]!r}",
        )
    each = {}
    for question, answer in answers.items():
        truths = [plain(human) for human in humans[question]]
        if not truths:
            raise DataError("ClothoAQA", None, f"the human answers to {question!r} are missing")
        binary = set(truths) <= YES_NO
        if questions != "all" and binary is not (questions == "binary"):
            continue
        if (value := _right(_said(answer, binary), truths, rule)) is not None:
            each[question] = value
    return Score.over(each, f"ClothoAQA, {rule} of {questions} questions")


def _said(answer: str, binary: bool) -> str:
    words = plain(answer).split()
    return words[0] if binary and words and words[0] in YES_NO else " ".join(words)


def _right(said: str, truths: Sequence[str], rule: Rule) -> float | None:
    """How right an answer is; None where the rule leaves the question out."""
    truth, count = Counter(truths).most_common(1)[0]
    if rule == "each":
        return truths.count(said) / len(truths)
    if rule == "any":
        return float(said in truths)
    needed = len(truths) if rule == "unanimous" else len(truths) // 2 + 1
    return float(said == truth) if count >= needed else None
