"""Many clients at once, of whom some leave half-way: every answer must be whole and its own.

    mico-chat serve --port 8000 --data-dir /tmp/load
    python -m tests.server.load --url http://127.0.0.1:8000 --requests 1000 --concurrency 32

A model that says what it was asked (``tests/server/echo.py``) shows every mix-up; a real one is
told by a JSON schema to repeat the word that marks its question. What was kept of conversations is
compared in the end with what was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import time
import wave
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from benchmarks.http_client import (
    Connection,
    File,
    Head,
    address_of,
    fetch,
    form_request,
    json_request,
    request,
)
from mico_chat.media.kinds import Kind
from tests.server.echo import question

CONVERSATIONS = 20
Leaves = Literal["in the body", "after the body", "after the first event", "in the middle"]
_LEAVES: tuple[Leaves, ...] = get_args(Leaves)


@dataclass(frozen=True)
class Shown:
    """A medium like no other of the load: its pixels or samples, and its size."""

    kind: Kind
    name: str
    data: bytes

    @classmethod
    def drawn(cls, number: int) -> Shown:
        """A picture of noise, or a short sound of noise for every third."""
        rng, file = np.random.default_rng(number), io.BytesIO()
        if number % 3 == 0:
            with wave.open(file, "wb") as sound:
                sound.setnchannels(1)
                sound.setsampwidth(2)
                sound.setframerate(16_000)
                sound.writeframes(rng.integers(-9_000, 9_000, 1_600 + number, "<i2").tobytes())
            return cls("audio", f"{number}.wav", file.getvalue())
        width, height = 8 + number % 60, 8 + number // 60
        # Coarse, so that the encoder tells one from the other.
        cells = rng.integers(0, 256, (2, 2, 3), np.uint8)
        Image.fromarray(cells).resize((width, height)).save(file, "PNG")
        return cls("image", f"{number}.png", file.getvalue() + b"%d" % number)


@dataclass(frozen=True)
class Ask:
    """One request of the load, and when its client leaves, if it does so."""

    number: int
    completions: bool
    stream: bool
    shown: Shown | None
    leaves: Leaves | None
    store: bool

    @property
    def marker(self) -> str:
        """The word that the answer must begin with."""
        return question(self.number)

    @property
    def text(self) -> str:
        """The question, which media stand before."""
        return f"Say {self.marker}."

    def request(self, options: dict[str, Any], conversation: str | None) -> bytes:
        """What is sent."""
        if self.completions:
            return json_request("/v1/chat/completions", self._completion(options))
        fields = {**options, "message": self.text, "stream": self.stream, "store": self.store}
        if conversation is not None:
            fields["conversation_id"] = conversation
        shown = self.shown
        files = [] if shown is None else [File(shown.kind, shown.name, shown.data)]
        return form_request("/v1/chat", fields, files)

    def _completion(self, options: dict[str, Any]) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.shown is not None:
            uri = f"data:;base64,{base64.b64encode(self.shown.data).decode()}"
            part = f"{self.shown.kind}_url"
            content.insert(0, {"type": part, part: {"url": uri}})
        body = {"messages": [{"role": "user", "content": content}], "stream": self.stream}
        if "json_schema" in options:
            schema = {"name": "answer", "schema": options["json_schema"]}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {**body, "model": options["model"], "max_tokens": options["max_tokens"]}


def planned(n: int, *, first: int = 0) -> list[list[Ask]]:
    """Conversations of questions that follow each other: 20 long ones, and as many questions again
    that stand alone. One in ten is left, but for the first of a long conversation.

    The questions' numbers begin with ``first``: those of two plans for one :class:`Load` differ.
    """
    rng = random.Random(first)
    lanes: list[list[Ask]] = [[] for _ in range(CONVERSATIONS)]
    for number in range(first, first + n):
        alone = rng.random() < 0.5
        lane = [] if alone else lanes[rng.randrange(CONVERSATIONS)]
        stream = rng.random() < 0.5
        leaves = _LEAVES[rng.randrange(4 if stream else 2)] if rng.random() < 0.1 else None
        ask = Ask(
            number,
            completions=alone and rng.random() < 0.75,
            stream=stream,
            shown=Shown.drawn(number) if rng.random() < 0.5 else None,
            leaves=leaves if alone or lane else None,
            store=not alone or rng.random() < 0.5,
        )
        lane.append(ask)
        if alone:
            lanes.append(lane)
    return [lane for lane in lanes if lane]


@dataclass
class Answered:
    """What a client was told; ``media`` are the reports of all media of the conversation."""

    text: str
    media: list[dict[str, Any]]
    conversation: str | None = None
    turn: int | None = None


@dataclass
class Sample:
    """The service at one moment, from /metrics."""

    requests: int
    memory: int
    files: int


@dataclass
class Load:
    """Runs lanes of questions against a service, and keeps count.

    ``options`` are those of a question; ``checked`` says what is wrong with the answer to the last
    of a conversation's questions, if anything is. Time to wait after a refusal is that which the
    service names, times ``patience``.
    """

    address: tuple[str, int]
    options: Callable[[Ask], dict[str, Any]]
    checked: Callable[[Sequence[Ask], str], str | None]
    concurrency: int = 32
    patience: float = 1.0
    statuses: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    lanes: dict[str, list[Ask]] = field(default_factory=dict)
    acknowledged: dict[str, dict[int, Answered]] = field(default_factory=dict)

    async def run(self, lanes: Sequence[Sequence[Ask]]) -> None:
        """Ask everything, ``concurrency`` questions at once, and compare what was kept."""
        started = time.monotonic()
        rng = random.Random(0)
        # Of both sorts as long as there are both: conversations, and questions that stand alone.
        sorts: list[list[_Lane]] = [[], []]
        for lane in lanes:
            sorts[len(lane) == 1].append(_Lane(list(lane)))
        watching = asyncio.create_task(self._watch())

        async def client() -> None:
            while some := [ready for ready in sorts if ready]:
                ready = rng.choice(some)
                lane = ready.pop(rng.randrange(len(ready)))
                await self._one(lane, lane.asks.pop(0), rng)
                if lane.asks:
                    ready.append(lane)

        await asyncio.gather(*(client() for _ in range(self.concurrency)))
        self.seconds += time.monotonic() - started
        watching.cancel()
        await self.settled()
        kept = list(self.lanes)
        await asyncio.gather(*(self._compare(kept[n::8]) for n in range(8)))

    async def settled(self) -> Sample:
        """The service when nothing runs and waits any more."""
        for _ in range(200):
            if not (sample := await self.sample()).requests:
                return sample
            await asyncio.sleep(0.05)
        raise AssertionError(f"{sample.requests} requests still run after 10 s")

    async def sample(self) -> Sample:
        """What /metrics says now."""
        _, body = await fetch(self.address, request("GET", "/metrics"))
        lines = [line.rsplit(" ", 1) for line in body.decode().splitlines()]
        values = {name: float(value) for name, value in lines if not name.startswith("#")}
        waiting = values["mico_engine_waiting_requests"]
        return Sample(
            int(values["mico_engine_running_requests"] + waiting),
            int(values["process_resident_memory_bytes"]),
            int(values["process_open_fds"]),
        )

    async def _watch(self) -> None:
        while True:
            self.samples.append(await self.sample())
            await asyncio.sleep(0.2)

    def fault(self, ask: Ask, what: str) -> None:
        """Note what must not be."""
        self.faults.append(f"{ask.marker} {'stream' if ask.stream else 'whole'}: {what}")

    async def _one(self, lane: _Lane, ask: Ask, rng: random.Random) -> None:
        sent = ask.request(self.options(ask), lane.conversation)
        lane.asked.append(ask)
        answered = await self._until_taken(ask, sent, rng)
        if answered is None:
            return
        for report, shown in zip(answered.media[::-1], [ask.shown], strict=False):
            if shown is not None and not _reports(report, shown, ask.completions):
                self.fault(ask, f"was shown {shown.name}, reported {report}")
        if answered.conversation is None:
            if (what := self.checked([ask], answered.text)) is not None:
                self.fault(ask, what)
            if len(answered.media) != (ask.shown is not None):
                self.fault(ask, f"{len(answered.media)} reports")
            return
        lane.conversation = answered.conversation
        self.lanes[answered.conversation] = lane.asked
        self.acknowledged.setdefault(answered.conversation, {})[ask.number] = answered

    async def _until_taken(self, ask: Ask, sent: bytes, rng: random.Random) -> Answered | None:
        """Ask until the service takes it; what it answered, None where the client left."""
        while True:
            connection = await Connection.open(self.address)
            try:
                if ask.leaves in ("in the body", "after the body"):
                    await self._leave_early(connection, ask, sent, rng)
                    return None
                await connection.send(sent)
                head = await connection.head()
                self.statuses[str(head.status)] += 1
                if head.status in (409, 429):
                    await connection.body(head)
                    await self._wait(ask, head)
                elif head.status != 200:
                    self.fault(ask, f"{head.status} {(await connection.body(head)).decode()}")
                    return None
                else:
                    return await self._read(connection, head, ask, rng)
            except (ConnectionError, ValueError, KeyError) as error:
                self.fault(ask, repr(error))
                return None
            finally:
                connection.close(abort=ask.leaves is not None and rng.random() < 0.5)

    async def _wait(self, ask: Ask, head: Head) -> None:
        if head.status == 409:  # this client's own question before, which it left
            await asyncio.sleep(0.02)
            return
        seconds = int(head.headers["retry-after"])
        if not 1 <= seconds <= 60:
            self.fault(ask, f"Retry-After {seconds}")
        await asyncio.sleep(seconds * self.patience)

    async def _leave_early(
        self, connection: Connection, ask: Ask, sent: bytes, rng: random.Random
    ) -> None:
        assert ask.leaves is not None
        whole = ask.leaves == "after the body"
        await connection.send(sent if whole else sent[: rng.randrange(len(sent))])
        await asyncio.sleep(rng.random() * 0.1)
        self.left[ask.leaves] += 1

    async def _read(
        self, connection: Connection, head: Head, ask: Ask, rng: random.Random
    ) -> Answered | None:
        if not ask.stream:
            body = json.loads(await connection.body(head))
            return _completion(body) if ask.completions else _chat(body)
        limit = {"after the first event": 1, "in the middle": rng.randint(2, 30)}
        events: list[tuple[str, Any]] = []
        async for name, data in connection.events(head):
            events.append((name, data if data == b"[DONE]" else json.loads(data)))
            if ask.leaves is not None and len(events) >= limit[ask.leaves]:
                self.left[ask.leaves] += 1
                return None
        return _chunks(events) if ask.completions else _events(events)

    async def _compare(self, conversations: Sequence[str]) -> None:
        """What the service kept of conversations must be what it acknowledged, in order."""
        for id_ in conversations:
            head, body = await fetch(self.address, request("GET", f"/v1/conversations/{id_}"))
            if head.status != 200:
                self.faults.append(f"{id_}: {head.status} {body.decode()}")
                continue
            self._compare_turns(id_, json.loads(body)["turns"])

    def _compare_turns(self, id_: str, turns: list[dict[str, Any]]) -> None:
        told = self.acknowledged[id_]
        asked = {ask.text: ask for ask in self.lanes[id_]}
        asks = [asked[turn["message"]] for turn in turns]  # KeyError: of another conversation
        numbers = [ask.number for ask in asks]
        if numbers != sorted(set(numbers)) or not set(told) <= set(numbers):
            self.faults.append(f"{id_}: answered {sorted(told)}, kept {numbers}")
        media: list[Shown] = []
        for place, (ask, turn) in enumerate(zip(asks, turns, strict=True)):
            own = [] if ask.shown is None else [ask.shown]
            media += own
            answered = told.get(ask.number)
            if answered is None and ask.leaves is None:
                self.fault(ask, "kept, but its client was never told")
            if turn["finish_reason"] == "cancelled":
                same = ask.marker.startswith(turn["answer"][: len(ask.marker)])
                if answered is not None or (not self.options(ask).get("json_schema") and not same):
                    self.fault(ask, f"kept as cancelled: {turn['answer']!r}")
            elif (what := self.checked(asks[: place + 1], turn["answer"])) is not None:
                self.fault(ask, f"kept {what}")
            if [m["name"] for m in turn["media"]] != [m.name for m in own]:
                self.fault(ask, f"kept media {turn['media']}")
            if answered is None:
                continue
            if (answered.text, answered.turn) != (turn["answer"], place + 1):
                self.fault(ask, f"told {answered.text!r} as turn {answered.turn}, kept {turn}")
            reports = [(m["name"], m["bytes"]) for m in answered.media]
            if reports != [(m.name, len(m.data)) for m in media]:
                self.fault(ask, f"was shown {[m.name for m in media]}, reported {reports}")


@dataclass
class _Lane:
    asks: list[Ask]
    asked: list[Ask] = field(default_factory=list)
    conversation: str | None = None


def _reports(report: dict[str, Any], shown: Shown, completions: bool) -> bool:
    named = completions or report["name"] == shown.name  # a data URI has no name
    if shown.kind == "image":
        with Image.open(io.BytesIO(shown.data)) as picture:
            named = named and (report["width"], report["height"]) == picture.size
    return bool(named and (report["kind"], report["bytes"]) == (shown.kind, len(shown.data)))


def _chat(body: dict[str, Any]) -> Answered:
    if body["finish_reason"] != "stop":
        raise ValueError(f"ended by {body['finish_reason']}: {body['answer']!r}")
    return Answered(body["answer"], body["media"], body["conversation_id"], body["turn"])


def _completion(body: dict[str, Any]) -> Answered:
    (choice,) = body["choices"]
    if choice["finish_reason"] != "stop":
        raise ValueError(f"ended by {choice['finish_reason']}")
    return Answered(choice["message"]["content"], body["media"])


def _events(events: Sequence[tuple[str, Any]]) -> Answered:
    (first, media), *deltas, (last, done) = events
    names = {name for name, _ in deltas}
    if (first, last) != ("media", "done") or names != {"delta"}:
        raise ValueError(f"events {[name for name, _ in events]}: {events[-1]}")
    answered = _chat(done)
    text = "".join(delta["text"] for _, delta in deltas)
    if text != answered.text or media["media"] != done["media"]:
        raise ValueError(f"the stream said {text!r}, its end {answered.text!r}")
    return answered


def _chunks(events: Sequence[tuple[str, Any]]) -> Answered:
    *chunks, (_, end) = events
    choices = [chunk["choices"][0] for _, chunk in chunks]
    if end != b"[DONE]" or choices[-1]["finish_reason"] != "stop":
        raise ValueError(f"ended by {events[-2:]}")
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return Answered(text, chunks[0][1]["media"])


def repeats(ask: Ask) -> dict[str, Any]:
    """Options that let a real model say the question's marker alone."""
    marker = {"type": "string", "const": ask.marker}
    schema = {"type": "object", "properties": {"id": marker}, "required": ["id"]}
    return {"json_schema": {**schema, "additionalProperties": False}, "max_tokens": 64}


