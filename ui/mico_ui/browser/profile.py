"""Who asks and how, as the browser keeps it: sent with every call, kept nowhere on this side."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mico_ui.client import ApiError, AsyncClient


class Profile(BaseModel):
    """A browser's opaque id and its user's settings.

    ``user`` makes a tenant of its own of each browser. ``key`` is the server's API key, empty
    where it needs none. Options that are None are the model's own.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    user: str = Field(pattern=r"^[A-Za-z0-9._-]{16,64}$")
    key: str = Field("", max_length=512)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    max_tokens: int | None = Field(None, ge=1, le=65536)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, gt=0.0, le=10.0)
    seed: int | None = Field(None, ge=0, lt=2**53)
    system: str = Field("", max_length=20_000)

    @classmethod
    def of(cls, data: Any) -> Profile:
        """The profile of what a browser sent.

        Raises:
            ApiError: naming the setting that makes no sense.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"]) or "profile"
            raise ApiError(f"{name}: {first['msg']}; see Settings", status=415) from error

    def client(self, api: str) -> AsyncClient:
        """A client of the server at ``api`` that asks for this user.

        Raises:
            ApiError: for a key that cannot be one.
        """
        return AsyncClient(api, self.key or None, user=self.user)

    @property
    def options(self) -> dict[str, Any]:
        """Generation options, by the server's names."""
        return self.model_dump(
            include={"temperature", "max_tokens", "top_p", "repetition_penalty", "seed"}
        )
