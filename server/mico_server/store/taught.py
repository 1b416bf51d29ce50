"""Taught names in the database: what people taught, and never their pictures or sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from sqlalchemy import delete, insert, select, update

from mico_chat.errors import LimitError, RequestError
from mico_chat.fair import owner_of
from mico_chat.media.taught import TaughtName, features_of
from mico_server.store.database import Database, Rows, uninterrupted
from mico_server.store.tables import check_text, new_id, now, taught

MOST_NAMES = 200
"""A key or user may teach so many names."""
MOST_KEPT = 20
"""A name keeps so many examples, of all requests that taught it."""
LOCAL = "local"
_TAUGHT = Rows(taught, select(taught))

Record: TypeAlias = Mapping[str, Any]


def teacher(tenant: str) -> str:
    """Whose names a request teaches: its key's, or its user's where it names one.

    Without a key there is one set, which terminal and page share.
    """
    return LOCAL if owner_of(tenant) == LOCAL else tenant


def checked_name(name: str) -> str:
    """The name as it is said; a :class:`RequestError` if it is none."""
    check_text(name, "name")
    name = " ".join(name.split())
    if not name or not name.isprintable() or len(name) > 60:
        raise RequestError.at("name", f"{name[:60]!r}; expected 1 to 60 printable characters")
    return name


@dataclass(frozen=True)
class TaughtStore:
    """A tenant sees its own names and those of its key, and changes its own."""

    database: Database

    @uninterrupted
    async def all(self, tenant: str) -> Sequence[Record]:
        """The names that a tenant sees, the oldest first."""
        seen = taught.c.tenant.in_((teacher(tenant), owner_of(tenant)))
        query = select(taught).where(seen).order_by(taught.c.created_at, taught.c.id)
        async with self.database.reading() as connection:
            return [dict(row._mapping) for row in await connection.execute(query)]

    async def names(self, tenant: str, space: str) -> Sequence[TaughtName]:
        """The names that a tenant sees and that a model of this space can say."""
        rows = [row for row in await self.all(tenant) if row["space"] == space]
        return [
            TaughtName(
                r["name"], r["kind"], features_of(r["features"], r["examples"]), tuple(r["ids"])
            )
            for r in rows
        ]

    @uninterrupted
    async def add(
        self, tenant: str, new: TaughtName, model: str, space: str, corrected: Record | None = None
    ) -> Record:
        """Teach a name. A name that the tenant has taught already gets more examples."""
        owner = teacher(tenant)
        async with self.database.writing() as connection:
            rows = (await connection.execute(_TAUGHT.of(owner).with_for_update())).all()
            old = next((row._mapping for row in rows if row.name == new.name), None)
            if old is None and len(rows) >= MOST_NAMES:
                reason = f"{len(rows)} names are taught, and {MOST_NAMES} may be: forget some"
                raise LimitError("name", reason)
            if old is not None and (old["kind"], old["space"]) != (new.kind, space):
                how = f"by {old['kind']} examples, to the model {old['model']}"
                reason = f"{new.name!r} was taught {how}: forget it, or teach another name"
                raise RequestError.at("name", reason)
            known = [] if old is None else [features_of(old["features"], old["examples"])]
            features = np.concatenate([*known, new.examples]).astype("<f4")
            if len(features) > MOST_KEPT:
                reason = f"{new.name!r} would have {len(features)} examples, over {MOST_KEPT}"
                raise LimitError("examples", f"{reason}: it is known well, or forget it first")
            row = dict(old or {"id": new_id("taught"), "tenant": owner, "created_at": now()})
            row |= {"name": new.name, "kind": new.kind, "model": model, "space": space}
            row |= {"ids": list(new.ids), "examples": len(features), "features": features.tobytes()}
            row["corrections"] = [*row.get("corrections", []), *([corrected] if corrected else [])]
            await connection.execute(delete(taught).where(taught.c.id == row["id"]))
            await connection.execute(insert(taught).values(row))
        return row

    @uninterrupted
    async def rename(self, tenant: str, id_: str, name: str, ids: tuple[int, ...]) -> Record:
        async with self.database.writing() as connection:
            await _TAUGHT.one(connection, teacher(tenant), id_)
            change = update(taught).where(taught.c.id == id_).values(name=name, ids=list(ids))
            await connection.execute(change)
            return dict((await _TAUGHT.one(connection, teacher(tenant), id_))._mapping)

    @uninterrupted
    async def forget(self, tenant: str, id_: str) -> None:
        async with self.database.writing() as connection:
            await _TAUGHT.one(connection, teacher(tenant), id_)
            await connection.execute(delete(taught).where(taught.c.id == id_))