def _repeated(asks: Sequence[Ask], answer: str) -> str | None:
    same = json.loads(answer) == {"id": asks[-1].marker}
    return None if same else f"{answer!r}"


async def _main(url: str, requests: int, concurrency: int) -> dict[str, Any]:
    address = address_of(url)
    _, body = await fetch(address, request("GET", "/v1/models"))
    name = json.loads(body)["data"][0]["id"]
    load = Load(
        address,
        lambda ask: {**repeats(ask), **({"model": name} if ask.completions else {})},
        _repeated,
        concurrency,
    )
    # Halves: the first one fills buffers and caches; what the second one adds is a leak.
    settled = [await load.settled()]
    for first in (0, requests // 2):
        await load.run(planned(requests // 2, first=first))
        settled.append(await load.settled())
    return {
        "seconds": round(load.seconds, 1),
        "statuses": dict(load.statuses),
        "left": dict(load.left),
        "conversations": len(load.lanes),
        "most requests in the engine": max(sample.requests for sample in load.samples),
        "memory, MB": [round(sample.memory / 1e6) for sample in settled],
        "open files": [sample.files for sample in settled],
        "faults": load.faults,
    }


def main() -> None:
    """Run the load that the command line asks for and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=32)
    found = asyncio.run(_main(**vars(parser.parse_args())))
    print(json.dumps(found, indent=1))
    raise SystemExit(bool(found["faults"]))


if __name__ == "__main__":
    main()
