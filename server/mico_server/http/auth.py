"""Who may ask: API keys, and the web pages that may use a visitor's browser to ask.

Keys come as ``Authorization: Bearer <secret>`` or ``X-Api-Key: <secret>``. A service on a loopback
address is open to its own machine while no key is in force. As soon as one is in force, a key is
needed there too, because a proxy in front of the service makes the whole world local. The page or
terminal chat that started the service sends a secret that both share instead. On any other address
a key is always needed, unless the operator says ``--insecure``. With ``--require-keys`` everybody
needs a key.

Any page can make its visitor's browser post to ``http://127.0.0.1:8000``. Such a request carries
an ``Origin``, which must be the service's own or one that the operator named. A page can also make
its own name resolve to 127.0.0.1 (DNS rebinding), so that the browser takes the service for the
page's own. So, where no key is needed, the ``Host`` of a request must be a name of this machine.
"""

import asyncio
import hmac
import ipaddress
import logging
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import ConfigError, MicoError
from mico_chat.fair import MOST_REMEMBERED, USER_SEPARATOR
from mico_server.errors import BusyError
from mico_server.http.errors import error_response, mico_error_response
from mico_server.store.keys import BROWSER, KeyScope, KeyStore

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""The paths of load balancers' checks: no guard looks at them."""

Reason = Literal["auth", "origin", "rate_limit", "scope", "unavailable", "user"]
"""Why a guard refuses a request."""


@dataclass
class Refused(Exception):
    """The answer to a request that a guard refuses; the metrics count ``reason``."""

    reason: Reason
    response: Response


@dataclass
class Guard(ABC):
    """A middleware that answers a request that fails its check, before the body is read.

    The server reads the body of a refused request, up to 1 MiB, and throws it away, so that the
    connection can serve the next request. After a longer body, or one of unknown length, the
    connection is closed.
    """

    app: ASGIApp

    @abstractmethod
    async def check(self, scope: Scope, headers: Headers) -> None:
        """Raise :class:`Refused`, or a MicoError if the guard itself cannot work."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            await self.check(scope, headers)
        except Refused as error:
            refused = error
        except MicoError as error:  # the application's own handlers are further in
            logger.error("%s cannot work: %s", type(self).__name__, error)
            refused = Refused("unavailable", mico_error_response(error))
        else:
            await self.app(scope, receive, send)
            return
        scope.setdefault("state", {})["refused"] = refused.reason
        length = headers.get("content-length", "0")
        short = length.isdecimal() and int(length) <= 1 << 20
        if not short or "transfer-encoding" in headers:
            refused.response.headers["connection"] = "close"
        await refused.response(scope, receive, send)


# --- Keys ---

USER_HEADER = "x-mico-user"
"""The user of a key for whom the request is; a user sees only that user's own things."""

_USER = re.compile(r"[A-Za-z0-9._-]{1,64}")

BROWSER_HEADER, HOME_HEADER = "x-mico-browser", "x-mico-home"
"""What the page and the terminal chat send: the browser's name, and that a person at this machine
asks. A key's tenant has the same chats everywhere. Without a key, so has the person at the machine
of a service on loopback; of all others each browser has its own."""

REQUIRE_KEY_HEADER = "x-mico-require-key"
"""The header that a program sends with the requests of other people. Such a request needs a key,
even where the service asks its own machine for none."""

_SCOPES: tuple[tuple[str, tuple[KeyScope, ...]], ...] = (
    (r"\S+ /metrics", ("metrics",)),
    (r"\S+ /v1/keys", ("admin",)),
    (r"\S+ /v1/(un)?load_lora_adapter", ("admin",)),
    (r"GET /v1/batches(/[^/]+)?\Z|POST /v1/batches/[^/]+/cancel\Z", ("chat", "admin")),
    ("", ("chat",)),
)
"""Beginnings of a method and a path, and the scopes of which such a request needs one; the first
that matches decides. Routers may read the end of a path differently: where a scope opens only a
part of the routes below a path, its pattern goes to the end."""

_HOW = (
    "send 'Authorization: Bearer KEY' with a key of this service; "
    "its operator makes one with `mico-chat keys create NAME`"
)
# Each is a code and a message. All wrong keys get the same message: it must not tell a guess from a
# revoked key.
_MISSING = ("missing_api_key", f"this service asks for a key, and none was sent: {_HOW}")
_INVALID = ("invalid_api_key", f"the key that was sent is not valid here: {_HOW}")


@dataclass(frozen=True)
class Caller:
    """Whose request it is: by default that of a client who needed no key."""

    tenant: str = "local"
    key_id: str | None = None
    rate_limit: str | None = None
    scopes: frozenset[str] = frozenset({"chat", "metrics"})

    @property
    def batches_of(self) -> str | None:
        """The tenant whose batches the caller lists, sees and cancels.

        None: those of all tenants, for a key of the scope ``admin`` whose request names no user.
        """
        all_ = "admin" in self.scopes and USER_SEPARATOR not in self.tenant
        return None if all_ else self.tenant


