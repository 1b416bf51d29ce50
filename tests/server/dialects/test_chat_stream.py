"""/v1/chat as server-sent events: their order, errors, and clients that go away."""

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, cast

import httpx
import numpy as np
import pytest

from benchmarks.http_client import address_of, form_request
from mico_chat.assistant import Assistant
from mico_chat.media import MediaDecoder
from mico_chat.messages import Message
from mico_server.dialects.chat import ChatTurn
from tests.engine.fake_model import FakeModel
from tests.server.conftest import Start
from tests.server.support.echo import decoding_assistant
from tests.server.support.running import events_of
from tests.server.support.sent import png
from tests.support.fakes import FakeAssistant
from tests.support.waiting import PATIENCE_S, until, until_it


def test_events_tell_the_answer_that_is_given_otherwise(start: Start) -> None:
    client = start(FakeAssistant())
    form = {"message": "What are  these?", "store": "false"}
    files = [("image", ("cat.jpg", b"one")), ("audio", ("purr.ogg", b"two"))]
    whole = client.post("/v1/chat", data=form, files=files).json()
    response = client.post("/v1/chat", data={**form, "stream": "true"}, files=files)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    names, data = zip(*events_of(response.text), strict=True)
    assert names == ("media", *["delta"] * (len(names) - 2), "done")
    begins = {"conversation_id": None, "turn": None}  # store=false
    assert data[0] == {**begins, "media": whole["media"]}
    assert "".join(delta["text"] for delta in data[1:-1]) == whole["answer"]
    assert all(delta["text"] for delta in data[1:-1])
    assert data[-1] == whole
    assert (whole["conversation_id"], whole["turn"]) == (None, None)


def test_choices_and_logprobs_stream_too(start: Start) -> None:
    client = start(FakeAssistant())
    form = {"message": "a b", "n": "3", "logprobs": "0", "stream": "true"}
    events = events_of(client.post("/v1/chat", data=form).text)
    texts = ["", "", ""]
    logprobs: list[list[object]] = [[], [], []]
    for name, data in events:
        if name == "delta":
            texts[data["index"]] += data["text"]
            logprobs[data["index"]] += data.get("logprobs", [])
    done = events[-1][1]
    assert texts == ["[] a b"] * 3 == [choice["text"] for choice in done["choices"]]
    assert logprobs == [choice["logprobs"] for choice in done["choices"]]
    assert all(logprobs)


def streamed(client: httpx.Client, form: dict[str, str]) -> Generator[str, None, None]:
    """The lines of a stream, whose connection ends with the generator."""
    with client.stream("POST", "/v1/chat", data={**form, "stream": "true"}) as response:
        yield from response.iter_lines()


