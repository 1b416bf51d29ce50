"""What a checkpoint's own chat defaults change: its system prompt and its generation options.

    python -m benchmarks.chat_defaults --model mini

The same questions are asked without and with them: who it is, JSON objects, poems and code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from mico_chat.assistant import Answer, Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder
from mico_chat.messages import Message

WHO = (
    *("Who are you?", "What is your name?", "What are you?", "Which model are you?"),
    *("Introduce yourself.", "Tell me about yourself.", "Who made you?", "Are you ChatGPT?"),
    *("What kind of AI are you?", "Hello, who am I talking to?", "Tell me who you are."),
    *("What should I call you?", "Are you a human?", "Are you SmolLM?", "Do you have a name?"),
)
JSON = (
    "Give me a JSON object with the name and age of a person.",
    "Describe a cat as JSON.",
    "List three fruits with their colours, as JSON.",
    "Return a JSON object with the keys city and country for Paris.",
    "Answer in JSON: what is the capital of Japan?",
    "Make a JSON recipe for pancakes with ingredients and steps.",
    "Give the weekdays as a JSON object.",
    "Write a JSON object that describes a book.",
    "Extract name and phone from: 'Call Anna at 555-1234'. Answer as JSON.",
    "Is 7 a prime number? Answer as JSON with the key answer.",
    "Write a JSON configuration of a web server.",
    "Give me a JSON object of the planets and their sizes.",
    "Translate 'good morning' to French; JSON with the key translation.",
    "Summarize in JSON: The dog ran over the street and a car stopped.",
    "JSON with the sentiment of: 'I love this film!'",
    "Give a to-do list of three items in JSON.",
    "What are the primary colours? Answer in JSON.",
    "Describe the weather today as a JSON object.",
    "Create a JSON user profile with an address.",
    "Count from one to five in JSON.",
)
POEMS = tuple(
    f"Write a poem about {subject}."
    for subject in (
        *("the sea", "autumn", "my cat", "a train", "the moon", "friendship", "rain"),
        *("a lost key", "winter in the city", "bread"),
    )
)
CODE = tuple(
    f"Write {program}."
    for program in (
        "a Python function that reverses a string",
        "a Python function for Fibonacci numbers",
        "JavaScript code that sorts an array",
        "a Python class for a bank account",
        "HTML for a simple contact form",
        "a SQL query that finds the oldest customer",
        "a Python script that counts words in a file",
        "a C function that computes the factorial",
        "a bash script that renames files",
        "Python code for bubble sort",
    )
)


def main() -> None:
    """Ask and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--name", default="MiCo-Chat", help="what an answer must say of itself")
    options = parser.parse_args()
    engine = EngineOptions(options.engine)
    ways = {"without both": replace(engine, chat_defaults=False), "with both": engine}
    columns = {}
    for way, how in ways.items():
        with MediaDecoder() as decoder, closing(load_assistant(options.model, decoder, how)) as one:
            columns[way] = _counts(one, options.name)
    print("| asked | " + " | ".join(columns) + " |\n|---|---|---|")
    for asked in next(iter(columns.values())):
        print(f"| {asked} | " + " | ".join(column[asked] for column in columns.values()) + " |")


def _counts(assistant: Assistant, name: str) -> dict[str, str]:
    def ends(answer: Answer) -> bool:
        return answer.choices[0].finish_reason == "stop"

    def is_json(answer: Answer) -> bool:
        try:
            return isinstance(json.loads(answer.text), dict)
        except ValueError:
            return False

    def count(questions: Sequence[str], right: Callable[[Answer], bool], **options: object) -> str:
        conversations = [[Message.user(question)] for question in questions]
        answers = assistant.answer_all(conversations, GenerationOptions.of(options))
        return f"{sum(map(right, answers))} of {len(answers)}"

    return {
        f'who it is: says "{name}"': count(WHO, lambda answer: name in answer.text),
        "for a JSON object: valid, and ends": count(
            JSON, lambda a: ends(a) and is_json(a), json_schema={"type": "object"}
        ),
        "for a poem: ends": count(POEMS, ends),
        "for code: ends": count(CODE, ends),
    }


if __name__ == "__main__":
    main()
