"""What a medium may cost: MediaLimits, set by ``MICO_MEDIA_*`` environment variables."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from mico_chat.errors import LimitError, MediaError

LimitName = Literal[
    "max_bytes", "max_pixels", "max_seconds", "max_frames", "timeout_s", "memory_mb", "max_side"
]


class MediaLimits(BaseSettings):
    """Limits on untrusted media; each is read from ``MICO_MEDIA_<NAME>`` when not given.

    ``max_bytes``, ``max_pixels``, ``timeout_s`` and ``memory_mb`` refuse a medium;
    ``max_seconds``, ``max_frames`` and ``max_side`` cut it, and its report says so.
    """

    model_config = SettingsConfigDict(env_prefix="MICO_MEDIA_", frozen=True, extra="forbid")

    max_bytes: int = Field(256 * 1024 * 1024, ge=1, description="encoded bytes of one medium")
    max_pixels: int = Field(
        50_000_000, ge=1, description="pixels of an image or frame, before downscaling"
    )
    max_seconds: float = Field(600.0, gt=0, description="seconds of sound kept")
    max_frames: int = Field(8, ge=1, le=1024, description="frames taken from a video")
    timeout_s: float = Field(30.0, gt=0, description="seconds one medium may take to decode")
    memory_mb: int = Field(
        1024, ge=128, description="address space of the decoder process, MiB (POSIX)"
    )
    max_side: int = Field(
        1024, ge=16, description="longest side of decoded pixels; larger is scaled down"
    )

    def exceeded(self, name: str, setting: LimitName, what: str) -> LimitError:
        """The error for a medium past ``setting``; ``what`` says the value, in words."""
        allowed = getattr(self, setting)
        return LimitError(
            name,
            f"{what}, more than the limit of {allowed} "
            f"({setting}; raise it with MICO_MEDIA_{setting.upper()})",
            setting,
        )

    def out_of_time(self, name: str) -> LimitError:
        """The error for a medium that took longer than ``timeout_s``."""
        return LimitError(
            name,
            f"decoding took longer than the limit of {self.timeout_s:g} s "
            "(timeout_s; raise it with MICO_MEDIA_TIMEOUT_S)",
            "timeout_s",
        )

    def check_pixels(self, name: str, width: int, height: int) -> None:
        """Refuse a raster by the size its header claims, before anything is decoded.

        Raises:
            MediaError: a side is 0.
            LimitError: more than ``max_pixels``.
        """
        if width < 1 or height < 1:
            raise MediaError(
                name, f"the header claims {width} x {height} pixels; it has no area", "damaged"
            )
        if width * height > self.max_pixels:
            raise self.exceeded(
                name, "max_pixels", f"{width} x {height} pixels is {width * height} pixels"
            )

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) scaled so the longest side is at most ``max_side``, shape kept."""
        longest = max(width, height)
        if longest <= self.max_side:
            return width, height
        scale = self.max_side / longest
        return max(1, round(width * scale)), max(1, round(height * scale))
