"""The database starts from nothing, again, and at the same time; errors tell no password."""

import asyncio
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, delete, insert, select, text

from mico_chat.errors import ConfigError, MissingExtraError
from mico_server.errors import UnavailableError
from mico_server.store.database import Database
from mico_server.store.keys import KeyStore
from mico_server.store.search import may_say
from mico_server.store.tables import blobs, conversations, media, metadata, now, turns
from tests.server.conftest import BOTH, POSTGRES
from tests.server.support.postgres import Postgres
from tests.server.support.stored import Stores

pytestmark = pytest.mark.anyio


def differences(connection: Connection) -> Any:
    """Between a database and the metadata, which lack the index of texts."""
    opts = {
        "compare_server_default": True,
        "include_name": lambda name, *_: "search" not in (name or ""),
    }
    return compare_metadata(MigrationContext.configure(connection, opts=opts), metadata)


@BOTH
async def test_servers_start_at_once_and_again(database_url: str, tmp_path: Path) -> None:
    for made in (0, 4):
        databases = [Database(database_url, tmp_path / "data") for _ in range(4)]
        await asyncio.gather(*(database.start() for database in databases))
        assert len(await KeyStore(databases[0]).list()) == made
        await asyncio.gather(*(KeyStore(database).create("bob") for database in databases))
        await asyncio.gather(*(database.close() for database in databases))


def without_order(sqlite: bool) -> list[str]:
    """What makes a database of today one of revision 0007."""
    triggers = ("insert", "delete", "update")
    sqlite_index = [
        *(f"DROP TRIGGER turns_search_{one}" for one in triggers),
        "DROP TABLE turns_search",
        "DROP INDEX ix_turns_search_id",
        "ALTER TABLE turns DROP COLUMN search_id",
    ]
    other = ["ALTER TABLE turns DROP COLUMN search", "DROP FUNCTION turns_search"]
    return [
        *(sqlite_index if sqlite else other),
        *(f"ALTER TABLE turns DROP COLUMN {one}" for one in ("model", "beside", "preferred")),
        "DROP INDEX ix_conversations_tenant_pinned_updated_at_id",
        "CREATE INDEX ix_conversations_tenant_updated_at_id "
        "ON conversations (tenant, updated_at, id)",
        "ALTER TABLE conversations DROP COLUMN pinned",
        "ALTER TABLE conversations DROP COLUMN archived",
        "ALTER TABLE conversations DROP COLUMN last_number",
        "UPDATE alembic_version SET version_num = '0007'",
    ]


@BOTH
async def test_a_database_of_the_first_version_is_upgraded(
    database_url: str, tmp_path: Path
) -> None:
    database = Database(database_url, tmp_path / "data")
    await database.start()
    secret, _ = await KeyStore(database).create("old", "t", scopes=["chat", "metrics"])
    async with database.writing() as connection:
        await connection.execute(insert(blobs).values(id="a", bytes=7))
        old = {"id": "m", "tenant": "t/anna", "blob_id": "a", "kind": "image", "name": "x"}
        await connection.execute(insert(media).values(**old, uploaded=True, created_at=now()))
        at = {"created_at": now(), "updated_at": now()}
        chat = {"id": "c", "tenant": "t", "title": "x", "title_folded": "x", "model": "mini"}
        await connection.execute(insert(conversations).values(**chat, **at))
        said: dict[str, Any] = {
            "parts": [],
            "answer": "",
            "text_folded": "",
            "finish_reason": "stop",
        }
        said |= {"conversation_id": "c", "reports": [], "created_at": now()}
        await connection.execute(insert(turns), [{**said, "number": n} for n in (1, 2, 3)])
        for change in (
            *without_order(database.is_sqlite),
            "ALTER TABLE keys DROP COLUMN scopes",
            "ALTER TABLE turns DROP COLUMN confidence",
            "ALTER TABLE turns DROP COLUMN unsure",
            "ALTER TABLE turns DROP COLUMN parent",
            "ALTER TABLE conversations DROP COLUMN head",
            "ALTER TABLE conversations DROP COLUMN revision",
            "DROP TABLE rate_limit_hits",
            "DROP TABLE files",
            "DROP TABLE batches",
            "DROP TABLE taught",
            "DROP INDEX ix_media_owner_blob_id_blob_bytes",
            "ALTER TABLE media DROP COLUMN owner",
            "ALTER TABLE media DROP COLUMN blob_bytes",
            "UPDATE alembic_version SET version_num = '0001'",
        ):
            await connection.execute(text(change))
    await database.close()

    await database.start()
    async with database.reading() as connection:
        assert await connection.run_sync(differences) == []
        sizes = await connection.execute(select(media.c.owner, media.c.blob_bytes))
        assert sizes.one() == ("t", 7)
        behind = await connection.execute(select(turns.c.number, turns.c.parent))
        assert sorted(behind.all()) == [(1, 0), (2, 1), (3, 2)], "one path, as before versions"
        if not database.is_sqlite:
            logged = text(
                "SELECT relpersistence FROM pg_class WHERE oid = 'rate_limit_hits'::regclass"
            )
            assert await connection.scalar(logged) in ("u", b"u")
    key = await KeyStore(database).find(secret)
    assert key is not None
    assert (key.name, key.scopes) == ("old", frozenset({"chat", "metrics"})), "as before scopes"
    await database.close()


