"""Media to context tokens and words, for many requests at once.

Media are decoded in the decoder's process and preprocessed in threads. The units of all waiting
requests are encoded in one batch; text and speech are recognised beside it. Tenants come in turn
in each of these (:mod:`mico_chat.fair`). A medium of several requests, at once or one after the
other, is encoded and read once: a digest of its bytes identifies it.

Requests may come from several event loops. The first request with a medium decodes and encodes it;
if that request is cancelled, one that waits for the medium takes over. Requests of different
tenants share nothing, so that response times do not reveal another tenant's media.
"""

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mico_chat.adapters.base import ModelAdapter, check_reads, shown_kinds
from mico_chat.ask import LORA, Tally
from mico_chat.engine.cpu import free_cores, usable_cores
from mico_chat.errors import ContextLengthError, LimitError, MediaError, ModelError, RequestError
from mico_chat.fair import FairQueue
from mico_chat.media.decoder import Decoder
from mico_chat.media.file import MediaFile
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.media.medium import (
    Audio,
    ContextBlock,
    Image,
    MeasuredMedium,
    MediaReport,
    Medium,
    Pages,
    Words,
    parts_of,
)
from mico_chat.media.taught import TaughtName, digest_of, names_for
from mico_chat.media.view import LOW_TOKENS, View
from mico_chat.reading import Reader
from mico_chat.reading.depths import DepthEstimator

DEFAULT_CACHE_BYTES = 256 << 20
WORDS_CACHE_BYTES = 8 << 20
DEPTHS_CACHE_BYTES = 32 << 20  # estimated depth maps, as files
COUNTED_CACHE_BYTES = 64 << 20  # decoded media that were counted and are not encoded yet
MAX_UNITS = 16  # a batch with this many units takes no more media: each takes 5 to 13 MB
MOST_WHOLE = 4096  # media that are known to have been shown whole
CLOSE_S = 5.0  # a batch may still take this long when the encoder is closed


class CacheStats(BaseModel):
    model_config = ConfigDict(frozen=True)

    hits: int
    misses: int
    entries: int
    bytes: int
    max_bytes: int


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


AnyMedium: TypeAlias = MediaFile | Medium
E = TypeVar("E", bound=_Sized)
T = TypeVar("T")


class ContextCache(Generic[E]):
    """Encoded media, or their words, by digest: at most ``max_bytes``. Threads may share it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[bytes, E] = OrderedDict()
        self._bytes = self._hits = self._misses = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> E | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return entry

    def put(self, key: bytes, medium: E) -> None:
        if medium.nbytes > self.max_bytes:
            return
        with self._lock:
            old = self._entries.pop(key, None)
            self._bytes += medium.nbytes - (0 if old is None else old.nbytes)
            self._entries[key] = medium
            while self._bytes > self.max_bytes:
                _, gone = self._entries.popitem(last=False)
                self._bytes -= gone.nbytes

    def take(self, key: bytes) -> E | None:
        """An entry, which is no longer there then."""
        with self._lock:
            entry = self._entries.pop(key, None)
            self._bytes -= 0 if entry is None else entry.nbytes
            return entry

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def stats(self) -> CacheStats:
        with self._lock:
            n, held, most = len(self._entries), self._bytes, self.max_bytes
            return CacheStats(
                hits=self._hits, misses=self._misses, entries=n, bytes=held, max_bytes=most
            )


class _GivenUpError(Exception):
    """The request that encoded a medium was cancelled: a request that waits for it takes over."""


class _Shared(Generic[E]):
    """Work on media that requests share: it is done once for each key, and its result is cached."""

    def __init__(self, cache_bytes: int) -> None:
        self.cache: ContextCache[E] = ContextCache(cache_bytes)
        self._coming: dict[bytes, Future[E]] = {}
        self._lock = threading.Lock()

    async def get(self, key: bytes, name: str, work: Callable[[], Awaitable[E]]) -> tuple[E, bool]:
        """The result, and whether it was there; ``name`` is this request's for the medium."""
        while True:
            with self._lock:
                found = self.cache.get(key)
                if found is not None:
                    return found, True
                coming = self._coming.get(key)
                if coming is None:
                    mine: Future[E] = Future()
                    mine.set_running_or_notify_cancel()  # a waiting request cannot cancel it
                    self._coming[key] = mine
                    break
            try:
                return await asyncio.wrap_future(coming), True
            except _GivenUpError:
                continue
            except MediaError as error:  # it has the other request's name for the medium
                raise error.named(name) from error
        try:
            result = await work()
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            mine.set_exception(error if isinstance(error, Exception) else _GivenUpError())
            raise
        with self._lock:
            self.cache.put(key, result)
            del self._coming[key]
        mine.set_result(result)
        return result, False


