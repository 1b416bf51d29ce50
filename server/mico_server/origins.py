"""Keep other sites' pages out: a browser on this machine reaches what is bound to loopback.

Any page can make its visitor's browser post to ``http://127.0.0.1:8000``: such a request carries
an ``Origin``, which must be the service's own or one the operator named. And a page whose name is
made to resolve to 127.0.0.1 (DNS rebinding) is of the service's own origin to the browser: where
no key stands guard, the ``Host`` it was asked by must be a name of this machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mico_chat.errors import ConfigError
from mico_server.addresses import is_loopback
from mico_server.auth import OPEN_PATHS, Caller
from mico_server.errors import error_response
from mico_server.refusal import refuse

ANY_ORIGIN = "*"
_PORTS = {"http": 80, "https": 443}


class OriginGuard:
    """ASGI middleware behind :class:`~mico_server.auth.Auth`: answers 403 to other sites' pages.

    Args:
        app: what is behind it.
        loopback: whether the service is bound to a loopback address. If it is, a request that
            needed no key must be for a loopback name, or for the host of one of ``cors_origins``.
        cors_origins: origins whose pages may call; ``*`` is any.

    Raises:
        ConfigError: for an origin that is none.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool, cors_origins: Iterable[str] = ()) -> None:
        self.app = app
        self.loopback = loopback
        self.origins = checked_origins(cors_origins)
        self.hosts = {urlsplit(origin).hostname for origin in self.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        host = _split(f"//{hosts[0]}", netloc=hosts[0]) if len(hosts) == 1 else None
        if not self._host_is_ours(scope, host):
            named = f"for the host {hosts[0][:100]!r}" if hosts else "that names no host"
            message = (
                f"a request {named}; without API keys only localhost is served: make a key with "
                "`mico-chat keys create NAME`, or name the origin in MICO_SERVER_CORS_ORIGINS"
            )
            response = error_response(403, message, "forbidden_host")
        elif not all(self._origin_may_call(origin, host) for origin in origins):
            message = (
                f"pages of {origins[0][:100]!r} may not call this service; "
                "name the origin in MICO_SERVER_CORS_ORIGINS to let them"
            )
            response = error_response(403, message, "forbidden_origin")
        else:
            await self.app(scope, receive, send)
            return
        await refuse(scope, receive, send, response, "origin")

    def _host_is_ours(self, scope: Scope, host: SplitResult | None) -> bool:
        caller: Caller | None = scope.get("state", {}).get("caller")
        if not self.loopback or (caller is not None and caller.key_id is not None):
            return True
        if host is None or host.hostname is None:
            return False
        return is_loopback(host.hostname.removesuffix(".")) or host.hostname in self.hosts

    def _origin_may_call(self, origin: str, host: SplitResult | None) -> bool:
        if ANY_ORIGIN in self.origins or origin.lower() in self.origins:
            return True
        page = _split(origin)
        if page is None or host is None or page.scheme not in _PORTS:
            return False
        # A proxy that ends TLS forwards the host, not the scheme: the page's own tells the port.
        default = _PORTS[page.scheme]
        return (page.hostname, page.port or default) == (host.hostname, host.port or default)


def checked_origins(origins: Iterable[str]) -> frozenset[str]:
    """Origins as browsers write them: lower case, without a slash at the end.

    Raises:
        ConfigError: for one that is no origin.
    """
    checked = frozenset(origin.lower().rstrip("/") for origin in origins)
    for origin in checked - {ANY_ORIGIN}:
        parts = _split(origin)
        if parts is None or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
            raise ConfigError(
                f"{origin!r} is no origin (MICO_SERVER_CORS_ORIGINS); "
                "write one like 'https://example.org' or 'http://localhost:5173'"
            )
    return checked


def cors_options(origins: Iterable[str]) -> dict[str, Any]:
    """Arguments of Starlette's ``CORSMiddleware``, which belongs before Auth: a page may read why
    it was refused. Keys come in a header, so that no cookies need to be allowed.

    Raises:
        ConfigError: as :func:`checked_origins`.
    """
    return {
        "allow_origins": sorted(checked_origins(origins)),
        "allow_methods": ["*"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id", "retry-after"],
    }


def _split(url: str, netloc: str | None = None) -> SplitResult | None:
    """The parts of a URL without a user in it, None for nonsense or another ``netloc``."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    if "@" in parts.netloc or (netloc is not None and parts.netloc != netloc):
        return None
    return parts
