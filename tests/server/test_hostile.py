"""The service survives hostile media: each costs its sender one clear answer, and nobody else."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import httpx
import pytest

from mico_chat.media import MediaDecoder, MediaLimits
from tests.server.bombs import BOMBS
from tests.server.hostile import (
    MUTATIONS,
    Outcome,
    mutated,
    resident_mb,
    send_all,
    service,
    unharmed,
)

COUNT = int(os.environ.get("MICO_TEST_HOSTILE_COUNT", "500"))
"""Files of the test; the documentation of a release may ask for thousands."""

SEED = int(os.environ.get("MICO_TEST_HOSTILE_SEED", "0"))
WARM_UP = 200
TIMEOUT_S = 10.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def decoder() -> Iterator[MediaDecoder]:
    with MediaDecoder(MediaLimits(timeout_s=TIMEOUT_S), workers=2) as decoder:
        yield decoder


@pytest.fixture
def client(folder: Path, decoder: MediaDecoder) -> Iterator[httpx.Client]:
    with service(decoder, folder / "data") as client:
        yield client


def assert_all_answered(outcomes: list[Outcome]) -> None:
    assert [(o.case.name, o.status, o.message) for o in outcomes if o.status != 200] == []


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_media(
    client: httpx.Client, decoder: MediaDecoder, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "mico_chat.media.decoder")
    cases = mutated(COUNT, SEED)
    assert_all_answered(send_all(client, unharmed()))
    outcomes = send_all(client, islice(cases, WARM_UP))
    memory, files = resident_mb(), len(os.listdir("/proc/self/fd"))
    outcomes += send_all(client, cases)
    assert_all_answered(send_all(client, unharmed()))

    assert len(outcomes) == COUNT
    assert [(o.case.name, o.complaint, o.message) for o in outcomes if o.complaint] == []
    assert max(outcome.seconds for outcome in outcomes) < TIMEOUT_S + 5

    assert resident_mb() - memory < 100
    assert len(os.listdir("/proc/self/fd")) <= files + 4
    assert list(folder.glob("mico-*")) == []
    assert list((folder / "data" / "media" / "tmp").iterdir()) == []  # of uploads
    starts = [r for r in caplog.records if r.msg == "decoder process %d started"]
    assert 1 <= len(starts) <= 2 + COUNT // 200
    assert len(decoder.pids()) <= 2
    assert all(resident_mb(pid) < decoder.limits.memory_mb for pid in decoder.pids())
    assert list(Path("/tmp").glob("owned*")) == []  # what pickles and paths of archives ask for


def test_every_mutation_and_every_bomb_comes_up() -> None:
    seen = {case.mutation for case in mutated(max(WARM_UP, 3 * len(BOMBS)), 0)}
    assert seen == {*MUTATIONS, *(bomb.name for bomb in BOMBS)}
