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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn
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
from mico_chat.fair import owner_of
from mico_server.errors import BodyTimeoutError, BusyError, UnavailableError
from mico_server.http.auth import Caller, Guard, Refused
from mico_server.http.errors import error_response, mico_error_body
from mico_server.http.json_body import VALUE_BYTES, BodyMemory, number_of_values
from mico_server.settings import ServerSettings, without_password
from mico_server.store.database import Database, uninterrupted

logger = logging.getLogger(__name__)

_TIMEOUTS: dict[str, Any] = {"socket_timeout": 5.0, "socket_connect_timeout": 5.0}
"""Seconds that a Redis may take."""

_IN_MEMORY = (
    "for a body that is not a multipart form (MICO_SERVER_MAX_JSON_BYTES); upload media to "
    "/v1/media and send their ids"
)
_URLENCODED = (
    "for a form of application/x-www-form-urlencoded (MICO_SERVER_MAX_TEXT_BYTES); send it as "
    "multipart/form-data"
)
_VALUES = "(MICO_SERVER_MAX_JSON_VALUES); send less text and fewer values at once"


@dataclass
class BodyLimit:
    """ASGI middleware: refuses a body that is too long by its claim or by the bytes that arrive.

    A multipart body goes to disk and may have ``max_body_bytes``. Any other body is held in memory
    and may have ``max_json_bytes``, if that is less, and ``max_json_values``; ``max_bodies_bytes``
    bounds all such bodies together, until their requests end. A form that is urlencoded may have
    ``max_text_bytes``. The next piece of a body must arrive within ``body_timeout_s``.
    """

    app: ASGIApp
    settings: ServerSettings

    def __post_init__(self) -> None:
        most = self.settings.max_bodies_bytes
        self.memory = BodyMemory(most or max(256 << 20, 4 * self.settings.max_json_bytes))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").lower()
        on_disk = kind.startswith("multipart/form-data")
        settings = self.settings
        limit, advice = settings.max_body_bytes, "(MICO_SERVER_MAX_BODY_BYTES)"
        if not on_disk and settings.max_json_bytes < limit:
            limit, advice = settings.max_json_bytes, _IN_MEMORY
        if kind.startswith("application/x-www-form-urlencoded") and settings.max_text_bytes < limit:
            limit, advice = settings.max_text_bytes, _URLENCODED
        length = headers.get("content-length", "")
        claimed = int(length) if length.isdecimal() else 0
        caller: Caller | None = scope.get("state", {}).get("caller")
        tenant = "" if caller is None else owner_of(caller.tenant)
        received, values, taken, ended = 0, 0, 0, False

        def refused(error: MicoError) -> HTTPException:
            close, reason = {"connection": "close"}, "body"
            if isinstance(error, BusyError):
                close["retry-after"], reason = str(error.retry_after_s), "busy"
            scope.setdefault("state", {})["refused"] = reason
            # While FastAPI reads a body, it replaces most other exceptions.
            return HTTPException(error.status, mico_error_body(error), close)

        def too_long(size: str, most: int, advice: str) -> HTTPException:
            reason = f"{size}, over the limit of {most} {advice}"
            return refused(LimitError("request body", reason))

        def hold(piece: bytes) -> None:
            nonlocal values, taken
            values += number_of_values(piece)
            if values > settings.max_json_values:
                size = f"at least {values} braces, brackets, commas and colons"
                raise too_long(size, settings.max_json_values, _VALUES)
            whole = received + VALUE_BYTES * values
            try:
                self.memory.take(tenant, taken, whole, claimed)
            except (BusyError, LimitError) as error:
                raise refused(error) from None
            taken = whole

        async def limited() -> Message:
            nonlocal received, ended
            if claimed > limit:
                raise too_long(f"{claimed} bytes", limit, advice)
            try:
                async with asyncio.timeout(None if ended else settings.body_timeout_s):
                    message = await receive()
            except TimeoutError:
                late = BodyTimeoutError(
                    f"request body: no bytes arrived for {settings.body_timeout_s:g} s after "
                    f"{received} bytes (MICO_SERVER_BODY_TIMEOUT_S); send it again"
                )
                raise refused(late) from None
            ended = not message.get("more_body", False)
            piece = message.get("body", b"")
            received += len(piece)
            if received > limit:
                raise too_long(f"more than {limit} bytes", limit, advice)
            if piece and not on_disk:
                hold(piece)
            return message

        try:
            await self.app(scope, limited, send)
        finally:
            self.memory.free(tenant, taken)