@BOTH
async def test_what_was_said_before_the_index_is_found(stores: Stores, database_url: str) -> None:
    database = stores.database
    first, second = [await stores.say("A needle", "in straw 字字字") for _ in range(2)]
    await stores.say("and nothing else", id_=second)
    async with database.writing() as connection:
        # SQLite gives rows other numbers in a VACUUM.
        await connection.execute(delete(turns).where(turns.c.conversation_id == first))
        for change in without_order(database.is_sqlite):
            await connection.execute(text(change))
    await database.close()
    await database.start()
    if database.is_sqlite:
        with closing(sqlite3.connect(database.name)) as file:
            file.execute("VACUUM")
    await stores.say("another needle", id_=first, number=1, after=0)
    async with database.reading() as connection:
        assert await connection.run_sync(differences) == []

    async def found(query: str) -> set[str]:
        return {one.id for one in await stores.conversations.list("t", query=query, limit=9)}

    assert await found("needle") == {first, second}
    assert await found("字字字") == await found("nothing") == {second}
    await stores.conversations.delete_turns("t", second, 2)
    assert await found("nothing") == set()
    await stores.conversations.delete("t", first)
    assert await found("needle") == {second}
    if database.is_sqlite:
        async with database.writing() as connection:
            check = "INSERT INTO turns_search(turns_search, rank) VALUES ('integrity-check', 1)"
            await connection.execute(text(check))
            await connection.execute(
                text("INSERT INTO turns_search(turns_search) VALUES ('delete-all')")
            )
        assert await found("straw") == set(), "the index alone says where to look"
    else:
        async with database.reading() as connection:
            await connection.execute(text("SET LOCAL enable_seqscan = off"))
            condition = may_say("needle", sqlite=False)
            assert condition is not None
            query = select(turns.c.number).where(condition)
            plain = query.compile(connection.engine, compile_kwargs={"literal_binds": True})
            plan = await connection.exec_driver_sql(f"EXPLAIN {plain}")
            assert "ix_turns_search" in str(plan.all())


@BOTH
async def test_a_schema_of_a_newer_version(database: Database, database_url: str) -> None:
    async with database.writing() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match=r"does not belong to this version.*9999"):
        await Database(database_url, Path(database._data_dir)).start()


@BOTH
async def test_reading_sees_one_state(database: Database) -> None:
    async with database.reading() as reader:
        assert not (await reader.execute(blobs.select())).all()
        async with database.writing() as writer:
            await writer.execute(insert(blobs).values(id="a", bytes=1))
        assert not (await reader.execute(blobs.select())).all()


