"""The one loaded model: loading it beside the event loop, and answering requests in batches."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mico_chat.engine import Answer, Engine, GenerationOptions
from mico_chat.errors import MicoError, ModelError
from mico_chat.messages import Message
from mico_server.errors import BusyError, NotReadyError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Waiting:
    """A request in the queue; media are decoded, so that only the model's work is left."""

    messages: list[Message]
    options: GenerationOptions
    answer: asyncio.Future[Answer]


class ModelHost:
    """Loads an engine in a thread, then lets it work in another, one batch at a time.

    Requests that wait are answered together when they have the same options. ``run`` is the
    whole life: it loads, calls ``on_ready`` or ``on_failed``, and serves until it is cancelled.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        *,
        max_batch: int,
        max_waiting: int,
        on_ready: Callable[[], None] | None = None,
        on_failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self._load = load
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._engine: Engine | None = None
        self._failed = False
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()

    @property
    def engine(self) -> Engine:
        """The loaded engine.

        Raises:
            NotReadyError: while it is loading, or when it could not be loaded.
        """
        if self._engine is None:
            why = "could not be loaded" if self._failed else "is still loading; try again soon"
            raise NotReadyError(f"the model {why}")
        return self._engine

    async def answer(self, messages: list[Message], options: GenerationOptions) -> Answer:
        """Decode the media, wait for a turn, and answer.

        Raises:
            BusyError: when ``max_waiting`` requests wait already.
            MicoError: whatever the engine says about the request.
        """
        engine = self.engine
        self._check_room()
        decoded = await asyncio.to_thread(engine.decode, messages)
        self._check_room()
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(decoded, options, future))
        self._arrived.set()
        return await future

    def _check_room(self) -> None:
        if len(self._queue) >= self._max_waiting:
            raise BusyError(f"{len(self._queue)} requests are waiting already; try again soon")

    async def run(self) -> None:
        """Load, then serve until cancelled."""
        try:
            engine = await asyncio.to_thread(self._load)
        except Exception as error:
            # Whatever went wrong, the service must stop saying "loading" and the caller be told.
            self._failed = True
            logger.error("the model could not be loaded: %s", error)
            if self._on_failed is not None:
                self._on_failed(error)
            return
        self._engine = engine
        if self._on_ready is not None:
            self._on_ready()
        try:
            while True:
                batch = await self._next_batch()
                await self._answer_batch(engine, batch)
        finally:
            self._engine = None
            for waiting in self._queue:
                waiting.answer.cancel()
            engine.close()

    async def _next_batch(self) -> list[_Waiting]:
        """The longest waiting request, and later ones with the same options."""
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        options = self._queue[0].options
        batch = [item for item in self._queue if item.options == options][: self._max_batch]
        for item in batch:
            self._queue.remove(item)
        return [item for item in batch if not item.answer.done()]

    async def _answer_batch(self, engine: Engine, batch: list[_Waiting]) -> None:
        if not batch:
            return
        conversations = [item.messages for item in batch]
        try:
            answers = await asyncio.to_thread(engine.answer, conversations, batch[0].options)
        except Exception as error:
            if len(batch) > 1 and isinstance(error, MicoError):
                for item in batch:  # one bad request must cost no other
                    await self._answer_batch(engine, [item])
                return
            if not isinstance(error, MicoError):
                # A defect: the log gets it, the requests hear of it, the service lives on.
                logger.exception("the engine failed")
                error = ModelError("the model failed; the server's log has the details")
            for item in batch:
                if not item.answer.done():  # otherwise its client has gone
                    item.answer.set_exception(error)
            return
        for item, answer in zip(batch, answers, strict=True):
            if not item.answer.done():
                item.answer.set_result(answer)
