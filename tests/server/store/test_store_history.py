"""What was made without a key goes to a key's tenant, and back: conversations, media, files."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import select

from mico_chat.errors import ConfigError
from mico_server.errors import NotFoundError
from mico_server.store.batches import BatchStore
from mico_server.store.blobs import walk
from mico_server.store.database import Database
from mico_server.store.keys import Amount, History, KeyStore
from mico_server.store.tables import blobs
from tests.server.conftest import BOTH, Run
from tests.server.support.stored import Stores

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


@dataclass
class Person:
    """The user of ``mico-chat keys``, who is at a terminal if there are ``answers``."""

    answers: list[bool] | None = None
    asked: list[str] = field(default_factory=list)

    def confirm(self, question: str, **_: object) -> bool:
        assert self.answers, question
        self.asked.append(question)
        return self.answers.pop(0)


@asynccontextmanager
async def opened(data: Path) -> AsyncIterator[Stores]:
    database = Database(None, data)
    await database.start()
    yield Stores(database, data / "media")
    await database.close()


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Person:
    """A user who has talked before there were keys."""
    person = Person()
    monkeypatch.setattr("mico_chat.cli.keys._at_a_terminal", lambda: person.answers is not None)
    monkeypatch.setattr("typer.confirm", person.confirm)

    async def talk() -> None:
        async with opened(tmp_path / "data") as stores:
            await stores.say(tenant="local/b-1", send=[b"cat"])
            await stores.say(tenant="local")

    asyncio.run(talk())
    return person


@pytest.fixture
def has(tmp_path: Path) -> Callable[[], dict[str, Amount]]:
    """Tells how much each tenant has, with the keys' tenants by the names of their keys."""

    async def look() -> dict[str, Amount]:
        async with opened(tmp_path / "data") as stores:
            history = History(stores.database, stores.folder)
            tenants = {key.name: key.tenant for key in await KeyStore(stores.database).list()}
            found = {n: await history.of(t) for n, t in {**tenants, "local": "local"}.items()}
            return {name: amount for name, amount in found.items() if amount}

    return lambda: asyncio.run(look())


Has = Callable[[], dict[str, Amount]]
MUCH = Amount(2, 1)


def id_in(err: str) -> str:
    (id_,) = set(re.findall(r"key-[0-9a-f]{24}", err))
    return str(id_)


def test_the_first_key_is_offered_the_history(keys_command: Run, person: Person, has: Has) -> None:
    person.answers = [True, True]
    ids = {}
    _, err = keys_command("create", "me")
    ids["me"] = id_in(err)
    assert "2 conversations and 1 file" in person.asked[0]
    assert "Moved to the key: 2 conversations and 1 file\n" in err
    assert has() == {"me": MUCH}
    for name in ("other", "third"):
        ids[name] = id_in(keys_command("create", name)[1])
    assert len(person.asked) == 1, "a second key is offered nothing"
    keys_command("revoke", ids["third"])
    assert len(person.asked) == 1, "and returns nothing while another is in force"
    for name in ("other", "me"):
        keys_command("revoke", ids[name])
    assert len(person.asked) == 2
    assert has() == {"local": MUCH}


def test_who_says_no_is_told_how(keys_command: Run, person: Person, has: Has) -> None:
    person.answers = [False]
    keys_command("create", "prometheus", "--scope", "metrics")
    assert person.asked == [], "a key that cannot chat is offered nothing"
    _, err = keys_command("create", "me")
    assert f"mico-chat keys take-history {id_in(err)}" in err
    assert has() == {"local": MUCH}
    keys_command("take-history", id_in(err))
    assert has() == {"me": MUCH}


def test_scripts_say_it_by_flags(keys_command: Run, person: Person, has: Has) -> None:
    one = id_in(keys_command("create", "one")[1])
    keys_command("revoke", one)
    _, err = keys_command("create", "two", "--no-take-history")
    assert "take-history" not in err
    assert has() == {"local": MUCH}
    three = id_in(keys_command("create", "three", "--take-history")[1])
    assert has() == {"three": MUCH}
    keys_command("revoke", id_in(err))
    assert f"revoke {three} --return-history" in keys_command("revoke", three)[1]
    keys_command("revoke", three, "--return-history")
    assert has() == {"local": MUCH}


@BOTH
async def test_files_and_batches_move_too(stores: Stores, history: History, tmp_path: Path) -> None:
    store = BatchStore(stores.database, tmp_path / "uploads")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}")
    file = await store.add_file("local/anna", "a.jsonl", path)
    batch = await store.create("local/anna", "/v1/responses", file.id, None)
    await history.move("local", "key-1")
    for read in (store.file, store.batch):
        with pytest.raises(NotFoundError):
            await read("local/anna", file.id if read == store.file else batch.id)
    assert store.content(await store.file("key-1/anna", file.id)).read_bytes() == b"{}"
    # The runner has the batch as it was before.
    store.path(batch.output_file_id).write_bytes(b"{}\n")
    await store.move(batch, "completed", counts={"completed": 1})
    ended = await store.batch("key-1/anna", batch.id)
    assert (await store.file("key-1/anna", ended.output_file_id)).purpose == "batch_output"


@BOTH
async def test_a_person_gets_what_browsers_of_their_own_had(
    stores: Stores, history: History
) -> None:
    one, two = (f"b-{n:036x}" for n in (1, 2))
    tenants = (f"local/{one}", f"local/{two}", f"local/page-{two}", "local/anna", f"locals/{one}")
    asked = {t: await stores.say(tenant=t, send=[t.encode()]) for t in (*tenants, f"key-1/{one}")}

    async def seen(tenant: str) -> set[str]:
        found = await stores.conversations.list(tenant, limit=9)
        return {t for t, id_ in asked.items() if id_ in {chat.id for chat in found}}

    await history.adopt(f"local/page-{one}")  # its browser comes back to a shared page
    assert await seen(f"local/page-{one}") == {f"local/{one}"}
    for _ in range(2):
        await history.adopt("local")
    assert await seen("local") == {f"local/{two}"}
    chat = await stores.load(asked[f"local/{two}"], "local")
    (medium,) = chat.media.values()
    assert stores.media.path(medium).read_bytes() == f"local/{two}".encode()
    for others in tenants[2:]:
        assert await seen(others) == {others}
    await history.move("local", "key-1")
    await history.adopt("key-1")
    mine = {f"local/{one}", f"local/{two}", f"local/page-{two}", f"key-1/{one}"}
    assert await seen("key-1") == mine
    assert await files(stores) == 6
    chat = await stores.load(await stores.say(tenant=f"key-1/{two}", send=[b"x"]), f"key-1/{two}")
    (medium,) = chat.media.values()
    os.remove(stores.media.path(medium))
    await history.adopt("key-1")  # the chat comes along without its file
    assert len(await stores.conversations.list("key-1", limit=9)) == 5
