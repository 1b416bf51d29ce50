"""What was made without a key goes to a key's tenant, and back: conversations, media, files."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest
from sqlalchemy import select

from mico_chat.cli.main import main
from mico_chat.errors import ConfigError
from mico_server.errors import NotFoundError
from mico_server.store.blobs import walk
from mico_server.store.database import Database
from mico_server.store.keys import Amount, History, KeyStore
from mico_server.store.tables import blobs
from tests.server.conftest import BOTH
from tests.server.stored import Stores

pytestmark = pytest.mark.anyio


async def files(stores: Stores) -> int:
    async with stores.database.reading() as connection:
        rows = set(await connection.scalars(select(blobs.c.id)))
    assert rows == set(walk(stores.folder))
    return len(rows)


@pytest.fixture
def history(stores: Stores) -> History:
    return History(stores.database, stores.folder)


@BOTH
async def test_a_tenant_and_its_users_move_and_nobody_else(
    stores: Stores, history: History
) -> None:
    media = stores.media
    tenants = ("local", "local/anna", "local/b-1", "locals", "LOCAL", "Local/anna", "key-1")
    shown = {tenant: (await stores.add(tenant=tenant)).id for tenant in tenants}
    asked = {tenant: await stores.say(tenant=tenant, show=[shown[tenant]]) for tenant in tenants}
    alone = (await stores.add(b"dog", tenant="local")).id
    assert await files(stores) == 8
    assert await history.of("local") == Amount(3, 4)

    assert await history.move("local", "key-1") == Amount(3, 4)
    assert not await history.of("local")
    assert await history.of("key-1") == Amount(4, 5)
    assert await files(stores) == 7, "one of the key's had the same bytes"
    for tenant in tenants:
        now = f"key-1{tenant[5:]}" if tenant[:6] in ("local", "local/") else tenant
        found = await stores.load(asked[tenant], now)
        assert media.path(found.media[shown[tenant]]).read_bytes() == b"bytes"
        if now != tenant:
            with pytest.raises(NotFoundError):
                await stores.load(asked[tenant], tenant)
    assert media.path(await media.get("key-1", alone)).read_bytes() == b"dog"

    # And back, the key's own with them.
    assert await history.move("key-1", "local") == Amount(4, 5)
    for tenant in ("local", "local/anna", "local/b-1"):
        found = await stores.load(asked[tenant], tenant)
        assert media.path(found.media[shown[tenant]]).read_bytes() == b"bytes"
    assert await files(stores) == 7
    await media.sweep()
    assert await files(stores) == 7


async def test_a_file_system_without_links_and_a_file_that_vanished(
    stores: Stores, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*paths: object) -> None:
        raise PermissionError("no links here")

    media = stores.media
    kept, lost = await stores.add(tenant="local"), await stores.add(b"dog", tenant="local")
    media.path(lost).unlink()
    monkeypatch.setattr(os, "link", none)
    await history.move("local", "key-1")
    assert media.path(await media.get("key-1", kept.id)).read_bytes() == b"bytes"
    assert (await media.get("key-1", lost.id)).name == "cat.jpg", "one that vanished stops nothing"


async def test_another_folder_is_refused_and_nothing_changes(
    stores: Stores, tmp_path: Path
) -> None:
    asked = await stores.say(tenant="local", send=[b"cat"])
    elsewhere = History(stores.database, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"elsewhere.*--media-dir"):
        await elsewhere.move("local", "key-1")
    (record,) = (await stores.load(asked, "local")).media.values()
    assert stores.media.path(record).is_file()
    assert not (tmp_path / "elsewhere").exists()


class TestCommand:
    """``mico-chat keys``; not async, as it has an event loop of its own."""

    @pytest.fixture(autouse=True)
    def _settings(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("mico_chat.cli.main._quiet_libraries", lambda: None)
        monkeypatch.setenv("MICO_SERVER_DATA_DIR", str(tmp_path))
        monkeypatch.setattr("mico_chat.cli.keys._at_a_terminal", lambda: self.answers is not None)
        monkeypatch.setattr("typer.confirm", self._confirm)
        self.answers: list[bool] | None = None
        self.asked: list[str] = []

    def _confirm(self, question: str, **_: object) -> bool:
        assert self.answers, question
        self.asked.append(question)
        return self.answers.pop(0)

    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
        """The key's id, if one is named, and what the command tells."""
        with pytest.raises(SystemExit) as ended:
            main(["keys", *arguments])
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        assert re.fullmatch(r"(mico-[A-Za-z0-9_-]{43}\n)?", out), "the secret alone"
        found = re.search(r"key-[0-9a-f]{24}", err)
        return (found[0] if found else ""), err

    def has(self, tmp_path: Path) -> dict[str, Amount]:
        """How much each tenant has, with the keys' tenants by their names."""

        async def look() -> dict[str, Amount]:
            database = Database(None, tmp_path)
            await database.start()
            history = History(database, tmp_path / "media")
            tenants = {key.name: key.tenant for key in await KeyStore(database).list()}
            found = {n: await history.of(t) for n, t in {**tenants, "local": "local"}.items()}
            await database.close()
            return {name: amount for name, amount in found.items() if amount}

        return asyncio.run(look())

    @pytest.fixture(autouse=True)
    def _talked(self, tmp_path: Path) -> None:
        async def talk() -> None:
            database = Database(None, tmp_path)
            await database.start()
            stores = Stores(database, tmp_path / "media")
            await stores.say(tenant="local/b-1", send=[b"cat"])
            await stores.say(tenant="local")
            await database.close()

        asyncio.run(talk())

    MUCH = Amount(2, 1)

    def test_the_first_key_is_offered_the_history(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        self.answers = [True, True]
        id_, err = self.run(capsys, "create", "me")
        assert "2 conversations and 1 file" in self.asked[0]
        assert "Moved to the key: 2 conversations and 1 file\n" in err
        assert self.has(tmp_path) == {"me": self.MUCH}
        self.run(capsys, "create", "other")
        assert len(self.asked) == 1, "a second key is offered nothing"
        self.run(capsys, "revoke", self.run(capsys, "create", "third")[0])
        assert len(self.asked) == 1, "and returns nothing while another is in force"
        for name in ("other", "me"):
            listed = self.listed(capsys, name)
            self.run(capsys, "revoke", listed)
        assert id_ == listed
        assert len(self.asked) == 2
        assert self.has(tmp_path) == {"local": self.MUCH}

    def listed(self, capsys: pytest.CaptureFixture[str], name: str) -> str:
        with pytest.raises(SystemExit):
            main(["keys", "list"])
        (id_,) = re.findall(rf"(?m)^(key-\w+) +{name} ", capsys.readouterr().out)
        return str(id_)

    def test_who_says_no_is_told_how(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        self.answers = [False]
        self.run(capsys, "create", "prometheus", "--scope", "metrics")
        assert self.asked == [], "a key that cannot chat is offered nothing"
        id_, err = self.run(capsys, "create", "me")
        assert f"mico-chat keys take-history {id_}" in err
        assert self.has(tmp_path) == {"local": self.MUCH}
        self.run(capsys, "take-history", id_)
        assert self.has(tmp_path) == {"me": self.MUCH}

    def test_scripts_say_it_by_flags(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        id_, err = self.run(capsys, "create", "one")
        assert f"mico-chat keys take-history {id_}" in err
        self.run(capsys, "revoke", id_)
        id_, err = self.run(capsys, "create", "two", "--no-take-history")
        assert "take-history" not in err
        assert self.has(tmp_path) == {"local": self.MUCH}
        self.run(capsys, "create", "three", "--take-history")
        assert self.has(tmp_path) == {"three": self.MUCH}
        self.run(capsys, "revoke", id_)
        three = self.listed(capsys, "three")
        assert f"revoke {three} --return-history" in self.run(capsys, "revoke", three)[1]
        self.run(capsys, "revoke", three, "--return-history")
        assert self.has(tmp_path) == {"local": self.MUCH}
