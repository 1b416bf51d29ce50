"""What was acknowledged is there after the server was killed; what was not leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mico_server.store.conversations import ConversationStore
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore
from mico_server.store.media import MediaStore
from tests.server.conftest import BOTH

pytestmark = pytest.mark.anyio


@pytest.fixture
def acknowledged(database_url: str, root: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """What a process said that it had stored, before it was killed in the midst of more."""
    lines: list[str] = []
    for enough in (3, 14, 25):
        command = [sys.executable, "-m", "tests.server.store_writer", database_url, str(tmp_path)]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for line in writer.stdout:
                lines.append(line)
                if len(lines) >= enough:
                    break
            writer.kill()
            lines += writer.stdout.readlines()
    return [json.loads(line) for line in lines if line.endswith("}\n")]


@BOTH
async def test_every_acknowledged_write_survives_a_kill(
    acknowledged: list[dict[str, Any]],
    database: Database,
    keys: KeyStore,
    media: MediaStore,
    conversations: ConversationStore,
    tmp_path: Path,
) -> None:
    assert len(acknowledged) >= 25
    for said in acknowledged:
        assert await keys.find(said["secret"]) is not None
        id_, number = said["turn"]
        turn = (await conversations.load("t", id_)).turns[number - 1]
        assert turn.answer == said["secret"]
        upload, new = await media.get_all("t", said["media"])
        assert media.path(upload).read_bytes() == media.path(new).read_bytes()[::-1]

    await media.sweep()
    records = await media.list("t", limit=1000)
    stored = {p for p in (tmp_path / "media").rglob("*") if p.is_file()}
    assert stored - set((tmp_path / "media" / "tmp").rglob("*")) == set(map(media.path, records))
    for info in await conversations.list("t", limit=1000):
        found = await conversations.load("t", info.id)
        assert [turn.number for turn in found.turns] == list(range(1, len(found.turns) + 1))
        assert conversations.messages(found)
