"""Media to context tokens, for many requests at once.

Decoding happens in the decoder's process and preprocessing in threads, beside whatever else is
computed; the units of all requests that wait are encoded in one batch. A medium that was shown
before, or that another request is showing, is encoded once: it is known by the digest of its bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mico_chat.context_cache import ContextCache
from mico_chat.encoded import ContextBlock, EncodedMedium
from mico_chat.errors import MediaError, MissingFileError
from mico_chat.media import Medium, Video
from mico_chat.media.decoder import Decoder
from mico_chat.media.kinds import KINDS
from mico_chat.messages import MediaPart, Message
from mico_chat.processing import MicoChatProcessor

DEFAULT_CACHE_BYTES = 256 << 20
MAX_UNITS = 64
"""Units (stills, frames, slices) that are encoded in one batch, where several media wait."""


@dataclass(eq=False)
class _Job:
    """Units (n, 3, H, W) of a medium, and where its context tokens (m, L) are awaited."""

    kind: int
    units: Tensor
    done: Future[Tensor]


class MediaEncoder:
    """A chat model's encoder, context and bridge behind a cache.

    Args:
        model: a :class:`~mico_chat.modeling.MicoChatForConditionalGeneration`, for its
            ``context_tokens``; its language model may be no more than a token table.
        processor: its processor.
        decoder: for media that are not decoded yet; it stays the caller's.
        cache_bytes: of context tokens that are kept; 0 keeps none.
    """

    def __init__(
        self,
        model: Any,
        processor: MicoChatProcessor,
        decoder: Decoder,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.cache = ContextCache(cache_bytes)
        self.model = model
        self._processor = processor
        self._decoder = decoder
        self._coming: dict[bytes, Future[EncodedMedium]] = {}
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mico-encode", daemon=True)
        self._thread.start()

    async def encode(
        self, messages: Sequence[Message], *, depth_scale: float = 0.001
    ) -> list[Message]:
        """The messages with an :class:`EncodedMedium` in place of every medium.

        Args:
            messages: their media are paths, bytes, decoded or encoded.
            depth_scale: metres for one unit of a 16-bit depth map.

        Raises:
            MediaError: naming the first medium that cannot be decoded, and why.
        """
        parts = [part for message in messages for part in message.media]
        encoded = await asyncio.gather(*(self._encode(part, depth_scale) for part in parts))
        fresh = iter(encoded)
        return [
            replace(
                message,
                content=tuple(
                    replace(part, source=next(fresh)) if isinstance(part, MediaPart) else part
                    for part in message.content
                ),
            )
            for message in messages
        ]

    def close(self) -> None:
        """End the thread; the decoder stays the caller's."""
        self._jobs.put(None)
        self._thread.join()

    async def _encode(self, part: MediaPart, depth_scale: float) -> EncodedMedium:
        if isinstance(part.source, EncodedMedium):
            return part.source
        key = await asyncio.to_thread(self._key, part, depth_scale)
        found = self.cache.get(key)
        if found is None:
            found = await self._shared(key, part, depth_scale)
        return found.named(part.name)

    async def _shared(self, key: bytes, part: MediaPart, depth_scale: float) -> EncodedMedium:
        """Encode a medium, or wait for a request that does so already."""
        with self._lock:
            future = self._coming.get(key)
            mine = future is None
            if future is None:
                future = self._coming[key] = Future()
        if not mine:
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                if not future.cancelled():  # this request was given up, not the other
                    raise
                return await self._shared(key, part, depth_scale)
        try:
            encoded = await self._decode_and_encode(key, part, depth_scale)
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            if isinstance(error, Exception):
                future.set_exception(error)
            else:
                future.cancel()
            raise
        self.cache.put(key, encoded)
        with self._lock:
            del self._coming[key]
        future.set_result(encoded)
        return encoded

    async def _decode_and_encode(
        self, key: bytes, part: MediaPart, depth_scale: float
    ) -> EncodedMedium:
        medium = part.source
        if isinstance(medium, str | Path | bytes):
            medium = await asyncio.to_thread(
                self._decoder.decode, part.kind, medium, name=part.name, depth_scale=depth_scale
            )
        assert isinstance(medium, Medium)
        return await self._tokens(key, medium)

    async def _tokens(self, key: bytes, medium: Medium) -> EncodedMedium:
        track = medium.audio if isinstance(medium, Video) else None
        audio = None if track is None else await self._tokens(key + b"audio", track)
        units = await asyncio.to_thread(self._processor.units, medium)
        job = _Job(KINDS.index(medium.kind), units, Future())
        self._jobs.put(job)
        tokens = await asyncio.wrap_future(job.done)
        block = ContextBlock(tokens, key)
        return EncodedMedium(medium.kind, len(units), audio, block, medium.report)

    def _key(self, part: MediaPart, depth_scale: float) -> bytes:
        """Digest of a medium's content and of all that its context tokens depend on.

        Raises:
            MissingFileError, MediaError: for a file that cannot be read.
        """
        digest = hashlib.sha256(
            repr(
                (
                    part.kind,
                    depth_scale if part.kind == "depth" else None,
                    self._processor.preprocessing,
                    self.model.use_concepts,
                    self.model.use_grid,
                )
            ).encode()
        )
        source = part.source
        if isinstance(source, bytes):
            digest.update(source)
        elif isinstance(source, str | Path):
            try:
                with Path(source).open("rb") as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
            except FileNotFoundError as error:
                raise MissingFileError(part.name) from error
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or "not a path"
                raise MediaError(part.name, f"cannot be read ({reason})") from error
        else:
            _update(digest, source)
        return digest.digest()

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch = [job]
            while sum(len(j.units) for j in batch) < MAX_UNITS:
                try:
                    more = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    self._jobs.put(None)
                    break
                batch.append(more)
            self._run(batch)

    def _run(self, batch: list[_Job]) -> None:
        waiting = [job for job in batch if job.done.set_running_or_notify_cancel()]
        if not waiting:
            return
        try:
            tokens = self._forward(waiting)
        except Exception as error:  # whoever waits raises it
            for job in waiting:
                job.done.set_exception(error)
            return
        for job, rows in zip(waiting, tokens, strict=True):
            job.done.set_result(rows)

    def _forward(self, batch: list[_Job]) -> list[Tensor]:
        device, dtype = self.model.device, self.model.dtype
        with torch.inference_mode():
            tokens = self.model.context_tokens(
                torch.tensor([job.kind for job in batch], device=device),
                torch.tensor([len(job.units) for job in batch], device=device),
                torch.cat([job.units for job in batch]).to(device, dtype),
            )
            return [rows.float() for rows in tokens]


def _update(digest: Any, medium: Any) -> None:
    """Feed a decoded medium's arrays, and those of its sound track, to a digest."""
    for name in ("pixels", "samples", "frames", "times", "values", "metric"):
        value = getattr(medium, name, None)
        if isinstance(value, np.ndarray):
            digest.update(f"{name}{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        elif value is not None:
            digest.update(f"{name}{value}".encode())
    if isinstance(medium, Video) and medium.audio is not None:
        _update(digest, medium.audio)
