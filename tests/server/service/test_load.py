"""Many clients at once, of whom some leave half-way: every answer must be whole and its own.

The model says what it was asked and shown (``echo.py``), so that any mix-up of requests shows.
"""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.http_client import Connection, fetch, form_request, request
from mico_chat.media import MediaDecoder, MediaFile
from tests.server.support.echo import SUMS, agree, echo, echoing_assistant, question, sums_of
from tests.server.support.sent import completion, data_uri, part, png
from tests.server.support.server_process import ServerProcess

REQUESTS = int(os.environ.get("MICO_TEST_LOAD_REQUESTS", "1000"))
CLIENTS = 32
MAX_REQUESTS = 24  # fewer than there are clients, so that some are refused
LEAVES = ("in the body", "after the body", "after the first event", "in the middle")


@dataclass(frozen=True)
class Ask:
    """A question for /v1/chat, whose answer is a stream, or for /v1/chat/completions, whole."""

    number: int
    completions: bool
    store: bool
    leaves: str | None
    picture: bytes

    @property
    def text(self) -> str:
        return f"Say {question(self.number)}."

    @property
    def shown(self) -> list[tuple[str, int]]:
        """The name and size of the picture, if there is one."""
        return [(f"{self.number}.png", len(self.picture))] if self.picture else []

    def request(self, conversation: str | None) -> bytes:
        if not self.completions:
            fields = {"message": self.text, "stream": True, "store": self.store}
            if conversation is not None:
                fields["conversation_id"] = conversation
            files = [("image", (name, self.picture)) for name, _ in self.shown]
            return form_request("/v1/chat", {**fields, "max_tokens": 256}, files)
        pictures = [part("image", data_uri("image/png", self.picture))] if self.picture else []
        body = completion(self.text, *pictures, model="tiny") | {"max_tokens": 256}
        return request("POST", "/v1/chat/completions", json=body)


@dataclass
class Answered:
    """What a client was told; ``media`` are the reports of all media of the conversation."""

    text: str
    media: list[dict[str, Any]]
    conversation: str | None = None
    turn: int | None = None

    @property
    def shown(self) -> list[tuple[str, int]]:
        return [(report["name"], report["bytes"]) for report in self.media]


@dataclass
class Lane:
    """Questions that follow each other, in one conversation or each alone."""

    waiting: list[Ask] = field(default_factory=list)
    asked: list[Ask] = field(default_factory=list)
    answered: dict[int, Answered] = field(default_factory=dict)
    conversation: str | None = None


