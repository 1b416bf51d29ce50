"""One model of a service: how it is loaded, and its answers within the time of a request."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from mico_chat.ask import Ask
from mico_chat.assistant import Assistant, Event
from mico_chat.engine.base import Delta
from mico_chat.errors import MediaError, MicoError, ModelError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.media.medium import MediaReport
from mico_chat.messages import Message
from mico_chat.wire import AnswerDefaults, LoadState, ModelStatus
from mico_server.errors import ModelNotFoundError, NotReadyError, RequestTimeoutError
from mico_server.http.request_log import Metrics

if TYPE_CHECKING:
    from mico_chat.checkpoints.lora import Lora

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _no_lora(name: str, path: str) -> Lora:
    raise ModelError(f"adapter {name} ({path}): the served model takes no adapters")


@dataclass(frozen=True)
class ModelSource:
    """How a model is loaded, the bytes that it will need, and the kinds of media that it reads.

    The functions are called in threads, all but the first before the model is loaded. ``lora``
    reads an adapter of it, by a name and a folder.
    """

    name: str
    load: Callable[[], Assistant]
    needs: Callable[[], int] = lambda: 0
    reads: Callable[[], tuple[Kind, ...]] = lambda: KINDS
    lora: Callable[[str, str], Lora] = _no_lora


@dataclass(eq=False)
class ModelHost:
    """One of the :class:`~mico_server.models.Models`, which load and unload it.

    ``users`` are the requests that use it; no new one may while the model is ``leaving``. A request
    may use it for at most ``timeout_s`` seconds. ``answered`` gets the seconds of each answer.
    ``loras`` are its adapters by name. One with a ``lora`` is a view of the model ``base`` for the
    requests that name this adapter.
    """

    source: ModelSource
    metrics: Metrics
    timeout_s: float
    answered: Callable[[float], None]
    loaded: Assistant | None = None
    loading: bool = False
    leaving: bool = False
    error: Exception | None = None
    """Why the model could not be loaded the last time; None if it could, or nobody tried."""
    needs: int | None = None
    bytes: int = 0
    users: int = 0
    loads: int = 0
    last_used: float = 0.0
    waiting: list[asyncio.Future[MicoError | None]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    reads: tuple[Kind, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """Fields of ModelInfo that are known once the model has been loaded."""
    loras: dict[str, Lora] = field(default_factory=dict)
    lora: Lora | None = None
    base: ModelHost | None = None

    def __post_init__(self) -> None:
        self.name = self.source.name

    def views(self) -> list[ModelHost]:
        """The model and each of its adapters, as they are listed."""
        return [self, *map(self.wearing, self.loras.values())]

    @contextmanager
    def worn(self, lora: Lora | None) -> Iterator[ModelHost]:
        """The model with an adapter, which goes with its last request if it is taken away."""
        if lora is None:
            yield self
            return
        if self.loras.get(lora.name) is not lora:
            raise ModelNotFoundError(f"the adapter {lora.name!r} was unloaded meanwhile")
        lora.users += 1
        try:
            yield self.wearing(lora)
        finally:
            lora.users -= 1
            self.take_off(lora)

    def take_off(self, lora: Lora) -> None:
        if not lora.users and self.loras.get(lora.name) is not lora and self.loaded is not None:
            self.loaded.wardrobe.unload_lora(lora)
            self.bytes -= lora.bytes

    def wearing(self, lora: Lora) -> ModelHost:
        """The model as it is now, for requests of an adapter."""
        view = copy.copy(self)
        view.name, view.lora, view.base = lora.name, lora, self
        if self.loaded is not None:
            view.loaded = self.loaded.wearing(lora)
        return view

    def load(self) -> Assistant:
        """The model with its adapters."""
        assistant = self.source.load()
        try:
            for lora in self.loras.values():
                assistant.wardrobe.load_lora(lora)
        except BaseException:
            assistant.close()
            raise
        return assistant

    def look(self) -> None:
        """Find out what the model reads, without loading it."""
        try:
            self.reads = self.source.reads()
        except MicoError as error:  # loading it will raise it again
            self.error = error

    def see(self) -> None:
        """Take the facts of the loaded model."""
        assert self.loaded is not None
        self.reads = self.loaded.input_modalities
        self.facts = {
            "context_length": self.loaded.engine.max_position,
            "embeddings": self.loaded.similarity is not None,
            "system_prompt": self.loaded.system_prompt,
            "defaults": AnswerDefaults.model_validate(self.loaded.defaults),
            "depth_model": self.loaded.depth_model,
            "notes": self.loaded.notes,
        }

    def status(self) -> ModelStatus:
        value: LoadState = "unloaded"
        if self.loaded is not None:
            value = "loaded"
        elif self.loading:
            value = "loading"
        elif self.error is not None:
            value = "failed"
        return ModelStatus(
            value=value,
            reason=self.reason if value == "failed" else None,
            bytes=self.bytes,
            requests=self.users + len(self.waiting),
            last_used=int(self.last_used) or None,
        )

    @property
    def reason(self) -> str:
        """Why the model could not be loaded, in words for clients."""
        if isinstance(self.error, MicoError):
            return str(self.error)
        return "a defect; the server's log has the details"

    @property
    def assistant(self) -> Assistant:
        if self.loaded is None:
            raise NotReadyError(f"{self.name}: the model is not loaded")
        self.check_alive()
        return self.loaded

    def check_alive(self) -> None:
        failure = None if self.loaded is None else self.loaded.engine.failure
        if failure is not None:
            raise NotReadyError(
                f"the model cannot answer any more: {failure}; start the service again"
            )

    @property
    def step_s(self) -> float:
        """Seconds since the present step of the loaded model began."""
        loaded = self.loaded
        return 0.0 if loaded is None else max(loaded.engine.busy_s, loaded.encoder.busy_s)

    def give_up(self, reason: str) -> None:
        """Answer all requests of the model with an error: its step does not end."""
        if self.loaded is not None:
            self.loaded.engine.give_up(reason)
            self.loaded.encoder.give_up(reason)

    def check_moving(self, max_step_s: float) -> None:
        """Refuse requests while a step lasts far too long."""
        seconds = self.step_s
        if seconds > max_step_s:
            raise NotReadyError(
                f"{self.name}: a step of the model has lasted {seconds:.0f} s, more than "
                f"{max_step_s:g} (MICO_SERVER_MAX_STEP_S); try again later"
            )

    async def stream(
        self, ask: Ask, wanted: asyncio.Event | None = None
    ) -> AsyncGenerator[Event, None]:
        """The events of the answer. Closing the stream stops the model.

        An answer that is begun early ends, and is counted, once it is ``wanted``.
        """
        now = asyncio.get_running_loop().time
        start, first_token = now(), False
        reports: tuple[MediaReport, ...] = ()
        events = self.assistant.stream(ask)
        async with aclosing(events):
            while True:
                # Around each event, because another task may ask for the next one.
                async with self._guarded(start + self.timeout_s):
                    event = await anext(events, None)
                if event is None:
                    return
                if not isinstance(event, Delta):
                    reports = event
                elif not first_token:
                    first_token = True
                    self.metrics.first_token(now() - start)
                if isinstance(event, Delta) and event.usage is not None:
                    seconds = now() - start
                    if wanted is not None:
                        await wanted.wait()
                    self.metrics.answered(event.usage, reports)
                    self.answered(seconds)
                yield event

    async def inspect(self, medium: MediaFile, tenant: str, *, read: bool = True) -> MediaReport:
        ask = Ask([Message.user(medium)], tenant=tenant)
        (report,) = (await self.guarded(self.assistant.estimate(ask, read=read))).media
        return report

    async def guarded(self, work: Awaitable[T]) -> T:
        async with self._guarded(asyncio.get_running_loop().time() + self.timeout_s):
            return await work

    @asynccontextmanager
    async def _guarded(self, deadline: float) -> AsyncIterator[None]:
        """End the work for a request in time, count refused media and hide defects."""
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"the request took longer than {self.timeout_s:g} s "
                "(MICO_SERVER_REQUEST_TIMEOUT_S): ask for less, or try again later"
            ) from error
        except MediaError as error:
            self.metrics.failed(error)
            raise
        except MicoError:
            raise
        except Exception as error:  # a defect: the log has the details, the client gets one line
            logger.exception("the model failed")
            raise ModelError("the model failed; the server's log has the details") from error
