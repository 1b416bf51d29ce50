"""A URL taken apart once, so that what is checked is what is asked.

Whatever programs are known to read in different ways is refused: user names, backslashes, control
characters, addresses in other forms than the usual one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

import idna

from mico_chat.errors import ConfigError, MediaError

MAX_URL = 8192
"""Characters of a URL."""

NOT_PUBLIC = (
    "it leads to a host without a public address; the service fetches from public "
    "hosts only, so send the bytes instead"
)
"""One message for every address that is refused: it tells nothing of the service's network."""

_PORTS = {"http": 80, "https": 443}
_KEPT = "/?%:@!$&'()*+,;=~[]|"
_LABEL = r"(?!-)[a-z0-9_-]{1,63}(?<!-)"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class FetchError(MediaError):
    """A URL that gives no medium; its ``name`` is the field of the request that has the URL."""

    usual_fault = "url"


@dataclass(frozen=True)
class Place:
    """Scheme, host, port and target of a URL; an IPv6 ``host`` is without brackets."""

    scheme: str
    host: str
    is_address: bool
    port: int
    target: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def place_of(url: str, where: str, base: str = "") -> Place:
    """Take a URL apart. ``where`` is its place in the request, for messages.

    ``base`` is what a redirect's URL may be relative to.

    Raises:
        FetchError: saying what is wrong with it.
    """
    if len(url) > MAX_URL:
        raise FetchError(where, f"the URL has {len(url)} characters; the most is {MAX_URL}")
    if not url.isprintable() or "\\" in url:
        raise FetchError(where, "the URL has control characters or backslashes in it")
    try:
        parts = urlsplit(urljoin(base, url))
        port = parts.port
    except ValueError as error:
        raise FetchError(where, "this is not a URL: its host or port cannot be read") from error
    if parts.scheme not in _PORTS:
        raise FetchError(where, f"the URL has the scheme {parts.scheme[:40]!r}; use http or https")
    if "@" in parts.netloc:
        raise FetchError(where, "the URL has a user name or password in it; leave them out")
    if port == 0:
        raise FetchError(where, "this is not a URL: port 0 does not exist")
    host, is_address = _host(parts.hostname or "", "[" in parts.netloc, where)
    path, query = quote(parts.path or "/", safe=_KEPT), quote(parts.query, safe=_KEPT)
    return Place(
        scheme=parts.scheme,
        host=host,
        is_address=is_address,
        port=port or _PORTS[parts.scheme],
        target=f"{path}?{query}" if query else path,
    )


def _host(host: str, bracketed: bool, where: str) -> tuple[str, bool]:
    """A host as it is asked for, and whether it is an address."""
    if bracketed:
        return _address(host, ipaddress.IPv6Address, where)
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode()
        except idna.IDNAError as error:
            raise FetchError(where, "this is not a URL: its host is not a valid name") from error
    host = host.removesuffix(".")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        # Some programs read 0177.1 or 2130706433 as addresses; this one only the usual form.
        return _address(host, ipaddress.IPv4Address, where)
    if len(host) > 253 or not _NAME.fullmatch(host):
        raise FetchError(where, "this is not a URL: its host is not a valid name")
    return host, False


def _address(host: str, parse: Callable[[str], object], where: str) -> tuple[str, bool]:
    try:
        return str(parse(host)), True
    except ValueError as error:
        raise FetchError(where, NOT_PUBLIC) from error


def host_of(host: str) -> str:
    """A host of the operator's list as URLs' hosts are written here."""
    try:
        return _host(host.lower(), ":" in host, "")[0]
    except FetchError as error:
        raise ConfigError(
            f"{host!r} is not the name of a host (MICO_SERVER_URL_HOSTS); write one like "
            "'media.example.org'"
        ) from error
