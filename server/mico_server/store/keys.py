"""API keys, and moving conversations and media to another tenant when keys are made or revoked."""

import asyncio
import hashlib
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import limits
from sqlalchemy import Select, exists, func, insert, select, update

from mico_chat.errors import ConfigError, RequestError
from mico_chat.fair import USER_SEPARATOR, owner_of
from mico_server.errors import NotFoundError
from mico_server.store.blobs import blob_id, blob_path, copy
from mico_server.store.database import Database, uninterrupted
from mico_server.store.media import MediaStore, lock_blob
from mico_server.store.tables import (
    batches,
    belongs,
    blobs,
    check_text,
    conversations,
    files,
    is_id,
    keys,
    media,
    new_id,
    now,
    taught,
)
from mico_server.store.taught import LOCAL

KeyScope = Literal["chat", "metrics", "admin"]
SCOPES: dict[KeyScope, str] = {
    "chat": "everything but what the other scopes open",
    "metrics": "GET /metrics",
    "admin": "/v1/keys: make, list and revoke keys; the batches of all tenants: list, see, cancel",
}
"""The scopes that a key can have, and what each opens."""

BROWSER = "page-"
"""The beginning of the user in the tenant of a browser, where no key says whose it is."""

_BROWSER = re.compile(r"(page-)?b-[0-9a-f]{36}")  # earlier versions named all browsers without it
_SECRET = re.compile("mico-[A-Za-z0-9_-]{43}")
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Key:
    """A key without its secret.

    ``tenant`` owns what is made with the key. ``rate_limit`` is None for the service's own limit.
    """

    id: str
    name: str
    tenant: str
    rate_limit: str | None
    scopes: frozenset[str]
    created_at: datetime
    revoked_at: datetime | None


