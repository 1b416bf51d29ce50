"""A judge behind an OpenAI-compatible URL: its prompt, and replies that cannot be read."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from mico_chat.evaluation.endpoint import Endpoint
from mico_chat.evaluation.judge import Verdict, read, verdict
from tests.evaluation.openai_endpoint import answering


def test_unreadable_and_refused_answers_have_a_reason_in_place_of_a_verdict() -> None:
    def answer(request: dict[str, Any]) -> tuple[int, str]:
        asked = request["messages"][1]["content"]
        if "rude" in asked:
            return 400, "content policy"
        if "patient" in asked and len(request["messages"]) > 2:
            return 200, "{'pred': 'yes', 'score': 4}"
        return 200, "Yes, I would say so."

    with answering(answer) as (url, requests), closing(Endpoint("m", url)) as judge:
        rude, patient, other = (
            verdict(judge, {"question": "what {runs}?", "references": ["dog"], "answer": said})
            for said in ("rude", "patient", "other")
        )
    assert "content policy" in str(rude)
    assert patient == Verdict(True, 4)
    assert other == (
        "the judge gave no readable verdict in 3 replies; the last: 'Yes, I would say so.'"
    )
    assert [len(request["messages"]) for request in requests] == [2, 2, 4, 2, 4, 4]
    assert (requests[0]["model"], requests[0]["temperature"]) == ("m", 0)
    assert "max_tokens" not in requests[0]
    assert [message["role"] for message in requests[0]["messages"]] == ["system", "user"]
    asked = requests[0]["messages"][1]["content"]
    assert "Question: what {runs}?\nCorrect answer: dog\nPredicted answer: rude\n" in asked
    assert "{'pred': 'yes', 'score': 4}" in asked


@pytest.mark.parametrize(
    ("reply", "verdict"),
    yaml.safe_load(Path(__file__).with_name("replies.yaml").read_text(encoding="utf-8")),
)
def test_reading_a_reply(reply: str, verdict: list[Any] | None) -> None:
    assert read(reply) == (verdict and Verdict(*verdict))
