"""What a checkpoint's own chat defaults change: its system prompt and its generation options.

The same questions (``chat_defaults.yaml``) are asked without and with the defaults.
"""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated

import yaml

from benchmarks.harness import Report
from mico_chat.assistant import Answer, Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder
from mico_chat.messages import Message

QUESTIONS: dict[str, list[str]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)


def measure(
    model: str = "mini",
    engine: str = "auto",
    name: Annotated[str, "the name that an answer must say"] = "MiCo-Chat",
) -> Report:
    columns = []
    for chat_defaults in (False, True):
        how = EngineOptions(engine, chat_defaults=chat_defaults)
        with MediaDecoder() as decoder, closing(load_assistant(model, decoder, how)) as assistant:
            columns.append(_counts(assistant, name))
    rows = [[asked, *(column[asked] for column in columns)] for asked in columns[0]]
    return Report({"rows": rows})


def _counts(assistant: Assistant, name: str) -> dict[str, str]:
    def ends(answer: Answer) -> bool:
        return answer.choices[0].finish_reason == "stop"

    def is_json(answer: Answer) -> bool:
        try:
            return ends(answer) and isinstance(json.loads(answer.text), dict)
        except ValueError:
            return False

    def count(kind: str, right: Callable[[Answer], bool], **options: object) -> str:
        conversations = [[Message.user(question)] for question in QUESTIONS[kind]]
        answers = assistant.answer_all(conversations, GenerationOptions.of(options))
        return f"{sum(map(right, answers))} of {len(answers)}"

    return {
        f'who it is: says "{name}"': count("who", lambda answer: name in answer.text),
        "for a JSON object: valid, and ends": count(
            "json", is_json, json_schema={"type": "object"}
        ),
        "for a poem: ends": count("poem", ends),
        "for code: ends": count("code", ends),
    }
