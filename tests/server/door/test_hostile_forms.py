"""Schemas, patterns and grammars of one key, sent to harm, beside another key's own."""

import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.door.test_hostile import resident_mb
from tests.server.support.served import Served, served

COUNT = 2000
SEED = 56
ENDLESS = 40  # about so many of them; each has its 4 seconds
ORDINARY = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}

Value = dict[str, Any]


def _pattern(own: random.Random, depth: int = 3) -> str:
    if not depth or own.random() < 0.2:
        return own.choice(
            ["a", "b", ".", "[ab]", "\\w", "\\d", "é", "(?i:a)", "\\s", "[^a]", "", "\\p{L}"]
        )
    inner = _pattern(own, depth - 1)
    n = own.choice([0, 1, 2, 9, 30, 400, 99_999])
    return own.choice(
        [
            f"({inner})*",
            f"({inner}|{_pattern(own, depth - 1)})",
            f"({inner}|)" * min(n, 90),
            f"({inner}){{{n}}}",
            f"({inner}){{{n},}}",
            f"({inner}+)+",
            f"{inner}{_pattern(own, depth - 1)}",
            f"(?={inner})",
            f"({inner}",
            f"[ab]*a[ab]{{{n % 40}}}",
        ]
    )


def _schema(own: random.Random, depth: int = 4) -> Any:
    n = own.choice([-1, 0, 1, 3, 0.1, 50, 997, 10**6, 1e300])
    if not depth or own.random() < 0.25:
        return own.choice(
            [
                {
                    "type": own.choice(
                        ["string", "integer", "number", "null", "boolean", "nonsense"]
                    )
                },
                {"type": "string", "pattern": _pattern(own)},
                {"type": "string", own.choice(["minLength", "maxLength"]): n},
                {"type": "number", own.choice(["minimum", "exclusiveMaximum"]): n},
                {"enum": [own.random() for _ in range(own.choice([0, 1, 900]))]},
                {"const": own.choice([None, "é\ud83d", 10**40, [], {}])},
                {"$ref": own.choice(["#", "#/$defs/a", "#/nothing", "http://127.0.0.1/a", 3])},
                own.choice([True, False, None, 7, [], "string"]),
            ]
        )
    inner = [_schema(own, depth - 1) for _ in range(own.choice([1, 1, 2, 5]))]
    return own.choice(
        [
            {own.choice(["anyOf", "oneOf", "allOf"]): inner},
            {"type": "array", "items": inner[0], own.choice(["minItems", "maxItems"]): n},
            {"type": "array", "prefixItems": inner, "uniqueItems": True},
            {"properties": {_pattern(own): one for one in inner}, "required": ["b", "a"]},
            {"patternProperties": {_pattern(own): inner[0]}, "additionalProperties": inner[-1]},
            {"$defs": {"a": inner[0]}, "$ref": "#/$defs/a"},
            {"not": inner[0]},
            {"if": inner[0], "then": inner[-1], "x-guidance": {"lenient": True}},
        ]
    )


def _endless(own: random.Random) -> Value:
    prime, other = own.sample([9973, 9967, 99_991, 999_983], 2)
    return own.choice(
        [
            {"type": "integer", "multipleOf": 999_983},
            {"type": "integer", "allOf": [{"multipleOf": prime}, {"multipleOf": other}]},
            {
                "type": "array",
                "items": {"type": "integer", "multipleOf": 10 ** own.randint(5, 9) + 7},
            },
        ]
    )


def _grammar(own: random.Random) -> str:
    rules = [f"r{n}" for n in range(own.choice([1, 3, 60]))]
    sign = own.choice([":", "::="])
    lines = []
    for rule in rules:
        pieces = [
            own.choice([*rules, '"a"', "[ab]*", "( r0 | )", f"/{_pattern(own)}/"]) for _ in "123"
        ]
        lines.append(f"{rule} {sign} {' '.join(pieces)}")
    return "\n".join([f"{own.choice(['start', 'root'])} {sign} r0", *lines])


def form(number: int) -> Value:
    """The fields of a request: a hostile form of answer."""
    own = random.Random(SEED * 100_000 + number)
    if own.random() < ENDLESS / COUNT:
        return {"structured_outputs": {"json": _endless(own)}}
    makers: list[tuple[str, Callable[[], Any]]] = [
        ("json", lambda: _schema(own)),
        ("json", lambda: _schema(own)),
        ("regex", lambda: _pattern(own, 4)),
        ("grammar", lambda: _grammar(own)),
        ("choice", lambda: [_pattern(own) for _ in range(own.choice([0, 1, 500]))]),
    ]
    name, make = own.choice(makers)
    return {"structured_outputs": {name: make()}}


def ask(client: httpx.Client, fields: Value) -> tuple[int, float, str]:
    body = {
        "model": "mini",
        "messages": [{"role": "user", "content": "A?"}],
        "max_tokens": 4,
        **fields,
    }
    began = time.perf_counter()
    done = client.post("/v1/chat/completions", content=json.dumps(body))
    return done.status_code, time.perf_counter() - began, done.text[:300]


def beside(site: Served, numbers: range) -> dict[str, Any]:
    """Sends forms with two keys, and all the time another key's ordinary one."""

    def client(name: str) -> httpx.Client:
        headers = {
            "Authorization": f"Bearer {site.new_key(name)}",
            "Content-Type": "application/json",
        }
        return httpx.Client(base_url=site.url, headers=headers, timeout=300)

    clients = [client("odd"), client("even"), client("good")]
    good = clients[-1]
    # Each form is new, or it would not be compiled.
    schemas = ({**ORDINARY, "title": str(n)} for n in range(10**6))

    def wait() -> float:
        status, seconds, said = ask(good, {"structured_outputs": {"json": next(schemas)}})
        assert status == 200, said
        return seconds

    wait()
    alone = [wait() for _ in range(20)]
    outcomes: list[tuple[int, float, str]] = []

    def send(which: int) -> None:
        for number in numbers[which::2]:
            outcomes.append(ask(clients[which], form(number)))

    threads = [threading.Thread(target=send, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    waits = []
    while any(thread.is_alive() for thread in threads):
        waits.append(wait())
    for each in clients:
        each.close()
    memory = resident_mb(site.pid)
    return {"outcomes": outcomes, "alone": alone, "beside": waits, "memory": memory}


@pytest.mark.soak
@pytest.mark.base_llm
def test_hostile_forms(base_llm_folder: Path, tmp_path: Path) -> None:
    with served(tmp_path) as site:
        warm = beside(site, range(200))
        found = beside(site, range(200, COUNT))
    outcomes = [*warm["outcomes"], *found["outcomes"]]
    print(Counter(status for status, _, _ in outcomes), max(s for _, s, _ in outcomes))
    print(*(f"{key} {statistics.median(found[key]):.3f}" for key in ("alone", "beside")))
    print(f"{warm['memory']:.0f} MB, then {found['memory']:.0f}")
    assert len(outcomes) == COUNT
    assert [said for status, _, said in outcomes if status not in {200, 400}] == []
    assert found["memory"] < warm["memory"] + 100
    # A busy machine's own delays are no other key's.
    assert statistics.median(found["beside"]) < 2 * statistics.median(found["alone"]) + 0.2
