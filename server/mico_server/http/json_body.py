"""Bodies of JSON: the memory that all of them take together, and how one is read."""

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from mico_chat.errors import LimitError, RequestError
from mico_server.errors import BusyError
from mico_server.http.errors import mico_error_body

MAX_FIELDS = 256
"""Most fields of a request: each unknown one would get an error of its own, of a kilobyte."""

VALUE_BYTES = 64
"""Memory of a parsed value beside its bytes: an empty object takes 64, a number 32."""

_BETWEEN = b"{[,:"
_HALF = re.compile("[\ud800-\udfff]")


def number_of_values(body: bytes) -> int:
    """An upper bound of the JSON values in a piece of a body: bytes of texts are counted too."""
    return len(body) - len(body.translate(None, _BETWEEN))


@dataclass
class BodyMemory:
    """Bytes of the bodies that are held in memory: ``most`` of all, half of them of one tenant."""

    most: int
    held: Counter[str] = field(default_factory=Counter)

    def take(self, tenant: str, taken: int, whole: int, claimed: int) -> None:
        """Hold ``whole`` bytes of a body instead of ``taken``.

        Raises:
            BusyError: there is no room now, or when it begins none for all that it ``claimed``.
            LimitError: there will never be.
        """
        share, needed = self.most // 2, whole if taken else max(whole, claimed)
        setting = "MICO_SERVER_MAX_BODIES_BYTES"
        if needed > share:
            reason = f"takes {needed} bytes of memory, over the limit of {share}, half of {setting}"
            raise LimitError("request body", f"{reason}; upload media to /v1/media")
        own, all_ = self.held[tenant], self.held.total()
        if own + needed - taken > share or all_ + needed - taken > self.most:
            raise BusyError(
                f"request body: the service holds {all_} bytes of bodies, {own} of them yours; the "
                f"most is {self.most}, and {share} of one client ({setting}): try again soon, or "
                "upload media to /v1/media"
            )
        self.held[tenant] += whole - taken

    def free(self, tenant: str, taken: int) -> None:
        self.held[tenant] -= taken
        if not self.held[tenant]:
            del self.held[tenant]


def read_json(data: bytes | str, field: str | None = None) -> Any:
    """Parse a client's JSON: a whole body, or the text of a form's ``field``.

    Raises:
        RequestError: it is no JSON, or has half of a surrogate pair, which is no text.
    """
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        value = json.loads(text)
        # Only an escape can make one: raw bytes of one are no UTF-8.
        path = _half(value) if "\\ud" in text or "\\uD" in text else None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{field or 'request body'}: not JSON ({error})", field) from error
    if path is not None:
        steps = (f"[{s}]" if isinstance(s, int) else f".{_shown(s)}" for s in reversed(path))
        place = f"{field or ''}{''.join(steps)}".removeprefix(".")
        raise RequestError.at(place or "request body", "half of a surrogate pair, which is no text")
    return value


def _half(value: Any) -> list[str | int] | None:
    """The path to the first text with half of a surrogate pair, its last step first."""
    if isinstance(value, str):
        return [] if _HALF.search(value) else None
    items: Any = value.items() if isinstance(value, dict) else ()
    for step, inner in enumerate(value) if isinstance(value, list) else items:
        path = [] if isinstance(step, str) and _HALF.search(step) else _half(inner)
        if path is not None:
            return [*path, step]
    return None


def _shown(name: str) -> str:
    return name[:64].encode("utf-8", "backslashreplace").decode()


class JsonRequest(Request):
    """A request that lets its body go once that is parsed."""

    async def body(self) -> bytes:
        kind = self.headers.get("content-type", "").lower()
        if kind.startswith("multipart/"):  # it may be longer than what memory is for
            error = RequestError("content-type: expected application/json, got a multipart form")
            raise HTTPException(error.status, mico_error_body(error), {"connection": "close"})
        return await super().body()

    async def json(self) -> Any:
        try:
            value = read_json(await self.body())
            if isinstance(value, dict) and len(value) > MAX_FIELDS:
                fields = f"{len(value)} fields, over the limit of {MAX_FIELDS}"
                raise RequestError(f"request body: {fields}; send fewer")
        except RequestError as error:  # FastAPI replaces any other exception
            raise HTTPException(error.status, mico_error_body(error)) from error
        self._body = b""
        return value


class JsonRoute(APIRoute):
    """A route that reads its JSON by :class:`JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle
