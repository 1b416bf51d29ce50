"""So many requests of each key in a moving window of time.

Requests are counted in this process: behind a load balancer with three replicas a key may make
three times as many.
"""

from __future__ import annotations

import functools
import math
import time

from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import ConfigError
from mico_server.auth import Caller
from mico_server.errors import error_response
from mico_server.refusal import refuse

UNCOUNTED_PATHS = frozenset({"/metrics"})


class RateLimit:
    """ASGI middleware behind :class:`~mico_server.auth.Auth`.

    A key's own limit goes before ``default``. Requests that needed no key are never limited.

    Raises:
        ConfigError: when ``default`` is no limit.
    """

    def __init__(self, app: ASGIApp, default: str | None = None) -> None:
        self.app = app
        self.default = default
        if default is not None:
            parsed_limits(default)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller: Caller | None = scope.get("state", {}).get("caller")
        if caller is None or caller.key_id is None or scope["path"] in UNCOUNTED_PATHS:
            await self.app(scope, receive, send)
            return
        text = caller.rate_limit or self.default
        for limit in parsed_limits(text) if text is not None else ():
            if not await self._limiter.hit(limit, caller.key_id):
                seconds = await self._seconds_until_free(limit, caller.key_id)
                message = f"more than {limit} requests of this key; try again in {seconds} s"
                response = error_response(429, message, "rate_limit_exceeded")
                response.headers["retry-after"] = str(seconds)
                await refuse(scope, receive, send, response, "rate_limit")
                return
        await self.app(scope, receive, send)

    async def _seconds_until_free(self, limit: RateLimitItem, key_id: str) -> int:
        """Whole seconds until the oldest request leaves the window, at least 1."""
        window = await self._limiter.get_window_stats(limit, key_id)
        return max(1, math.ceil(window.reset_time - time.time()))


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
