"""A thousand requests at once and one after the other: none is mixed up, and nothing is left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mico_chat.media import MediaDecoder, MediaFile
from tests.server.echo import SUMS, agree, echo, echoing_assistant, sums_of
from tests.server.load import Ask, Load, planned
from tests.server.server_process import ServerProcess

REQUESTS = int(os.environ.get("MICO_TEST_LOAD_REQUESTS", "1000"))
MAX_REQUESTS = 24
"""Fewer than there are clients, so that some are refused."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(decodes=True, data_dir=tmp_path, max_requests=MAX_REQUESTS) as running:
        yield running


def sums_of_all(lanes: Sequence[Sequence[Ask]]) -> dict[int, list[float]]:
    """What each question's medium adds to the sums, encoded alone and by another encoder."""

    async def of_all() -> dict[int, list[float]]:
        with MediaDecoder() as decoder, closing(echoing_assistant(decoder)) as assistant:
            return {
                ask.number: await sums_of(
                    assistant.encoder, MediaFile(ask.shown.kind, ask.shown.data)
                )
                for lane in lanes
                for ask in lane
                if ask.shown is not None
            }

    return asyncio.run(of_all())


@pytest.mark.soak
def test_no_request_is_lost_or_mixed_up(server: ServerProcess, tmp_path: Path) -> None:
    half = REQUESTS // 2
    halves = [planned(half), planned(half, first=half)]
    sums = sums_of_all([*halves[0], *halves[1]])

    def checked(asks: Sequence[Ask], answer: str) -> str | None:
        columns = zip([0.0] * SUMS, *(sums[a.number] for a in asks if a.shown), strict=True)
        expected = echo([ask.marker for ask in asks], [sum(column) for column in columns])
        return None if agree(answer, expected) else f"{answer!r} instead of {expected!r}"

    def options(ask: Ask) -> dict[str, Any]:
        return {"model": "tiny", "max_tokens": 256} if ask.completions else {"max_tokens": 256}

    load = Load(server.address, options, checked, patience=0.1)
    settled = []
    for lanes in halves:
        asyncio.run(load.run(lanes))
        settled.append(asyncio.run(load.settled()))
    assert not load.faults, "\n".join(load.faults[:20])
    assert set(load.statuses) <= {"200", "409", "429"}
    assert load.statuses["429"], "nobody was refused: the load is none"
    left = sum(load.left.values())
    assert len(load.left) == 4
    assert load.statuses["200"] + load.left["in the body"] + load.left["after the body"] == REQUESTS
    assert REQUESTS // 20 < left < REQUESTS // 5
    assert 0 < max(sample.requests for sample in load.samples) <= MAX_REQUESTS
    assert not list((tmp_path / "media" / "tmp").iterdir())
    first, second = settled
    assert second.files <= first.files + 2
    assert second.memory < first.memory + 30e6
