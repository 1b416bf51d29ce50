"""``decode``: bytes or a path to a Medium, in this process."""

from __future__ import annotations

import dataclasses
import os
import time

from mico_chat.errors import MediaError
from mico_chat.media.audio import decode_audio
from mico_chat.media.depth import decode_depth
from mico_chat.media.image import decode_image
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.limits import MediaLimits
from mico_chat.media.medium import Medium
from mico_chat.media.normal import decode_normal
from mico_chat.media.source import Source, source_of
from mico_chat.media.video import decode_video


def decode(
    kind: Kind,
    source: str | os.PathLike[str] | bytes,
    *,
    name: str = "",
    limits: MediaLimits | None = None,
    depth_scale: float = 0.001,
    brighter_is_nearer: bool = True,
) -> Medium:
    """Decode one medium in this process: for trusted media, and for the decoder's worker.

    ``timeout_s`` and ``memory_mb`` hold only in a worker; see MediaDecoder for untrusted media.

    Args:
        kind: what the medium is meant as.
        source: a path or the encoded bytes.
        name: what errors and the report call it; default the file's name.
        limits: default ``MediaLimits()``, from the environment.
        depth_scale: metres per unit of an integer depth map (0.001: millimetres).
        brighter_is_nearer: how an 8-bit depth map is meant.

    Raises:
        MediaError: it cannot be decoded, and why. LimitError and MissingFileError are such.
    """
    limits = limits or MediaLimits()
    checked = source_of(source, name, limits)
    started = time.perf_counter()
    medium = _decode(kind, checked, limits, depth_scale, brighter_is_nearer)
    decode_ms = round((time.perf_counter() - started) * 1000, 1)
    report = medium.report.model_copy(update={"decode_ms": decode_ms})
    return dataclasses.replace(medium, report=report)


def _decode(
    kind: Kind, source: Source, limits: MediaLimits, depth_scale: float, brighter_is_nearer: bool
) -> Medium:
    match kind:
        case "image":
            return decode_image(source, limits)
        case "audio":
            return decode_audio(source, limits)
        case "video":
            return decode_video(source, limits)
        case "depth":
            return decode_depth(
                source, limits, depth_scale=depth_scale, brighter_is_nearer=brighter_is_nearer
            )
        case "normal":
            return decode_normal(source, limits)
    raise MediaError(
        source.name, f"unknown kind '{kind}'; the kinds are {', '.join(KINDS)}", "unsupported"
    )
