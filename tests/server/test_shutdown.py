"""The service is asked to end: it takes nothing new, and ends what it has begun."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http_client import Connection, fetch, form_request, json_request, request
from tests.server.echo import question
from tests.server.server_process import ServerProcess

CHAT = form_request("/v1/chat", {"message": f"Say {question(1)}.", "stream": True})
COMPLETION = json_request(
    "/v1/chat/completions",
    {
        "model": "tiny",
        "stream": True,
        "messages": [{"role": "user", "content": f"Say {question(2)}."}],
    },
)
WHOLE = form_request("/v1/chat", {"message": f"Say {question(3)}."})


async def refused(server: ServerProcess) -> None:
    for _ in range(1500):
        try:
            await fetch(server.address, request("GET", "/health/live"))
        except ConnectionRefusedError:
            return
        except ConnectionError:  # at the moment at which the service stops listening
            pass
        await asyncio.sleep(0.02)
    pytest.fail("new connections are taken 30 s after SIGTERM")


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
        connections = [await Connection.open(server.address) for _ in range(3)]
        with ExitStack() as stack:
            for connection in connections:
                stack.enter_context(closing(connection))
            await ended(server, connections)

    async def ended(server: ServerProcess, connections: Sequence[Connection]) -> None:
        for connection, sent in zip(connections, (CHAT, COMPLETION, WHOLE), strict=True):
            await connection.send(sent)
        streams = [c.events(await c.head()) for c in connections[:2]]
        for stream in streams:
            await anext(stream)
        server.terminate()
        await refused(server)
        (*_, (last, done)), (*_, (_, end)) = [[e async for e in stream] for stream in streams]
        assert (last, end) == ("done", b"[DONE]")
        assert json.loads(done)["answer"].startswith(f"{question(1)} n1 ")
        head = await connections[2].head()
        assert head.status == 200
        assert json.loads(await connections[2].body(head))["answer"].startswith(question(3))

    with ServerProcess(pause_s=0.02, data_dir=tmp_path) as server:
        asyncio.run(asked(server))
        assert server.exit_code(60) == 0
    assert {turn["finish_reason"] for turn in turns_kept(tmp_path)} == {"stop"}


async def rest(stream: AsyncIterator[tuple[str, bytes]], said: list[tuple[str, bytes]]) -> None:
    async for event in stream:
        said.append(event)


def test_an_answer_that_takes_too_long_is_cut(tmp_path: Path) -> None:
    async def asked(server: ServerProcess) -> float:
        with closing(await Connection.open(server.address)) as connection:
            await connection.send(CHAT)
            stream = connection.events(await connection.head())
            said = [await anext(stream) for _ in range(4)]
            assert said[-1][0] == "delta"
            server.terminate()
            at = time.monotonic()
            with pytest.raises(ConnectionError):
                await rest(stream, said)
            assert "done" not in dict(said)
            return time.monotonic() - at

    with ServerProcess(pause_s=0.1, data_dir=tmp_path, shutdown_timeout_s=1) as server:
        assert asyncio.run(asked(server)) > 0.9
        assert server.exit_code(60) == 0
    (turn,) = turns_kept(tmp_path)
    assert turn["finish_reason"] == "cancelled"
    assert question(1).startswith(turn["answer"][:7])


def test_a_question_that_the_end_overtakes_stays(tmp_path: Path) -> None:
    async def asked(server: ServerProcess) -> int | None:
        with ExitStack() as stack:
            for sent in (CHAT, WHOLE):
                connection = stack.enter_context(closing(await Connection.open(server.address)))
                await connection.send(sent)
            for _ in range(3000):
                _, body = await fetch(server.address, request("GET", "/v1/conversations"))
                if len(json.loads(body)["data"]) == 2:
                    server.terminate()
                    return await asyncio.to_thread(server.exit_code, 60)
                await asyncio.sleep(0.02)
        pytest.fail("the questions are not stored after 60 s")

    with ServerProcess(pause_s=2, data_dir=tmp_path, shutdown_timeout_s=1) as server:
        assert asyncio.run(asked(server)) == 0
    assert [turn["finish_reason"] for turn in turns_kept(tmp_path)] == ["unanswered"] * 2
