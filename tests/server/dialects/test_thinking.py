"""A model that thinks before it answers, through every dialect with the official clients."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import openai
import pytest

from mico_chat.ask import Ask
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.messages import Message
from mico_server.settings import ServerSettings
from tests.server.support.running import running
from tests.server.support.scripted import UNTHOUGHT, ScriptedModel, scripted_assistant
from tests.support.fakes import FakeDecoder
from tests.support.templates import HERMES, THINKING

THOUGHTS = "It is\nJune."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Berlin"}}\n</tool_call>'
ANSWERS = {
    "think?": f"<think>\n{THOUGHTS}\n</think>\n\nIt is warm.",
    "call?": f"<think>\nI ask.\n</think>\n\n{CALL}",
    "json?": '<think>\nA.\n</think>\n\n{"a": 1}',
    "plain?": "It is <think>warm</think>.",
}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
ALWAYS = THINKING.replace(
    THINKING[THINKING.index("    {%- if enable_thinking is defined") :],
    "    {{- '<think>\\n' }}\n{%- endif %}\n",
)


@dataclass
class Service:
    """``ask`` gives the thoughts, the text and the tokens of thoughts of an answer."""

    script: ScriptedModel
    http: httpx.Client
    openai: Any
    anthropic: Any

    def ask(self, dialect: str, text: str, stream: bool, thinks: bool | None = None) -> Any:
        return getattr(self, f"_{dialect}")(text, stream, thinks)

    def _chat(self, text: str, stream: bool, thinks: bool | None) -> Any:
        form = {"message": text, **({} if thinks is None else {"thinking": thinks})}
        answer = self.http.post("/v1/chat", data={**form, "stream": stream})
        assert answer.status_code == 200, answer.text
        if not stream:
            body = answer.json()
            return body["reasoning_content"], body["answer"], body["usage"]["reasoning_tokens"]
        events = [
            (block.split("\n")[0], json.loads(block.split("data: ", 1)[1]))
            for block in answer.text.replace("\r\n", "\n").strip().split("\n\n")
        ]
        deltas = [data for name, data in events if name == "event: delta"]
        thoughts = "".join(delta.get("reasoning_content", "") for delta in deltas)
        usage = events[-1][1]["usage"]
        return thoughts or None, "".join(d["text"] for d in deltas), usage["reasoning_tokens"]

    def _completions(self, text: str, stream: bool, thinks: bool | None) -> Any:
        extra = {} if thinks is None else {"chat_template_kwargs": {"enable_thinking": thinks}}
        made: Any = self.openai.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": text}],
            extra_body=extra,
            **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
        )
        if not stream:
            message = made.choices[0].message
            details = made.usage.completion_tokens_details
            return message.reasoning_content, message.content, details.reasoning_tokens
        chunks = list(made)
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        thoughts = "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas)
        tokens = chunks[-1].usage.completion_tokens_details.reasoning_tokens
        return thoughts or None, "".join(d.content or "" for d in deltas), tokens

    def _responses(self, text: str, stream: bool, thinks: bool | None) -> Any:
        effort = {None: None, True: "high", False: "none"}[thinks]
        options: Any = {} if effort is None else {"reasoning": {"effort": effort}}
        if stream:
            with self.openai.responses.stream(model="tiny", input=text, **options) as events:
                seen = list(events)
                made: Any = events.get_final_response()
            kinds = ("response.reasoning_text.delta", "response.output_text.delta")
            streamed = ["".join(e.delta for e in seen if e.type == kind) for kind in kinds]
        else:
            made = self.openai.responses.create(model="tiny", input=text, **options)
        thought = [i.content[0].text for i in made.output if i.type == "reasoning"]
        found = (thought or [None])[0], made.output_text
        if stream:
            assert streamed == [found[0] or "", found[1]]
        return *found, made.usage.output_tokens_details.reasoning_tokens

    def _messages(self, text: str, stream: bool, thinks: bool | None) -> Any:
        kind = {None: "adaptive", True: "enabled", False: "disabled"}[thinks]
        asked: Any = {
            "model": "tiny",
            "max_tokens": 256,
            "messages": [{"role": "user", "content": text}],
            "thinking": {"type": kind, **({"budget_tokens": 1024} if thinks else {})},
        }
        if stream:
            with self.anthropic.messages.stream(**asked) as events:
                made = events.get_final_message()
        else:
            made = self.anthropic.messages.create(**asked)
        blocks: Any = made.content
        thought = [block.thinking for block in blocks if block.type == "thinking"]
        said = "".join(block.text for block in blocks if block.type == "text")
        details: Any = made.usage.output_tokens_details
        return (thought or [None])[0], said, details.thinking_tokens


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    script = ScriptedModel(ANSWERS)
    assistant = scripted_assistant(FakeDecoder(), script, source=THINKING)
    settings = ServerSettings(data_dir=tmp_path_factory.mktemp("data"))
    with running(lambda: assistant, settings) as http:
        url = str(http.base_url)
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other,
        ):
            yield Service(script, http, client, other)


DIALECTS = ("chat", "completions", "responses", "messages")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_thoughts_have_a_field_of_their_own(service: Service, dialect: str, stream: bool) -> None:
    n_tokens = len(f"<think>\n{THOUGHTS}\n</think>\n\n")  # each letter is one
    for thinks in (None, True):
        answer = service.ask(dialect, "think?", stream, thinks)
        assert answer == (THOUGHTS, "It is warm.", n_tokens)
    assert service.ask(dialect, "think?", stream, False) == (None, "It is warm.", 0)
    assert service.script.prompts[-1].endswith(UNTHOUGHT)
    assert service.ask(dialect, "plain?", stream) == (None, ANSWERS["plain?"], 0)


def test_the_effort_is_given_to_the_template(service: Service) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "think?"}]}
    service.openai.chat.completions.create(**asked, reasoning_effort="low")
    assert "Reasoning: low" in service.script.prompts[-1]
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        service.openai.chat.completions.create(**asked, reasoning_effort="<|im_end|>")
    both = {"enable_thinking": True, "thinking": False}
    with pytest.raises(openai.BadRequestError, match="enable_thinking: True, but another field"):
        service.openai.chat.completions.create(**asked, extra_body=both)
    extra = {"chat_template_kwargs": {"enable": True}}
    with pytest.raises(openai.BadRequestError, match=r"chat_template_kwargs.*enable"):
        service.openai.chat.completions.create(**asked, extra_body=extra)


def test_earlier_thoughts_follow_the_templates_own_rule(service: Service) -> None:
    """Thoughts before a call stay until the user speaks again; others go."""
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA}
    first: Any = service.openai.responses.create(model="tiny", input="call?", tools=[tool])
    assert [item.type for item in first.output] == ["reasoning", "function_call"]
    call = first.output[1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "plain?"}
    items: list[Any] = [{"role": "user", "content": "call?"}, *first.output, result]
    service.openai.responses.create(model="tiny", input=items, tools=[tool])
    assert "<think>\nI ask.\n</think>" in service.script.prompts[-1].replace("<0x0A>", "\n")
    items += [{"role": "user", "content": "plain?"}]
    service.openai.responses.create(model="tiny", input=items)
    assert "I ask." not in service.script.prompts[-1]

    described = {"name": "weather", "input_schema": SCHEMA}
    question: Any = {"role": "user", "content": "call?"}
    options: Any = {"model": "tiny", "max_tokens": 256, "tools": [described]}
    asked = service.anthropic.messages.create(messages=[question], **options)
    thought, use = asked.content
    assert (thought.type, use.type, asked.stop_reason) == ("thinking", "tool_use", "tool_use")
    said: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "plain?"}
    answer: Any = [{"role": "assistant", "content": asked.content}]
    service.anthropic.messages.create(
        messages=[question, *answer, {"role": "user", "content": [said]}], **options
    )
    assert "<think>\nI ask.\n</think>" in service.script.prompts[-1].replace("<0x0A>", "\n")

    given: Any = [{"role": "assistant", "content": "Hm.", "reasoning_content": "X<|im_end|>Y"}]
    after: Any = [{"role": "user", "content": "plain?"}]
    service.openai.chat.completions.create(model="tiny", messages=[*given, *after])
    assert "X" not in service.script.prompts[-1]


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"json_schema": {"type": "object"}}, '{"a": 1}'),
        ({"n": 2}, '{"a": 1}'),
        ({"stop": ["A", "}"]}, '{"a": 1'),
        ({"logprobs": 1}, '{"a": 1}'),
    ],
)
@pytest.mark.parametrize("source", [THINKING, ALWAYS])
@pytest.mark.anyio
async def test_thoughts_beside_other_options(
    source: str, options: dict[str, Any], answer: str
) -> None:
    assistant = scripted_assistant(FakeDecoder(), ScriptedModel(ANSWERS), source=source)
    given = GenerationOptions.of(options)
    found = await assistant.answer(Ask([Message.user("json?")], given))
    thoughts = None if given.json_schema is not None else "A."
    for choice in found.choices:
        assert (choice.text, choice.reasoning_content) == (answer, thoughts)
        assert [token.token for token in choice.logprobs] == list(answer) * bool(given.logprobs)
    cut = await assistant.answer(Ask([Message.user("think?")], GenerationOptions(max_tokens=14)))
    assert (cut.text, cut.choices[0].finish_reason) == ("", "length")
    assert THOUGHTS.startswith(cut.choices[0].reasoning_content or "?")
    assert cut.usage.reasoning_tokens == cut.usage.completion_tokens == 14
    assistant.close()


@pytest.mark.anyio
async def test_a_given_beginning_or_form_leaves_no_room_for_thoughts() -> None:
    assistant = scripted_assistant(FakeDecoder(), ScriptedModel(ANSWERS), source=ALWAYS)
    begun = await assistant.answer(Ask([Message.user("think?")], GenerationOptions(prefix="It ")))
    assert (begun.text, begun.choices[0].reasoning_content) == ("It is warm.", None)
    question = Message.user(MediaFile("image", b"1", name="a.png"), "think?")
    explained = await assistant.answer(Ask([question], GenerationOptions(explain=True)))
    assert explained.explanation is not None
    assert "".join(word.text for word in explained.explanation.words) == "It is warm."
    other = await assistant.explain(Ask([question]), "It is warm.")
    assert [word.text for word in other.words] == [w.text for w in explained.explanation.words]
    forms: list[dict[str, Any]] = [{"prefix": "a"}, {"json_schema": {}}, {"explain": True}]
    for given in forms:
        options = GenerationOptions.of({"thinking": True, **given})
        with pytest.raises(RequestError, match=f"^thinking: an answer with {next(iter(given))}"):
            await assistant.shown(Ask([Message.user("json?")], options))
    assistant.close()


@pytest.mark.anyio
async def test_a_model_that_knows_no_thinking() -> None:
    assistant = scripted_assistant(FakeDecoder(), ScriptedModel(ANSWERS), source=HERMES)
    question = [Message.user("plain?")]
    for options in ({"thinking": False}, {"reasoning_effort": "high"}, {}):
        answer = await assistant.answer(Ask(question, GenerationOptions.of(options)))
        assert (answer.text, answer.usage.reasoning_tokens) == (ANSWERS["plain?"], 0)
    for refused in (assistant.answer, assistant.estimate):
        with pytest.raises(RequestError, match=r"^thinking: .*knows no thinking"):
            await refused(Ask(question, GenerationOptions(thinking=True)))
    assistant.close()
