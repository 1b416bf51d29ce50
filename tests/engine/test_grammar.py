"""Grammars of JSON schemas and other forms: what they allow, and that a hostile one costs a bounded
work."""

import asyncio
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jsonschema_rs import Draft202012Validator

from mico_chat.engine.base import Delta, GenerationOptions, Prompt
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.grammar import Grammar, Grammars
from mico_chat.engine.transformers import TransformersModel
from mico_chat.errors import ModelError, RequestError
from mico_chat.tools import Tool, call_schema
from tests.engine.tiny_llm import exported, text, tiny_llm
from tests.support.tiny import byte_level, in_loop


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    tokenizer = byte_level()
    made = Grammars(tokenizer.backend_tokenizer, [tokenizer.eos_token_id])
    yield made
    made.close()


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
    grammar = grammars.compile("json_schema", schema)
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
    "a multiple of a large number": {"type": "integer", "multipleOf": 999_983},
    "multiples of both": {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]},
    "patterns of all": {
        "type": "string",
        "allOf": [pattern(f"(a|b)*a(a|b){{{n}}}") for n in range(16, 25)],
    },
    "two at once": {"allOf": [pattern("[ab]*a[ab]{30}c"), pattern("[ab]*b[ab]{31}c")]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_ends_in_few_steps_or_an_error(grammars: Grammars, name: str) -> None:
    """Each bound counts work, so the test cannot hang where the product would not."""
    refused = ""
    text, ended = "", False
    try:
        text, ended = written(grammars.compile("json_schema", HOSTILE[name]), 0, 60)
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
        written(grammars.compile("json_schema", schema), 0, 10)


# --- What is allowed ------------------------------------------------------------------------------

KNOWN = yaml.safe_load((Path(__file__).parents[1] / "support/forms.yaml").read_text("utf-8"))
CASES, UNKNOWN, FORMS = KNOWN["schemas"], KNOWN["unknown"], KNOWN["others"]


def taken(grammar: Grammar, said: str) -> bool:
    """Whether a text, token by token, is an answer of the grammar."""
    tokenizer = byte_level()
    for token in [*tokenizer(said, add_special_tokens=False).input_ids, tokenizer.eos_token_id]:
        if not grammar.allowed(300)[token]:
            return False
        grammar.accept(token)
    return True


@pytest.mark.parametrize("name", CASES)
def test_valid_instances_are_taken_and_invalid_ones_refused(grammars: Grammars, name: str) -> None:
    schema, valid, invalid = CASES[name]
    known = Draft202012Validator(schema, validate_formats=True)
    grammar = grammars.compile("json_schema", schema)
    for instances, is_valid in ((valid, True), (invalid, False)):
        for one in instances:
            assert known.is_valid(one) is is_valid
            assert taken(grammar.copy(), json.dumps(one, ensure_ascii=False)) is is_valid, one


@pytest.mark.parametrize("keyword", UNKNOWN)
def test_a_keyword_that_cannot_be_followed_is_named(grammars: Grammars, keyword: str) -> None:
    schema = {"type": ["array", "string", "object"], keyword: UNKNOWN[keyword]}
    with pytest.raises(RequestError, match=rf"^json_schema: cannot .*(\b{keyword}\b|binary)"):
        grammars.compile("json_schema", schema)
    asked = {**schema, "x-guidance": {"lenient": True}}
    assert taken(grammars.compile("json_schema", asked), "[]")
    tool = Tool("f", None, {"type": "object", "properties": {"a": schema}})
    assert taken(
        grammars.compile("json_schema", call_schema([tool])), '{"name": "f", "arguments": {}}'
    )
    with pytest.raises(RequestError):
        grammars.compile("json_schema", call_schema([Tool(tool.name, None, tool.parameters, True)]))


@pytest.mark.parametrize("case", FORMS)
def test_other_forms(grammars: Grammars, case: str) -> None:
    name, value, good, bad = FORMS[case]
    grammar = grammars.compile(name, value)
    assert [said for said in good if not taken(grammar.copy(), said)] == []
    assert [said for said in bad if taken(grammar.copy(), said)] == []


def test_a_token_asked_about_alone_gets_the_answer_that_it_gets_among_all(
    grammars: Grammars,
) -> None:
    """Text that must follow is written in one way: its first letter alone is no such token."""
    end = byte_level().eos_token_id
    merged = [said for said in byte_level().get_vocab() if said.isascii() and len(said) > 3]
    asked: list[tuple[str, Any]] = [("json_schema", schema) for schema, _, _ in CASES.values()]
    asked += [(name, value) for name, value, _, _ in FORMS.values()]
    for form in [*asked, ("choice", merged[:2]), ("regex", merged[0] + "+")]:
        grammar, drawn = grammars.compile(*form), random.Random(0)
        for _ in range(30):
            one = [grammar.allows(token) for token in range(310)]  # more than the tokenizer has
            if (all_ := np.flatnonzero(grammar.allowed(310)).tolist()) == [end]:
                break
            assert np.flatnonzero(one).tolist() == all_, form
            if (token := drawn.choice(all_)) == end:
                break
            grammar.accept(token)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *KNOWN["bad"],
        ("regex", "x" * 200_000, "200000 bytes, more than 131072"),
        ("grammar", "root ::= " + '"a" ' * 5000, "20009 bytes, more than 16384"),
    ],
)
def test_a_bad_form_is_named(grammars: Grammars, name: str, value: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=rf"^{name}[^:]*: {reason}"):
        grammars.compile(name, value)