def read_to(lines: Iterator[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


def the_only_conversation(client: httpx.Client) -> dict[str, Any]:
    def answered() -> dict[str, Any]:
        for one in client.get("/v1/conversations").json()["data"]:
            found: dict[str, Any] = client.get(f"/v1/conversations/{one['id']}").json()
            if found["turns"][-1]["finish_reason"] != "unanswered":
                return found
        return {}

    return until(answered)


def test_what_was_said_until_a_client_left_is_kept(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    assistant = FakeAssistant(halfway=(halfway := threading.Event()))
    client = start(assistant, max_requests=1)
    lines = streamed(client, {"message": "one two three"})
    told = json.loads(read_to(lines, 'data: {"conv').removeprefix("data: "))
    assert json.loads(read_to(lines, 'data: {"index"').removeprefix("data: "))["text"] == "[] "
    lines.close()
    assert assistant.cancelled.wait(timeout=PATIENCE_S)
    kept = the_only_conversation(client)
    assert (told["conversation_id"], told["turn"]) == (kept["id"], 1)
    (turn,) = kept["turns"]
    assert (turn["message"], turn["answer"]) == ("one two three", "[] ")
    assert (turn["finish_reason"], turn["usage"]) == ("cancelled", None)
    halfway.set()
    form = {"message": "go on", "conversation_id": str(kept["id"])}
    assert client.post("/v1/chat", data=form).json()["turn"] == 2
    earlier = [Message.user("one two three"), Message.assistant("[] ")]
    assert assistant.asked[-1] == [*earlier, Message.user("go on")]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_nothing_is_kept_of_an_answer_that_had_not_begun(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    assistant = FakeAssistant(gate := threading.Event())
    client = start(assistant, max_requests=1)
    for stream in ("true", "false"):
        with socket.create_connection(address_of(str(client.base_url))) as hasty:
            hasty.sendall(form_request("/v1/chat", {"message": "one", "stream": stream}))
            assert assistant.started.acquire(timeout=PATIENCE_S)
        assert assistant.cancelled.wait(timeout=PATIENCE_S)
        assistant.cancelled.clear()
    gate.set()
    assert client.post("/v1/chat", data={"message": "x", "store": "false"}).status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    # The question was stored, and is taken back.
    until(lambda: not client.get("/v1/conversations").json()["data"])


def test_an_error_after_the_first_event_is_an_event(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    assistant = FakeAssistant(halfway=(halfway := threading.Event()))
    halfway.set()
    client = start(assistant)
    id_ = client.post("/v1/chat", data={"message": "one"}).json()["conversation_id"]
    halfway.clear()
    lines = streamed(client, {"message": "two", "conversation_id": id_})
    read_to(lines, "event: delta")
    assert client.delete(f"/v1/conversations/{id_}").status_code == 200
    halfway.set()
    read_to(lines, "event: error")
    error = json.loads(read_to(lines, "data: ").removeprefix("data: "))["error"]
    assert error["code"] == "not_found_error"
    assert list(lines) == [""]  # the stream ends as a whole one does
    assert not [r for r in caplog.records if r.levelname == "ERROR" and "ASGI" in r.message]


def test_a_stream_that_takes_too_long_says_so(start: Start) -> None:
    assistant = FakeAssistant(halfway=(halfway := threading.Event()))
    client = start(assistant, request_timeout_s=0.3)
    events = events_of(client.post("/v1/chat", data={"message": "one two", "stream": "true"}).text)
    halfway.set()
    assert [name for name, _ in events] == ["media", "delta", "error"]
    assert events[-1][1]["error"]["code"] == "request_timeout_error"
    (turn,) = the_only_conversation(client)["turns"]
    assert turn["finish_reason"] == "cancelled"


# --- progress ---

LONG = {"message": "word " * 150, "stream": "true", "store": "false", "max_tokens": "8"}
PNG, OTHER = (png(np.full((24, 40, 3), value, np.uint8)) for value in (99, 0))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an answer waits for is told, however short it is."""
    monkeypatch.setattr("mico_server.service.PROGRESS_AFTER_S", 0)
    monkeypatch.setattr("mico_server.service.PROGRESS_EVERY_S", 0)


@pytest.fixture
def tiny() -> Iterator[Assistant]:
    with MediaDecoder() as decoder, closing(decoding_assistant(decoder)) as assistant:
        yield assistant


def told(text: str, what: str) -> list[tuple[int, int]]:
    """What was done of how much; it grows, and ends at the total."""
    found = [data for name, data in events_of(text) if name == "progress" and data["what"] == what]
    steps = [(data["done"], data["total"]) for data in found]
    assert steps == sorted(set(steps))
    assert not steps or steps[-1][0] == steps[-1][1]
    return steps


def answered(text: str) -> list[str]:
    said = [data["text"] for name, data in events_of(text) if name == "delta"]
    return [*said, events_of(text)[-1][1]["answer"]]


@pytest.mark.usefixtures("at_once")
def test_a_long_prompt_and_media_tell_how_far_they_are(
    start: Start, tiny: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(tiny)
    files = [("image", ("a.png", PNG)), ("image", ("b.png", OTHER))]
    loud = client.post("/v1/chat?progress=true", data=LONG, files=files).text
    steps = told(loud, "prompt")
    assert len(steps) > 2
    (total,) = {total for _, total in steps}
    done = events_of(loud)[-1][1]
    assert total == done["usage"]["prompt_tokens"] > 750
    assert told(loud, "media")[-1] == (4, 4)  # each is encoded and read
    names = [name for name, _ in events_of(loud)]
    assert names.index("media") > names.index("progress")
    assert answered(loud) == answered(client.post("/v1/chat", data=LONG, files=files).text)
    # What was computed before takes no steps, and what is short takes one.
    again = client.post("/v1/chat?progress=true", data=LONG, files=files).text
    assert told(again, "prompt") == []
    short = {**LONG, "message": "Hi"}
    assert told(client.post("/v1/chat?progress=true", data=short).text, "prompt") == []
    assert (
        "event: progress" not in client.post("/v1/chat", data={**LONG, "message": "x" * 700}).text
    )


@pytest.mark.usefixtures("at_once")
def test_two_clients_are_told_each_of_its_own_prompt(start: Start, tiny: Assistant) -> None:
    client = start(tiny)

    def ask(n: int) -> tuple[str, int]:
        form = {**LONG, "message": f"{n}" * (350 + 100 * n)}
        text = client.post("/v1/chat?progress=true", data=form).text
        return text, events_of(text)[-1][1]["usage"]["prompt_tokens"]

    with ThreadPoolExecutor(4) as pool:
        for text, total in pool.map(ask, range(4)):
            assert {of for _, of in told(text, "prompt")} == {total}


@pytest.mark.usefixtures("at_once")
def test_a_client_that_leaves_in_the_middle_of_its_prompt(
    start: Start, tiny: Assistant, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, steps, run = threading.Event(), itertools.count(), FakeModel.run

    def held(model: FakeModel, batch: Any) -> Any:
        assert next(steps) == 0 or gate.wait(PATIENCE_S)
        return run(model, batch)

    monkeypatch.setattr(FakeModel, "run", held)
    caplog.set_level("INFO", "mico_server.service")
    client = start(tiny, max_requests=1)
    form = {**LONG, "store": "true"}
    with client.stream("POST", "/v1/chat?progress=true", data=form) as response:
        lines = response.iter_lines()
        read_to(lines, "event: progress")
        first = json.loads(read_to(lines, "data: ").removeprefix("data: "))
        assert 0 < first["done"] < first["total"]
    until(lambda: "the client disconnected" in caplog.text)  # else the first word may come before
    gate.set()
    until(lambda: not tiny.engine.stats().running)
    until(lambda: not client.get("/v1/conversations").json()["data"])
    assert until(lambda: client.post("/v1/chat", data=form).status_code == 200)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.usefixtures("at_once")
def test_an_error_behind_progress_is_an_event_and_one_before_it_has_its_status(
    start: Start, tiny: Assistant
) -> None:
    client = start(tiny)
    files, form = [("image", ("a.png", PNG))], {**LONG, "message": "x" * 999}
    events = events_of(client.post("/v1/chat?progress=true", data=form, files=files).text)
    assert {name for name, _ in events[:-1]} == {"progress"}
    assert events[-1][1]["error"]["code"] == "context_length_exceeded"
    wrong = [("image", ("a.png", b"no picture"))]
    refused = client.post("/v1/chat?progress=true", data=LONG, files=wrong)
    assert refused.status_code == 422


@pytest.mark.usefixtures("at_once")
def test_an_explanation_tells_its_steps(start: Start, tiny: Assistant) -> None:
    client = start(tiny)
    form, files = {"message": "What?", "max_tokens": "4"}, [("image", ("a.png", PNG))]
    asked = client.post("/v1/chat", data=form, files=files).json()
    path = f"/v1/conversations/{asked['conversation_id']}/turns/1/explanation"
    text = client.post(f"{path}?progress=true").text
    steps = told(text, "explain")
    assert len(steps) > 17
    assert {name for name, _ in events_of(text)[:-1]} == {"progress"}
    assert not told(text, "prompt")
    assert events_of(text)[-1] == ("done", client.post(path).json())


def test_a_client_that_leaves_while_the_answer_is_kept_loses_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, keep_so_far = threading.Event(), ChatTurn.keep_so_far
    answering: list[asyncio.Task[Any]] = []

    def noted(turn: ChatTurn, gathered: Any) -> None:
        answering.append(cast("asyncio.Task[Any]", asyncio.current_task()))
        keep_so_far(turn, gathered)

    async def saving(turn: ChatTurn, gathered: Any) -> None:
        """A part is being saved as the answer ends, until its client has left."""
        try:
            await asyncio.sleep(PATIENCE_S)
        finally:
            ending.set()
            await until_it(lambda: answering[-1].cancelling())

    monkeypatch.setattr(ChatTurn, "keep_so_far", noted)
    monkeypatch.setattr(ChatTurn, "_save", saving)
    client = start(FakeAssistant())
    with client.stream("POST", "/v1/chat", data={"message": "Hi", "stream": "true"}) as response:
        lines = response.iter_lines()
        read_to(lines, "event: media")
        path = f"/v1/conversations/{json.loads(next(lines)[len('data: ') :])['conversation_id']}"
        assert ending.wait(PATIENCE_S)
    until(lambda: "unanswered" not in client.get(path).text)
    (turn,) = client.get(path).json()["turns"]
    assert (turn["answer"], turn["finish_reason"]) == ("[] Hi", "stop")
