"""The service is asked to end: it takes nothing new, and ends what it has begun."""

import asyncio
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http_client import Connection, fetch, form_request, request
from tests.server.support.echo import question
from tests.server.support.sent import completion
from tests.server.support.server_process import ServerProcess

CHAT = form_request("/v1/chat", {"message": f"Say {question(1)}.", "stream": True})
BODY = completion(f"Say {question(2)}.", model="tiny") | {"stream": True}
COMPLETION = request("POST", "/v1/chat/completions", json=BODY)
WHOLE = form_request("/v1/chat", {"message": f"Say {question(3)}."})


async def sent(server: ServerProcess, request: bytes) -> Connection:
    connection = await Connection.open(server.address)
    await connection.send(request)
    return connection


async def refused(server: ServerProcess) -> None:
    while True:
        try:
            await fetch(server.address, request("GET", "/health/live"))
        except ConnectionRefusedError:
            return
        except ConnectionError:  # at the moment at which the service stops listening
            pass
        await asyncio.sleep(0.02)


def turns_kept(data_dir: Path) -> list[dict[str, Any]]:
    async def turns(server: ServerProcess) -> list[dict[str, Any]]:
        _, body = await fetch(server.address, request("GET", "/v1/conversations"))
        found = []
        for conversation in json.loads(body)["data"]:
            path = f"/v1/conversations/{conversation['id']}"
            _, body = await fetch(server.address, request("GET", path))
            found += json.loads(body)["turns"]
        return found

    with ServerProcess(data_dir=data_dir) as server:
        return asyncio.run(turns(server))


def test_answers_that_have_begun_come_to_their_end(tmp_path: Path) -> None:
    async def asked(server: ServerProcess) -> None:
        chat, completion, whole = [await sent(server, r) for r in (CHAT, COMPLETION, WHOLE)]
        streams = [c.events(await c.head()) for c in (chat, completion)]
        for stream in streams:
            await anext(stream)
        server.terminate()
        await refused(server)
        (*_, (last, done)), (*_, (_, end)) = [[e async for e in stream] for stream in streams]
        assert (last, end) == ("done", b"[DONE]")
        assert json.loads(done)["answer"].startswith(f"{question(1)} n1 ")
        head = await whole.head()
        assert head.status == 200
        assert json.loads(await whole.body(head))["answer"].startswith(question(3))
        for connection in (chat, completion, whole):
            connection.close()

    with ServerProcess(pause_s=0.02, data_dir=tmp_path) as server:
        asyncio.run(asked(server))
        assert server.exit_code() == 0
    assert {turn["finish_reason"] for turn in turns_kept(tmp_path)} == {"stop"}


def test_who_waits_for_news_alone_does_not_hold_the_service(tmp_path: Path) -> None:
    path = "/v1/conversations/state?wait_s=300&known="

    async def asked(server: ServerProcess) -> None:
        _, body = await fetch(server.address, request("GET", path))
        state = json.loads(body)["state"]
        with closing(await sent(server, request("GET", path + state))) as connection:
            await fetch(server.address, request("GET", "/health/live"))
            server.terminate()
            head = await connection.head()
            assert (head.status, json.loads(await connection.body(head))["state"]) == (200, state)

    with ServerProcess(data_dir=tmp_path) as server:
        asyncio.run(asked(server))
        assert server.exit_code() == 0


def test_an_answer_that_takes_too_long_is_cut(tmp_path: Path) -> None:
    async def asked(server: ServerProcess) -> float:
        with closing(await sent(server, CHAT)) as connection:
            stream = connection.events(await connection.head())
            said = [await anext(stream) for _ in range(4)]
            assert said[-1][0] == "delta"
            server.terminate()
            at = time.monotonic()
            with pytest.raises(ConnectionError):
                _ = [event async for event in stream]
            return time.monotonic() - at

    with ServerProcess(pause_s=0.1, data_dir=tmp_path, shutdown_timeout_s=1) as server:
        assert asyncio.run(asked(server)) > 0.9
        assert server.exit_code() == 0
    (turn,) = turns_kept(tmp_path)
    assert turn["finish_reason"] == "cancelled"
    assert question(1).startswith(turn["answer"][:7])


def test_a_question_that_the_end_overtakes_stays(tmp_path: Path) -> None:
    async def asked(server: ServerProcess) -> int | None:
        connections = [await sent(server, r) for r in (CHAT, WHOLE)]
        n = 0
        while n < len(connections):  # until the questions are stored
            _, body = await fetch(server.address, request("GET", "/v1/conversations"))
            n = len(json.loads(body)["data"])
        server.terminate()
        code = await asyncio.to_thread(server.exit_code)
        for connection in connections:
            connection.close()
        return code

    with ServerProcess(pause_s=2, data_dir=tmp_path, shutdown_timeout_s=1) as server:
        assert asyncio.run(asked(server)) == 0
    assert [turn["finish_reason"] for turn in turns_kept(tmp_path)] == ["unanswered"] * 2