@BOTH
async def test_a_cancelled_caller_leaves_no_half_transaction(database: Database) -> None:
    keys = KeyStore(database)
    for delay in range(12):
        task = asyncio.create_task(keys.create("bob"))
        reader = asyncio.create_task(keys.list())
        await asyncio.sleep(delay / 2000)
        task.cancel()
        reader.cancel()
        await asyncio.gather(task, reader, return_exceptions=True)
    stored = len(await keys.list())
    await keys.create("bob")  # nothing is locked
    assert len(await keys.list()) == stored + 1


async def test_sqlite_is_durable_and_closed_to_others(tmp_path: Path) -> None:
    database = Database(None, tmp_path / "new" / "data")
    await database.start()
    async with database.reading() as connection:
        pragmas = [
            await connection.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    await database.close()
    full = 2
    assert pragmas == ["wal", full, 1, 30000]
    folder = tmp_path / "new" / "data"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "mico-chat.db").stat().st_mode) == 0o600


@POSTGRES
async def test_a_lost_connection_is_said_and_mended(
    database: Database, database_url: str, keys: KeyStore
) -> None:
    await keys.create("bob")
    drop = text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def lose() -> None:
        async with database.writing() as victim:
            await victim.execute(text("SELECT 1"))
            async with database.writing() as killer:
                await killer.execute(drop)
            await victim.execute(text("SELECT 1"))

    with pytest.raises(UnavailableError, match="try again"):
        await lose()
    assert len(await keys.list()) == 1

    stranger = await asyncpg.connect(database_url)
    await stranger.execute(drop.text)
    await stranger.close()
    assert len(await keys.list()) == 1, "one that was lost while idle is not used"


@POSTGRES
async def test_a_server_that_goes_away_and_comes_back(postgres: Postgres, keys: KeyStore) -> None:
    secret, key = await keys.create("bob")
    await asyncio.to_thread(postgres.crash)
    try:
        with pytest.raises(UnavailableError):
            await keys.find(secret)
    finally:
        await asyncio.to_thread(postgres.start)
    assert await keys.find(secret) == key, "committed before the crash"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://u:s3cret@h/x", "'mysql'.*postgresql:// or sqlite:///"),
        ("", "scheme"),
        ("sqlite:x.db", "scheme"),
        ("sqlite:///", "does not name a file"),
        ("sqlite:///:memory:", "does not name a file"),
        ("sqlite:///x.db?mode=memory", "does not name a file"),
        ("postgresql://u:s3cr@et@h/x", "cannot be read.*%XX"),
        ("postgresql://u:s3cr?et@h/x", "cannot be read.*%XX"),
    ],
)
async def test_urls_that_are_refused(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        Database(url, tmp_path)
    assert "s3cr" not in str(refused.value)


@POSTGRES
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda url: url.replace("s3cret", "s3cres"), "password authentication failed"),
        (lambda url: url.replace("/postgres?", "/x?"), 'database "x" does not exist'),
        (lambda url: url.rsplit(":", 1)[0] + ":1/x", "cannot be reached"),
        (lambda url: url.rsplit(":", 1)[0] + ":http/x", "cannot be read"),
        (lambda url: url.replace("127.0.0.1", "nowhere.invalid"), "cannot be reached"),
        (lambda url: f"{url}&sslmode=s3cret", "cannot be read"),
    ],
)
async def test_unreachable_databases(
    database_url: str, tmp_path: Path, change: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        await Database(change(database_url), tmp_path).start()
    assert "s3cre" not in str(refused.value)


async def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file.*database_url"):
        await Database(None, tmp_path / "file" / "data").start()
    (tmp_path / "x.db").write_bytes(b"text, and enough of it" * 100)
    with pytest.raises(ConfigError, match=r"x\.db: file is not a database"):
        await Database(f"sqlite:///{tmp_path / 'x.db'}", tmp_path).start()


async def test_a_missing_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mico_server.store.database.asyncpg", None)
    with pytest.raises(MissingExtraError, match=r"mico-chat\[postgres\]"):
        Database("postgresql://h/x", tmp_path)
