"""Two processes that share a PostgreSQL database and a media folder are one service."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http_client import fetch, form_request, request
from tests.server.conftest import POSTGRES
from tests.server.support.echo import question
from tests.server.support.server_process import ServerProcess

pytestmark = POSTGRES


@pytest.fixture
def pair(database_url: str, tmp_path: Path) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    settings: dict[str, Any] = {
        "database_url": database_url,
        "rate_limit": "9/minute",
        "media_dir": tmp_path / "media",
        "pause_s": 0.005,
    }
    with (
        ServerProcess(data_dir=tmp_path / "one", **settings) as one,
        ServerProcess(data_dir=tmp_path / "other", **settings) as other,
    ):
        yield one, other


def ask(number: int, conversation: str | None = None, *media: str) -> bytes:
    """A question, about media that are uploaded already."""
    fields: dict[str, Any] = {"message": f"Say {question(number)}."}
    if conversation is not None:
        fields["conversation_id"] = conversation
    for id_ in media:
        fields["image"] = f"media:{id_}"
    return form_request("/v1/chat", fields)


async def told(server: ServerProcess, sent: bytes, status: int = 200) -> Any:
    head, body = await fetch(server.address, sent)
    assert head.status == status, body
    return json.loads(body)


Pair = tuple[ServerProcess, ServerProcess]


def test_a_medium_is_used_and_deleted_at_the_other(pair: Pair) -> None:
    async def use() -> None:
        one, other = pair
        pixels = b"pixels" * 1000
        file = ("image", ("cat.png", pixels))
        media = [
            (await told(one, form_request("/v1/media", {}, [file]), 201))["id"] for _ in range(2)
        ]
        answered = await told(other, ask(1, None, media[0]))
        assert [report["name"] for report in answered["media"]] == ["cat.png"]
        path = f"/v1/media/{media[1]}"
        assert (await told(other, request("DELETE", path)))["deleted"]
        await told(one, request("GET", path), 404)
        await told(one, request("GET", f"{path}/content"), 404)
        # The same bytes, which the conversation still shows, outlive the other upload.
        _, content = await fetch(one.address, request("GET", f"/v1/media/{media[0]}/content"))
        assert content == pixels
        await told(one, request("DELETE", f"/v1/media/{media[0]}"), 409)
        again = await told(one, ask(2, answered["conversation_id"]))
        assert [report["name"] for report in again["media"]] == ["cat.png"]

    asyncio.run(use())


def test_both_are_asked_to_continue_at_once(pair: Pair) -> None:
    async def race() -> None:
        id_ = (await told(pair[0], ask(1)))["conversation_id"]
        kept = [1]
        for number in (10, 20, 30):
            asked = [ask(number + n, id_) for n in range(2)]
            answers = await asyncio.gather(
                *(fetch(server.address, sent) for server, sent in zip(pair, asked, strict=True))
            )
            assert sorted(head.status for head, _ in answers) == [200, 409]
            for place, (head, body) in enumerate(answers):
                if head.status == 200:
                    kept.append(number + place)
                    assert json.loads(body)["turn"] == len(kept)
                else:
                    assert json.loads(body)["error"]["code"] == "conflict_error"
        found = await told(pair[1], request("GET", f"/v1/conversations/{id_}"))
        assert [turn["message"] for turn in found["turns"]] == [f"Say {question(n)}." for n in kept]
        assert [turn["answer"].split()[:2] for turn in found["turns"]] == [
            [question(number), f"n{place + 1}"] for place, number in enumerate(kept)
        ]

    asyncio.run(race())
