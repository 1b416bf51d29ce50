"""Who is asking: keys sent as ``Authorization: Bearer <secret>``, OpenAI's way.

A service on a loopback address is open to the machine it runs on until its first key is made;
from then on a key is needed there too, for a proxy in front of it makes the whole world local.
A key's requests for different users (``X-Mico-User``) are as those of different keys.

On any other address a key is always needed, unless the operator says ``--insecure``.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import ConfigError, MicoError
from mico_server.addresses import is_loopback
from mico_server.errors import error_response, mico_error_response
from mico_server.refusal import refuse

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

# The same words whatever is wrong: they must not tell a guess from a revoked key.
_REFUSED = (
    "no valid API key: send 'Authorization: Bearer KEY' with a key of this service; "
    "its operator makes one with `mico-chat keys create NAME`"
)


class Key(Protocol):
    """What is known of a key that is in force."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def rate_limit(self) -> str | None: ...


class Keys(Protocol):
    """Where keys are kept."""

    async def find(self, secret: str) -> Key | None:
        """The key in force that has this secret."""
        ...

    async def any(self) -> bool:
        """Whether a key was ever made, revoked or not."""
        ...


@dataclass(frozen=True)
class Caller:
    """Whose request it is: ``key_id`` is None for one that needed no key.

    ``rate_limit`` is the key's own, such as ``"60/minute"``.
    """

    tenant: str = LOCAL_TENANT
    key_id: str | None = None
    rate_limit: str | None = None


class Auth:
    """ASGI middleware: puts a :class:`Caller` into ``scope["state"]["caller"]``, or answers 401.

    Health checks pass without a caller, and so do the browser's questions before a request to
    another site (CORS preflights), which carry no key. Keys are looked up anew for every
    request, so that a revoked one stops at once.

    Args:
        app: what is behind it.
        keys: the keys of the service.
        required: whether a key is needed even while none was ever made.
        insecure: whether a request without a key is let in although there are keys.
    """

    def __init__(self, app: ASGIApp, keys: Keys, *, required: bool, insecure: bool = False) -> None:
        if required and insecure:
            raise ConfigError("a service cannot both require keys and be insecure")
        self.app = app
        self.keys = keys
        self.required = required
        self.insecure = insecure
        self._keys_exist = False

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
        try:
            caller = await self._caller(headers.getlist("authorization"))
        except MicoError as error:  # the application's own handlers are further in
            logger.error("keys cannot be looked up: %s", error)
            await refuse(scope, receive, send, mico_error_response(error), "unavailable")
            return
        if caller is None:
            response = error_response(401, _REFUSED, "invalid_api_key")
            response.headers["www-authenticate"] = "Bearer"
            await refuse(scope, receive, send, response, "auth")
            return
        if user is not None:
            caller = replace(caller, tenant=f"{caller.tenant}{USER_SEPARATOR}{user}")
        scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)

    async def _caller(self, given: list[str]) -> Caller | None:
        # OpenAI's clients send a made-up key where none is needed: without keys all are welcome.
        if (self.insecure and not given) or not (self.required or await self._exist()):
            return Caller()
        if len(given) != 1:
            return None
        scheme, _, secret = given[0].partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            return None
        key = await self.keys.find(secret.strip())
        return None if key is None else Caller(key.tenant, key.id, key.rate_limit)

    async def _exist(self) -> bool:
        # A key that was made stays known after it is revoked: this never becomes False again.
        self._keys_exist = self._keys_exist or await self.keys.any()
        return self._keys_exist


def check_binding(host: str, insecure: bool, has_keys: bool) -> None:
    """Refuse to serve other machines before there is a key.

    Raises:
        ConfigError: ``host`` is no loopback address, there is no key, and ``insecure`` is not set.
    """
    if not (is_loopback(host) or insecure or has_keys):
        raise ConfigError(
            f"other machines can reach {host or 'every address'}, and the service has no API key: "
            "make one with `mico-chat keys create NAME`, or serve anyone with --insecure"
        )


def _is_preflight(scope: Scope) -> bool:
    return scope["method"] == "OPTIONS" and any(
        name == b"access-control-request-method" for name, _ in scope["headers"]
    )
