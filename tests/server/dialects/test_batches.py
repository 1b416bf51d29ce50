"""OpenAI's own client sends files and batches, to a service that restarts now and then."""

import asyncio
import json
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Batch, BatchError

from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.engine.base import Delta
from mico_chat.errors import RequestError
from mico_server import batch_runner
from mico_server.batch_runner import BatchRunner
from mico_server.errors import UnavailableError
from mico_server.store.batches import BatchStore
from tests.server.conftest import BOTH, Start
from tests.server.support.running import new_key, openai_to
from tests.support.fakes import FakeAssistant
from tests.support.waiting import PATIENCE_S, until

CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"


def service(
    folder: Path, assistant: Assistant, key: str = "none", **settings: Any
) -> AbstractContextManager[OpenAI]:
    return openai_to(assistant, folder / "data", key, **settings)


def line(id_: str, said: str = "hello", url: str = CHAT, **body: Any) -> dict[str, Any]:
    asked = {"model": "fake", "messages": [{"role": "user", "content": said}], **body}
    return {"custom_id": id_, "method": "POST", "url": url, "body": asked}


def jsonl(lines: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def begin(client: OpenAI, lines: Sequence[Any], endpoint: Any = CHAT) -> Batch:
    file = client.files.create(file=("asked.jsonl", jsonl(lines)), purpose="batch")
    return create(client, file.id, endpoint, metadata={"a": "b"})


def create(client: OpenAI, file: str, endpoint: Any = CHAT, **more: Any) -> Batch:
    return client.batches.create(
        input_file_id=file, endpoint=endpoint, completion_window="24h", **more
    )


def first_error(batch: Batch) -> BatchError:
    assert batch.errors is not None
    assert batch.errors.data is not None
    return batch.errors.data[0]


def ended(client: OpenAI, batch: Batch) -> Batch:
    def check() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed", "cancelled") else None

    found = until(check)
    assert found is not None
    return found


def lines_of(client: OpenAI, file: str | None) -> dict[str, Any]:
    assert file is not None
    found = [json.loads(one) for one in client.files.content(file).text.splitlines()]
    assert len({one["id"] for one in found}) == len(found)
    return {one["custom_id"]: one["response"] for one in found}


@BOTH
def test_a_batch_is_answered(tmp_path: Path, database_url: str) -> None:
    with service(tmp_path, FakeAssistant(), database_url=database_url) as client:
        asked = [
            line("one", "first"),
            line("two", "second", n=2),
            line("bad", temperature=7),
            line("crash", "crash"),
            line("stream", stream=True),
            line("other", model="gpt"),
        ]
        batch = begin(client, asked)
        assert (batch.object, batch.endpoint, batch.metadata) == ("batch", CHAT, {"a": "b"})
        batch = ended(client, batch)
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (6, 2, 4)
        assert batch.status == "completed"
        assert batch.completed_at
        assert batch.in_progress_at
        answers = lines_of(client, batch.output_file_id)
        assert {id_: one["status_code"] for id_, one in answers.items()} == {"one": 200, "two": 200}
        assert answers["one"]["body"]["choices"][0]["message"]["content"] == "[] first"
        assert len(answers["two"]["body"]["choices"]) == 2
        errors = lines_of(client, batch.error_file_id)
        statuses = {id_: one["status_code"] for id_, one in errors.items()}
        assert statuses == {"bad": 400, "crash": 500, "stream": 400, "other": 404}
        assert errors["bad"]["body"]["error"]["param"] == "temperature"
        assert "secret" not in json.dumps(errors)
        names = {file.filename: file.purpose for file in client.files.list()}
        assert names == {
            "asked.jsonl": "batch",
            f"{batch.id}_output.jsonl": "batch_output",
            f"{batch.id}_error.jsonl": "batch_output",
        }
        assert [one.id for one in client.batches.list()] == [batch.id]
        (newest,) = client.files.list(limit=1).data
        older = client.files.list(limit=1, after=newest.id).data
        assert older[0].id != newest.id


def test_responses_in_a_batch(tmp_path: Path) -> None:
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/responses"}
    with service(tmp_path, FakeAssistant()) as client:
        bodies = ({"model": "fake", "input": "hello"}, {"model": "fake"})
        lines = [{**asked, "custom_id": str(n), "body": body} for n, body in enumerate(bodies)]
        batch = ended(client, begin(client, lines, "/v1/responses"))
        answers = lines_of(client, batch.output_file_id)
        assert answers["0"]["body"]["output"][0]["content"][0]["text"] == "[] hello"
        assert lines_of(client, batch.error_file_id)["1"]["body"]["error"]["param"] == "input"
        embedding = {**asked, "url": "/v1/embeddings", "body": {"model": "fake", "input": "x"}}
        batch = ended(client, begin(client, [embedding], "/v1/embeddings"))
        assert lines_of(client, batch.error_file_id)["a"]["status_code"] == 501


@pytest.mark.parametrize(
    ("content", "number", "said"),
    [
        (b"nothing\n", 1, "not JSON"),
        (b'\n{"a":\n', 2, "not JSON"),
        (b"[1]\n", 1, "expected an object"),
        (b"\n\n", None, "no requests"),
        (jsonl([{**line("a"), "custom_id": 3}]), 1, "expected a text"),
        (jsonl([line("a"), line("a")]), 2, "'a' is there twice"),
        (jsonl([{**line("a"), "method": "GET"}]), 1, "expected POST"),
        (jsonl([line("a", url="/v1/files")]), 1, f"expected {CHAT}"),
        (jsonl([{**line("a"), "body": 3}]), 1, "expected an object"),
        (b"[" * 100_000 + b"\n", 1, "not JSON"),
        (jsonl([line("a", "x" * 3_000_000)]), 1, "MICO_SERVER_MAX_JSON_BYTES"),
        (jsonl([line("\ud800")]), 1, "custom_id: half"),
        (jsonl([line("a"), line("b", metadata={"half": "\udc00"})]), 2, "body.metadata.half: half"),
        (jsonl([line("a")]).replace(b"hello", b"\xed\xa0\x80"), 1, "not JSON"),
        (jsonl([line("a", metadata=[0] * 150_000)]), 1, "MICO_SERVER_MAX_JSON_VALUES"),
        (jsonl([{**line("a"), "body": {str(n): 0 for n in range(300)}}]), 1, "over 256"),
        (jsonl([line("a" * 513)]), 1, "513 characters, over 512"),
    ],
)
def test_a_file_that_is_wrong(
    tmp_path: Path, content: bytes, number: int | None, said: str
) -> None:
    limits: dict[str, Any] = {"max_json_bytes": 2_000_000, "max_json_values": 150_000}
    with service(tmp_path, FakeAssistant(), **limits) as client:
        file = client.files.create(file=("a.jsonl", content), purpose="batch")
        batch = ended(client, create(client, file.id))
        assert (batch.status, batch.output_file_id) == ("failed", None)
        assert first_error(batch).line == number
        assert said in str(first_error(batch).message)
        good = ended(client, begin(client, [line("\N{GRINNING FACE}" * 512)]))
        assert good.status == "completed"


def test_what_is_refused(tmp_path: Path) -> None:
    gate = threading.Event()
    with service(tmp_path, FakeAssistant(gate)) as client:
        for purpose, content in (("vision", b"{}"), ("batch", b"")):
            with pytest.raises(openai.BadRequestError):
                client.files.create(file=("a", content), purpose=purpose)  # type: ignore[arg-type]
        for id_ in ("file-" + "0" * 24, "../../etc/passwd", "x"):
            with pytest.raises(openai.NotFoundError):
                client.files.retrieve(id_)
            with pytest.raises(openai.NotFoundError):
                create(client, id_)
        batch = begin(client, [line("a")])
        with pytest.raises(openai.ConflictError, match="cancel it first"):
            client.files.delete(batch.input_file_id)
        with pytest.raises(openai.BadRequestError, match="endpoint"):
            create(client, batch.input_file_id, "/v1/audio/speech")
        for metadata in ({str(n): "" for n in range(17)}, {"a" * 65: "b"}, {"a": "b" * 513}):
            with pytest.raises(openai.BadRequestError, match="metadata"):
                create(client, batch.input_file_id, metadata=metadata)
        gate.set()
        batch = ended(client, batch)
        with pytest.raises(openai.ConflictError, match="has ended"):
            client.batches.cancel(batch.id)
        assert client.files.delete(batch.input_file_id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.content(batch.input_file_id)
        assert lines_of(client, batch.output_file_id)


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_a_batch_leaves_room_for_those_who_wait(
    tmp_path: Path, pause_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where lines take their time between their turn and the model."""
    asked = BatchRunner._asked

    async def paused(self: BatchRunner, *given: Any) -> Any:
        await asyncio.sleep(pause_s)
        return await asked(self, *given)

    monkeypatch.setattr(BatchRunner, "_asked", paused)
    gate = threading.Event()
    assistant = FakeAssistant(gate)
    settings: dict[str, Any] = {"max_requests": 4, "max_batch_requests": 64}
    with service(tmp_path, assistant, **settings) as client:
        batch = begin(client, [line(str(n)) for n in range(20)])
        for _ in range(2):
            assert assistant.started.acquire(timeout=PATIENCE_S)
        # Half of the room is the clients': nobody of them is refused, nor is a third line begun.
        answers: list[Any] = []

        def ask() -> None:
            answers.append(
                client.chat.completions.create(
                    model="fake", messages=[{"role": "user", "content": "me"}]
                )
            )

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert assistant.started.acquire(timeout=PATIENCE_S)
        assert not assistant.started.acquire(timeout=0.5)
        gate.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [one.choices[0].message.content for one in answers] == ["[] me"] * 2
        assert ended(client, batch).status == "completed"


def test_a_batch_that_is_cancelled_keeps_its_answers(tmp_path: Path) -> None:
    gate = threading.Event()
    assistant = FakeAssistant(gate)
    with service(tmp_path, assistant, max_batch_requests=1) as client:
        batch = begin(client, [line(str(n)) for n in range(9)])
        assert assistant.started.acquire(timeout=PATIENCE_S)
        assert client.batches.cancel(batch.id).status == "cancelling"
        waiting = begin(client, [line("a")])
        client.batches.cancel(waiting.id)
        gate.set()
        batch = ended(client, batch)
        assert batch.status == "cancelled"
        assert list(lines_of(client, batch.output_file_id)) == ["0"]
        assert ended(client, waiting).status == "cancelled"


@BOTH
def test_a_batch_goes_on_after_a_restart(tmp_path: Path, database_url: str) -> None:
    words = threading.Semaphore(3)

    class Slow(FakeAssistant):
        async def stream(self, *args: Any, **options: Any) -> Any:
            await self._wait_until(lambda: words.acquire(blocking=False))
            async for item in super().stream(*args, **options):
                yield item

    settings: dict[str, Any] = {
        "database_url": database_url,
        "max_batch_requests": 1,
        "shutdown_timeout_s": 1,
    }
    with service(tmp_path, Slow(), **settings) as client:
        batch = begin(client, [line(str(n), f"number {n}") for n in range(6)])

        def done() -> bool:
            counts = client.batches.retrieve(batch.id).request_counts
            return counts is not None and counts.completed == 3

        until(done)
    for path in (tmp_path / "data/media/uploads").iterdir():
        if b'"response"' in path.read_bytes():  # as if the process had died while it wrote
            first, _, third = path.read_bytes().splitlines(keepends=True)
            torn = b'{"id": "batch_req_1", "custom_id": "4", "resp'
            path.write_bytes(first + bytes(64) + b"\n" + third + torn)
    assistant = FakeAssistant()
    with service(tmp_path, assistant, **settings) as client:
        batch = ended(client, batch)
        assert batch.status == "completed"
        answers = lines_of(client, batch.output_file_id)
        assert {
            id_: one["body"]["choices"][0]["message"]["content"] for id_, one in answers.items()
        } == {str(n): f"[] number {n}" for n in range(6)}
        assert len(assistant.asked) == 4, "what was answered before is not asked again"


def test_a_fault_ends_its_batch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = batch_runner._Lines.add

    def failing(self: Any, answered: Any) -> None:
        if answered["custom_id"] == "full":
            raise OSError(28, "No space left on device")
        add(self, answered)

    monkeypatch.setattr(batch_runner._Lines, "add", failing)
    with service(tmp_path, FakeAssistant(), max_batch_requests=1) as client:
        batch = begin(client, [line("a"), line("full"), line("b")])
        other = begin(client, [line("c")])
        batch = ended(client, batch)
        assert (batch.status, list(lines_of(client, batch.output_file_id))) == ("failed", ["a"])
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed) == (3, 1)
        assert first_error(batch).code == "server_error"
        assert ended(client, other).status == "completed"


def test_a_batch_waits_while_the_database_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, away = BatchStore.count, threading.Event()

    async def counted(self: BatchStore, *given: Any, **counts: Any) -> Any:
        if not away.is_set():
            away.set()
            raise UnavailableError("the database cannot be reached")
        return await count(self, *given, **counts)

    monkeypatch.setattr(BatchStore, "count", counted)
    with service(tmp_path, FakeAssistant()) as client:
        batch = begin(client, [line("a")])
        assert away.wait(PATIENCE_S)
        batches = [batch, begin(client, [line("b")])]  # which begins a round
        assert [ended(client, one).status for one in batches] == ["completed"] * 2


def test_an_answer_that_is_no_text(tmp_path: Path) -> None:
    class Halves(FakeAssistant):
        async def stream(self, *args: Any, **options: Any) -> Any:
            async for item in super().stream(*args, **options):
                if isinstance(item, Delta) and item.text == "hello":
                    if len(self.asked) > 1:
                        raise RequestError("no answer to \udfff")
                    item = item.model_copy(update={"text": "\ud800"})
                yield item

    with service(tmp_path, Halves(), max_batch_requests=1) as client:
        batch = ended(client, begin(client, [line(id_) for id_ in "ab"]))
        assert batch.status == "completed"
        said = lines_of(client, batch.output_file_id)["a"]["body"]["choices"][0]["message"]
        assert said["content"] == "[] \ufffd"
        error = lines_of(client, batch.error_file_id)["b"]["body"]["error"]
        assert error["message"] == "no answer to \ufffd"


def test_no_tenants_batch_waits_for_anothers(tmp_path: Path) -> None:
    class Held(FakeAssistant):
        async def stream(self, ask: Ask) -> Any:
            if ask.messages[-1].text == "slow":
                held.release()
                await self._wait_until(gate.is_set)
            async for item in super().stream(ask):
                yield item

    held, gate = threading.Semaphore(0), threading.Event()
    one, other = (new_key(tmp_path / "data", name) for name in ("one", "other"))
    with service(tmp_path, Held(), one, max_batch_requests=2) as client:
        batches = [
            begin(client.with_options(default_headers={"x-mico-user": user}), [line("a", "slow")])
            for user in ("anna", "bob")
        ]
        slow = begin(client, [line(str(n), "slow") for n in range(9)])
        assert held.acquire(timeout=PATIENCE_S)
        for n in range(2):  # all of the other tenant's lines, while those of the first are held
            few = begin(client.with_options(api_key=other), [line("b", f"few {n}")])
            assert ended(client.with_options(api_key=other), few).status == "completed"
        assert client.batches.retrieve(slow.id).status == "validating"
        assert not held.acquire(timeout=0), "the users of a key share its turn"
        gate.set()
        assert ended(client, slow).status == "completed"
        for user, batch in zip(("anna", "bob"), batches, strict=True):
            asker = client.with_options(default_headers={"x-mico-user": user})
            assert ended(asker, batch).status == "completed"


def test_an_operator_cancels_anybodys_batch(tmp_path: Path) -> None:
    gate = threading.Event()
    one, admin, both = (
        new_key(tmp_path / "data", name, scopes=name.split())
        for name in ("chat", "admin", "admin chat")
    )
    with service(tmp_path, FakeAssistant(gate), one) as client:
        batch = begin(client, [line("a")])
        for operator in (client.with_options(api_key=key) for key in (admin, both)):
            assert [found.id for found in operator.batches.list()] == [batch.id]
            assert operator.batches.retrieve(batch.id).id == batch.id
            a_user = operator.with_options(default_headers={"x-mico-user": "anna"})
            assert not a_user.batches.list().data
            with pytest.raises(openai.NotFoundError):
                a_user.batches.cancel(batch.id)
            with pytest.raises((openai.PermissionDeniedError, openai.NotFoundError)):
                operator.files.content(batch.input_file_id)
        assert client.with_options(api_key=admin).batches.cancel(batch.id).status == "cancelling"
        gate.set()
        assert ended(client, batch).status == "cancelled"


def test_what_a_key_may_store(tmp_path: Path) -> None:
    with service(tmp_path, FakeAssistant(), max_stored_files=1) as client:
        batch = ended(client, begin(client, [line("a")]))  # its answers are the second file
        full = partial(pytest.raises, openai.APIStatusError, match=r"413.*MAX_STORED_FILES.*delete")
        with full():
            begin(client, [line("a")])
        with full():
            create(client, batch.input_file_id)
        assert len(list((tmp_path / "data/media/uploads").iterdir())) == 2
        client.files.delete(batch.input_file_id)
        client.files.delete(batch.output_file_id or "")
        assert ended(client, begin(client, [line("a")])).status == "completed"


def test_too_many_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "MOST_REQUESTS", 3)
    with service(tmp_path, FakeAssistant()) as client:
        batch = ended(client, begin(client, [line(str(n)) for n in range(4)]))
        assert "4 requests, but a batch has at most 3" in str(first_error(batch).message)


def test_a_form_that_is_wrong(start: Start) -> None:
    client: httpx.Client = start(FakeAssistant())
    file = {"file": ("a.jsonl", b"{}")}
    for data, files in (
        ({"purpose": "batch"}, {}),
        ({"purpose": "batch", "other": "x"}, file),
        ({}, file),
    ):
        response = client.post("/v1/files", data=data, files=files or {"x": b"y"})
        assert response.status_code == 400
