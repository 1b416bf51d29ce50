"""The page's door: the middleware in front of Gradio, which guards the page as the API is guarded.

Gradio has some seventy routes, and the page of any site can make its visitor's browser send
requests here. The door lets in what this page sends: reads of its files, calls of its functions,
and uploads. It takes uploads itself: Gradio stores one before it asks whose it is.
"""

import asyncio
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from mico_chat.errors import ConfigError
from mico_chat.media import MediaLimits
from mico_ui import routes
from mico_ui.browser.talk import REFUSED, talk
from mico_ui.browser.turns import problem_of
from mico_ui.browser.visitor import Access, Visitor
from mico_ui.client import ApiError, is_local

FILES = re.compile(r"/|/(favicon\.ico|robots\.txt|ear\.js)")
TALK = "/talk"
WRITTEN = "/gradio_api/file="  # and the path of a file that the page wrote
CALL, UPLOAD = "/gradio_api/component_server/", "/gradio_api/upload"

CALL_BYTES = 4 << 20  # the server takes texts of 1 MiB; JSON may escape letters
UPLOAD_BYTES = MediaLimits().max_bytes + (64 << 10)  # the largest medium, and the form around it
BODIES = {CALL: ("application/json", CALL_BYTES), UPLOAD: ("multipart/form-data", UPLOAD_BYTES)}
# What one visitor may have and all may have. An upload goes as soon as the server has it. A browser
# sends six files at once, and a question shows 32.
MOST = {"bytes": (8 * UPLOAD_BYTES, 16 * UPLOAD_BYTES), "uploads at once": (32, 128)}
LEAST_BYTES = 64 << 10  # the smallest file counts as that much, which bounds the number of files
UPLOAD_S = 1800.0  # after this time an upload goes that the page did not send on
PIECE_S = 30.0  # the next piece of a body must arrive in this time, as at the server
REFUSED_S = 60.0  # a browser has this time to send the rest of a body that was refused
KEY_S, MAX_KEYS = 30.0, 1024  # a key that the server took stays good for a while, and so many do

Place = tuple[str, str, int]  # scheme, host and port
_ALL, _FOREIGN = "", "foreign_site"  # the owner of everything; the code of an error


