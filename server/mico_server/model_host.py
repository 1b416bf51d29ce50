"""The one loaded model: loading it beside the event loop, and how many may ask at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mico_chat.assistant import Answer, Assistant
from mico_chat.engine import GenerationOptions
from mico_chat.errors import MicoError, ModelError
from mico_chat.messages import Message
from mico_server.errors import BusyError, NotReadyError

logger = logging.getLogger(__name__)


class ModelHost:
    """Loads an assistant in a thread, and lets at most ``max_requests`` ask it at once.

    ``run`` is the whole life: it loads, calls ``on_ready`` or ``on_failed``, and serves until it
    is cancelled.
    """

    def __init__(
        self,
        load: Callable[[], Assistant],
        *,
        max_requests: int,
        on_ready: Callable[[], None] | None = None,
        on_failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self._load = load
        self._max_requests = max_requests
        self._on_ready = on_ready
        self._on_failed = on_failed
        self._assistant: Assistant | None = None
        self._failed = False
        self._requests = 0

    @property
    def assistant(self) -> Assistant:
        """The loaded model.

        Raises:
            NotReadyError: while it is loading, or when it could not be loaded.
        """
        if self._assistant is None:
            why = "could not be loaded" if self._failed else "is still loading; try again soon"
            raise NotReadyError(f"the model {why}")
        return self._assistant

    def check(self) -> None:
        """Whether a request would be taken now.

        Raises:
            NotReadyError: as :attr:`assistant`.
            BusyError: when ``max_requests`` are being answered or wait already.
        """
        _ = self.assistant
        if self._requests >= self._max_requests:
            raise BusyError(f"{self._requests} requests are being answered; try again soon")

    async def answer(self, messages: list[Message], options: GenerationOptions) -> Answer:
        """Answer a conversation.

        Raises:
            NotReadyError, BusyError: as :meth:`check`.
            MicoError: whatever the assistant says about the request.
        """
        self.check()
        self._requests += 1
        try:
            return await self.assistant.answer(messages, options)
        except MicoError:
            raise
        except Exception as error:  # a defect: the log gets it, the request hears of it
            logger.exception("the model failed")
            raise ModelError("the model failed; the server's log has the details") from error
        finally:
            self._requests -= 1

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
