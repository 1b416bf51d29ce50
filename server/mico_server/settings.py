"""Limits of the service, from ``MICO_SERVER_*`` environment variables."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class ServerSettings(BaseSettings):
    """What one request, and all of them together, may take.

    Limits on a single medium are the media layer's (``MICO_MEDIA_*``).
    """

    model_config = SettingsConfigDict(env_prefix="MICO_SERVER_", frozen=True)

    max_body_bytes: int = Field(512 * 1024 * 1024, ge=1, description="bytes of a request's body")
    max_media: int = Field(32, ge=1, description="media of a request")
    max_text_bytes: int = Field(1024 * 1024, ge=1, description="bytes of a text field")
    max_requests: int = Field(80, ge=1, description="requests that are answered or wait at once")
