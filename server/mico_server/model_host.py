"""The one loaded model: loading it beside the event loop, and how many may ask at once."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mico_chat.assistant import Answer, Assistant, GatheredAnswer
from mico_chat.engine import Delta, EngineStats, GenerationOptions
from mico_chat.errors import MediaError, MicoError, ModelError
from mico_chat.media import MediaFile
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message
from mico_chat.wire import Estimate
from mico_server.errors import BusyError, NotReadyError, RequestTimeoutError
from mico_server.metrics import Metrics

if TYPE_CHECKING:
    from mico_chat.encode import CacheStats

logger = logging.getLogger(__name__)

LONGEST_RETRY_S = 60

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A conversation to answer, whose media are files or bytes, and for which tenant."""

    messages: Sequence[Message]
    options: GenerationOptions
    tenant: str


class ModelHost:
    """Loads an assistant in a thread, and lets at most ``max_requests`` ask it at once.

    ``run`` is the whole life: it loads, calls ``on_ready`` or ``on_failed``, and serves until it
    is cancelled. A request may take ``timeout_s`` seconds.
    """

    def __init__(
        self,
        load: Callable[[], Assistant],
        metrics: Metrics,
        *,
        max_requests: int,
        timeout_s: float,
        on_ready: Callable[[], None] | None = None,
        on_failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self._load = load
        self._metrics = metrics
        self._max_requests = max_requests
        self._timeout_s = timeout_s
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._assistant: Assistant | None = None
        self._failed = False
        self._requests = 0
        self._mean_s = 1.0

    @property
    def assistant(self) -> Assistant:
        """The loaded model.

        Raises:
            NotReadyError: while it is loading, when it could not be loaded, or has ended.
        """
        if self._assistant is None:
            why = "could not be loaded" if self._failed else "is still loading; try again soon"
            raise NotReadyError(f"the model {why}")
        self.check_alive()
        return self._assistant

    def check_alive(self) -> None:
        """Whether the service can get, or get back, to answering by itself.

        Raises:
            NotReadyError: when the model's engine has ended: only a new start helps.
        """
        failure = None if self._assistant is None else self._assistant.engine.failure
        if failure is not None:
            raise NotReadyError(
                f"the model cannot answer any more: {failure}; start the service again"
            )

    def engine_stats(self) -> EngineStats | None:
        """The engine's counts, None while no model is loaded."""
        return None if self._assistant is None else self._assistant.engine.stats()

    def cache_stats(self) -> CacheStats | None:
        """Those of the cache of encoded media, likewise."""
        return None if self._assistant is None else self._assistant.context_cache

    def check(self) -> None:
        """Whether a request would be taken now.

        Raises:
            NotReadyError: as :attr:`assistant`.
            BusyError: when ``max_requests`` are being answered or wait already.
        """
        _ = self.assistant
        if self._requests >= self._max_requests:
            raise BusyError(
                f"the service is busy: {self._requests} requests are running or waiting, which "
                "is the limit; try again soon",
                min(math.ceil(self._mean_s), LONGEST_RETRY_S),
            )

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A request's place among those that are answered or wait, while the block runs.

        Raises:
            NotReadyError, BusyError: as :meth:`check`.
        """
        self.check()
        self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1

    async def stream(
        self, question: Question
    ) -> AsyncGenerator[Delta | tuple[MediaReport, ...], None]:
        """The reports of the media, then the deltas of the answer. Closing it stops the model.

        The request has been :meth:`admitted`.

        Raises:
            NotReadyError: as :attr:`assistant`.
            RequestTimeoutError: when it takes too long.
            MicoError: whatever the assistant says about the request.
        """
        now = asyncio.get_running_loop().time
        start, first_token = now(), False
        reports: tuple[MediaReport, ...] = ()
        items = self.assistant.stream(question.messages, question.options, salt=question.tenant)
        async with aclosing(items):
            while True:
                # Around each item: the next one may be asked for by another task.
                async with self._guarded(start + self._timeout_s):
                    item = await anext(items, None)
                if item is None:
                    return
                if not isinstance(item, Delta):
                    reports = item
                elif not first_token:
                    first_token = True
                    self._metrics.first_token(now() - start)
                if isinstance(item, Delta) and item.usage is not None:
                    self._metrics.answered(item.usage, reports)
                    self._mean_s += 0.1 * (now() - start - self._mean_s)
                yield item

    async def answer(self, question: Question) -> Answer:
        """The whole answer; see :meth:`stream`."""
        gathered = GatheredAnswer(question.options.n)
        async with aclosing(self.stream(question)) as items:
            async for item in items:
                gathered.add(item)
        return gathered.answer()

    async def estimate(self, question: Question) -> Estimate:
        """What a question would cost; its media are decoded for it.

        Raises:
            NotReadyError: as :attr:`assistant`.
            MicoError: as :meth:`guarded`.
        """
        return await self.guarded(
            self.assistant.estimate(question.messages, question.options, salt=question.tenant)
        )

    async def inspect(self, medium: MediaFile, tenant: str) -> MediaReport:
        """The report of a medium, decoded to see whether it can be.

        Raises:
            MicoError: as :meth:`estimate`.
        """
        asked = [Message.user(medium)]
        (report,) = (await self.estimate(Question(asked, GenerationOptions(), tenant))).media
        return report

    async def guarded(self, work: Awaitable[T]) -> T:
        """What ``work`` gives, as one request, counted with those that are answered.

        Raises:
            RequestTimeoutError: when it takes too long.
            MicoError: whatever ``work`` says about the request.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        self._requests += 1
        try:
            async with self._guarded(deadline):
                return await work
        finally:
            self._requests -= 1

    @asynccontextmanager
    async def _guarded(self, deadline: float) -> AsyncIterator[None]:
        """Ends what is done for a request in time, counts its errors and hides defects."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"the request took longer than {self._timeout_s:g} s "
                "(MICO_SERVER_REQUEST_TIMEOUT_S): ask for less, or try again later"
            ) from error
        except MediaError as error:
            self._metrics.failed(error)
            raise
        except MicoError:
            raise
        except Exception as error:  # a defect: the log gets it, the request hears of it
            logger.exception("the model failed")
            raise ModelError("the model failed; the server's log has the details") from error

    async def run(self) -> None:
        """Load, then serve until cancelled."""
        try:
            assistant = await asyncio.to_thread(self._load)
        except Exception as error:
            # Whatever went wrong, the service must stop saying "loading" and the caller be told.
            self._failed = True
            logger.error("the model could not be loaded: %s", error)
            if self._on_failed is not None:
                self._on_failed(error)
            return
        self._assistant = assistant
        if self._on_ready is not None:
            self._on_ready()
        try:
            await asyncio.Event().wait()
        finally:
            self._assistant = None
            assistant.close()