class KeyStore:
    """Keys in the database.

    A secret is stored as its plain SHA-256: nobody can guess 256 random bits, and a slow hash, as
    for passwords, would delay every request.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @uninterrupted
    async def create(
        self,
        name: str,
        tenant: str | None = None,
        rate_limit: str | None = None,
        scopes: Collection[str] = ("chat",),
    ) -> tuple[str, Key]:
        """Make a key; its secret is returned this once.

        Keys that name the same ``tenant`` share media and conversations; by default a key is a
        tenant of its own.
        """
        _check_name(name, "name")
        if tenant is not None:
            _check_name(tenant, "tenant")
        if rate_limit is not None:
            _check_rate_limit(rate_limit)
        if not scopes or set(scopes) - SCOPES.keys():
            given = ", ".join(repr(scope[:100]) for scope in scopes) or "none"
            raise RequestError.at("scopes", f"{given}; a key needs some of {', '.join(SCOPES)}")
        secret = f"mico-{secrets.token_urlsafe(32)}"
        id_ = new_id("key")
        key = Key(id_, name, tenant or id_, rate_limit, frozenset(scopes), now(), None)
        stored = {**vars(key), "scopes": " ".join(sorted(key.scopes))}
        async with self._database.writing() as connection:
            await connection.execute(insert(keys).values(secret_sha256=_hash(secret), **stored))
        return secret, key

    @uninterrupted
    async def find(self, secret: str) -> Key | None:
        if not _SECRET.fullmatch(secret):
            return None
        hashed = keys.c.secret_sha256 == _hash(secret)
        found = await self._found(select(keys).where(hashed, keys.c.revoked_at.is_(None)))
        return found[0] if found else None

    @uninterrupted
    async def any(self) -> bool:
        in_force = select(exists().where(keys.c.revoked_at.is_(None)))
        async with self._database.reading() as connection:
            return bool(await connection.scalar(in_force))

    @uninterrupted
    async def list(self) -> tuple[Key, ...]:
        return await self._found(select(keys).order_by(keys.c.created_at, keys.c.id))

    @uninterrupted
    async def get(self, id_: str) -> Key:
        found = is_id("key", id_) and await self._found(select(keys).where(keys.c.id == id_))
        if not found:
            raise NotFoundError(f"no key {id_!r}; see mico-chat keys list")
        return found[0]

    @uninterrupted
    async def revoke(self, id_: str) -> Key:
        """Revoke a key; the list keeps it. Revoking it again changes nothing."""
        if is_id("key", id_):
            async with self._database.writing() as connection:
                await connection.execute(
                    update(keys)
                    .where(keys.c.id == id_, keys.c.revoked_at.is_(None))
                    .values(revoked_at=now())
                )
        return await self.get(id_)

    async def _found(self, query: Select[Any]) -> tuple[Key, ...]:
        async with self._database.reading() as connection:
            rows = [dict(row._mapping) for row in await connection.execute(query)]
        for row in rows:
            row["scopes"] = frozenset(row["scopes"].split())
            del row["secret_sha256"]
        return tuple(Key(**row) for row in rows)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _check_name(text: str, what: str) -> None:
    check_text(text, what)
    if USER_SEPARATOR in text:
        raise RequestError.at(
            what, f"{text!r} has a {USER_SEPARATOR!r}, which separates a tenant from its user"
        )
    if not text.strip() or not text.isprintable() or len(text) > _LONGEST_NAME:
        raise RequestError.at(
            what,
            f"{text[:_LONGEST_NAME]!r} ({len(text)} characters); "
            f"it must have 1 to {_LONGEST_NAME} printable characters",
        )


def _check_rate_limit(text: str) -> None:
    try:
        (parsed,) = limits.parse_many(text)
    except ValueError as error:
        raise RequestError(f"rate_limit: {text!r}; write one limit, such as 60/minute") from error
    if parsed.amount < 1:
        raise RequestError(f"rate_limit: {text!r}; write a limit above 0, such as 60/minute")


# --- The history of a tenant moves to another ---


@dataclass(frozen=True)
class Amount:
    conversations: int
    media: int

    def __bool__(self) -> bool:
        return bool(self.conversations or self.media)

    def __str__(self) -> str:
        counts = ((self.conversations, "conversation"), (self.media, "file"))
        named = [f"{n} {what}" if n == 1 else f"{n} {what}s" for n, what in counts if n]
        return " and ".join(named) or "nothing"


@dataclass(frozen=True)
class History:
    """The conversations, media, files and batches of tenants. ``folder`` is the media folder.

    The path of a file contains its tenant, so the new tenant gets a link or a copy of the file. The
    old file is removed once the database has the new one, or by a sweep after a crash.
    """

    database: Database
    folder: Path

    @uninterrupted
    async def of(self, tenant: str) -> Amount:
        async with self.database.reading() as connection:
            counts = [
                await connection.scalar(
                    select(func.count()).select_from(table).where(belongs(table, tenant))
                )
                for table in (conversations, media)
            ]
        return Amount(*(count or 0 for count in counts))

    @uninterrupted
    async def adopt(self, tenant: str) -> None:
        """Give a key's tenant, or ``local``, what its browsers have, or ``OWNER/page-X`` what
        ``OWNER/X`` has: earlier versions had a tenant for each browser.
        """
        owner, _, user = tenant.partition(USER_SEPARATOR)
        found = {f"{owner}{USER_SEPARATOR}{user.removeprefix(BROWSER)}"} if user else set()
        for table in (conversations, media, taught) if not user else ():
            async with self.database.reading() as connection:
                named = select(table.c.tenant).where(belongs(table, owner)).distinct()
                found |= set(await connection.scalars(named))
        for former in sorted(found):
            browser = _BROWSER.fullmatch(former.partition(USER_SEPARATOR)[2])
            if browser and not (browser[1] and owner == LOCAL):  # that is another person's
                await self.move(former, tenant, check_folder=False)

    @uninterrupted
    async def move(self, source: str, target: str, *, check_folder: bool = True) -> Amount:
        """Give everything of a tenant to another: ``source/USER`` becomes ``target/USER``.

        Raises:
            ConfigError: with ``check_folder``, if the folder has no file of theirs.
        """
        old: set[str] = set()
        found = 0
        async with self.database.writing() as connection:
            # The conversations first: a request that continues a conversation at this moment holds
            # its lock, and has stored its media before it releases the lock.
            moved: dict[str, int] = {}
            for table in (conversations, files, batches, taught):
                rest = func.substr(table.c.tenant, len(source) + 1)
                changed = update(table).where(belongs(table, source))
                owner = {"owner": owner_of(target)} if "owner" in table.c else {}
                done = await connection.execute(changed.values(tenant=target + rest, **owner))
                moved[table.name] = done.rowcount
            rows = (
                await connection.execute(
                    select(media.c.id, media.c.tenant, media.c.blob_id, blobs.c.bytes)
                    .join(blobs, blobs.c.id == media.c.blob_id)
                    .where(belongs(media, source))
                    .order_by(media.c.id)
                    .with_for_update(of=media)
                )
            ).all()
            for row in sorted(rows, key=lambda row: row.blob_id.partition("/")[2]):
                tenant = target + row.tenant[len(source) :]
                new = blob_id(tenant, row.blob_id.partition("/")[2])
                await lock_blob(connection, new, row.bytes)
                found += await asyncio.to_thread(copy, self.folder, row.blob_id, new)
                await connection.execute(
                    update(media)
                    .where(media.c.id == row.id)
                    .values(tenant=tenant, owner=owner_of(target), blob_id=new)
                )
                old.add(row.blob_id)
            if rows and not found and check_folder:
                raise ConfigError(
                    f"{blob_path(self.folder, rows[0].blob_id)}: there is no such file: "
                    "name the media folder of the service with --media-dir"
                )
        await MediaStore(self.database, self.folder).collect(old)
        return Amount(moved[conversations.name], len(rows))
