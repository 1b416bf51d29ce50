"""Who is asking: keys sent as ``Authorization: Bearer <secret>``, OpenAI's way.

A service on a loopback address is open to the machine it runs on while no key is in force. As long
as one is, a key is needed there too, for a proxy in front of it makes the whole world local. The
page or terminal chat that started the service shares a private secret with it instead: whoever
sends that needs no key. On any other address a key is always needed, unless the operator says
``--insecure``; with ``--require-keys`` it is on loopback as well, from everybody.

A key's requests for different users (``X-Mico-User``) are as those of different keys. A key opens
what its scopes name.
"""

from __future__ import annotations

import hmac
import logging
import re
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import ConfigError, MicoError
from mico_server.addresses import is_loopback
from mico_server.errors import error_response, mico_error_response
from mico_server.refusal import Reason, refuse

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""What a load balancer asks: never a key, never a limit."""

USER_HEADER = "x-mico-user"
"""Whom a request is for, where one key serves many: each sees its own conversations alone."""

USER_SEPARATOR = "/"
"""Between a tenant and its user; no tenant's name has one."""

_USER = re.compile(r"[A-Za-z0-9._-]{1,64}")

LOCAL_TENANT = "local"
"""Whose requests without a key are, where none is needed."""

REQUIRE_KEY_HEADER = "x-mico-require-key"
"""Sent by a program that passes on what others ask: this request needs a key, whatever the service
would let in from this machine."""

KeyScope = Literal["chat", "metrics", "admin"]
SCOPES: dict[KeyScope, str] = {
    "chat": "everything but what the other scopes open",
    "metrics": "GET /metrics",
    "admin": "/v1/keys: make, list and revoke keys",
}
"""What a key can be made for."""

OPEN_SCOPES = frozenset({"chat", "metrics"})
"""The scopes of a request that needs no key."""

_SCOPE_OF_PATH: dict[str, KeyScope] = {"/metrics": "metrics", "/v1/keys": "admin"}

_HOW = (
    "send 'Authorization: Bearer KEY' with a key of this service; "
    "its operator makes one with `mico-chat keys create NAME`"
)
_MISSING = f"this service asks for a key, and none was sent: {_HOW}"
# The same words for every key: they must not tell a guess from a revoked key.
_INVALID = f"the key that was sent is not valid here: {_HOW}"


