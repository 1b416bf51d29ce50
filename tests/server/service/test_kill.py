"""The service is killed in the middle of its work: what it had acknowledged is there afterwards."""

import asyncio
import json
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http_client import Connection, fetch, form_request, request
from tests.server.conftest import BOTH
from tests.server.support.echo import question
from tests.server.support.server_process import ServerProcess

ANSWERS = (12, 23, 34)
"""Questions asked in each round before the service is killed."""
CLIENTS = 6


@dataclass
class Asked:
    """A question, perhaps with a medium, and its answer if the client got one."""

    text: str
    data: bytes | None
    answer: str | None = None


@dataclass
class Client:
    """Goes on with one conversation, uploads files between, and remembers what was acknowledged."""

    rng: random.Random
    number: int
    id: str | None = None
    asked: list[Asked] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    async def work(self, address: tuple[str, int]) -> None:
        try:
            while True:
                if self.rng.random() < 0.3:
                    await self._upload(address)
                else:
                    await self._ask(address)
        except OSError:
            return

    async def _ask(self, address: tuple[str, int]) -> None:
        self.number += 1
        data = self.rng.randbytes(self.rng.randrange(1, 30_000)) if self.number % 2 else None
        asked = Asked(f"Say {question(self.number)}.", data)
        self.asked.append(asked)
        fields: dict[str, Any] = {"message": asked.text, "stream": self.rng.random() < 0.5}
        if self.id is not None:
            fields["conversation_id"] = self.id
        files = [] if data is None else [("image", (f"{self.number}.png", data))]
        head, body = await fetch(address, form_request("/v1/chat", fields, files))
        assert head.status == 200, body
        told = json.loads(body.rpartition(b"event: done\ndata: ")[2])
        asked.answer, self.id = told["answer"], told["conversation_id"]

    async def _upload(self, address: tuple[str, int]) -> None:
        data = self.rng.randbytes(self.rng.randrange(1, 300_000))
        head, body = await fetch(
            address, form_request("/v1/media", {}, [("image", ("a.png", data))])
        )
        assert head.status == 201, body
        self.uploads[json.loads(body)["id"]] = data


async def get(server: ServerProcess, path: str) -> Any:
    head, body = await fetch(server.address, request("GET", path))
    assert head.status == 200, (path, body)
    return json.loads(body) if head.headers["content-type"] == "application/json" else body


async def check(server: ServerProcess, client: Client) -> None:
    """All that a client was told is there, and nothing that is half of something."""
    for id_, data in client.uploads.items():
        assert await get(server, f"/v1/media/{id_}/content") == data
    if client.id is None:
        client.asked.clear()
        return
    turns = (await get(server, f"/v1/conversations/{client.id}"))["turns"]
    # The last question may be kept though its answer did not arrive; no other may be missing.
    last = client.asked[-1]
    if last.answer is None and (not turns or turns[-1]["message"] != last.text):
        client.asked.pop()
    assert [turn["message"] for turn in turns] == [asked.text for asked in client.asked]
    for asked, turn in zip(client.asked, turns, strict=True):
        if asked.answer is None:  # the service was killed while it answered
            assert (turn["finish_reason"] == "stop") == (turn["answer"] != "")
        else:
            assert (turn["answer"], turn["finish_reason"]) == (asked.answer, "stop")
        assert len(turn["media"]) == (asked.data is not None)
        for medium in turn["media"]:
            assert await get(server, f"/v1/media/{medium['id']}/content") == asked.data


async def killed_amid(server: ServerProcess, clients: Sequence[Client], answers: int) -> None:
    """Kill the service when all clients work and have asked ``answers`` more questions in all."""
    before = [len(client.asked) for client in clients]
    work = [asyncio.create_task(client.work(server.address)) for client in clients]
    while True:
        asked = [len(c.asked) - n for c, n in zip(clients, before, strict=True)]
        if min(asked) >= 2 and sum(asked) >= answers:
            break
        done = [task for task in work if task.done()]
        for task in done:
            await task  # says what was wrong with an answer
        assert not done, "the service ended by itself"
        await asyncio.sleep(0.01)
    server.kill()
    await asyncio.gather(*work)


@BOTH
def test_a_question_outlives_the_process_that_was_to_answer_it(
    database_url: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"database_url": database_url, "data_dir": tmp_path / "data"}
    id_ = f"conv-{0:024x}"
    first = {"message": f"Say {question(1)}.", "conversation_id": id_, "create": True}
    second = {"message": f"Say {question(2)}.", "conversation_id": id_, "create": True}

    async def killed_before_a_word(server: ServerProcess, sent: bytes, n_turns: int) -> None:
        with closing(await Connection.open(server.address)) as connection:
            await connection.send(sent)
            path = f"/v1/conversations/{id_}"
            while True:  # until the question is stored
                head, body = await fetch(server.address, request("GET", path))
                if head.status == 200 and len(json.loads(body)["turns"]) == n_turns:
                    break
                await asyncio.sleep(0.01)
            server.kill()

    async def kept(server: ServerProcess) -> None:
        (conversation,) = (await get(server, "/v1/conversations"))["data"]
        assert (conversation["id"], conversation["title"]) == (id_, f"Say {question(1)}.")
        (found,) = (await get(server, f"/v1/conversations?query={question(1)}"))["data"]
        assert found == conversation
        (turn,) = (await get(server, f"/v1/conversations/{id_}"))["turns"]
        assert (turn["message"], turn["answer"]) == (f"Say {question(1)}.", "")
        assert (turn["finish_reason"], turn["usage"], turn["reports"]) == ("unanswered", None, [])
        (medium,) = turn["media"]
        assert await get(server, f"/v1/media/{medium['id']}/content") == b"pixels"

    async def goes_on(server: ServerProcess) -> None:
        head, body = await fetch(server.address, form_request("/v1/chat", second))
        assert head.status == 200, body
        answer = json.loads(body)
        # Both questions are one message of the user's, with the medium of the first.
        assert answer["answer"].startswith(f"{question(2)} n1 ")
        assert (answer["turn"], len(answer["media"])) == (3, 1)

    image = [("image", ("a.png", b"pixels"))]
    with ServerProcess(pause_s=600, **settings) as server:
        sent = form_request("/v1/chat", first | {"stream": True}, image)
        asyncio.run(killed_before_a_word(server, sent, 1))
    with ServerProcess(pause_s=600, **settings) as server:
        asyncio.run(kept(server))
        asyncio.run(killed_before_a_word(server, form_request("/v1/chat", second), 2))
    with ServerProcess(**settings) as server:
        head, _ = asyncio.run(
            fetch(server.address, request("DELETE", f"/v1/conversations/{id_}/turns/2"))
        )
        assert head.status == 200
        asyncio.run(goes_on(server))


@pytest.mark.soak
@BOTH
def test_what_was_acknowledged_outlives_the_process(database_url: str, tmp_path: Path) -> None:
    clients = [Client(random.Random(n), 100_000 * n) for n in range(CLIENTS)]
    settings: dict[str, Any] = {"database_url": database_url, "data_dir": tmp_path / "data"}

    async def check_all(server: ServerProcess) -> None:
        for client in clients:
            await check(server, client)

    for answers in ANSWERS:
        with ServerProcess(pause_s=0.001, **settings) as server:
            asyncio.run(killed_amid(server, clients, answers))
        with ServerProcess(**settings) as server:
            asyncio.run(check_all(server))
