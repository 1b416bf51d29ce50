"""How much may be sent: bytes of a body, and requests of each key in a moving window of time.

Servers that share a PostgreSQL database, or a Redis, count requests together: three of them let as
many requests in as one does. A server with SQLite counts in its own memory.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import StorageError
from sqlalchemy import text
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mico_chat.errors import ConfigError, LimitError, MicoError, MissingExtraError
from mico_server.errors import BodyTimeoutError, UnavailableError
from mico_server.http.auth import Caller, Guard, Refused
from mico_server.http.errors import error_response, mico_error_body
from mico_server.settings import without_password
from mico_server.store.database import Database, uninterrupted

logger = logging.getLogger(__name__)

_TIMEOUTS: dict[str, Any] = {"socket_timeout": 5.0, "socket_connect_timeout": 5.0}
"""Seconds that a Redis may take."""

_IN_MEMORY = (
    "for a body that is not a multipart form (MICO_SERVER_MAX_JSON_BYTES); upload media to "
    "/v1/media and send their ids"
)


@dataclass
class BodyLimit:
    """ASGI middleware: refuses a body that is too long by its claim or by the bytes that arrive.

    A multipart body goes to disk and may have ``max_bytes``. Any other body is held in memory and
    may have ``max_json_bytes``, if that is less. The next piece of a body must arrive within
    ``timeout_s`` seconds.
    """

    app: ASGIApp
    max_bytes: int
    max_json_bytes: int
    timeout_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        on_disk = headers.get("content-type", "").lower().startswith("multipart/form-data")
        limit, advice = self.max_bytes, "(MICO_SERVER_MAX_BODY_BYTES)"
        if not on_disk and self.max_json_bytes < limit:
            limit, advice = self.max_json_bytes, _IN_MEMORY
        claimed = headers.get("content-length", "")
        received, ended = 0, False

        def refused(error: MicoError) -> HTTPException:
            scope.setdefault("state", {})["refused"] = "body"
            # While FastAPI reads a body, it replaces most other exceptions.
            return HTTPException(error.status, mico_error_body(error), {"connection": "close"})

        def too_long(size: str) -> HTTPException:
            reason = f"{size}, over the limit of {limit} {advice}"
            return refused(LimitError("request body", reason))

        async def limited() -> Message:
            nonlocal received, ended
            if claimed.isdecimal() and int(claimed) > limit:
                raise too_long(f"{int(claimed)} bytes")
            try:
                async with asyncio.timeout(None if ended else self.timeout_s):
                    message = await receive()
            except TimeoutError:
                late = BodyTimeoutError(
                    f"request body: no bytes arrived for {self.timeout_s:g} s after {received} "
                    "bytes (MICO_SERVER_BODY_TIMEOUT_S); send it again"
                )
                raise refused(late) from None
            ended = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > limit:
                raise too_long(f"more than {limit} bytes")
            return message

        await self.app(scope, limited, send)


# --- Requests of each key ---


@dataclass
class RateLimit(Guard):
    """Behind :class:`~mico_server.http.auth.Auth`: limits the requests of each key.

    A key's own limit replaces ``default``. While requests cannot be counted, those of keys with a
    limit are refused.
    """

    counters: StoredCounters | DatabaseCounters
    default: str | None = None

    def __post_init__(self) -> None:
        if self.default is not None:
            parsed_limits(self.default)

    async def check(self, scope: Scope, headers: Headers) -> None:
        caller: Caller | None = scope.get("state", {}).get("caller")
        if caller is None or caller.key_id is None or scope["path"] == "/metrics":
            return
        written = caller.rate_limit or self.default
        for limit in parsed_limits(written) if written is not None else ():
            wait_s = await self.counters.hit(limit, caller.key_id)
            if wait_s is not None:
                seconds = max(1, math.ceil(wait_s))
                message = f"this key has reached its limit ({limit}): try again in {seconds} s"
                wait, code = {"retry-after": str(seconds)}, "rate_limit_exceeded"
                raise Refused("rate_limit", error_response(429, message, code, headers=wait))


class StoredCounters:
    """Requests counted in a storage of the package ``limits``: this process's memory, or Redis."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._limiter = MovingWindowRateLimiter(storage)

    async def hit(self, limit: RateLimitItem, key_id: str) -> float | None:
        """Count a request: None within the limit, else the seconds until the next may come."""
        try:
            if await self._limiter.hit(limit, key_id):
                return None
            window = await self._limiter.get_window_stats(limit, key_id)
        except StorageError as error:
            logger.error("requests cannot be counted: %s", error.storage_error)
            raise UnavailableError(
                "the requests of this key cannot be counted now; try again soon"
            ) from error
        return window.reset_time - time.time()

    async def close(self) -> None:
        if isinstance(self._storage, RedisStorage):
            bridge: Any = self._storage.bridge
            await bridge.get_connection().aclose()


