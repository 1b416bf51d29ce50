"""A judge behind an OpenAI-compatible URL: its prompt, its replies, its faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mico_chat.evaluation.judge import Judge, JudgedAnswer, Verdict, read
from tests.evaluation.openai_endpoint import answering


def by_prediction(request: dict[str, Any]) -> tuple[int, str]:
    """The mark that the predicted answer asks for: ``yes 4``."""
    predicted = request["messages"][1]["content"].split("Predicted answer: ")[1].split("\n")[0]
    word, score = predicted.split()
    return 200, f"{{'pred': '{word}', 'score': {score}}}"


def test_verdicts_of_many_answers_come_by_their_items() -> None:
    marks = [("yes", 5), ("no", 0), ("yes", 3), ("no", 2)] * 5
    items = [
        JudgedAnswer(str(index), "what {runs}?", "dog", f"{word} {score}")
        for index, (word, score) in enumerate(marks)
    ]
    with answering(by_prediction) as (url, requests), Judge("m", url, "secret") as judge:
        found = dict(judge.verdicts(iter(items)))
    assert found == {
        str(index): Verdict(word == "yes", score) for index, (word, score) in enumerate(marks)
    }
    assert len(requests) == len(items)
    request = requests[0]
    assert (request["path"], request["key"]) == ("/v1/chat/completions", "Bearer secret")
    assert (request["model"], request["temperature"]) == ("m", 0)
    assert [message["role"] for message in request["messages"]] == ["system", "user"]
    asked = request["messages"][1]["content"]
    assert "Question: what {runs}?\nCorrect answer: dog\nPredicted answer: " in asked
    assert "{'pred': 'yes', 'score': 4}" in asked


def test_unreadable_and_refused_items_are_counted_and_the_rest_goes_on() -> None:
    def answer(request: dict[str, Any]) -> tuple[int, str]:
        asked = request["messages"][1]["content"]
        if "rude" in asked:
            return 400, "content policy"
        if "patient" in asked and len(request["messages"]) > 2:
            return 200, "{'pred': 'yes', 'score': 4}"
        return 200, "Yes, I would say so."

    items = [JudgedAnswer(said, "q", "a", said) for said in ("rude", "patient", "other")]
    with answering(answer) as (url, requests), Judge("m", url, concurrency=1) as judge:
        found = dict(judge.verdicts(items))
    assert "content policy" in str(found["rude"])
    assert found["patient"] == Verdict(True, 4)
    assert found["other"] == (
        "the judge gave no readable verdict in 3 replies; the last: 'Yes, I would say so.'"
    )
    assert [len(request["messages"]) for request in requests] == [2, 2, 4, 2, 4, 4]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    yaml.safe_load(Path(__file__).with_name("replies.yaml").read_text(encoding="utf-8")),
)
def test_reading_a_reply(reply: str, verdict: list[Any] | None) -> None:
    assert read(reply) == (verdict and Verdict(*verdict))
