"""Calls in answers: the same, whichever pieces an answer comes in."""

import json
import random

import pytest

from mico_chat.calls import (
    HERMES,
    MISTRAL,
    MISTRAL_ARGUMENTS,
    OBJECTS,
    XML,
    AnswerPiece,
    CallFormat,
    CallReader,
    format_of,
)
from mico_chat.chat_template import ChatTemplate
from mico_chat.errors import ConfigError, RequestError
from mico_chat.thoughts import ThoughtFormat
from mico_chat.tools import Tool, call_schema
from tests.support import templates

TOOLS = (
    Tool("weather", None, {"properties": {"days": {"type": "integer"}, "city": {}}}),
    Tool("time"),
)
CITY = '{"city": "a}\\"{[", "days": 2}'
HERMES_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n<b>\nNice\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)
LLAMA_CALL = f'{{"name": "weather", "parameters": {CITY}}}'
TYPED = '{"city": "<b>\\nNice", "days": 2}'
BOTH = [("weather", CITY), ("time", "{}")]
Calls = list[tuple[str, str]]


NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
LAX: CallFormat = {  # Gemma 4's
    "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
    "close": "<tool_call|>",
    "repeats": True,
    "content": "json",
    "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
    "transform": NAMED,
}
PYTHONIC: CallFormat = {  # LFM2's
    "open": "<|tool_call_start|>",
    "close": "<|tool_call_end|>",
    "content": "python-call-list",
    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
    "transform_each": True,
}
TAGGED: CallFormat = {  # Qwen3.5's
    "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
    "close_pattern": r"</function>\s*</tool_call>",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
    },
    "transform": NAMED,
}
KEYED: CallFormat = {  # one JSON object behind each name
    "open_pattern": r"<call (?P<name>\w+)>",
    "close": "</call>",
    "repeats": True,
    "content": "json",
    "transform": NAMED,
}
CHANNELS = {
    "start_anchor": ["<|turn>model\n"],
    "fields": {
        "thinking": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "tool_calls": LAX,
        "content": {"close": ["<turn|>"]},
    },
}


def joined(pieces: list[AnswerPiece]) -> tuple[str, Calls]:
    text = ""
    calls: Calls = []
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
        elif piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        else:
            assert piece.index == len(calls) - 1, "a piece of a call that has not begun"
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return text, calls


def read(form: CallFormat, answer: str, most: int | None = None) -> tuple[str, Calls]:
    """What is read from the answer as a whole, which must be what is read from its pieces."""
    reader = CallReader(form, TOOLS, most=most)
    whole = joined(reader.feed(answer) + reader.finish())
    chance = random.Random(0)
    for size in (1, 3, 40):
        reader, pieces, at = CallReader(form, TOOLS, most=most), [], 0
        while at < len(answer):
            step = chance.randint(1, size)
            pieces += reader.feed(answer[at : at + step])
            at += step
        assert joined(pieces + reader.finish()) == whole
    return whole


@pytest.mark.parametrize(
    ("form", "answer", "text", "calls"),
    [
        (HERMES, HERMES_CALL, "", [("weather", CITY)]),
        (
            HERMES,
            f"Let me see.\n{HERMES_CALL}\n{HERMES_CALL}\n",
            "Let me see.",
            [("weather", CITY)] * 2,
        ),
        (HERMES, f"{HERMES_CALL} Done. ", "Done.", [("weather", CITY)]),
        (
            HERMES,
            '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>',
            "",
            [("time", '{"a": 1}')],
        ),
        (
            HERMES,
            '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [("time", '{"a": 1}')],
        ),
        (
            XML,
            f"Yes.\n\n{XML_CALL}",
            "Yes.",
            [("weather", '{"city": "<b>\\nNice", "days": 2}')],
        ),
        (XML, "<tool_call><function=time></function></tool_call>", "", [("time", "{}")]),
        (
            MISTRAL,
            f'[TOOL_CALLS] [{{"name": "weather", "arguments": {CITY}, "id": "abc"}}, '
            '{"name": "time", "arguments": {}}]',
            "",
            [("weather", CITY), ("time", "{}")],
        ),
        (
            MISTRAL_ARGUMENTS,
            f"[TOOL_CALLS]weather[ARGS]{CITY}[TOOL_CALLS]time[ARGS]{{}}",
            "",
            [("weather", CITY), ("time", "{}")],
        ),
        (OBJECTS, LLAMA_CALL, "", [("weather", CITY)]),
        (OBJECTS, f"{LLAMA_CALL}; {LLAMA_CALL}", "", [("weather", CITY)] * 2),
        (
            OBJECTS,
            json.dumps({"type": "function", "function": {"name": "time", "arguments": {}}}),
            "",
            [("time", "{}")],
        ),
        (
            LAX,
            'Yes. <|tool_call>call:weather{city:<|"|>a: "{["<|"|>,days:2}<tool_call|>'
            "<|tool_call>call:time{}<tool_call|>",
            "Yes.",
            [("weather", '{"city": "a: \\"{[\\"", "days": 2}'), ("time", "{}")],
        ),
        (
            PYTHONIC,
            "<|tool_call_start|>[weather(city='a, b', days=2), time()]<|tool_call_end|> Done.",
            "Done.",
            [("weather", '{"city": "a, b", "days": 2}'), ("time", "{}")],
        ),
        (TAGGED, f"Yes.\n\n{XML_CALL}\n{XML_CALL}", "Yes.", [("weather", TYPED)] * 2),
        (KEYED, f"<call weather> {CITY} </call><call time>{{}}</call>A", "A", BOTH),
    ],
)
def test_calls_are_told_from_text(form: CallFormat, answer: str, text: str, calls: Calls) -> None:
    assert read(form, answer) == (text, calls)


