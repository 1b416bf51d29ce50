"""``mico-chat data look``: the clips of shards on a page, served to this machine alone.

The page has no script. Captions may come from anybody: the template escapes them, and the page's
policy lets nothing run or load that the page does not serve itself. A browser that was led here by
another site's name (DNS rebinding) gets no answer: the Host must be this machine's.
"""

import base64
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from mico_chat.errors import ConfigError, MicoError
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.addresses import located
from mico_chat.media.file import mime_type
from mico_chat.media.kinds import TABLE, Kind
from mico_corpus.describing.base import Clip
from mico_corpus.looking import pictures
from mico_corpus.looking.filters import KEPT, ClipFilter
from mico_corpus.looking.report import pages
from mico_corpus.looking.store import BuildStore, ClipEntry, Plain, open_store
from mico_corpus.rows import REASONS

PAGE = 24
HOST = "127.0.0.1"
REMEMBERED = 4096
"""The media of so many clips are served: of those on the pages that were shown last."""
DRAWN: Mapping[str, tuple[str, Callable[[MediaDecoder, MediaFile], bytes], tuple[Kind, ...]]] = {
    "sheet": ("image/jpeg", pictures.sheet, ("video",)),
    "wave": ("image/svg+xml", pictures.wave, ("audio", "video")),
    "depth": ("image/png", pictures.depth, ("depth",)),
}
"""The type of each picture of a medium, what draws it, and the kinds of medium that have it."""
POLICY = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
OF_PAGE = POLICY + "form-action 'self'; img-src 'self' data:; media-src 'self'; style-src 'self'"
OF_REPORT = POLICY + "img-src data:; style-src 'unsafe-inline'"
HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Accept-Ranges": "bytes",
    "Cache-Control": "no-store",
}

Content = tuple[str, bytes]
"""It holds a type and the bytes."""


class Gone(Exception):
    """Nothing is at an address; the text says why."""


class Look:
    """The pages and pictures of a store. Threads may share it."""

    def __init__(self, shards: str, store: Plain | BuildStore | None = None) -> None:
        self.title = shards
        self.store = store or open_store(shards)
        self.decoder = MediaDecoder(pictures.LIMITS)
        self.template = pages().get_template("look.html")
        self.style = pages().get_template("look.css").render()
        self._shown: OrderedDict[int, ClipEntry] = OrderedDict()
        self._lock, self._decoding = threading.Lock(), threading.Lock()

    def page(self, query: str) -> str:
        asked, number = asked_of(query)
        numbers = self.store.find(asked)
        last = max(1, math.ceil(len(numbers) / PAGE))
        number = min(number, last)
        entries = self.store.entries(numbers[(number - 1) * PAGE : number * PAGE])
        with self._lock:
            for entry in entries:
                self._shown[entry.number] = entry
                self._shown.move_to_end(entry.number)
            while len(self._shown) > REMEMBERED:
                self._shown.popitem(last=False)
        given = {name: value for name, value in vars(asked).items() if value not in ("", None)}

        def link(to: int) -> str:
            return "?" + urlencode({**given, "page": to})

        return self._rendered(
            entries, address, asked=asked, count=len(numbers), number=number, last=last, link=link
        )

    def whole(self, clips: int) -> str:
        """One page of the first clips that needs no server: media and style are in it."""
        entries = self.store.entries(self.store.find(ClipFilter())[:clips])
        by_number = {entry.number: entry for entry in entries}

        def inside(entry: ClipEntry, view: str, name: str = "") -> str:
            try:
                kind, content = self.medium(view, by_number[entry.number], name)
            except (MicoError, OSError, Gone):
                return "data:,"
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"

        return self._rendered(entries, inside, asked=None, count=len(entries))

    def _rendered(self, entries: Any, source: Callable[..., str], **about: Any) -> str:
        return self.template.render(
            title=self.title,
            store=self.store,
            style=self.style,
            entries=entries,
            source=source,
            meanings=REASONS,
            has_report=self.report() is not None,
            is_there=is_there,
            **about,
        )

    def report(self) -> bytes | None:
        if isinstance(self.store, BuildStore) and self.store.place.exists("build/report.html"):
            return self.store.place.read("build/report.html")
        return None

    def shown(self, number: str) -> ClipEntry:
        with self._lock:
            entry = self._shown.get(int(number))
        if entry is None:
            raise Gone("this clip is on no page that was shown last: load its page again")
        return entry

    def medium(self, view: str, entry: ClipEntry, name: str) -> Content:
        """A medium of a clip as it is ("file"), a picture of it, or frames of its source file."""
        if view == "source" and entry.row.get("reason"):
            return "image/jpeg", self._of_source(entry)
        media = {} if entry.sample is None else entry.sample.media
        if name not in media or view == "source":
            raise Gone(f"the clip {entry.id} has no medium {name!r}")
        file = media[name]
        if view == "file":
            content = file.read()
            return mime_type(file.kind, content), content
        kind, draw, kinds = DRAWN[view]
        if file.kind not in kinds:
            raise Gone(f"{name} is {TABLE[file.kind].words}, which has no view {view!r}")
        return kind, draw(self.decoder, file)

    def _of_source(self, entry: ClipEntry) -> bytes:
        with self._decoding:  # decoded frames stay in a store that threads do not share
            frames = Clip(entry.row).frames(4, 240).frames
        return pictures.contact_sheet(frames)