IN_PROTOCOL = "openai-insecure-api-key."


@dataclass
class ClientSecrets:
    """Secrets that open sessions of /v1/realtime for a while, in place of the key of who made them.

    They are in this process's memory.
    """

    _made: dict[str, tuple[float, Caller, dict[str, Any]]] = field(default_factory=dict)

    def make(self, caller: Caller, expires_at: float, session: dict[str, Any]) -> str:
        """``session`` has the settings of the sessions that the secret opens."""
        self._made = {key: one for key, one in self._made.items() if one[0] > time.time()}
        if len(self._made) >= MOST_REMEMBERED:
            raise BusyError(f"{len(self._made)} secrets are in force, the most: wait for their end")
        value = f"ek_{secrets.token_urlsafe(32)}"
        self._made[value] = expires_at, caller, session
        return value

    def find(self, value: str) -> tuple[Caller, dict[str, Any]] | None:
        expires_at, caller, session = self._made.get(value, (0.0, Caller(), {}))
        return (caller, session) if expires_at > time.time() else None


@dataclass
class Auth(Guard):
    """Puts a :class:`Caller` into ``scope["state"]["caller"]``, or answers 401, or 403 if the key
    lacks the scope that the path needs.

    CORS preflights pass without a caller. Each request looks its key up anew, so that a revoked key
    stops at once. With ``required`` a key is needed even while none is in force; with ``insecure``
    none is needed although there are keys. A request that sends ``local_secret`` needs no key
    unless keys are ``required``. ``adopt`` gives a tenant what its browsers had in earlier
    versions; it is called once for each.
    """

    keys: KeyStore
    required: bool
    insecure: bool = False
    local_secret: str | None = None
    loopback: bool = False
    adopt: Callable[[str], Awaitable[None]] | None = None
    secrets: ClientSecrets = field(default_factory=ClientSecrets)
    _adopted: set[str] = field(default_factory=set)
    _adopting: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        if self.required and self.insecure:
            raise ConfigError(
                "--insecure lets everybody in, but keys are required: leave one of both out"
            )

    async def check(self, scope: Scope, headers: Headers) -> None:
        method = scope.get("method", "GET")  # a WebSocket has none
        if method == "OPTIONS" and "access-control-request-method" in headers:
            return  # a preflight
        user = headers.get(USER_HEADER)
        for name in (USER_HEADER, BROWSER_HEADER):
            if not _USER.fullmatch(headers.get(name, "-")):
                message = f"{name}: expected 1 to 64 letters, digits, '.', '_' or '-'"
                raise Refused("user", error_response(400, message, "invalid_value", name))
        given = headers.getlist("authorization")
        given += [f"Bearer {key}" for key in headers.getlist("x-api-key")]
        # A page cannot give a WebSocket headers: OpenAI's clients offer the secret as a protocol.
        for offered in headers.get("sec-websocket-protocol", "").split(","):
            if offered.strip().startswith(IN_PROTOCOL):
                given.append(f"Bearer {offered.strip().removeprefix(IN_PROTOCOL)}")
        if scope["type"] == "websocket" and len(given) == 1:
            found = self.secrets.find(given[0].partition(" ")[2].strip())
            if found is not None:
                scope.setdefault("state", {}).update(caller=found[0], session=found[1])
                return
        caller = await self._caller(given, self.required or REQUIRE_KEY_HEADER in headers)
        if caller is None:
            code, message = _INVALID if any(given) else _MISSING
            challenge = {"www-authenticate": "Bearer"}
            raise Refused("auth", error_response(401, message, code, headers=challenge))
        asked = f"{method} {scope['path']}"
        opening = next(scopes for start, scopes in _SCOPES if re.match(start, asked))
        if caller.scopes.isdisjoint(opening):
            needed = opening[0]
            has = ", ".join(sorted(caller.scopes)) or "none"
            sent = "none was sent" if caller.key_id is None else f"the key that was sent has {has}"
            message = (
                f"this request needs a key of the scope {needed!r}, but {sent}: "
                f"make one with `mico-chat keys create NAME --scope {needed}`"
            )
            code = "insufficient_scope"
            challenge = {"www-authenticate": f'Bearer error="{code}", scope="{needed}"'}
            raise Refused("scope", error_response(403, message, code, headers=challenge))
        if user is not None:
            caller = replace(caller, tenant=f"{caller.tenant}{USER_SEPARATOR}{user}")
        elif BROWSER_HEADER in headers or HOME_HEADER in headers:
            caller = await self._person(caller, headers)
        scope.setdefault("state", {})["caller"] = caller

    async def _person(self, caller: Caller, headers: Headers) -> Caller:
        """The caller of a page or terminal chat: a person, or a browser of people unknown."""
        browser = headers.get(BROWSER_HEADER)
        known = caller.key_id is not None or (self.loopback and HOME_HEADER in headers)
        if browser is not None and not known:
            caller = replace(caller, tenant=f"{caller.tenant}{USER_SEPARATOR}{BROWSER}{browser}")
        if self.adopt is not None and (known or browser is not None):
            async with self._adopting:
                if caller.tenant not in self._adopted:
                    await self.adopt(caller.tenant)
                    if len(self._adopted) >= MOST_REMEMBERED:
                        self._adopted.clear()
                    self._adopted.add(caller.tenant)
        return caller

    async def _caller(self, given: list[str], required: bool) -> Caller | None:
        scheme, _, secret = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() == "bearer" and (secret := secret.strip()):
            ours = self.local_secret
            if not required and ours and hmac.compare_digest(ours.encode(), secret.encode()):
                return Caller()
            key = await self.keys.find(secret)
            if key is not None:
                return Caller(key.tenant, key.id, key.rate_limit, key.scopes)
        if required:
            return None
        # OpenAI's clients always send some key: while none is in force, any key is as good as none.
        if (self.insecure and not given) or not await self.keys.any():
            return Caller()
        return None


