"""``mico-chat keys``: the keys that a service asks its clients for."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from mico_chat.cli.options import check_extra, group, in_columns
from mico_chat.late import late

with late():
    from mico_server import settings as server
    from mico_server.store import database as databases
    from mico_server.store import keys as stores

T = TypeVar("T")

keys = group("Keys that a service asks its clients for.")

DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="As for serve. Default: MICO_SERVER_DATABASE_URL, or SQLite in --data-dir."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="As for serve. Default: MICO_SERVER_DATA_DIR, or the user's.")
]
MediaDir = Annotated[
    Path | None,
    typer.Option(help="As for serve. Default: MICO_SERVER_MEDIA_DIR, or media in --data-dir."),
]

LOCAL = "local"
"""The name under which the server keeps the data of requests without a key."""


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; for the list.")],
    tenant: str | None = typer.Option(
        None, help="Share media and conversations with the keys that name it too."
    ),
    rate_limit: str | None = typer.Option(
        None, help="Such as 60/minute. Default: the service's own limit."
    ),
    scope: list[str] | None = typer.Option(
        None,
        help="What the key opens: chat, metrics (/metrics) or admin (/v1/keys, and everybody's "
        "batches). Repeatable. Default: chat.",
    ),
    take_history: bool | None = typer.Option(
        None,
        "--take-history/--no-take-history",
        help="Give the key what was asked without a key. Default: ask, for the first key.",
    ),
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
    media_dir: MediaDir = None,
) -> None:
    """Make a key and print its secret, which cannot be shown again.

    KEY=$(mico-chat keys create bob)

    mico-chat keys create prometheus --scope metrics
    """
    scopes = scope or ["chat"]

    async def create(store: stores.KeyStore, history: stores.History) -> None:
        first = "chat" in scopes and not any("chat" in k.scopes for k in await _in_force(store))
        secret, key = await store.create(name, tenant, rate_limit, scopes)
        print(secret, flush=True)
        _tell(f"{key.id}: a key for {key.name}, shown only this once")
        kept = await history.of(LOCAL)
        if take_history is None and kept and first:
            said = f"Made without a key: {kept}."
            if not _confirmed(f"{said} Move this to the new key? Only the key sees it then."):
                _tell(f"{said} To move it to the new key: mico-chat keys take-history {key.id}")
                return
        elif not take_history:
            return
        _tell(f"Moved to the key: {await _given(history, key.tenant)}")

    _with_stores(create, database_url, data_dir, media_dir)


@keys.command("take-history")
def take_history(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As the list has it: key-...")],
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
    media_dir: MediaDir = None,
) -> None:
    """Give a key the conversations and files that were made without a key."""

    async def take(store: stores.KeyStore, history: stores.History) -> None:
        key = await store.get(key_id)
        _tell(f"Moved to the key {key.name!r}: {await _given(history, key.tenant)}")

    _with_stores(take, database_url, data_dir, media_dir)


@keys.command("list")
def list_keys(database_url: DatabaseUrl = None, data_dir: DataDir = None) -> None:
    """Print all keys, without their secrets; the oldest first."""

    async def read(store: stores.KeyStore, history: stores.History) -> Sequence[stores.Key]:
        return await store.list()

    rows = [("ID", "NAME", "TENANT", "SCOPES", "RATE LIMIT", "CREATED", "REVOKED")]
    for key in _with_stores(read, database_url, data_dir):
        created, revoked = (
            "-" if time is None else f"{time:%Y-%m-%d %H:%M}"
            for time in (key.created_at, key.revoked_at)
        )
        scopes, limit = ",".join(sorted(key.scopes)), key.rate_limit or "-"
        rows.append((key.id, key.name, key.tenant, scopes, limit, created, revoked))
    print(in_columns(rows))


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As the list has it: key-...")],
    return_history: bool | None = typer.Option(
        None,
        "--return-history/--no-return-history",
        help="Let what the key has be seen without a key. Default: ask, for the last key.",
    ),
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
    media_dir: MediaDir = None,
) -> None:
    """End a key at once; a running service refuses it from its next request on."""

    async def revoke(store: stores.KeyStore, history: stores.History) -> None:
        before = await _in_force(store)
        key = await store.revoke(key_id)
        _tell(f"{key.id}: the key {key.name!r} is revoked")
        last = bool(before) and not await store.any()
        if last:
            _tell(
                "No key is in force now. A service on a loopback address lets everybody on this "
                "machine in again, without a key, unless it was started with --require-keys."
            )
        kept = await history.of(key.tenant)
        back = return_history
        if back is None and last and kept:
            said = f"Made with this key: {kept}."
            back = _confirmed(f"{said} Let it be seen without a key?")
            if not back:
                again = f"mico-chat keys revoke {key.id} --return-history"
                _tell(f"{said} To let it be seen without a key: {again}")
        if back:
            _tell(f"Seen without a key now: {await history.move(key.tenant, LOCAL)}")

    _with_stores(revoke, database_url, data_dir, media_dir)


async def _given(history: stores.History, tenant: str) -> stores.Amount:
    moved = await history.move(LOCAL, tenant)
    await history.adopt(tenant)  # a key's chats are its owner's, in every browser
    return moved


async def _in_force(store: stores.KeyStore) -> list[stores.Key]:
    return [key for key in await store.list() if key.revoked_at is None]


def _tell(line: str) -> None:
    """Print a line for people: on standard error, as programs read standard output."""
    print(line, file=sys.stderr, flush=True)


def _confirmed(question: str) -> bool:
    """Whether a person at a terminal says yes; False without a terminal."""
    return _at_a_terminal() and typer.confirm(question, default=True, err=True)


def _at_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _with_stores(
    work: Callable[[stores.KeyStore, stores.History], Awaitable[T]],
    database_url: str | None,
    data_dir: Path | None,
    media_dir: Path | None = None,
) -> T:
    check_extra("server", "mico-chat keys", server, databases, stores)
    flags = {"--database-url": database_url, "--data-dir": data_dir, "--media-dir": media_dir}
    settings = server.read_settings(
        [word for flag, value in flags.items() if value for word in (flag, str(value))]
    )

    async def run() -> T:
        database = databases.Database(settings.database_url, settings.data_dir)
        await database.start()
        try:
            return await work(
                stores.KeyStore(database), stores.History(database, settings.media_folder)
            )
        finally:
            await database.close()

    return asyncio.run(run())