def drawn(number: int) -> bytes:
    """Coarse noise, so that the encoder tells one picture from the other."""
    cells = np.random.default_rng(number).integers(0, 256, (2, 2, 3), np.uint8)
    return png(cells.repeat(4 + number % 30, axis=0).repeat(4 + number // 60, axis=1))


def planned(first: int, n: int) -> list[Lane]:
    """20 long conversations, and as many questions again that stand alone. One in ten is left, but
    never the first of a conversation."""
    rng = random.Random(first)
    lanes = [Lane() for _ in range(20)]
    for number in range(first, first + n):
        alone = rng.random() < 0.5
        lane = Lane() if alone else rng.choice(lanes[:20])
        completions = alone and rng.random() < 0.75
        leaves = rng.choice(LEAVES[: 2 if completions else 4]) if rng.random() < 0.1 else None
        lane.waiting.append(
            Ask(
                number,
                completions=completions,
                store=not alone or rng.random() < 0.5,
                leaves=leaves if alone or lane.waiting else None,
                picture=drawn(number) if rng.random() < 0.5 else b"",
            )
        )
        if alone:
            lanes.append(lane)
    return [lane for lane in lanes if lane.waiting]


class Load:
    """Runs lanes of questions against a service and notes every fault.

    ``sums`` is what each question's medium adds to the sums of an echo.
    """

    def __init__(self, address: tuple[str, int], sums: dict[int, list[float]]) -> None:
        self.address, self.sums = address, sums
        self.statuses: Counter[int] = Counter()
        self.left: Counter[str] = Counter()
        self.faults: list[str] = []
        self.rng = random.Random(0)

    async def run(self, lanes: Sequence[Lane]) -> dict[str, float]:
        """Ask everything, compare what was kept, and return the service's figures at rest."""
        ready = list(lanes)

        async def client() -> None:
            while ready:
                lane = ready.pop(self.rng.randrange(len(ready)))
                await self.ask(lane, lane.waiting.pop(0))
                if lane.waiting:
                    ready.append(lane)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        at_work = True
        while at_work:
            _, body = await fetch(self.address, request("GET", "/metrics"))
            lines = [line.rsplit(" ", 1) for line in body.decode().splitlines()]
            figures = {name: float(value) for name, value in lines if not name.startswith("#")}
            at_work = any(figures[f"mico_engine_{of}_requests"] for of in ("running", "waiting"))
            await asyncio.sleep(0.05)
        for lane in lanes:
            if lane.conversation is not None:
                await self.compare(lane)
        return figures

    async def ask(self, lane: Lane, ask: Ask) -> None:
        """Ask until the service takes the question, or its client leaves."""
        sent = ask.request(lane.conversation)
        lane.asked.append(ask)
        while True:
            connection = await Connection.open(self.address)
            try:
                if ask.leaves in LEAVES[:2]:
                    whole = ask.leaves == LEAVES[1]
                    end = len(sent) if whole else self.rng.randrange(len(sent))
                    await connection.send(sent[:end])
                    await asyncio.sleep(self.rng.random() * 0.1)
                    self.left[ask.leaves] += 1
                    return
                await connection.send(sent)
                head = await connection.head()
                self.statuses[head.status] += 1
                if head.status == 200:
                    answered = await self.read(connection, head, ask)
                    break
                await connection.body(head)
                if head.status == 429:
                    assert 1 <= int(head.headers["retry-after"]) <= 60
                # 409: the client's own question before, which it left.
                await asyncio.sleep(0.1 if head.status == 429 else 0.02)
            finally:
                connection.close(abort=ask.leaves is not None and self.rng.random() < 0.5)
        if answered is None:
            return
        if answered.conversation is None:
            # A data URI has no name.
            sizes = [[size for _, size in shown] for shown in (answered.shown, ask.shown)]
            self.check(ask, *sizes)
            self.check_echo([ask], answered.text)
        else:
            lane.conversation = answered.conversation
            lane.answered[ask.number] = answered

    async def read(self, connection: Connection, head: Any, ask: Ask) -> Answered | None:
        if ask.completions:
            body = json.loads(await connection.body(head))
            (choice,) = body["choices"]
            self.check(ask, choice["finish_reason"], "stop")
            return Answered(choice["message"]["content"], body["media"])
        events: list[tuple[str, Any]] = []
        most = {LEAVES[2]: 1, LEAVES[3]: self.rng.randint(2, 30)}.get(ask.leaves or "", 10**9)
        async for name, data in connection.events(head):
            events.append((name, json.loads(data)))
            if len(events) >= most:
                self.left[ask.leaves or ""] += 1
                return None
        (first, begun), *deltas, (last, body) = events
        self.check(ask, (first, last, body["finish_reason"]), ("media", "done", "stop"))
        said = "".join(delta["text"] for _, delta in deltas)
        self.check(ask, (said, begun["media"]), (body["answer"], body["media"]))
        return Answered(body["answer"], body["media"], body["conversation_id"], body["turn"])

    async def compare(self, lane: Lane) -> None:
        """What the service kept of a conversation must be what it acknowledged, in order."""
        path = f"/v1/conversations/{lane.conversation}"
        _, body = await fetch(self.address, request("GET", path))
        asked = {ask.text: ask for ask in lane.asked}
        asks: list[Ask] = []
        for turn in json.loads(body)["turns"]:
            ask = asked[turn["message"]]  # KeyError: a question of another conversation
            asks.append(ask)
            told = lane.answered.get(ask.number)
            names = [medium["name"] for medium in turn["media"]]
            self.check(ask, names, [name for name, _ in ask.shown])
            if turn["finish_reason"] == "cancelled":
                marker = question(ask.number)
                self.check(ask, told, None)
                self.check(ask, marker.startswith(turn["answer"][: len(marker)]), True)
            else:
                self.check_echo(asks, turn["answer"])
            if told is None:
                self.check(ask, ask.leaves is None, False)  # kept, but its client was never told
                continue
            self.check(ask, (turn["answer"], turn["turn"]), (told.text, told.turn))
            self.check(ask, told.shown, [medium for a in asks for medium in a.shown])
        numbers = [ask.number for ask in asks]
        if numbers != sorted(set(numbers)) or not lane.answered.keys() <= set(numbers):
            self.faults.append(f"{path}: answered {sorted(lane.answered)}, kept {numbers}")

    def check(self, ask: Ask, found: object, expected: object) -> None:
        if found != expected:
            self.faults.append(f"{ask.number}: {found!r} instead of {expected!r}")

    def check_echo(self, asks: Sequence[Ask], answer: str) -> None:
        columns = zip([0.0] * SUMS, *(self.sums[a.number] for a in asks if a.picture), strict=True)
        expected = echo([question(a.number) for a in asks], [sum(column) for column in columns])
        if not agree(answer, expected):
            self.check(asks[-1], answer, expected)


async def sums_of_all(lanes: Sequence[Lane]) -> dict[int, list[float]]:
    """What each question's medium adds to the sums, encoded alone and by another encoder."""
    with MediaDecoder() as decoder, closing(echoing_assistant(decoder)) as assistant:
        return {
            ask.number: await sums_of(assistant.encoder, MediaFile("image", ask.picture))
            for lane in lanes
            for ask in lane.waiting
            if ask.picture
        }


@pytest.mark.soak
def test_no_request_is_lost_or_mixed_up(tmp_path: Path) -> None:
    halves = [planned(0, REQUESTS // 2), planned(REQUESTS // 2, REQUESTS // 2)]
    sums = asyncio.run(sums_of_all([*halves[0], *halves[1]]))
    with ServerProcess(decodes=True, data_dir=tmp_path, max_requests=MAX_REQUESTS) as server:
        load = Load(server.address, sums)
        # The first half fills buffers and caches; what the second one adds is a leak.
        first, second = [asyncio.run(load.run(lanes)) for lanes in halves]
        assert not list((tmp_path / "media" / "tmp").iterdir())
    assert not load.faults, "\n".join(load.faults[:20])
    assert set(load.statuses) <= {200, 409, 429}
    assert load.statuses[429], "nobody was refused: the load is none"
    assert load.left.keys() == set(LEAVES)
    assert load.statuses[200] + load.left[LEAVES[0]] + load.left[LEAVES[1]] == REQUESTS
    assert REQUESTS // 20 < load.left.total() < REQUESTS // 5
    assert second["process_open_fds"] <= first["process_open_fds"] + 2
    assert second["process_resident_memory_bytes"] < first["process_resident_memory_bytes"] + 30e6