# One statement, so that each of several simultaneous requests sees those before it: PostgreSQL
# looks at the row again when it has waited for the row's lock. No row comes back past the limit.
_HIT = text(
    """
    INSERT INTO rate_limit_hits AS kept (id, hits)
    SELECT :id, ARRAY[extract(epoch FROM clock_timestamp())::float8] WHERE :amount > 0
    ON CONFLICT (id) DO UPDATE
    SET hits = ARRAY(
        SELECT hit FROM unnest(kept.hits) WITH ORDINALITY AS given (hit, place)
        WHERE hit > extract(epoch FROM clock_timestamp()) - :seconds ORDER BY place
    ) || extract(epoch FROM clock_timestamp())::float8
    WHERE cardinality(kept.hits) < :amount
    OR kept.hits[cardinality(kept.hits) - :amount + 1]
        <= extract(epoch FROM clock_timestamp()) - :seconds
    RETURNING 1
    """
)
_WAIT = text(
    """
    SELECT hits[cardinality(hits) - :amount + 1] + :seconds - extract(epoch FROM clock_timestamp())
    FROM rate_limit_hits WHERE id = :id
    """
)


class DatabaseCounters:
    """Requests counted in a PostgreSQL database, by its clock."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @uninterrupted
    async def hit(self, limit: RateLimitItem, key_id: str) -> float | None:
        id_, seconds = limit.key_for(key_id), limit.get_expiry()
        values = {"id": id_, "amount": limit.amount, "seconds": float(seconds)}
        async with self._database.writing() as connection:
            if await connection.scalar(_HIT, values) is not None:
                return None
            wait_s = await connection.scalar(_WAIT, values)
        return seconds if wait_s is None else float(wait_s)

    async def close(self) -> None:
        """Do nothing: the service itself closes its database."""


def counters(store: str | None, database: Database) -> StoredCounters | DatabaseCounters:
    """The counters of a service: in ``memory``, or in the Redis of a URL.

    For None they are in the database if it is PostgreSQL, otherwise in memory.

    Raises:
        ConfigError: ``store`` names no Redis that answers.
    """
    if store is None and not database.is_sqlite:
        return DatabaseCounters(database)
    if store is None or store == "memory":
        return StoredCounters(MemoryStorage())
    name = f"rate_limit_store {without_password(store)!r}"
    if urlsplit(store).scheme not in ("redis", "rediss", "redis+unix"):
        raise ConfigError(f"{name}: expected memory, or a Redis such as redis://host:6379")
    make: Callable[..., Storage] = RedisStorage
    try:
        import redis

        url = store.replace("redis+unix", "unix", 1)
        with redis.Redis.from_url(url, **_TIMEOUTS) as client:
            client.ping()
        storage = make(f"async+{store}", True, implementation="redispy", **_TIMEOUTS)
    except ModuleNotFoundError as error:
        raise MissingExtraError("counting requests in Redis", "redis") from error
    except (TypeError, ValueError, redis.RedisError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"{name}: {reason}") from None
    return StoredCounters(storage)


@functools.lru_cache(maxsize=1024)
def parsed_limits(text: str) -> tuple[RateLimitItem, ...]:
    try:
        return tuple(parse_many(text))
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is no rate limit; write one like '60/minute' or '5/second; 60/minute'"
        ) from error
