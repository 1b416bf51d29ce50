"""Grammars of JSON schemas: what they allow, and that a hostile one costs a bounded work."""

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from mico_chat.engine.grammar import Grammar, Grammars
from mico_chat.errors import RequestError
from tests.support.tiny import byte_level


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = byte_level()
    return Grammars(tokenizer.backend_tokenizer, [tokenizer.eos_token_id])


def written(grammar: Grammar, seed: int, most: int = 400) -> tuple[str, bool]:
    """A text of tokens that are drawn among those allowed, and whether it ended."""
    tokenizer = byte_level()
    drawn, tokens = random.Random(seed), list[int]()
    while len(tokens) < most:
        token = drawn.choice(np.flatnonzero(grammar.allowed(300)).tolist())
        grammar.accept(token)
        if token == tokenizer.eos_token_id:
            return str(tokenizer.decode(tokens)), True
        tokens.append(token)
    return str(tokenizer.decode(tokens)), False


def test_bounds_of_numbers_and_lengths_hold(grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 3, "maximum": 12},
            "s": {"type": "string", "pattern": "^[a-c]{2,4}$"},
        },
        "required": ["n", "s"],
        "additionalProperties": False,
    }
    grammar = grammars.compile(schema)
    for seed in range(20):
        text, ended = written(grammar.copy(), seed)
        found = json.loads(text)
        assert ended
        assert 3 <= found["n"] <= 12
        assert 2 <= len(found["s"]) <= 4
        assert "  " not in text.replace("\n", "").strip() or "\n" in text


def pattern(text: str) -> dict[str, Any]:
    return {"type": "string", "pattern": text}


def nested(text: str, depth: int) -> str:
    for _ in range(depth):
        text = f"({text}+)"
    return text


BOTH: dict[str, Any] = {"type": "string"}
for _ in range(12):
    BOTH = {"anyOf": [BOTH, {"type": "array", "items": BOTH}]}
DEEP: dict[str, Any] = {}
for _ in range(900):
    DEEP = {"items": DEEP}

HOSTILE: dict[str, Any] = {
    "nullable, 160": pattern("^" + "(a|)" * 160 + "$"),
    "nullable, 300": pattern("^" + "(a|)" * 300 + "$"),
    "nullable, 5000": pattern("^" + "(a|)" * 5000 + "$"),
    "nullable behind a property": {
        "type": "object",
        "properties": {"x": {"const": "y"}, "b": pattern("^" + "(a|b?)" * 400 + "$")},
        "required": ["x", "b"],
    },
    "nested plus": pattern("^" + nested("a", 100) + "$"),
    "a million of a letter": pattern("^(a{1000}){1000}$"),
    "100,000 values": {"enum": [f"value {n}" for n in range(100_000)]},
    "10,000 values": {"enum": [f"v{n}" for n in range(10_000)]},
    "long": {"type": "string", "maxLength": 10**9},
    "many": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "either, 12 times": BOTH,
    "deep": DEEP,
    "itself": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "two at once": {"allOf": [pattern("[ab]*a[ab]{30}c"), pattern("[ab]*b[ab]{31}c")]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_ends_in_few_steps_or_an_error(grammars: Grammars, name: str) -> None:
    """Each bound counts work, so the test cannot hang where the product would not."""
    refused = ""
    text, ended = "", False
    try:
        text, ended = written(grammars.compile(HOSTILE[name]), 0, 60)
    except RequestError as error:
        refused = str(error)
    assert re.match("json_schema: .{5,280}$", refused) or ended or len(text) > 20


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "nonsense"}, "cannot be turned into a grammar"),
        (pattern("("), "cannot be turned into a grammar"),
        (pattern("^\ud800$"), "cannot be turned into a grammar"),
        ({"enum": []}, "cannot be turned into a grammar"),
        ({"enum": ["x" * 200_000]}, r"200\d+ bytes, more than 131072"),
    ],
)
def test_a_bad_schema_is_a_request_error(
    grammars: Grammars, schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=f"^json_schema: {reason}"):
        written(grammars.compile(schema), 0, 10)
