"""``mico-chat keys``: the keys that a service asks its clients for."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mico_chat.cli_shared import other

keys = typer.Typer(
    help="Keys that a service asks its clients for.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DatabaseUrl = Annotated[
    str | None,
    typer.Option(help="As for serve. Default: MICO_SERVER_DATABASE_URL, or SQLite in --data-dir."),
]
DataDir = Annotated[
    Path | None, typer.Option(help="As for serve. Default: MICO_SERVER_DATA_DIR, or the user's.")
]


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; for the list.")],
    tenant: Annotated[
        str | None,
        typer.Option(help="Share media and conversations with the keys that name it too."),
    ] = None,
    rate_limit: Annotated[
        str | None, typer.Option(help="Such as 60/minute. Default: the service's own limit.")
    ] = None,
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
) -> None:
    """Make a key and print its secret, which cannot be shown again.

    KEY=$(mico-chat keys create bob)
    """
    secret, key = _with_keys(
        database_url, data_dir, lambda store: store.create(name, tenant, rate_limit)
    )
    print(secret)
    print(f"{key.id}: a key for {key.name}, shown only this once", file=sys.stderr)


@keys.command("list")
def list_keys(database_url: DatabaseUrl = None, data_dir: DataDir = None) -> None:
    """Print all keys, without their secrets; the oldest first."""
    rows = [("ID", "NAME", "TENANT", "RATE LIMIT", "CREATED", "REVOKED")]
    for key in _with_keys(database_url, data_dir, lambda store: store.list()):
        created = f"{key.created_at:%Y-%m-%d %H:%M}"
        revoked = "-" if key.revoked_at is None else f"{key.revoked_at:%Y-%m-%d %H:%M}"
        rows.append((key.id, key.name, key.tenant, key.rate_limit or "-", created, revoked))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As the list has it: key-...")],
    database_url: DatabaseUrl = None,
    data_dir: DataDir = None,
) -> None:
    """End a key at once; a running service refuses it from its next request on."""
    key = _with_keys(database_url, data_dir, lambda store: store.revoke(key_id))
    print(f"{key.id}: the key of {key.name} is revoked", file=sys.stderr)


def _with_keys(
    database_url: str | None, data_dir: Path | None, work: Callable[[Any], Awaitable[Any]]
) -> Any:
    """What ``work`` makes of the service's store of keys."""
    modules = ("settings", "database", "keys")
    settings_, database_, keys_ = (
        other(f"mico_server.{module}", "mico-chat keys", "server") for module in modules
    )
    flags = {"--database-url": database_url, "--data-dir": data_dir}
    settings = settings_.read_settings(
        [word for flag, value in flags.items() if value for word in (flag, str(value))]
    )

    async def run() -> Any:
        database = database_.Database(settings.database_url, settings.data_dir)
        await database.start()
        try:
            return await work(keys_.KeyStore(database))
        finally:
            await database.close()

    return asyncio.run(run())