class Key(Protocol):
    """What is known of a key that is in force."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def rate_limit(self) -> str | None: ...
    @property
    def scopes(self) -> frozenset[str]: ...


class Keys(Protocol):
    """Where keys are kept."""

    async def find(self, secret: str) -> Key | None:
        """The key in force that has this secret."""
        ...

    async def any(self) -> bool:
        """Whether a key is in force."""
        ...


@dataclass(frozen=True)
class Caller:
    """Whose request it is: ``key_id`` is None for one that needed no key.

    ``rate_limit`` is the key's own, such as ``"60/minute"``; ``scopes`` are what it opens.
    """

    tenant: str = LOCAL_TENANT
    key_id: str | None = None
    rate_limit: str | None = None
    scopes: frozenset[str] = OPEN_SCOPES


class Auth:
    """ASGI middleware: puts a :class:`Caller` into ``scope["state"]["caller"]``, or answers 401,
    or 403 where the key lacks the scope that the path needs.

    Health checks pass without a caller, and so do the browser's questions before a request to
    another site (CORS preflights), which carry no key. Keys are looked up anew for every
    request, so that a revoked one stops at once.

    Args:
        app: what is behind it.
        keys: the keys of the service.
        required: whether a key is needed even while none is in force; then ``local_secret`` is
            not taken either.
        insecure: whether a request without a key is let in although there are keys.
        local_secret: who sends it in a key's place needs no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        *,
        required: bool,
        insecure: bool = False,
        local_secret: str | None = None,
    ) -> None:
        if required and insecure:
            raise ConfigError(
                "--insecure lets everybody in, but keys are required: leave one of both out"
            )
        self.app = app
        self.keys = keys
        self.required = required
        self.insecure = insecure
        self.local_secret = local_secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or _is_preflight(scope):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        user = headers.get(USER_HEADER)
        if user is not None and not _USER.fullmatch(user):
            message = f"{USER_HEADER}: expected 1 to 64 letters, digits, '.', '_' or '-'"
            response = error_response(400, message, "invalid_value", USER_HEADER)
            await refuse(scope, receive, send, response, "user")
            return
        given = headers.getlist("authorization")
        try:
            caller = await self._caller(given, self.required or REQUIRE_KEY_HEADER in headers)
        except MicoError as error:  # the application's own handlers are further in
            logger.error("keys cannot be looked up: %s", error)
            await refuse(scope, receive, send, mico_error_response(error), "unavailable")
            return
        needed = scope_needed(scope["path"])
        reason: Reason
        if caller is None:
            missing = not any(given)
            code = "missing_api_key" if missing else "invalid_api_key"
            response = error_response(401, _MISSING if missing else _INVALID, code)
            response.headers["www-authenticate"], reason = "Bearer", "auth"
        elif needed not in caller.scopes:
            response, reason = _lacks_scope(caller, needed), "scope"
        else:
            if user is not None:
                caller = replace(caller, tenant=f"{caller.tenant}{USER_SEPARATOR}{user}")
            scope.setdefault("state", {})["caller"] = caller
            await self.app(scope, receive, send)
            return
        await refuse(scope, receive, send, response, reason)

    async def _caller(self, given: list[str], required: bool) -> Caller | None:
        secret = _bearer(given)
        if secret is not None:
            if not required and self._is_local(secret):
                return Caller()
            key = await self.keys.find(secret)
            if key is not None:
                return Caller(key.tenant, key.id, key.rate_limit, key.scopes)
        if required:
            return None
        # OpenAI's clients send a made-up key where none is needed: without keys all are welcome.
        if (self.insecure and not given) or not await self.keys.any():
            return Caller()
        return None

    def _is_local(self, secret: str) -> bool:
        ours = self.local_secret
        return ours is not None and hmac.compare_digest(ours.encode(), secret.encode("utf-8"))


def scope_needed(path: str) -> KeyScope:
    """The scope that a path needs.

    By how the path begins: whatever a router makes of its end, no other scope opens it.
    """
    found = (scope for start, scope in _SCOPE_OF_PATH.items() if path.startswith(start))
    return next(found, "chat")


def _bearer(given: list[str]) -> str | None:
    """The secret of the one Authorization header."""
    if len(given) != 1:
        return None
    scheme, _, secret = given[0].partition(" ")
    return (secret.strip() or None) if scheme.lower() == "bearer" else None


def _lacks_scope(caller: Caller, needed: KeyScope) -> JSONResponse:
    if caller.key_id is None:
        message = f"this request needs a key of the scope {needed!r}, and none was sent"
    else:
        has = ", ".join(sorted(caller.scopes)) or "none"
        message = (
            f"this request needs a key of the scope {needed!r}; the key that was sent has {has}"
        )
    message += f": make one with `mico-chat keys create NAME --scope {needed}`"
    response = error_response(403, message, "insufficient_scope")
    response.headers["www-authenticate"] = f'Bearer error="insufficient_scope", scope="{needed}"'
    return response


def check_binding(host: str, insecure: bool, has_keys: bool) -> None:
    """Refuse to serve other machines before there is a key.

    Raises:
        ConfigError: ``host`` is no loopback address, there is no key, and ``insecure`` is not set.
    """
    if not (is_loopback(host) or insecure or has_keys):
        raise ConfigError(
            f"other machines can reach {host or 'every address'}, and no API key is in force: "
            "make one with `mico-chat keys create NAME`, or serve anyone with --insecure"
        )


def _is_preflight(scope: Scope) -> bool:
    return scope["method"] == "OPTIONS" and any(
        name == b"access-control-request-method" for name, _ in scope["headers"]
    )