async def no_names(tenant: str) -> Sequence[TaughtName]:
    """The names of a tenant where nobody teaches."""
    return ()


@dataclass(frozen=True, eq=False)
class _Counted:
    """A medium of which the tokens are counted, and what it was decoded to."""

    measured: MeasuredMedium
    decoded: Medium

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.decoded.all_arrays)


@dataclass(eq=False)
class _Job:
    medium: MeasuredMedium
    tenant: str
    alone: bool
    done: Future[ContextBlock]


@dataclass(frozen=True)
class _How:
    shown: Sequence[Kind]
    tenant: str
    alone: bool
    tally: Tally


class MediaEncoder:
    """A model's adapter behind a cache of context tokens.

    ``reader`` recognises text and speech; without one, media have no words. ``depths`` estimates
    the depth of pictures, where that is asked for. The caller closes ``decoder``. If you change the
    model so that it gives other tokens, change ``variant`` too. ``names_of`` gives the names that a
    tenant taught the model: they are asked for at each request, so that they count at once.
    The media of a conversation share ``budget`` tokens, and those of high detail ``context``; None:
    as many as they take.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        decoder: Decoder,
        *,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        reader: Reader | None = None,
        depths: DepthEstimator | None = None,
        context: int | None = None,
        budget: int | None = None,
    ) -> None:
        self._context, self._budget = context, budget
        self._whole: dict[bytes, tuple[int, bytes]] = {}
        self._encodings: _Shared[MeasuredMedium] = _Shared(cache_bytes)
        self._words: _Shared[Words] = _Shared(WORDS_CACHE_BYTES)
        self._counted: _Shared[_Counted] = _Shared(COUNTED_CACHE_BYTES)
        self.cache = self._encodings.cache
        self.reader = reader
        self.depths = depths
        self._depths: _Shared[NDArray[np.uint8]] = _Shared(DEPTHS_CACHE_BYTES)
        self.adapter = adapter
        self.variant = ""
        self.names_of: Callable[[str], Awaitable[Sequence[TaughtName]]] = no_names
        self._decoder = decoder
        cores = max(2, usable_cores())
        # Not asyncio's threads, in which a slow file would delay other requests.
        self._reading = FairQueue(cores, name="mico-read")  # of one thread each
        self._decoding = FairQueue(cores, name="mico-decode")
        self._closed = False
        self._threads = torch.get_num_threads()
        self._jobs: dict[str, deque[_Job]] = {}
        self._wake = threading.Condition()
        self._since: float | None = None  # when the present batch began
        self._batch: Sequence[_Job] = ()
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="mico-encode", daemon=True)
        self._thread.start()

    async def encode(
        self,
        media: Sequence[AnyMedium],
        *,
        tenant: str = "",
        beside: Sequence[AnyMedium] | None = None,
        read: bool = True,
        alone: bool = False,
    ) -> list[MeasuredMedium]:
        """The tokens and report of each medium. Only requests with the same ``tenant`` share work.

        ``beside``: all media of the conversation, if these stand in for some of them. Without
        ``read``, no text or speech is recognised. ``alone``: not in a batch with other media, on
        which the last bits would depend.
        """
        shown = self._shown(media if beside is None else beside)
        tally = Tally("media", len(media))
        how = _How(shown, tenant, alone, tally)
        return await asyncio.gather(*(tally.counted(self._encode, m, how, read) for m in media))

    async def decoded(self, media: Sequence[AnyMedium], *, tenant: str = "") -> list[Medium]:
        shown = tuple(medium.kind for medium in media)
        seen = (self._viewed(medium, shown) for medium in media)
        return await asyncio.gather(*(self._decoded(medium, tenant) for medium in seen))

    async def looked_at(
        self,
        media: Sequence[AnyMedium],
        look: Callable[[Sequence[MeasuredMedium]], T],
        tenant: str = "",
    ) -> T:
        """What ``look`` makes, in a thread, of media that are prepared and not encoded."""
        decoded = await self.decoded(media, tenant=tenant)

        def work() -> T:
            prepared = [self.adapter.prepare(medium, ()) for medium in decoded]
            with free_cores().take() as threads:
                torch.set_num_threads(min(threads, self._threads))
                return look(prepared)

        return await self._in_decoding(tenant, work)

    async def measure(
        self, media: Sequence[AnyMedium], *, tenant: str = "", read: bool = True
    ) -> list[MeasuredMedium]:
        """Like :meth:`encode`, but media that are not cached are only decoded and counted.

        What they are decoded to is kept for a while: counting or reading them later does not decode
        them again, nor does encoding them.
        """
        shown = self._shown(media)
        return await asyncio.gather(*(self._measure(one, shown, tenant, read) for one in media))

    async def estimated(self, picture: AnyMedium, *, tenant: str = "") -> MediaFile:
        """A depth map estimated from a picture: a file that says so; see check_estimates."""
        depths = self.check_estimates()
        key = await self._in_decoding(tenant, self._key, picture, (), tenant)

        async def estimate() -> NDArray[np.uint8]:
            decoded = await self._decoded(picture, tenant)
            assert isinstance(decoded, Image)

            def work(_: threading.Event) -> bytes:
                with free_cores().take() as threads:
                    torch.set_num_threads(min(threads, self._threads))
                    return depths.estimate(decoded)

            return np.frombuffer(await self._in_reading(tenant, work), np.uint8)

        data, _ = await self._depths.get(key, picture.name, estimate)
        return MediaFile("depth", data.tobytes(), f"depth of {Path(picture.name).name}.png")

    def check_estimates(self) -> DepthEstimator:
        """The estimator of depth; a :class:`RequestError` if there is none."""
        if self.depths is None:
            raise RequestError.at(
                "estimate_depth",
                "nothing estimates depth here: set MICO_DEPTH_MODEL to mini or to the name of a "
                "depth estimator of transformers, and start again",
            )
        return self.depths

    def _shown(self, media: Sequence[AnyMedium]) -> tuple[Kind, ...]:
        for medium in media:
            check_reads(self.adapter, medium.name, medium.kind)
        return tuple(medium.kind for medium in media)

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(CLOSE_S)
        self._decoding.close()
        self._reading.close()
        if self.reader is not None:
            self.reader.close()

    async def _encode(self, medium: AnyMedium, how: _How, read: bool) -> MeasuredMedium:
        tenant, alone = how.tenant, how.alone
        key = await self._in_decoding(tenant, self._key, medium, how.shown, tenant) + _variant()
        taught = await self.names_of(tenant)
        # The words in a medium do not depend on taught names, and so are not read again.
        base = key + _most(medium) + digest_of(taught) + b"unread" * (not read) + b"alone" * alone
        seen = self._viewed(medium, how.shown)
        own = self._sized(base, seen)

        async def encode() -> MeasuredMedium:
            counted = self._counted.cache.take(_counted_key(key, taught, seen))
            decoded = counted.decoded if counted else await self._decoded(seen, tenant)
            encoding = self._encoded(own, decoded, how, taught)
            if not read:
                return await encoding
            encoded, words = await asyncio.gather(encoding, self._words_of(key, decoded, tenant))
            return _with_words(encoded, words)

        encoded, cached = await self._encodings.get(own, medium.name, encode)
        if seen.view.tokens is not None and not (encoded.cut or encoded.report.cut):
            if len(self._whole) >= MOST_WHOLE:
                self._whole.clear()
            self._whole[base] = encoded.all_tokens, own
        return replace(encoded, report=_report(medium, encoded, cached=cached))

    async def _measure(
        self, medium: AnyMedium, shown: Sequence[Kind], tenant: str, read: bool
    ) -> MeasuredMedium:
        key = await self._in_decoding(tenant, self._key, medium, shown, tenant) + _variant()
        seen = self._viewed(medium, shown)
        taught = await self.names_of(tenant)
        whole = key + _most(medium) + digest_of(taught)
        found = self.cache.get(self._sized(whole, seen))
        if found is not None:
            return replace(found, report=_report(medium, found, cached=True))

        async def count() -> _Counted:
            decoded = await self._decoded(seen, tenant)
            prepared = await self._in_decoding(tenant, self._prepared, decoded, shown)
            return _Counted(_bare(prepared), decoded)

        at = _counted_key(key, taught, seen)
        counted, _ = await self._counted.get(at, medium.name, count)
        measured = counted.measured
        if read or TABLE[medium.kind].made_of:  # a document without text may be refused
            words = await self._words_of(key, counted.decoded, tenant)
            measured = _with_words(measured, words)
        return replace(measured, report=_report(medium, measured, cached=False))

    def _viewed(self, medium: AnyMedium, shown: Sequence[Kind]) -> AnyMedium:
        """A medium with its part of the tokens that those ``shown`` together may take."""
        view, seen = medium.view, [kind for kind in shown if TABLE[kind].layout != "slices"]
        tokens = self._context if view.detail == "high" else self._budget
        if medium.kind not in seen:
            tokens = None
        if tokens is not None:  # by halves: another medium seldom changes those before it
            tokens >>= (len(seen) - 1).bit_length()
            tokens = min(tokens, LOW_TOKENS) if view.detail == "low" else tokens
        return replace(medium, view=self.adapter.viewed(medium.kind, replace(view, tokens=tokens)))

    def _sized(self, key: bytes, seen: AnyMedium) -> bytes:
        """The key of a medium within its tokens; that of an earlier one of which nothing was cut,
        if it fits."""
        if (most := seen.view.tokens) is None:
            return key
        tokens, whole = self._whole.get(key, (most + 1, b""))
        return whole if tokens <= most else key + b"%d" % most

    def _prepared(self, medium: Medium, shown: Sequence[Kind]) -> MeasuredMedium:
        """A medium with the media in it; a sound track only if the model reads sounds."""
        kinds, view = shown_kinds(self.adapter.input_modalities), medium.view
        if view.tokens is not None and isinstance(medium, Pages):
            view = replace(view, tokens=view.tokens // max(1, len(medium.pages)))
        within = (replace(part, view=view) for part in parts_of(medium) if part.kind in kinds)
        parts = [self.adapter.prepare(part, shown) for part in within]
        if self._context is not None and sum(map(len, parts)) > self._context:
            reason = f"{medium.name} takes {sum(map(len, parts))} tokens"
            raise ContextLengthError(f"{reason}, more than the context of {self._context}")
        if TABLE[medium.kind].made_of:
            cut = tuple(dict.fromkeys(chain.from_iterable(part.cut for part in parts)))
            document = MeasuredMedium(medium.kind, 0, tuple(parts), medium.report, cut=cut)
            return document.within(medium.view)
        whole = replace(parts[0], inner=tuple(parts[1:]))
        if len(parts) > len(medium.inner):
            return whole
        report = whole.report.model_copy(update={"audio_used": False})
        cut = (*whole.cut, "the sound track was left out: this model reads no sounds")
        return replace(whole, report=report, cut=cut)

    async def listened(
        self,
        recording: MediaFile,
        listen: Callable[[Audio, threading.Event], T],
        *,
        tenant: str = "",
    ) -> T:
        """What ``listen`` makes of a recording, in a thread; its event is set if nobody waits."""
        sound = await self._decoded(recording, tenant)
        assert isinstance(sound, Audio)
        return await self._in_reading(tenant, lambda stop: listen(sound, stop))

    async def _words_of(self, key: bytes, medium: Medium, tenant: str) -> Words:
        reader, report = self.reader, medium.report
        unread = medium.unread if isinstance(medium, Pages) else report.written is None
        if reader is None or not unread:  # the file brings its text
            return Words(report.written, report.spoken)

        def read() -> Awaitable[Words]:
            return self._in_reading(tenant, lambda stop: reader.read(medium, stop))

        return (await self._words.get(key, medium.name, read))[0]

    async def _in_reading(self, tenant: str, work: Callable[[threading.Event], T]) -> T:
        self._check_open()
        stop = threading.Event()
        try:
            return await self._reading.run(tenant, work, stop)
        finally:
            stop.set()

    async def _in_decoding(self, tenant: str, work: Callable[..., T], *given: Any) -> T:
        self._check_open()
        return await self._decoding.run(tenant, work, *given)

    async def _decoded(self, medium: AnyMedium, tenant: str) -> Medium:
        if not isinstance(medium, MediaFile):
            return medium
        try:
            found = await self._in_decoding(tenant, self._decoder.decode, medium)
        except LimitError as error:
            if error.fault == "max_frames":  # those that the request asks for
                raise RequestError(str(error), medium.kind) from error
            raise
        return replace(found, view=medium.view)

    async def _encoded(
        self, key: bytes, medium: Medium, how: _How, taught: Sequence[TaughtName]
    ) -> MeasuredMedium:
        prepared = await self._in_decoding(how.tenant, self._prepared, medium, how.shown)
        how.tally.step(0, more=len(prepared.parts))
        started = time.perf_counter()
        parts = enumerate(prepared.parts)
        keyed = [replace(p, key=key + b"%d" % n, lora=_of_media()) for n, p in parts]
        named = (replace(part, taught=names_for(taught, part.kind)) for part in keyed)
        works = (how.tally.counted(self._with_block, p, how.tenant, how.alone) for p in named)
        encoded = await asyncio.gather(*works)
        encode_ms = round((time.perf_counter() - started) * 1000, 1)
        report = prepared.report.model_copy(update={"encode_ms": encode_ms})
        inner = encoded[len(encoded) - len(prepared.inner) :]
        whole = prepared if len(inner) == len(encoded) else encoded[0]
        return replace(whole, inner=tuple(inner), report=report)

    async def _with_block(self, medium: MeasuredMedium, tenant: str, alone: bool) -> MeasuredMedium:
        job = _Job(medium, tenant, alone, Future())
        with self._wake:
            self._check_open()
            self._jobs.setdefault(tenant, deque()).append(job)
            self._wake.notify()
        block = await asyncio.wrap_future(job.done)
        return replace(medium, n_tokens=len(block), inputs=None, block=block, taught=(), lora=None)

    def _check_open(self) -> None:
        if self._closed:
            raise ModelError("the media encoder is closed")

    def _key(self, medium: AnyMedium, shown: Sequence[Kind], tenant: str) -> bytes:
        """Digest of a medium's content and of all that its context tokens depend on."""
        scaled = isinstance(medium, MediaFile) and TABLE[medium.kind].has_scale
        scale = medium.depth_scale if isinstance(medium, MediaFile) and scaled else None
        settings: tuple[Any, ...] = (tenant, medium.kind, scale)
        settings += (self.adapter.setting(shown), self.variant)
        view = replace(medium.view, most_pages=None)  # which the words do not depend on
        settings += () if view == View() else (view,)
        digest = hashlib.sha256(repr(settings).encode())
        if not isinstance(medium, MediaFile):
            _update(digest, medium)
            return digest.digest()
        _ = medium.size  # refuses what is no regular file, and so may have no end
        try:
            with medium.open() as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise medium.unreadable(error) from error
        return digest.digest()

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._next_batch():
            self._since = time.monotonic()
            wanted = [job for job in batch if job.done.set_running_or_notify_cancel()]
            self._batch = wanted
            together: dict[Any, list[_Job]] = {}  # with each adapter
            for job in wanted:
                together.setdefault(job if job.alone else job.medium.lora, []).append(job)
            for jobs in together.values():
                self._run(jobs)
            self._since = None

    def _next_batch(self) -> list[_Job]:
        """Waiting jobs; none once the encoder is closed. Where several tenants wait, each has one
        job in the batch: a small one is soon done.
        """
        with self._wake:
            while not (self._jobs or self._closed):
                self._wake.wait()
            several, batch = len(self._jobs) > 1, list[_Job]()
            for _ in range(len(self._jobs) if several else MAX_UNITS):
                if not self._jobs or sum(job.medium.units for job in batch) >= MAX_UNITS:
                    break
                tenant = next(iter(self._jobs))
                waiting = self._jobs.pop(tenant)
                batch.append(waiting.popleft())
                if waiting:  # behind the other tenants
                    self._jobs[tenant] = waiting
            return batch

    def give_up(self, reason: str) -> None:
        """Answer all requests with an error, because a batch does not end; nothing works then."""
        with self._wake:
            self._closed = self._given_up = True
            waiting = [job for jobs in self._jobs.values() for job in jobs]
            self._jobs.clear()
        for job in (*self._batch, *waiting):
            if not job.done.done():
                job.done.set_exception(ModelError(reason))

    @property
    def n_waiting(self) -> int:
        """Media that wait for a batch."""
        return sum(map(len, self._jobs.values()))

    @property
    def busy_s(self) -> float:
        """Seconds since the present batch began; 0 between batches."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self, batch: list[_Job]) -> None:
        if not batch:
            return
        try:
            with free_cores().take() as threads:
                # Of this Python thread's work alone.
                torch.set_num_threads(min(threads, self._threads))
                blocks = self.adapter.encode([job.medium for job in batch])
        except Exception as error:  # the waiting requests raise it
            if len(batch) == 1 and not self._given_up:
                batch[0].done.set_exception(error)
            elif not self._given_up:
                for job in batch:  # one by one: only the broken medium fails
                    self._run([job])
            return
        if not self._given_up:
            for job, block in zip(batch, blocks, strict=True):
                job.done.set_result(block)


def _counted_key(key: bytes, taught: Sequence[TaughtName], seen: AnyMedium) -> bytes:
    return key + digest_of(taught) + repr(seen.view).encode()


def _bare(medium: MeasuredMedium) -> MeasuredMedium:
    """A medium without what is encoded of it."""
    return replace(medium, inputs=None, inner=tuple(map(_bare, medium.inner)))


def _most(medium: AnyMedium) -> bytes:
    """The part of a document's key that its words do not depend on."""
    most = medium.view.most_pages
    return b"" if most is None else b"first %d" % most