def address(entry: ClipEntry, view: str, name: str = "") -> str:
    return f"/{view}/{entry.number}/{quote(name, safe='')}"


def is_there(entry: ClipEntry) -> bool:
    """Whether a clip's source file may be there; what is at an address is not asked."""
    place = located(entry.row.get("address") or "")
    return place.is_file() if isinstance(place, Path) else True


def asked_of(query: str) -> tuple[ClipFilter, int]:
    """The filters and the page's number of an address; what makes no sense is left out."""
    given = {name: values[-1] for name, values in parse_qs(query).items()}
    known: dict[str, Any] = {}
    for field in fields(ClipFilter):
        value = given.get(field.name, "").strip()
        if field.name in ("least", "most"):
            known[field.name] = _number(value)
        elif value:
            known[field.name] = value
    page = given.get("page", "1")
    return ClipFilter(**known), int(page) if re.fullmatch(r"[1-9]\d{0,8}", page) else 1


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# --- the server -----------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        host = (self.headers.get("Host") or "").lower()
        port = self.server.server_address[1]
        if host not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._say(HTTPStatus.FORBIDDEN, "this page answers to 127.0.0.1 and localhost alone")
            return
        try:
            content = self._answer()
        except Gone as gone:
            self._say(HTTPStatus.NOT_FOUND, str(gone))
        except (MicoError, OSError) as error:
            self._say(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        else:
            with suppress(ConnectionError):  # a browser stops when it has read enough of a video
                self._send(*content)

    do_HEAD = do_GET

    def _answer(self) -> tuple[Content, str]:
        parts = urlsplit(self.path)
        look = self.server.look
        if parts.path == "/":
            return ("text/html; charset=utf-8", look.page(parts.query).encode()), OF_PAGE
        if parts.path == "/style.css":
            return ("text/css; charset=utf-8", look.style.encode()), POLICY
        if parts.path == "/report" and (report := look.report()) is not None:
            return ("text/html; charset=utf-8", report), OF_REPORT
        found = re.fullmatch(r"/(file|source|sheet|wave|depth)/(\d{1,15})/([^/]*)", parts.path)
        if found is None:
            raise Gone("nothing is at this address")
        return look.medium(found[1], look.shown(found[2]), unquote(found[3])), POLICY

    def _send(self, content: Content, policy: str) -> None:
        kind, data = content
        start, end, status = 0, len(data), HTTPStatus.OK
        part = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", self.headers.get("Range") or "")
        if part and (part[1] or part[2]):
            if part[1]:
                start, end = int(part[1]), min(end, int(part[2]) + 1 if part[2] else end)
            else:
                start = max(0, end - int(part[2]))
            status = HTTPStatus.PARTIAL_CONTENT
            if start >= end:
                self._say(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"of {len(data)} bytes")
                return
        headers = HEADERS | {"Content-Security-Policy": policy}
        if status is HTTPStatus.PARTIAL_CONTENT:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self._write(status, kind, data[start:end], headers)

    def _say(self, status: HTTPStatus, words: str) -> None:
        data = f"{words}\n".encode(errors="replace")
        self._write(status, "text/plain; charset=utf-8", data, {})

    def _write(
        self, status: HTTPStatus, kind: str, data: bytes, headers: Mapping[str, str]
    ) -> None:
        about = {"Content-Type": kind, "Content-Length": str(len(data))}
        self.send_response(status)
        for header in (about | {"X-Content-Type-Options": "nosniff"} | dict(headers)).items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a page of pictures would fill the terminal."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, look: Look, port: int) -> None:
        super().__init__((HOST, port), Handler)
        self.look = look

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


def write_page(shards: str, file: Path, clips: int) -> int:
    """Write one page of the first clips that needs no server; returns how many it has."""
    look = Look(shards)
    with look.decoder:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(look.whole(clips), encoding="utf-8")
    return min(clips, look.store.reasons[KEPT])


def serve(shards: str, port: int, show: Callable[[str], object]) -> None:
    """Serve the page until the process is interrupted; ``show`` gets its address."""
    look = Look(shards)
    try:
        server = Server(look, port)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {HOST} cannot be used ({error.strerror}): give another --port, or 0"
        ) from error
    with look.decoder, server:
        show(server.url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
