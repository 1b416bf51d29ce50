"""A browser's user, settings and access.

The browser keeps the settings and sends them with every call; this process stores none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from mico_ui.client import ApiError, AsyncClient, host_of, is_local
from mico_ui.routes import Call

T = TypeVar("T")

_OF_PROXIES = ("forwarded", "via", "x-forwarded-", "x-real-ip", "x-client-ip", "cf-connecting-ip")


@dataclass(frozen=True)
class Access:
    """The rights of a visitor who gives no API key.

    The server that was started beside the page takes ``secret`` in the place of a key. With
    ``require_key`` the server must ask for a key, even where this machine needs none. With ``home``
    all browsers of this machine are one person's.
    """

    secret: str | None = None
    require_key: bool = False
    home: bool = False

    def for_visitor(self, headers: Mapping[str, str]) -> Access:
        """The access of the request with these headers; only this machine has secret and home."""
        return self if is_at_home(headers) else Access(None, self.require_key)


NO_ACCESS = Access()


def is_at_home(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from this page in a browser of this machine.

    A proxy adds its own headers. The page of another site has another origin. A site whose name was
    made to lead here (DNS rebinding) sends that name as the host. A proxy that adds no header
    passes on an origin that differs from the host.
    """
    if any(name.lower().startswith(_OF_PROXIES) for name in headers):
        return False
    host = headers.get("host", "")
    return headers.get("origin") == f"http://{host}" and is_local(host_of(host))


class Frozen(BaseModel):
    """Data that the page and its process send to each other; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Visitor(Frozen):
    """A browser's opaque id and its user's settings.

    ``user`` is the browser's name. ``key`` is the server's API key, empty where it needs none.
    ``model`` is empty where the server has one. For options that are None the model has its
    own values.
    """

    user: str = Field(pattern=r"^[A-Za-z0-9._-]{16,64}$")
    key: str = Field("", max_length=512)
    model: str = Field("", max_length=512)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    max_tokens: int | None = Field(None, ge=1, le=65536)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, gt=0.0, le=10.0)
    seed: int | None = Field(None, ge=0, lt=2**53)
    system: str = Field("", max_length=20_000)
    _access: Access = PrivateAttr(NO_ACCESS)

    @classmethod
    def of(cls, data: Any, access: Access = NO_ACCESS) -> Visitor:
        """The visitor whose data a browser sent, with the access that the browser has."""
        try:
            visitor = cls.model_validate(data)
            visitor._access = access
            return visitor
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "profile"
            raise ApiError(f"{name}: {first['msg']}; see Settings", status=415) from error

    @property
    def owner(self) -> tuple[str, str]:
        """Whose things are this visitor's: a browser's, or a person's in every browser.

        The browser's name, empty for a person, and a hash of the key, empty without one.
        """
        key = self.key or self._access.secret
        user = "" if self.key or self._access.home else self.user
        return user, hashlib.sha256(key.encode()).hexdigest() if key else ""

    def client(self, api: str) -> AsyncClient:
        access, key = self._access, self.key or self._access.secret
        who: dict[str, Any] = {"browser": self.user, "home": access.home}
        return AsyncClient(api, key, **who, require_key=access.require_key)

    async def send(self, api: str, call: Call[T]) -> T:
        async with self.client(api) as client:
            return await client.send(call)