def test_two_forms_exclude_each_other() -> None:
    with pytest.raises(RequestError, match=r"^regex: json_schema limits the answer already"):
        _ = GenerationOptions(json_schema={}, regex="a").form


def test_a_schema_of_many_levels_does_not_end_the_process(grammars: Grammars) -> None:
    """Each level is a call on the stack: without a long one, this process would die here."""
    levels = {f"a{n}": {"properties": {"a": {"$ref": f"#/$defs/a{n + 1}"}}} for n in range(1500)}
    schema = {"$ref": "#/$defs/a0", "$defs": {**levels, "a1500": {"type": "null"}}}
    assert taken(grammars.compile("json_schema", schema), '{"a": {"a": {"a": {}}}}')


# --- In the engines -------------------------------------------------------------------------------


@pytest.fixture(params=["transformers", "llamacpp"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "transformers":
        return TransformersModel(tiny_llm(), n_slots=20)
    llamacpp = pytest.importorskip("mico_chat.engine.llamacpp")
    return llamacpp.LlamaCppModel(exported(tiny_llm(), tmp_path), n_slots=20, n_cells=8192)


@in_loop
async def test_answers_of_every_form_side_by_side(model: Any, grammars: Grammars) -> None:
    """A random model writes noise. What it may not write is left to no sampler."""
    tokenizer = byte_level()
    asked: list[tuple[str, Any]] = [("json_schema", schema) for schema, _, _ in CASES.values()]
    asked += [(name, value) for name, value, _, _ in FORMS.values()]
    engine = BatchingEngine(model, tokenizer, [tokenizer.eos_token_id], name="tiny", max_running=16)

    async def answer(seed: int, **form: Any) -> Delta:
        options = GenerationOptions(max_tokens=120, temperature=1.0, seed=seed, **form)
        deltas = [d async for d in engine.generate(Prompt((text(5, seed),)), options)]
        return deltas[-1].model_copy(update={"text": "".join(delta.text for delta in deltas)})

    try:
        free, *found = await asyncio.gather(
            answer(0), *(answer(n, **{name: value}) for n, (name, value) in enumerate(asked))
        )
    finally:
        engine.close()
    ended = [
        (form, one.text)
        for form, one in zip(asked, found, strict=True)
        if one.finish_reason == "stop"
    ]
    assert len(free.text) > 20
    assert len({json.dumps(form) for form, _ in ended}) > len(asked) / 2
    for (name, value), said in ended:
        if name == "json_schema":
            Draft202012Validator(value).validate(json.loads(said))
        else:
            assert taken(grammars.compile(name, value), said), (name, said)


@in_loop
async def test_endless_forms_of_two_owners_hold_up_no_third() -> None:
    tokenizer = byte_level()
    model = TransformersModel(tiny_llm(), n_slots=4)
    engine = BatchingEngine(model, tokenizer, [tokenizer.eos_token_id], name="tiny")

    async def answer(tenant: str, schema: dict[str, Any]) -> Delta:
        prompt = Prompt((text(5, 0),), tenant=tenant)
        options = GenerationOptions(max_tokens=20, json_schema=schema)
        return [delta async for delta in engine.generate(prompt, options)][-1]

    endless = HOSTILE["a multiple of a large number"]
    asked = [f"{owner}/{user}" for owner in ("a", "b") for user in range(4)]
    hostile = [asyncio.create_task(answer(tenant, endless)) for tenant in asked]
    await asyncio.sleep(0)
    assert (await answer("c", {"const": 1})).finish_reason == "stop"
    assert not all(task.done() for task in hostile)
    engine.close()  # and what still compiles ends
    ended = await asyncio.gather(*hostile, return_exceptions=True)
    assert {type(one) for one in ended} <= {RequestError, ModelError, asyncio.CancelledError}
    with pytest.raises(ModelError, match="is closed"):
        await answer("c", {"const": 1})


def test_a_compiled_form_is_kept_and_a_trial_that_does_not_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_level()
    made = Grammars(tokenizer.backend_tokenizer, [tokenizer.eos_token_id])
    monkeypatch.setattr("mico_chat.engine.grammar._MAIN", "raise SystemExit('no memory')")
    with pytest.raises(ModelError, match="does not start: no memory"):
        made.compile("choice", ["a"])
    monkeypatch.undo()
    made.compile("choice", ["a"]).accept(tokenizer.encode("a")[0])
    made.close()
    assert taken(made.compile("choice", ["a"]), "a")
