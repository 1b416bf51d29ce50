"""OpenAI's own client and its Responses API: a service whose model follows a script."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response

from tests.server.support import sent
from tests.server.support.running import openai_to
from tests.server.support.scripted import (
    BARE,
    CALL,
    CITY,
    WEATHER,
    ScriptedModel,
    scripted_assistant,
)
from tests.support.fakes import FakeDecoder

ANSWERS = {
    "one?": f"Let me see.\n{CALL}\n{CALL}",
    "bare?": BARE,
    "json?": '{"a": 1}',
    "text?": "It is warm.",
    "empty?": "",
}
TOOL: Any = {"type": "function", **WEATHER}


@pytest.fixture(scope="module")
def script() -> ScriptedModel:
    return ScriptedModel(ANSWERS)


@pytest.fixture(scope="module")
def client(script: ScriptedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("data")
    with openai_to(scripted_assistant(FakeDecoder(), script), folder) as client:
        yield client


def ask(client: OpenAI, asked: Any, **options: Any) -> Any:
    return client.responses.create(model="tiny", input=asked, **options)


def outline(response: Response) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.name, item.arguments, str(item.status)))
        elif item.type == "message":
            (part,) = item.content
            assert part.type == "output_text"
            found.append((part.text, item.status))
    return found


def test_text(client: OpenAI, script: ScriptedModel) -> None:
    response = ask(client, "text?", instructions="Be short.", metadata={"a": "b"})
    assert response.output_text == "It is warm."
    assert (response.status, response.object, response.model) == ("completed", "response", "tiny")
    assert (response.instructions, response.metadata) == ("Be short.", {"a": "b"})
    assert response.id.startswith("resp_")
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens == len("It is warm.") + 1
    assert script.prompts[-1].startswith("<|im_start|>system\nBe short.<|im_end|>")
    (item,) = ask(client, "empty?").output
    assert item.content[0].text == ""


EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    *(
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    )
    * 2,
    "response.completed",
]


def test_a_stream_has_openais_events_and_the_same_response(client: OpenAI) -> None:
    options: dict[str, Any] = {"tools": [TOOL]}
    whole = ask(client, "one?", **options)
    events = list(ask(client, "one?", stream=True, **options))
    kinds = [event.type for event in events]
    assert [kind for n, kind in enumerate(kinds) if n == 0 or kinds[n - 1] != kind] == EVENTS
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert outline(events[-1].response) == outline(whole)
    with client.responses.stream(model="tiny", input="one?", **options) as stream:
        for _ in stream:
            pass
        assert outline(stream.get_final_response()) == outline(whole)
    assert outline(whole) == [
        ("Let me see.", "completed"),
        ("weather", CITY, "completed"),
        ("weather", CITY, "completed"),
    ]


def test_results_go_back_to_the_model(client: OpenAI, script: ScriptedModel) -> None:
    asked: list[Any] = [{"role": "user", "content": "one?"}]
    response = ask(client, asked, tools=[TOOL])
    asked += response.output
    asked += [
        {"type": "function_call_output", "call_id": item.call_id, "output": "text?"}
        for item in response.output
        if item.type == "function_call"
    ]
    assert ask(client, asked, tools=[TOOL]).output_text == "It is warm."
    prompt = script.prompts[-1]
    assert f"<|im_start|>assistant\nLet me see.\n{CALL}\n{CALL}<|im_end|>" in prompt
    assert prompt.count("<tool_response>\ntext?\n</tool_response>") == 2


def test_pictures_and_sounds(client: OpenAI) -> None:
    picture = sent.data_uri("image/png", sent.png(sent.square()))
    content = [
        {"type": "input_image", "image_url": picture, "detail": "auto"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "input_text", "text": "text?"},
    ]
    response = ask(client, [{"role": "user", "content": content}])
    assert [report["kind"] for report in response.media] == ["image", "audio"]
    assert response.output_text == "It is warm."
    assert response.usage.input_tokens_details.media_tokens > 0


def test_an_answer_that_is_cut(client: OpenAI) -> None:
    response = ask(client, "text?", max_output_tokens=5)
    assert (response.status, response.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert outline(response) == [("It is", "incomplete")]
    *_, last = ask(client, "text?", max_output_tokens=5, stream=True)
    assert (last.type, outline(last.response)) == ("response.incomplete", outline(response))
    n = len("Let me see.\n") + CALL.index("rlin")
    cut = ask(client, "one?", max_output_tokens=n, tools=[TOOL])
    assert outline(cut)[1:] == [("weather", '{"city": "Be', "incomplete")]


def test_schemas(client: OpenAI, script: ScriptedModel) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted: Any = {"type": "json_schema", "name": "x", "schema": schema}
    response = ask(client, "json?", text={"format": wanted})
    assert (response.output_text, script.schemas[-1]) == ('{"a": 1}', schema)
    assert response.text.format.type == "json_schema"
    must: Any = {"type": "function", "name": "weather"}
    forced = ask(client, "bare?", tools=[TOOL], tool_choice=must)
    assert outline(forced) == [("weather", CITY, "completed")]
    assert script.schemas[-1] is not None


def said(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    ("asked", "options", "error"),
    [
        ("text?", {"previous_response_id": "resp_1"}, "previous_response_id: this service stores"),
        ("text?", {"conversation": "conv_1"}, "conversation: this service stores no"),
        ("text?", {"background": True}, "background: not here"),
        ("text?", {"temperature": 3}, "temperature: "),
        ("text?", {"max_output_tokens": 10**6}, "maximum context length"),
        ([], {}, "input: expected a list with at least one"),
        (["x", 3], {}, "input"),
        ([{"type": "reasoning"}], {}, "input[0].type: 'reasoning' is none of message, function_c"),
        ([{"role": "robot", "content": "x"}], {}, "input[0].role: 'robot' is none of"),
        (said({"type": "input_file"}), {}, "input[0].content[0].type: 'input_file' is none of"),
        (said({"type": "input_image", "file_id": "a"}), {}, "input[0].content[0]: send the pict"),
        (said({"type": "input_text"}), {}, "input[0].content[0].text: expected a string"),
        (
            [{"type": "function_call_output", "call_id": "a", "output": "x"}],
            {},
            "input[0].tool_call_id: 'a' is the id of no tool call",
        ),
        ([{"type": "function_call", "name": "f"}], {}, "input[0].call_id: expected a string"),
        ("text?", {"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name: 'a b' is not"),
        ("text?", {"tool_choice": {"type": "function", "name": "x"}}, "'x' is no tool"),
        (
            "text?",
            {"tools": [TOOL], "text": {"format": {"type": "json_object"}}},
            "text.format: a schema leaves",
        ),
    ],
)
def test_what_is_wrong_with_a_request(
    client: OpenAI, asked: Any, options: dict[str, Any], error: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, asked, stream=stream, **options)
        assert error in caught.value.body["message"]  # type: ignore[index]
    assert ask(client, "text?").output_text == "It is warm."
