"""Media to context tokens, for many requests at once.

Decoding happens in the decoder's process and preprocessing in threads, beside whatever else is
computed; the units of all requests that wait are encoded in one batch. A medium that was shown
before, or that another request is showing, is encoded once: it is known by the digest of its bytes.

Requests may come from several event loops; each medium is decoded and encoded by the request that
showed it first, and when that one is given up, by one of those that wait for it. Requests of
different salts share nothing, so that nobody learns from the clock what another has shown.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mico_chat.context_cache import ContextCache
from mico_chat.engine.cpu import free_cores
from mico_chat.errors import MediaError, ModelError
from mico_chat.media import Medium, Video
from mico_chat.media.decoder import Decoder
from mico_chat.media.encoded import ContextBlock, EncodedMedium
from mico_chat.media.kinds import KINDS
from mico_chat.media.medium import MediaReport
from mico_chat.media.source import file_size, unreadable
from mico_chat.messages import MediaPart, Message
from mico_chat.model.processing import MicoChatProcessor

DEFAULT_CACHE_BYTES = 256 << 20
MAX_UNITS = 64
"""A batch that has so many units (stills, frames, slices) takes no more media in."""

DECODING_THREADS = 8
"""Media that wait for the decoder at once, which has few processes of its own."""


class _GivenUpError(Exception):
    """The request that encoded a medium was cancelled; whoever waits for the medium takes over."""


@dataclass(eq=False)
class _Job:
    """Units (n, 3, H, W) of a medium, and where its context tokens (m, L) are awaited."""

    kind: int
    units: Tensor
    done: Future[Tensor]


class MediaEncoder:
    """A chat model's encoder, context and bridge behind a cache.

    Args:
        model: a :class:`~mico_chat.model.chat.MicoChatForConditionalGeneration`, for its
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
        # Not asyncio's: a slow file must not hold up what other requests do in threads.
        self._decoding = ThreadPoolExecutor(DECODING_THREADS, "mico-decode")
        self._closed = False
        self._threads = torch.get_num_threads()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mico-encode", daemon=True)
        self._thread.start()

    async def encode(
        self, messages: Sequence[Message], *, salt: str = "", depth_scale: float = 0.001
    ) -> list[Message]:
        """The messages with an :class:`EncodedMedium` in place of every medium.

        Args:
            messages: their media are paths, bytes, decoded or encoded.
            salt: only requests of the same one share what was encoded.
            depth_scale: metres for one unit of a 16-bit depth map.

        Raises:
            MediaError: naming a medium that cannot be decoded, and why.
            ModelError: after :meth:`close`.
        """
        parts = [part for message in messages for part in message.media]
        encoded = await asyncio.gather(*(self._encode(part, salt, depth_scale) for part in parts))
        return _with_media(messages, encoded)

    async def measure(
        self, messages: Sequence[Message], *, salt: str = "", depth_scale: float = 0.001
    ) -> list[Message]:
        """As :meth:`encode`, but media that are not in the cache are decoded and no more.

        Their :class:`EncodedMedium` has no block; its report tells the tokens it would have.
        """
        parts = [part for message in messages for part in message.media]
        measured = await asyncio.gather(*(self._measure(part, salt, depth_scale) for part in parts))
        return _with_media(messages, measured)

    def close(self) -> None:
        """End the threads; what is shown later is refused. The decoder stays the caller's."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()
        self._decoding.shutdown(wait=False, cancel_futures=True)

    async def _encode(self, part: MediaPart, salt: str, depth_scale: float) -> EncodedMedium:
        if isinstance(part.source, EncodedMedium):
            return part.source
        key = await asyncio.to_thread(self._key, part, salt, depth_scale)
        encoded, cached = await self._shared(key, part, depth_scale)
        return replace(encoded, report=_report(part, encoded, encoded.n_tokens, cached=cached))

    async def _measure(self, part: MediaPart, salt: str, depth_scale: float) -> EncodedMedium:
        if isinstance(part.source, EncodedMedium):
            return part.source
        key = await asyncio.to_thread(self._key, part, salt, depth_scale)
        found = self.cache.get(key)
        if found is not None:
            return replace(found, report=_report(part, found, found.n_tokens, cached=True))
        medium = await self._decoded(part, depth_scale)
        measured = await asyncio.to_thread(self._measured, medium)
        tokens = self._processor.context_length(measured)
        return replace(measured, report=_report(part, measured, tokens, cached=False))

    def _measured(self, medium: Medium) -> EncodedMedium:
        """What is known of a decoded medium; its units are made, as not every medium has some."""
        track = medium.audio if isinstance(medium, Video) else None
        audio = None if track is None else self._measured(track)
        units = len(self._processor.units(medium))
        return EncodedMedium(medium.kind, units, audio, None, medium.report)

    async def _shared(
        self, key: bytes, part: MediaPart, depth_scale: float
    ) -> tuple[EncodedMedium, bool]:
        """A medium from the cache, from a request that is encoding it already, or encoded here.

        Also says whether it was one of the first two.
        """
        while True:
            with self._lock:
                found = self.cache.get(key)
                if found is not None:
                    return found, True
                coming = self._coming.get(key)
                if coming is None:
                    mine: Future[EncodedMedium] = Future()
                    mine.set_running_or_notify_cancel()  # who only waits cannot cancel it
                    self._coming[key] = mine
                    break
            try:
                return await asyncio.wrap_future(coming), True
            except _GivenUpError:
                continue
            except MediaError as error:  # another user's name for it is none of this one's business
                raise error.named(part.name) from error
        try:
            encoded = await self._encoded(key, await self._decoded(part, depth_scale))
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            mine.set_exception(error if isinstance(error, Exception) else _GivenUpError())
            raise
        with self._lock:
            self.cache.put(key, encoded)
            del self._coming[key]
        mine.set_result(encoded)
        return encoded, False

    async def _decoded(self, part: MediaPart, depth_scale: float) -> Medium:
        medium = part.source
        if isinstance(medium, str | Path | bytes):
            decode = functools.partial(
                self._decoder.decode, part.kind, medium, name=part.name, depth_scale=depth_scale
            )
            self._check_open()
            medium = await asyncio.get_running_loop().run_in_executor(self._decoding, decode)
        assert isinstance(medium, Medium)
        return medium

    async def _encoded(self, key: bytes, medium: Medium) -> EncodedMedium:
        track = medium.audio if isinstance(medium, Video) else None
        if track is None:
            return await self._without_track(key, medium)
        encoded, audio = await asyncio.gather(
            self._without_track(key, medium), self._encoded(key + b"audio", track)
        )
        both = max(encoded.report.encode_ms or 0.0, audio.report.encode_ms or 0.0)
        report = encoded.report.model_copy(update={"encode_ms": both})
        return replace(encoded, audio=audio, report=report)

    async def _without_track(self, key: bytes, medium: Medium) -> EncodedMedium:
        """A medium with its own context tokens, and in its report how long they took."""
        units = await asyncio.to_thread(self._processor.units, medium)
        job = _Job(KINDS.index(medium.kind), units, Future())
        started = time.perf_counter()
        with self._lock:
            self._check_open()
            self._jobs.put(job)
        block = ContextBlock(await asyncio.wrap_future(job.done), key)
        encode_ms = round((time.perf_counter() - started) * 1000, 1)
        report = medium.report.model_copy(update={"encode_ms": encode_ms})
        return EncodedMedium(medium.kind, len(units), None, block, report)

    def _check_open(self) -> None:
        if self._closed:
            raise ModelError("the media encoder is closed")

    def _key(self, part: MediaPart, salt: str, depth_scale: float) -> bytes:
        """Digest of a medium's content and of all that its context tokens depend on.

        Raises:
            MediaError: for a file that is missing or cannot be read.
        """
        digest = hashlib.sha256(
            repr(
                (
                    salt,
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
            file_size(Path(source), part.name)  # a regular file, which has an end
            try:
                with Path(source).open("rb") as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
            except OSError as error:
                raise unreadable(part.name, error) from error
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
            self._run([job for job in batch if job.done.set_running_or_notify_cancel()])
        # Nothing comes after the None: `close` and `_block` put theirs under the lock.

    def _run(self, batch: list[_Job]) -> None:
        if not batch:
            return
        try:
            tokens = self._forward(batch)
        except Exception as error:  # whoever waits raises it
            if len(batch) == 1:
                batch[0].done.set_exception(error)
                return
            for job in batch:  # one that cannot be encoded must cost no other
                self._run([job])
            return
        for job, rows in zip(batch, tokens, strict=True):
            job.done.set_result(rows)

    def _forward(self, batch: list[_Job]) -> list[Tensor]:
        device, dtype = self.model.device, self.model.dtype
        with torch.inference_mode(), free_cores().take() as threads:
            torch.set_num_threads(min(threads, self._threads))  # of this Python thread's work alone
            tokens = self.model.context_tokens(
                torch.tensor([job.kind for job in batch], device=device),
                torch.tensor([len(job.units) for job in batch], device=device),
                torch.cat([job.units for job in batch]).to(device, dtype),
            )
            # Copies: the rows are views of the batch, which the cache would keep alive. On the CPU,
            # where the cache's bytes are cheap.
            return [rows.to("cpu", torch.float32, copy=True) for rows in tokens]


def _with_media(messages: Sequence[Message], media: Sequence[EncodedMedium]) -> list[Message]:
    """The messages with these in place of their media, in order."""
    fresh = iter(media)
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


def _report(part: MediaPart, known: EncodedMedium, tokens: int, *, cached: bool) -> MediaReport:
    """What is told of a medium in this request, whoever showed it first."""
    # The same arrays may come from different files.
    source = part.source.report if isinstance(part.source, Medium) else known.report
    return source.model_copy(
        update={
            "name": part.name,
            "tokens": tokens,
            "cached": cached,
            "decode_ms": None if cached else source.decode_ms,
            "encode_ms": None if cached else known.report.encode_ms,
        }
    )


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
