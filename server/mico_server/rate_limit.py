"""So many requests of each key in a moving window of time.

Servers that share a PostgreSQL database, or a Redis, count together: three of them let as many
requests in as one does. A server with SQLite counts in its own memory.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import ConfigurationError, StorageError
from sqlalchemy import text
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import ConfigError, MicoError, MissingExtraError
from mico_server.auth import Caller
from mico_server.database import Database, uninterrupted
from mico_server.errors import UnavailableError, error_response, mico_error_response
from mico_server.refusal import refuse

logger = logging.getLogger(__name__)

UNCOUNTED_PATHS = frozenset({"/metrics"})

_TIMEOUTS: dict[str, Any] = {"socket_timeout": 5.0, "socket_connect_timeout": 5.0}
"""Of a Redis, in seconds."""


class Counters(Protocol):
    """Where requests are counted."""

    async def hit(self, limit: RateLimitItem, key_id: str) -> float | None:
        """Count a request, if it is within the limit: None then, or else the seconds until the
        oldest request leaves the window.

        Raises:
            UnavailableError: if requests cannot be counted now.
        """
        ...

    async def close(self) -> None:
        """End what is connected."""
        ...


class RateLimit:
    """ASGI middleware behind :class:`~mico_server.auth.Auth`.

    A key's own limit goes before ``default``. Requests that needed no key are never limited. While
    requests cannot be counted, those of keys with a limit are refused.

    Raises:
        ConfigError: when ``default`` is no limit.
    """

    def __init__(
        self, app: ASGIApp, default: str | None = None, counters: Counters | None = None
    ) -> None:
        self.app = app
        self.default = default
        if default is not None:
            parsed_limits(default)
        self._counters = StoredCounters(MemoryStorage(), "memory") if counters is None else counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller | None = scope.get("state", {}).get("caller")
        if caller is None or caller.key_id is None or scope["path"] in UNCOUNTED_PATHS:
            await self.app(scope, receive, send)
            return
        written = caller.rate_limit or self.default
        for limit in parsed_limits(written) if written is not None else ():
            try:
                wait_s = await self._counters.hit(limit, caller.key_id)
            except MicoError as error:  # the application's own handlers are further in
                logger.error("requests cannot be counted: %s", error)
                await refuse(scope, receive, send, mico_error_response(error), "unavailable")
                return
            if wait_s is not None:
                seconds = max(1, math.ceil(wait_s))
                message = f"this key has reached its limit ({limit}): try again in {seconds} s"
                response = error_response(429, message, "rate_limit_exceeded")
                response.headers["retry-after"] = str(seconds)
                await refuse(scope, receive, send, response, "rate_limit")
                return
        await self.app(scope, receive, send)


class StoredCounters:
    """Requests counted in a storage of the package ``limits``: this process's memory, or Redis."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._limiter = MovingWindowRateLimiter(storage)
        self._name = name

    async def hit(self, limit: RateLimitItem, key_id: str) -> float | None:
        try:
            if await self._limiter.hit(limit, key_id):
                return None
            window = await self._limiter.get_window_stats(limit, key_id)
        except StorageError as error:
            logger.error("%s: %s", self._name, error.storage_error)
            raise UnavailableError(
                "the requests of this key cannot be counted now; try again soon"
            ) from error
        return window.reset_time - time.time()

    async def close(self) -> None:
        if isinstance(self._storage, RedisStorage):
            bridge: Any = self._storage.bridge
            await bridge.get_connection().aclose()


# One statement, so that of requests that come at once each sees those before it: PostgreSQL looks
# at the row again when it has waited for the row's lock. No row comes back past the limit.
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
        """The database is the service's own to close."""


def counters(store: str | None, database: Database) -> Counters:
    """Where a service counts: in ``store``, ``memory`` or the URL of a Redis.

    By default it is the database where that is PostgreSQL, or else memory.

    Raises:
        ConfigError: for any other store.
        MissingExtraError: for Redis without its client.
    """
    if store is None and not database.is_sqlite:
        return DatabaseCounters(database)
    if store is None or store == "memory":
        return StoredCounters(MemoryStorage(), "memory")
    make: Callable[..., Storage] = RedisStorage
    with _readable(store):
        redis = make(f"async+{store}", True, implementation="redispy", **_TIMEOUTS)
    return StoredCounters(redis, shown_store(store))


def check_store(store: str | None) -> None:
    """Look once whether a Redis answers; any other store needs no look.

    Raises:
        ConfigError: if it does not.
        MissingExtraError: for Redis without its client.
    """
    if store is None or store == "memory":
        return
    with _readable(store):
        import redis

        url = store.replace("redis+unix", "unix", 1)
        with redis.Redis.from_url(url, **_TIMEOUTS) as client:
            client.ping()


@contextmanager
def _readable(store: str) -> Iterator[None]:
    """Says what is wrong with a Redis's URL, or with the Redis."""
    name = f"rate_limit_store {shown_store(store)!r}"
    if urlsplit(store).scheme not in ("redis", "rediss", "redis+unix"):
        raise ConfigError(f"{name}: expected memory, or a Redis such as redis://host:6379")
    try:
        yield
    except (ConfigurationError, ModuleNotFoundError) as error:
        raise MissingExtraError("counting requests in Redis", "redis") from error
    except Exception as error:  # the client's own, which is not there to be named, or a ValueError
        reason = str(error) or type(error).__name__
        raise ConfigError(f"{name}: {reason}") from None


def shown_store(url: str) -> str:
    """A store's URL without its password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


@functools.lru_cache(maxsize=1024)
def parsed_limits(text: str) -> tuple[RateLimitItem, ...]:
    """The limits of ``"60/minute"`` or ``"5/second; 60/minute"``.

    Raises:
        ConfigError: when the text says no limit.
    """
    try:
        return tuple(parse_many(text))
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is no rate limit; write one like '60/minute' or '5/second; 60/minute'"
        ) from error