# --- Sessions of /v1/realtime ---


@dataclass
class Sessions:
    """The open sessions of a service, ``most`` at once."""

    most: int
    n: int = 0
    _none: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def entered(self) -> Iterator[None]:
        if self.n >= self.most:
            raise BusyError(
                f"{self.n} sessions are open, the most at once "
                "(MICO_SERVER_MAX_REALTIME_SESSIONS); try again soon"
            )
        self.n += 1
        self._none.clear()
        try:
            yield
        finally:
            self.n -= 1
            if not self.n:
                self._none.set()

    async def ended(self, timeout_s: float) -> None:
        """Wait until all sessions have told their clients that they end, or for so long."""
        if self.n:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._none.wait(), timeout_s)


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
        if caller is None or scope["path"] == "/metrics":
            return
        try:
            await count(self.counters, self.default, caller)
        except BusyError as error:
            wait, code = {"retry-after": str(error.retry_after_s)}, "rate_limit_exceeded"
            refusal = error_response(429, str(error), code, headers=wait)
            raise Refused("rate_limit", refusal) from None


async def count(
    counters: StoredCounters | DatabaseCounters, default: str | None, caller: Caller
) -> None:
    """Count a request of a caller; a BusyError if its key has had too many."""
    written = caller.rate_limit or default
    for limit in parsed_limits(written) if written is not None and caller.key_id else ():
        wait_s = await counters.hit(limit, caller.key_id or "")
        if wait_s is not None:
            seconds = max(1, math.ceil(wait_s))
            message = f"this key has reached its limit ({limit}): try again in {seconds} s"
            raise BusyError(message, seconds)


async def left(
    counters: StoredCounters | DatabaseCounters, default: str | None, caller: Caller
) -> list[dict[str, Any]]:
    """What each limit of a caller's key still lets in, as OpenAI's ``rate_limits``.

    ``reset_seconds`` is the time until the oldest request in the window counts no more.
    """
    written = caller.rate_limit or default
    found: list[dict[str, Any]] = []
    for limit in parsed_limits(written) if written is not None and caller.key_id else ():
        remaining, reset_s = await counters.left(limit, caller.key_id or "")
        told = {"name": "requests", "limit": limit.amount, "remaining": max(0, remaining)}
        found.append({**told, "reset_seconds": round(max(0.0, reset_s), 3)})
    return found


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
        except StorageError as error:
            self._fail(error)
        return (await self.left(limit, key_id))[1]

    async def left(self, limit: RateLimitItem, key_id: str) -> tuple[int, float]:
        """The requests that may still come, and the seconds until the oldest counts no more."""
        try:
            window = await self._limiter.get_window_stats(limit, key_id)
        except StorageError as error:
            self._fail(error)
        return window.remaining, window.reset_time - time.time()

    def _fail(self, error: StorageError) -> NoReturn:
        logger.error("requests cannot be counted: %s", error.storage_error)
        raise UnavailableError(
            "the requests of this key cannot be counted now; try again soon"
        ) from error

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


_LEFT = text(
    """
    SELECT count(*), min(hit) + :seconds - extract(epoch FROM clock_timestamp())
    FROM rate_limit_hits, unnest(hits) AS hit
    WHERE id = :id AND hit > extract(epoch FROM clock_timestamp()) - :seconds
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

    @uninterrupted
    async def left(self, limit: RateLimitItem, key_id: str) -> tuple[int, float]:
        """The requests that may still come, and the seconds until the oldest counts no more."""
        id_, seconds = limit.key_for(key_id), limit.get_expiry()
        async with self._database.reading() as connection:
            found = await connection.execute(_LEFT, {"id": id_, "seconds": float(seconds)})
            n, reset_s = found.one()
        return limit.amount - n, seconds if reset_s is None else float(reset_s)

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
