"""API keys: who may ask, as which tenant, and how often."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import limits
from sqlalchemy import Row, exists, insert, select, update

from mico_chat.errors import RequestError
from mico_server.auth import SCOPES, USER_SEPARATOR
from mico_server.database import Database, uninterrupted
from mico_server.errors import NotFoundError
from mico_server.tables import is_id, keys, new_id, now
from mico_server.texts import check_text

_SECRET = re.compile("mico-[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class Key:
    """What is known of a key; its secret is not.

    ``tenant`` owns what is made with the key: media and conversations. ``rate_limit`` is written
    as ``60/minute``; None is the service's own limit. ``scopes`` are of
    :data:`~mico_server.auth.SCOPES`.
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

    A secret is stored as its plain SHA-256. A slow, salted hash guards passwords, which can be
    guessed; 256 random bits cannot, and every request would pay for it.
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
        """A new key and its secret, which cannot be had again.

        Without a ``tenant`` the key is a tenant of its own; keys that name the same one share
        media and conversations.

        Raises:
            RequestError: for a name or tenant that is empty, long or not printable, for a rate
                limit that is none, or for a scope that is none.
        """
        _check_name(name, "name")
        if tenant is not None:
            _check_name(tenant, "tenant")
        if rate_limit is not None:
            _check_rate_limit(rate_limit)
        _check_scopes(scopes)
        secret = f"mico-{secrets.token_urlsafe(32)}"
        id_ = new_id("key")
        key = Key(id_, name, tenant or id_, rate_limit, frozenset(scopes), now(), None)
        async with self._database.writing() as connection:
            await connection.execute(
                insert(keys).values(
                    id=key.id,
                    name=key.name,
                    tenant=key.tenant,
                    secret_sha256=_hash(secret),
                    rate_limit=key.rate_limit,
                    scopes=" ".join(sorted(key.scopes)),
                    created_at=key.created_at,
                )
            )
        return secret, key

    @uninterrupted
    async def find(self, secret: str) -> Key | None:
        """The key with this secret, unless there is none or it was revoked."""
        if not _SECRET.fullmatch(secret):
            return None
        wanted = select(keys).where(
            keys.c.secret_sha256 == _hash(secret), keys.c.revoked_at.is_(None)
        )
        async with self._database.reading() as connection:
            row = (await connection.execute(wanted)).one_or_none()
        return None if row is None else _key(row)

    @uninterrupted
    async def any(self) -> bool:
        """Whether a key is in force: made, and not revoked."""
        in_force = select(exists().where(keys.c.revoked_at.is_(None)))
        async with self._database.reading() as connection:
            return bool(await connection.scalar(in_force))

    @uninterrupted
    async def list(self) -> tuple[Key, ...]:
        """All keys, revoked ones too, the oldest first."""
        async with self._database.reading() as connection:
            rows = await connection.execute(select(keys).order_by(keys.c.created_at, keys.c.id))
            return tuple(_key(row) for row in rows)

    @uninterrupted
    async def get(self, id_: str) -> Key:
        """A key by its id, revoked or not.

        Raises:
            NotFoundError: if there is no such key.
        """
        row = None
        if is_id("key", id_):
            async with self._database.reading() as connection:
                row = (await connection.execute(select(keys).where(keys.c.id == id_))).one_or_none()
        if row is None:
            raise NotFoundError(f"no key {id_!r}; see mico-chat keys list")
        return _key(row)

    @uninterrupted
    async def revoke(self, id_: str) -> Key:
        """End a key; it stays in the list. Revoking it again changes nothing.

        Raises:
            NotFoundError: if there is no such key.
        """
        if is_id("key", id_):
            async with self._database.writing() as connection:
                await connection.execute(
                    update(keys)
                    .where(keys.c.id == id_, keys.c.revoked_at.is_(None))
                    .values(revoked_at=now())
                )
        return await self.get(id_)


def _key(row: Row[Any]) -> Key:
    return Key(
        id=row.id,
        name=row.name,
        tenant=row.tenant,
        rate_limit=row.rate_limit,
        scopes=frozenset(row.scopes.split()),
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _check_name(text: str, what: str, *, longest: int = 100) -> None:
    check_text(text, what)
    if USER_SEPARATOR in text:
        raise RequestError.at(what, f"{text!r} has a {USER_SEPARATOR!r}, which parts users")
    if not text.strip() or not text.isprintable() or len(text) > longest:
        raise RequestError.at(
            what,
            f"{text[:longest]!r} ({len(text)} characters); "
            f"it must have 1 to {longest} printable characters",
        )


def _check_scopes(scopes: Collection[str]) -> None:
    known = ", ".join(SCOPES)
    if not scopes:
        raise RequestError.at("scopes", f"a key needs a scope: {known}")
    for scope in scopes:
        if scope not in SCOPES:
            raise RequestError.at("scopes", f"{scope[:100]!r} is no scope; there are {known}")


def _check_rate_limit(text: str) -> None:
    try:
        limit = limits.parse(text)
        many = len(limits.parse_many(text)) != 1
    except ValueError as error:
        raise RequestError(
            f"rate_limit: {text!r} is no limit; write one such as 60/minute"
        ) from error
    if many or limit.amount < 1:
        raise RequestError(f"rate_limit: {text!r}; write one limit above 0, such as 60/minute")