@pytest.mark.parametrize(
    ("form", "answer"),
    [
        (HERMES, "It is warm.\n"),
        (HERMES, " <tool_call \n"),
        (HERMES, "a\n<tool_call>\nnothing\n</tool_call> b"),
        (HERMES, 'a <tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "wea'),
        (HERMES, '<tool_call>[1]</tool_call><tool_call>{"name": 3}</tool_call>'),
        (XML, "<tool_call><function=other></function></tool_call>"),
        (MISTRAL, "[TOOL_CALLS] [1, 2]"),
        (OBJECTS, '{"answer": 3}'),
        (OBJECTS, "Warm. " + LLAMA_CALL),
        (OBJECTS, '{"name": "Ann", "age": 3} '),
        (LAX, "<|tool_call>call:weather{city:<tool_call|> b"),
        (LAX, '<|tool_call>call:other{a:<|"|>b<|"|>}<tool_call|>'),
        (LAX, '<|tool_call>call:weather{city:<|"|>'),
        (PYTHONIC, "a <|tool_call_start|>[weather(<|tool_call_end|> b"),
        (PYTHONIC, "<|tool_call_start|>[weather(), other()]<|tool_call_end|>"),
        (KEYED, "<call other>{}</call>"),
    ],
)
def test_what_is_no_call_stays_text(form: CallFormat, answer: str) -> None:
    assert read(form, answer) == (answer, [])


@pytest.mark.parametrize(
    ("form", "answer", "arguments"),
    [
        (HERMES, HERMES_CALL[:60], '{"city": "a}\\"{'),
        (XML, XML_CALL[:90], '{"city": "<b>\\nNice"'),
        (XML, XML_CALL.removesuffix("\n</tool_call>"), TYPED),
        (TAGGED, XML_CALL[:90], '{"city": "<b>\\nNice"'),
        (KEYED, f"<call weather>{CITY[:13]}", CITY[:13]),
        (OBJECTS, LLAMA_CALL[:46], '{"city": "a}'),
    ],
)
def test_a_call_that_was_cut_keeps_what_was_begun(
    form: CallFormat, answer: str, arguments: str
) -> None:
    assert read(form, answer) == ("", [("weather", arguments)])


def test_the_first_calls_alone() -> None:
    found = read(HERMES, f"{HERMES_CALL}{HERMES_CALL}Done.", most=1)
    assert found == ("Done.", [("weather", CITY)])


def test_a_call_is_given_piece_by_piece() -> None:
    reader = CallReader(HERMES, TOOLS)
    assert reader.feed("See: <tool_") == ["See:"]
    assert reader.feed('call>{"name": "time", "argum') == []
    name, first = reader.feed('ents": {"zone": "C')
    assert not isinstance(name, str)
    assert name.name == "time"
    assert joined([name, first])[1] == [("time", '{"zone": "C')]
    assert len(reader.feed('ET"')) == 1


def test_the_format_is_the_templates() -> None:
    forms = {
        templates.HERMES: HERMES,
        templates.XML: XML,
        templates.LLAMA: OBJECTS,
        templates.MISTRAL: MISTRAL,
        templates.VISION: None,
    }
    assert {source: format_of(source) for source in forms} == forms


def test_a_tokenizer_describes_calls_and_thoughts() -> None:
    tokenizer = templates.tokenizer_with(templates.CHANNELS)
    template = ChatTemplate(tokenizer)
    assert template.call_format is None, "the template alone says nothing that is known"
    tokenizer.response_template = CHANNELS
    template = ChatTemplate(tokenizer)
    assert template.call_format == LAX
    shown = tokenizer.convert_ids_to_tokens(sorted(template.call_tokens))
    assert set(shown) == {"<|tool_call>", "<tool_call|>", '<|"|>'}
    assert template.thoughts == ThoughtFormat("<|channel>thought", "<channel|>")
    tokenizer.chat_template = templates.VISION
    assert ChatTemplate(tokenizer).call_format is None, "a template without tools"
    tokenizer.response_template = {
        "start_anchor": "x",
        "fields": {"tool_calls": {"content": "xml"}},
    }
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: Field 'tool_calls': unknown"):
        ChatTemplate(tokenizer)


def test_a_forced_calls_schema_becomes_a_grammar() -> None:
    llama_grammar = pytest.importorskip("llama_cpp.llama_grammar")
    place = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    at = {"type": "object", "properties": {"at": {"$ref": "#/$defs/Place"}}, "required": ["at"]}
    one = Tool("weather", None, {**at, "$defs": {"Place": place}})
    grammar = llama_grammar.json_schema_to_gbnf(json.dumps(call_schema([one, Tool("time")])))
    assert all(word in grammar for word in ("weather", "time", "city", "arguments"))
    again = Tool("again", None, {**at, "$defs": {"Place": {"type": "string"}}})
    with pytest.raises(RequestError, match=r"two tools have different \$defs of the name 'Place'"):
        call_schema([one, again])
    call_schema([one, Tool("same", None, one.parameters)])