@dataclass
class Uploads:
    """The uploads that arrive or lie in ``folder``, and how much of them each visitor has."""

    folder: Path
    _all: dict[Path, tuple[str, int]] = field(default_factory=dict)  # owner and bytes
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, what: str, owner: str, n: int) -> None:
        """Count ``n`` more of ``MOST``, unless they are too many."""
        for who, most in zip((owner, _ALL), MOST[what], strict=True):
            if n > 0 and self._counts[what, who] + n > most:
                whose = "all visitors" if who == _ALL else "one visitor"
                raise ApiError(f"too many uploads: {whose} may have {most} {what}", 429)
        self._counts.update({(what, owner): n, (what, _ALL): n})
        if not self._counts[what, owner]:
            del self._counts[what, owner]

    def begin(self, owner: str) -> Path:
        """The path of a new upload, whose name nobody can guess."""
        self.count("uploads at once", owner, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / secrets.token_urlsafe(24)
        self._all[path] = owner, 0
        return path

    def grow(self, path: Path, n: int) -> None:
        owner, n_bytes = self._all[path]
        self.count("bytes", owner, n)
        self._all[path] = owner, n_bytes + n

    def drop(self, path: Path) -> None:
        """Remove a file, if it is an upload."""
        if path in self._all:
            owner, n_bytes = self._all.pop(path)
            self.count("bytes", owner, -n_bytes)
            path.unlink(missing_ok=True)


@dataclass
class _Body:
    """A request's body of at most ``most`` bytes; ``arrived`` gets the number of each piece's."""

    receive: Receive
    most: int = 0
    arrived: Callable[[int], None] = lambda n: None
    n_bytes: int = 0
    ended: bool = False

    async def __call__(self) -> Message:
        try:
            async with asyncio.timeout(None if self.ended else PIECE_S):
                message = await self._piece()
        except TimeoutError as error:
            self.ended = True
            reason = f"no bytes arrived for {PIECE_S:g} s after {self.n_bytes} bytes"
            raise ApiError(reason, 408) from error
        if self.n_bytes > self.most:
            raise ApiError(f"the request has more than {self.most} bytes", 413)
        self.arrived(len(message.get("body", b"")))
        return message

    async def _piece(self) -> Message:
        message = await self.receive()
        self.n_bytes += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        return message

    async def throw_away(self) -> None:
        """Read the rest: a browser reads no answer before it has sent its request."""
        with suppress(TimeoutError):
            async with asyncio.timeout(REFUSED_S):
                while not self.ended and self.n_bytes < UPLOAD_BYTES:
                    await self._piece()


@dataclass
class Door:
    """ASGI middleware. ``written`` are the paths of files that browsers may fetch.

    ``loopback``: the page listens on a loopback address, so a request must name a loopback host or
    the host of one of ``origins``. Those are the origins of pages that may use this one: of its
    own behind a proxy.
    """

    app: ASGIApp
    api: str
    access: Access
    uploads: Uploads
    written: Collection[str]
    loopback: bool = True
    origins: Collection[Place] = ()
    _good: dict[str, float] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http({**scope, "query_string": b""}, receive, send)  # no route reads it
        elif scope["type"] == "websocket":
            await self._socket(WebSocket(scope, receive, send))
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        app, headers, body = self.app, Headers(scope=scope), _Body(receive)
        try:
            self._check_site(headers)
            try:
                self._check_route(scope, headers, body)
                if scope["path"] == UPLOAD:
                    app = await self._upload(Request(scope, body), body)
            except ApiError:
                await body.throw_away()
                raise
        except ClientDisconnect:
            return
        except ApiError as error:
            told = {"detail": str(error), "problem": problem_of(error).model_dump(mode="json")}
            app = JSONResponse(told, error.status or 502, {"connection": "close"})
        await app(scope, body, send)

    async def _socket(self, socket: WebSocket) -> None:
        try:
            self._check_site(socket.headers)
            if socket.url.path != TALK:
                raise ApiError(f"this page has no WebSocket at {socket.url.path[:100]!r}", 404)
        except ApiError as error:
            await socket.close(REFUSED, str(error))
            return
        await talk(socket, self.api)

    def _check_site(self, headers: Headers) -> None:
        """Refuse the pages of other sites, also of one whose name was made to lead here."""
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        named = hosts[0] if len(hosts) == 1 else ""
        _, host, _ = _place(f"http://{named}") or ("", "", 0)
        local = is_local(host.removesuffix(".")) or not self.loopback
        if not host or not (local or host in (origin[1] for origin in self.origins)):
            reason = f"this page does not answer for the host {named[:100]!r}"
            raise ApiError(f"{reason}: open it at localhost, or name its --origin", 403, _FOREIGN)
        for origin in origins:
            # A proxy that ends TLS passes on the host and not the scheme.
            page = _place(origin)
            own = page and page == _place(f"{page[0]}://{named}")
            if not own and page not in self.origins:
                reason = f"pages of {origin[:100]!r} may not use this one"
                raise ApiError(f"{reason}: its --origin names those that may", 403, _FOREIGN)

    def _check_route(self, scope: Scope, headers: Headers, body: _Body) -> None:
        method, path = scope["method"], scope["path"]
        written = path.startswith(WRITTEN) and path.removeprefix(WRITTEN) in self.written
        if method in ("GET", "HEAD") and (written or FILES.fullmatch(path)):
            return
        if method != "POST" or path not in BODIES:
            raise ApiError(f"this page has nothing for {method} {path[:100]!r}", 404)
        taken, body.most = BODIES[path]
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > body.most:
            raise ApiError(f"the request has {length} bytes, more than {body.most}", 413)
        sent = headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != taken:
            raise ApiError(f"{path} takes {taken}, but {sent[:100]!r} was sent", 415)

    async def _upload(self, request: Request, body: _Body) -> ASGIApp:
        """Store the file of a form; the answer is its path."""
        user, key = (request.headers.get(f"x-mico-{name}", "") for name in ("user", "key"))
        access = self.access.for_visitor(request.headers)
        visitor = Visitor.of({"user": user, "key": unquote(key)}, access)
        owner = visitor.owner[1] or user
        path = self.uploads.begin(owner)
        try:
            await self._check_key(visitor)
            body.arrived = partial(self.uploads.grow, path)
            body.arrived(LEAST_BYTES)
            async with request.form(max_files=1, max_fields=0) as form:
                file = form.get("files")
                if not isinstance(file, UploadFile):
                    raise ApiError("the form has no file of the name 'files'", 400)
                with path.open("xb") as opened:
                    await asyncio.to_thread(shutil.copyfileobj, file.file, opened)
        except BaseException as error:
            self.uploads.drop(path)
            if isinstance(error, HTTPException | OSError):
                raise ApiError(f"the upload cannot be stored: {error}", 400) from error
            raise
        finally:
            self.uploads.count("uploads at once", owner, -1)
        asyncio.get_running_loop().call_later(UPLOAD_S, self.uploads.drop, path)
        return JSONResponse([str(path)])

    async def _check_key(self, visitor: Visitor) -> None:
        """Ask the server, which alone knows whether it needs a key, and which ones."""
        key, now = visitor.owner[1], time.monotonic()
        if self._good.get(key, now) <= now:
            await visitor.send(self.api, routes.models())
            self._good[key] = now + KEY_S
            if len(self._good) > MAX_KEYS:
                del self._good[next(iter(self._good))]


def places(origins: Iterable[str]) -> list[Place]:
    found = {origin: _place(origin) for origin in origins}
    for origin, place in found.items():
        if place is None:
            example = "write one like 'https://chat.example.org'"
            raise ConfigError(f"{origin!r} is no origin of a page (--origin): {example}")
    return [place for place in found.values() if place]


def _place(url: str) -> Place | None:
    """The place of an origin, None for anything else, as for ``null``."""
    try:
        parts = urlsplit(url.lower())
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        return None
    whole = "@" not in parts.netloc and url.lower() == f"{parts.scheme}://{parts.netloc}"
    return (parts.scheme, parts.hostname, port) if whole and parts.hostname else None
