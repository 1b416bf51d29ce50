"""Anthropic's own client against the service: text, streams, tools, media, counts and errors."""

import base64
import json
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from mico_chat.assistant import Assistant
from mico_server.dialects.messages import MessagesRequest
from mico_server.routes.batches import ENDPOINTS
from mico_server.settings import ServerSettings
from tests.server.support import sent
from tests.server.support.running import new_key, running
from tests.server.support.scripted import ScriptedModel, scripted_assistant
from tests.support.fakes import FakeAssistant, FakeDecoder

CITY = '{"city": "Berlin"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {CITY}}}\n</tool_call>'
ANSWERS = {"one?": f"Let me see.\n{CALL}", "text?": "No call is needed.", "WARM": "It is warm."}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}
PNG = base64.b64encode(sent.png(sent.square())).decode()
PICTURE: Any = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": PNG},
}


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return ScriptedModel(ANSWERS)


@pytest.fixture(scope="module")
def clients(
    model: ScriptedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Clients of a model that follows a script, and of one that names the media it is shown."""
    assistants: dict[str, Assistant] = {
        "scripted": scripted_assistant(FakeDecoder(), model),
        "fake": FakeAssistant(),
    }
    with ExitStack() as stack:
        found = {}
        for name, assistant in assistants.items():
            settings = ServerSettings(data_dir=tmp_path_factory.mktemp("data"))
            key = new_key(settings.data_dir, "anthropic")
            http = stack.enter_context(running(partial(_same, assistant), settings))
            options: dict[str, Any] = {"base_url": str(http.base_url), "api_key": key}
            found[name] = stack.enter_context(Anthropic(max_retries=0, **options))
        yield found


def _same(assistant: Assistant) -> Assistant:
    return assistant


def asked(client: Any, content: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    request: dict[str, Any] = {"model": "tiny", "max_tokens": 200, "messages": messages}
    return client.messages.create(**{**request, **options})


def test_text_and_its_usage(clients: dict[str, Any]) -> None:
    message = asked(clients["scripted"], "text?", system=[{"type": "text", "text": "Be brief."}])
    assert [block.to_dict() for block in message.content] == [
        {"type": "text", "text": "No call is needed."}
    ]
    assert (message.role, message.stop_reason, message.stop_sequence) == (
        "assistant",
        "end_turn",
        None,
    )
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0
    assert message.id.startswith("msg_")


def test_a_stop_text_and_the_limit_are_told(clients: dict[str, Any]) -> None:
    stopped = asked(clients["scripted"], "text?", stop_sequences=["needed", "Zebra"])
    assert stopped.content[0].text == "No call is "
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "needed")
    assert asked(clients["scripted"], "text?", max_tokens=3).stop_reason == "max_tokens"


def test_a_stream_with_a_call_gives_the_message_of_the_answer(
    clients: dict[str, Any],
) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 200,
        "tools": [WEATHER],
        "messages": [{"role": "user", "content": "one?"}],
    }
    whole = clients["scripted"].messages.create(**request)
    assert [block.type for block in whole.content] == ["text", "tool_use"]
    assert whole.content[1].input == json.loads(CITY)
    assert whole.stop_reason == "tool_use"
    with clients["scripted"].messages.stream(**request) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[0].text == whole.content[0].text
    assert final.content[1].input == whole.content[1].input
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)
    assert counted == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert events[0] == "message_start"
    assert events[-1] == "message_stop"
    assert events.count("content_block_start") == events.count("content_block_stop") == 2


def test_a_result_is_answered_and_earlier_thoughts_are_left_out(
    clients: dict[str, Any], model: ScriptedModel
) -> None:
    thought = {"type": "thinking", "thinking": "SECRET", "signature": ""}
    call = {"type": "tool_use", "id": "call_1", "name": "weather", "input": json.loads(CITY)}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "WARM"}
    messages: Any = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": [thought, {"type": "text", "text": "I ask."}, call]},
        {"role": "user", "content": [result]},
    ]
    client = clients["scripted"]
    message = client.messages.create(
        model="tiny", max_tokens=60, messages=messages, tools=[WEATHER]
    )
    assert message.content[0].to_dict() == {"type": "text", "text": "It is warm."}
    assert "I ask." in model.prompts[-1]
    assert "SECRET" not in model.prompts[-1]


def test_media_of_every_form_and_turns_of_one_speaker(clients: dict[str, Any]) -> None:
    wav = {"type": "audio_url", "audio_url": {"url": sent.data_uri("audio/wav", sent.wav())}}
    parts = [PICTURE, wav, {"type": "text", "text": "what is it"}]
    message = asked(clients["fake"], parts, model="fake")
    assert "image" in message.content[0].text
    assert "audio" in message.content[0].text
    assert [one["kind"] for one in message.to_dict()["media"]] == ["image", "audio"]
    turns = [{"role": "user", "content": [PICTURE]}, {"role": "user", "content": "what is it"}]
    joined = clients["fake"].messages.create(model="fake", max_tokens=20, messages=turns)
    assert "image" in joined.content[0].text


def test_an_answer_continues_the_assistants_last_message(
    clients: dict[str, Any], model: ScriptedModel
) -> None:
    messages: Any = [
        {"role": "user", "content": "text?"},
        {"role": "assistant", "content": "No call"},
    ]
    message = clients["scripted"].messages.create(model="tiny", max_tokens=60, messages=messages)
    assert message.content[0].text == " is needed."
    request: dict[str, Any] = {"model": "tiny", "max_tokens": 60, "messages": messages}
    with clients["scripted"].messages.stream(**request) as stream:
        assert "".join(stream.text_stream) == " is needed."


def test_the_count_is_what_the_request_then_takes(clients: dict[str, Any]) -> None:
    messages: Any = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "text?"}]}]
    client = clients["scripted"]
    counted = client.messages.count_tokens(model="tiny", messages=messages)
    usage = client.messages.create(model="tiny", max_tokens=9, messages=messages).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("request_", "error", "kind", "names"),
    [
        ({"tools": [{"type": "web_search", "name": "w"}]}, 400, "invalid_request", "tools[0]"),
        ({"tool_choice": {"type": "tool", "name": "no"}}, 400, "invalid_request", "tool_choice"),
        ({"model": "other"}, 404, "not_found", "other"),
        ({"temperature": 9}, 400, "invalid_request", "temperature"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid",
            "source",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_request", "role"),
        ({"frob": 1}, 400, "invalid_request", "frob"),
    ],
)
def test_errors_have_anthropics_form(
    clients: dict[str, Any], request_: dict[str, Any], error: int, kind: str, names: str
) -> None:
    extra = {name: request_.pop(name) for name in ("frob", "temperature") if name in request_}
    with pytest.raises(anthropic.APIStatusError) as raised:
        asked(clients["fake"], "hello", **{"model": "fake", "extra_body": extra, **request_})
    assert raised.value.status_code == error
    body = raised.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["type"].startswith(kind)
    assert names in body["error"]["message"]


def test_a_wrong_key_and_an_error_within_a_stream(clients: dict[str, Any]) -> None:
    with pytest.raises(anthropic.AuthenticationError) as refused:
        asked(clients["fake"].with_options(api_key="wrong"), "hello", model="fake")
    assert "authentication_error" in str(refused.value.body)


def test_batches_and_estimates_know_the_format() -> None:
    assert ENDPOINTS["/v1/messages"].body is MessagesRequest
