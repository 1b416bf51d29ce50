"""What a form of answers costs: seconds for each token of a free answer, and of one of a form."""

from contextlib import closing
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.harness import Report
from mico_chat.assistant import Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder
from mico_chat.messages import Message

FORMS: dict[str, dict[str, Any]] = {
    "free": {"ignore_eos": True},
    "json_schema": {"json_schema": {"type": "array", "items": {"type": "string"}, "minItems": 500}},
    "regex": {"regex": r"(\w+[ ,.!?\n]+){500}"},
}
"""None of them lets an answer end before ``max_tokens``."""


def measure(
    model: str = "mini", engine: str = "auto", answers: int = 1, tokens: int = 96, turns: int = 5
) -> Report:
    how, times = EngineOptions(engine), list[list[float]]()
    with MediaDecoder() as decoder, closing(load_assistant(model, decoder, how)) as assistant:
        for _ in range(turns + 1):
            times.append([_seconds(assistant, form, answers, tokens) for form in FORMS.values()])
    of = dict(zip(FORMS, (median(own) for own in zip(*times[1:], strict=True)), strict=True))
    rows = [[n, f"{1e3 * s:.2f}", f"{100 * (s / of['free'] - 1):+.1f} %"] for n, s in of.items()]
    return Report({"rows": rows})


def _seconds(assistant: Assistant, form: dict[str, Any], answers: int, tokens: int) -> float:
    messages, start = [Message.user("List all the animals.")], perf_counter()
    assistant.answer_all([messages] * answers, GenerationOptions(max_tokens=tokens, **form))
    return (perf_counter() - start) / tokens
