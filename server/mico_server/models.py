"""The models of a service: each is loaded when a request names it, and let go by least use.

All loaded models together may take ``max_bytes``. A model counts with the bytes that were estimated
before it was loaded, or with those that were measured then, if these are more.

Models are loaded one after the other, in the order in which requests asked for them. To make room,
idle models go, the one that was used longest ago first. If this is not enough, models that are in
use take no new requests, and go when their last request ends. So a model in use is never unloaded,
and no request waits for ever behind requests for other models.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
from pydantic import BaseModel

from mico_chat.ask import NOTE
from mico_chat.assistant import Assistant
from mico_chat.engine.base import EngineStats
from mico_chat.errors import (
    ConfigError,
    MicoError,
    MissingLoraError,
    ModelError,
    RequestError,
)
from mico_chat.fair import Shares
from mico_chat.system import give_back_memory
from mico_chat.wire import Progress
from mico_server.errors import (
    BusyError,
    ModelNotFoundError,
    NoRoomError,
    NotReadyError,
    RequestTimeoutError,
)
from mico_server.host import ModelHost, ModelSource
from mico_server.http.request_log import Metrics, ModelFigures

if TYPE_CHECKING:
    from mico_chat.checkpoints.lora import Lora
    from mico_chat.encode import CacheStats

logger = logging.getLogger(__name__)


M = TypeVar("M", bound=BaseModel)


class Models:
    """The models of a service, the first of which is the default. :meth:`run` is its whole life.

    The first model is loaded at once; then ``on_ready`` or ``on_failed`` is called. At most
    ``max_requests`` of a tenant run or wait at once, and some more of tenants that have few; each
    may wait ``timeout_s`` seconds for its model. While a step of a model lasts longer than
    ``max_step_s``, the service is not ready. A model that no request has used for ``keep_alive_s``
    seconds is unloaded.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        *,
        max_requests: int,
        timeout_s: float,
        max_step_s: float = math.inf,
        max_bytes: int | None = None,
        keep_alive_s: float | None = None,
        on_ready: Callable[[], None] = lambda: None,
        on_failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.metrics = Metrics(self._engines, self._caches, self._figures)
        self.hosts = [
            ModelHost(source, self.metrics, timeout_s, self._answered) for source in sources
        ]
        self._timeout_s, self._keep_alive_s = timeout_s, keep_alive_s
        self.max_bytes, self._max_step_s = max_bytes, max_step_s
        self._on_ready, self._on_failed = on_ready, on_failed
        self._state = "is still loading; try again soon"
        self._requests = Shares(max_requests, max_requests + max(1, max_requests // 4))
        self._mean_s = 1.0
        self._adapting = asyncio.Lock()
        self._turn = asyncio.Lock()  # loads and unloads come one after the other
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        first = self.hosts[0]
        try:
            for host in self.hosts:
                await asyncio.to_thread(host.look)
            try:
                await self._acquire(first, timeout_s=None)
            except MicoError as error:
                # Whatever went wrong, the service must stop saying "loading".
                self._state = "could not be loaded"
                self._on_failed(first.error or error)
                return
            self._release(first)
            self._state = ""
            self._on_ready()
            await asyncio.Event().wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for host in self.hosts:
                assistant, host.loaded = host.loaded, None
                if assistant is not None:
                    assistant.close()

    # --- Requests ---

    def check(self, tenant: str = "") -> None:
        """Check that the service is ready and takes another request of a tenant."""
        self.check_ready()
        if not self._requests.may_enter(tenant):
            raise BusyError(
                f"the service is busy: {self._requests.total} requests are running or waiting, and "
                f"the limit is {self._requests.places} (MICO_SERVER_MAX_REQUESTS); try again soon",
                min(math.ceil(self._mean_s), 60),
            )

    @property
    def has_room(self) -> bool:
        """Whether work that nobody waits for may begin: the models answer, and half is free."""
        try:
            self.check_ready()
        except NotReadyError:
            return False
        return 2 * self._requests.total < self._requests.places

    def check_ready(self) -> None:
        if self._state:
            raise NotReadyError(f"the model {self._state}")
        self.check_alive()
        for host in self.hosts:
            host.check_moving(self._max_step_s)

    def check_alive(self) -> None:
        """Check that the service need not be started again."""
        for host in self.hosts:
            host.check_alive()

    def named(self, name: str | None) -> ModelHost:
        """The model of a name, or the view of an adapter; without a name the first model."""
        for host in self.views:
            if name is None or host.name == name:
                return host
        names = ", ".join(repr(host.name) for host in self.views)
        raise ModelNotFoundError(f"no model {name!r} here; this server has {names}")

    @property
    def views(self) -> list[ModelHost]:
        """The models, the default first, each before its adapters."""
        return [view for host in self.hosts for view in host.views()]

    @asynccontextmanager
    async def use(self, name: str | None = None, tenant: str = "") -> AsyncIterator[ModelHost]:
        """A model, loaded until the end of the block, for a request of a tenant."""
        self.check(tenant)
        named = self.named(name)
        host = named.base or named
        self._requests.take(tenant)
        try:
            await self._acquire(host, timeout_s=self._timeout_s)
            try:
                with host.worn(named.lora) as used:
                    yield used
            finally:
                self._release(host)
        finally:
            self._requests.give_back(tenant)

    # --- Adapters ---

    def declare(self, given: str) -> None:
        """Serve the adapter of a ``NAME=FOLDER``, before its model is loaded."""
        name, _, path = given.partition("=")
        if not (name and path) or any(view.name == name for view in self.views):
            raise ConfigError(f"adapter: expected NAME=FOLDER with a new name, got {given!r}")
        host, lora = self._read(name, path)
        host.loras[name] = lora

    def _read(self, name: str, path: str) -> tuple[ModelHost, Lora]:
        """An adapter, and the first model that it is made for."""
        refused = []
        for host in self.hosts:
            try:
                return host, host.source.lora(name, path)
            except ModelError as error:
                refused.append(error)
        raise refused[0]

    async def load_lora(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Serve an adapter from now on; its model is loaded if it is not.

        Raises:
            MissingLoraError: there is none.
            RequestError: the name is taken, or the adapter fits no model.
            NoRoomError: it would take too much memory.
        """
        async with self._adapting:
            for view in self.views:
                if view.name == name and not (in_place and view.lora):
                    reason = f"The lora adapter '{name}' has already been loaded."
                    how = "If you want to load the adapter in place, set 'load_inplace' to True."
                    raise RequestError(
                        f"{reason} {how if view.lora else 'It is a model.'}", "lora_name"
                    )
            try:
                host, lora = await asyncio.to_thread(self._read, name, path)
                async with self.use(host.name):
                    held = sum(one.bytes for one in self.hosts) + lora.bytes
                    if self.max_bytes is not None and held > self.max_bytes:
                        most = f"{megabytes(self.max_bytes)} (MICO_SERVER_MAX_MODELS_BYTES)"
                        raise NoRoomError(f"all models and {name} need {megabytes(held)} of {most}")
                    await asyncio.to_thread(host.assistant.wardrobe.load_lora, lora)
                    if in_place and name in {one for host in self.hosts for one in host.loras}:
                        self.unload_lora(name)
                    host.loras[name] = lora
                    host.bytes += lora.bytes
            except MissingLoraError:
                raise
            except ModelError as error:
                raise RequestError(str(error), "lora_path") from error

    def unload_lora(self, name: str) -> None:
        """Serve an adapter no more; requests that have begun with it end with it."""
        for host in self.hosts:
            if (lora := host.loras.pop(name, None)) is not None:
                return host.take_off(lora)
        raise ModelNotFoundError(f"The lora adapter '{name}' cannot be found.")

    async def _acquire(self, host: ModelHost, *, timeout_s: float | None) -> None:
        if host.loaded is None or host.leaving:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wait_for(host)
            except TimeoutError as error:
                raise RequestTimeoutError(
                    f"{host.name}: the model was not loaded within {timeout_s:g} s "
                    "(MICO_SERVER_REQUEST_TIMEOUT_S): try again later"
                ) from error
        else:
            host.users += 1
        if host.timer is not None:
            host.timer.cancel()
            host.timer = None

    async def _wait_for(self, host: ModelHost) -> None:
        turn: asyncio.Future[MicoError | None] = asyncio.get_running_loop().create_future()
        host.waiting.append(turn)
        if not host.loading:
            host.loading = True
            self._start(self._load(host))
        note, before = NOTE.get(), _used()
        try:
            while note is not None and not turn.done():
                grown, needs = max(0, _used() - before), host.needs or 0
                note(Progress(what="model", done=min(grown, needs or grown), total=needs))
                await asyncio.wait((turn,), timeout=0.25)
            error = await turn
        except asyncio.CancelledError:
            if turn in host.waiting:
                host.waiting.remove(turn)
                self._move()
            elif not turn.cancelled() and turn.result() is None:  # it came in the same moment
                self._release(host)
            raise
        if error is not None:
            raise error

    def _release(self, host: ModelHost) -> None:
        host.users -= 1
        host.last_used = time.time()
        self._move()
        if not host.users and self._keep_alive_s is not None:
            host.timer = asyncio.get_running_loop().call_later(
                self._keep_alive_s, lambda: self._start(self._let_go(host))
            )

    def _answered(self, seconds: float) -> None:
        self._mean_s += 0.1 * (seconds - self._mean_s)

    # --- Loading and unloading ---

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def _load(self, host: ModelHost) -> None:
        """Load a model for the requests that wait for it; all of them use it from then on."""
        failed: str | MicoError = "the service ends"
        try:
            async with self._turn:
                if host.loaded is None and await self._make_room(host):
                    host.error = None
                    assistant, measured = await asyncio.to_thread(_measured, host.load)
                    if self.max_bytes is not None and measured > self.max_bytes:
                        held = [assistant]  # what it imports does not count the second time
                        del assistant
                        await asyncio.to_thread(_free, held)
                        assistant, measured = await asyncio.to_thread(_measured, host.load)
                    host.loaded, host.name = assistant, assistant.name
                    del assistant  # the host alone holds it, so that it can be let go
                    host.bytes = host.needs = max(measured, host.needs or 0)
                    host.loads += 1
                    await self._keep_bound(host)
                    host.see()
                    logger.info("%s is loaded: %s", host.name, megabytes(host.bytes))
        except NoRoomError as error:
            host.error = failed = error
        except Exception as error:
            # Nobody but this task hears of it, and the requests must not wait for ever.
            host.error = error
            logger.error("the model could not be loaded: %s", error)
            failed = f"{host.name}: the model could not be loaded: {host.reason}"
        finally:
            host.loading = False
            host.users += 1  # by this task, until all others have it
            waiting, host.waiting = host.waiting, []
            for turn in waiting:
                if host.loaded is not None:
                    host.users += 1
                    turn.set_result(None)
                else:  # an error of its own, because each is raised in another task
                    kind = NoRoomError if isinstance(failed, NoRoomError) else ModelError
                    turn.set_result(kind(str(failed)))
            self._release(host)

    async def _make_room(self, host: ModelHost) -> bool:
        """Unload models until this one fits; False if nobody waits for it any more."""
        if self.max_bytes is None:
            return bool(host.waiting)
        if host.needs is None:
            host.needs = await asyncio.to_thread(host.source.needs)
        if host.needs > self.max_bytes:
            raise NoRoomError(
                f"{host.name} needs {megabytes(host.needs)}, but the models of this service may "
                f"take {megabytes(self.max_bytes)} together (MICO_SERVER_MAX_MODELS_BYTES)"
            )
        loaded = [other for other in self.hosts if other.loaded is not None and other is not host]
        missing = sum(other.bytes for other in loaded) + host.needs - self.max_bytes
        leaving: list[ModelHost] = []
        for other in sorted(loaded, key=lambda other: (other.users > 0, other.last_used)):
            if missing > 0:
                leaving.append(other)
                missing -= other.bytes
        try:
            for other in leaving:
                other.leaving = True
            for other in leaving:
                while other.users and host.waiting:
                    await self._moved.wait()
                if not host.waiting:
                    break
                await self._unload(other)
        finally:
            for other in leaving:
                other.leaving = False
        return bool(host.waiting)

    async def _keep_bound(self, host: ModelHost) -> None:
        """Unload others, or this model itself, if it takes more than it seemed to need."""
        try:
            await self._make_room(host)
        except NoRoomError:
            await self._unload(host)
            raise

    async def _let_go(self, host: ModelHost) -> None:
        async with self._turn:
            if host.loaded is not None and not host.users:
                await self._unload(host)

    async def _unload(self, host: ModelHost) -> None:
        assert host.loaded is not None
        held, host.loaded = [host.loaded], None
        try:
            await asyncio.to_thread(_free, held)
        except Exception:
            logger.exception("%s was not unloaded cleanly", host.name)
        host.bytes = 0
        logger.info("%s is unloaded", host.name)

    # --- Figures ---

    def _assistants(self) -> list[Assistant]:
        return [host.loaded for host in self.hosts if host.loaded is not None]

    def _engines(self) -> EngineStats | None:
        return _sum([one.engine.stats() for one in self._assistants()])

    def _caches(self) -> CacheStats | None:
        return _sum([one.context_cache for one in self._assistants()])

    def _figures(self) -> list[ModelFigures]:
        return [
            ModelFigures(h.name, int(h.loaded is not None), h.bytes, h.users, h.loads)
            for h in self.hosts
        ]


def _sum(counts: Sequence[M]) -> M | None:
    """Counts of one kind, added field by field; None for no counts."""
    if not counts:
        return None
    dumped = [one.model_dump() for one in counts]
    return type(counts[0])(**{name: sum(one[name] for one in dumped) for name in dumped[0]})


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"


# --- Memory ---


def _measured(load: Callable[[], Assistant]) -> tuple[Assistant, int]:
    """A loaded model, and the bytes by which this process has grown meanwhile."""
    before = _used()
    assistant = load()
    return assistant, max(_used() - before, 0)


def _used() -> int:
    used: int = psutil.Process().memory_info().rss
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        used += sum(map(torch.cuda.memory_reserved, range(torch.cuda.device_count())))
    return used


def _free(held: list[Assistant]) -> None:
    """Close the one assistant of a list, to which no other reference is left, and free its memory.

    Loading froze the garbage collector's objects, among them the circles of this model.
    """
    held.pop().close()
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    give_back_memory()