def _with_words(medium: MeasuredMedium, words: Words) -> MeasuredMedium:
    """A medium with its words, of a document with those on its pages."""
    pages = medium.report.pages
    if not TABLE[medium.kind].made_of or pages is None:
        return replace(medium, words=words)
    if not (medium.inner or words.written):
        reason = "this model cannot see its pages, and they have no text of their own"
        raise RequestError(
            f"{medium.report.name}: {reason}; choose a model that reads pictures", medium.kind
        )
    return replace(medium, words=words.on_pages(pages))


def _of_media() -> Any:
    """The request's adapter, if media are encoded in another way with it."""
    lora = LORA.get()
    return lora if lora is not None and lora.in_media else None


def _variant() -> bytes:
    lora = _of_media()
    return b"" if lora is None else b"%d:" % lora.key


def _report(medium: AnyMedium, known: MeasuredMedium, *, cached: bool) -> MediaReport:
    """A medium's report in this request, of which another request may have been the first."""
    # The same arrays may come from different files.
    report = known.report if isinstance(medium, MediaFile | Pages) else medium.report
    words = known.words
    return report.model_copy(
        update={
            "written": words.written,
            "spoken": words.spoken,
            "cut": [*report.cut, *known.cut, *words.cut],
            "shown_as": "picture" if known.as_picture else None,
            "audio_used": known.report.audio_used,
            "name": medium.name,
            "tokens": known.all_tokens,
            "cached": cached,
            "decode_ms": None if cached else report.decode_ms,
            "encode_ms": None if cached else known.report.encode_ms,
        }
    )


def _update(digest: Any, medium: Medium) -> None:
    digest.update(f"{medium.kind}{getattr(medium, 'metric', None)}{medium.report.written}".encode())
    for value in medium.own_arrays:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    for one in medium.inner:
        _update(digest, one)