def is_loopback(host: str) -> bool:
    """Whether this machine alone can reach a name or address."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_binding(host: str, insecure: bool, has_keys: bool) -> None:
    if not (is_loopback(host) or insecure or has_keys):
        raise ConfigError(
            f"other machines can reach {host or 'every address'}, and no API key is in force: "
            "make one with `mico-chat keys create NAME`, or serve anyone with --insecure"
        )


# --- Web pages ---

_PORTS = {"http": 80, "https": 443}


class OriginGuard(Guard):
    """Behind :class:`Auth`: answers 403 to requests from other sites' pages.

    ``loopback``: the service is bound to a loopback address, so a request that needed no key must
    name a loopback host or the host of one of ``cors_origins``. Origin ``*`` is any.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool, cors_origins: Iterable[str] = ()) -> None:
        super().__init__(app)
        self.loopback = loopback
        self.origins = checked_origins(cors_origins)
        self.hosts = {urlsplit(origin).hostname for origin in self.origins}

    async def check(self, scope: Scope, headers: Headers) -> None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = _split(f"//{hosts[0]}", netloc=hosts[0]) if len(hosts) == 1 else None
        if not self._host_is_ours(scope, host):
            named = f"for the host {hosts[0][:100]!r}" if hosts else "that names no host"
            message = (
                f"a request {named}; without API keys only localhost is served: make a key with "
                "`mico-chat keys create NAME`, or name the origin in MICO_SERVER_CORS_ORIGINS"
            )
            raise Refused("origin", error_response(403, message, "forbidden_host"))
        if not all(self._origin_may_call(origin, host) for origin in origins):
            message = (
                f"pages of {origins[0][:100]!r} may not call this service; "
                "name the origin in MICO_SERVER_CORS_ORIGINS to let them"
            )
            raise Refused("origin", error_response(403, message, "forbidden_origin"))

    def _host_is_ours(self, scope: Scope, host: SplitResult | None) -> bool:
        caller: Caller | None = scope.get("state", {}).get("caller")
        if not self.loopback or (caller is not None and caller.key_id is not None):
            return True
        if host is None or host.hostname is None:
            return False
        return is_loopback(host.hostname.removesuffix(".")) or host.hostname in self.hosts

    def _origin_may_call(self, origin: str, host: SplitResult | None) -> bool:
        if "*" in self.origins or origin.lower() in self.origins:
            return True
        page = _split(origin)
        if page is None or host is None or page.scheme not in _PORTS:
            return False
        # A proxy that ends TLS forwards the host but not the scheme, so the page's scheme decides
        # which port is meant.
        default = _PORTS[page.scheme]
        return (page.hostname, page.port or default) == (host.hostname, host.port or default)


def checked_origins(origins: Iterable[str]) -> frozenset[str]:
    """Origins as browsers write them: lower case, without a slash at the end."""
    checked = frozenset(origin.lower().rstrip("/") for origin in origins)
    for origin in checked - {"*"}:
        parts = _split(origin)
        if parts is None or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise ConfigError(
                f"{origin!r} is no origin (MICO_SERVER_CORS_ORIGINS); "
                "write one like 'https://example.org' or 'http://localhost:5173'"
            )
    return checked


def cors_options(origins: Iterable[str]) -> dict[str, Any]:
    """Arguments of Starlette's ``CORSMiddleware``, which belongs before :class:`Auth`, so that a
    page may read why it was refused.
    """
    return {
        "allow_origins": sorted(checked_origins(origins)),
        "allow_methods": ["*"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id", "retry-after"],
    }


def _split(url: str, netloc: str | None = None) -> SplitResult | None:
    """The parts of a URL; None if it is unreadable, has a user in it, or another ``netloc``."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    if "@" in parts.netloc or (netloc is not None and parts.netloc != netloc):
        return None
    return parts
