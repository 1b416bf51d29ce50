"""Turns between tenants: no tenant's load stands in front of another tenant's small request.

The tenant of a request is the owner of a key, then perhaps ``/`` and a user. Owners come
in turn first, so that nobody gains turns by naming many users; then the users of one owner.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from mico_chat.errors import ModelError

T = TypeVar("T")

USER_SEPARATOR = "/"
MOST_REMEMBERED = 10_000  # tenants


def owner_of(tenant: str) -> str:
    return tenant.partition(USER_SEPARATOR)[0]


class Shares:
    """How many of ``places`` each tenant holds. One that holds none may have one more, up to
    ``most`` of all together: twice the places by default. An owner holds at most ``each``.
    """

    def __init__(self, places: int, most: int | None = None, each: int | None = None) -> None:
        self.places, self.each = places, each
        self.most = 2 * places if most is None else most
        self.total = 0
        self._held: Counter[str] = Counter()
        self._owners: Counter[str] = Counter()
        self._turns = 0
        self._served: dict[str, int] = {}

    def may_enter(self, tenant: str) -> bool:
        if self.each is not None and self._owners[owner_of(tenant)] >= self.each:
            return False
        room = self.places
        if not self._owners[owner_of(tenant)]:
            room = self.most
        elif not self._held[tenant]:
            room += (self.most - self.places + 1) // 2
        return self.total < room

    def holds(self, tenant: str) -> bool:
        return self._held[tenant] > 0

    def next(self, tenants: Iterable[str]) -> str | None:
        """Whose turn it is: the owner, then the user who holds least, then who waited longest."""
        return min(tenants, key=self._rank, default=None)

    def _rank(self, tenant: str) -> tuple[int, int, int]:
        owner = owner_of(tenant)
        return self._owners[owner], self._held[tenant], self._served.get(tenant, 0)

    def take(self, tenant: str) -> None:
        self._turns += 1
        self.total += 1
        self._held[tenant] += 1
        self._owners[owner_of(tenant)] += 1
        self._served[tenant] = self._turns

    def give_back(self, tenant: str) -> None:
        self.total -= 1
        for counter, name in ((self._held, tenant), (self._owners, owner_of(tenant))):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        if not self.total or len(self._served) > MOST_REMEMBERED:
            self._served.clear()  # who was served when matters only while somebody waits


class FairQueue:
    """Places for work, which tenants get in turn. Event loops and threads may share it.

    A tenant that holds none finds a place beyond the ``places``, up to ``most``; an owner holds at
    most ``each``. ``name`` is that of the threads of :meth:`run`, one for each place.
    """

    def __init__(
        self,
        places: int,
        most: int | None = None,
        *,
        each: int | None = None,
        name: str = "mico-fair",
    ) -> None:
        self._shares = Shares(places, most, each)
        self._threads = ThreadPoolExecutor(self._shares.most, name)
        self._waiting: dict[str, deque[Future[None]]] = {}
        self._lock = threading.Lock()

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a place of ``tenant``, and hold it until the end of the block."""
        await self._enter(tenant)
        try:
            yield
        finally:
            self._leave(tenant)

    async def run(self, tenant: str, work: Callable[..., T], *given: Any) -> T:
        """The result of ``work``, in a thread. It keeps its place of ``tenant`` until it ends."""
        await self._enter(tenant)
        try:
            done = self._threads.submit(work, *given)
        except RuntimeError as error:
            self._leave(tenant)
            raise ModelError("the model is closed") from error
        done.add_done_callback(lambda _: self._leave(tenant))
        return await asyncio.wrap_future(done)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _enter(self, tenant: str) -> None:
        turn: Future[None] = Future()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(turn)
            self._serve()
        try:
            await asyncio.wrap_future(turn)
        except BaseException:
            with self._lock:
                if turn.cancelled() or turn.cancel():
                    self._forget(tenant, turn)
                else:  # the turn came in the same moment
                    self._shares.give_back(tenant)
                self._serve()
            raise

    def _leave(self, tenant: str) -> None:
        with self._lock:
            self._shares.give_back(tenant)
            self._serve()

    def _serve(self) -> None:
        blocked: set[str] = set()
        while (tenant := self._shares.next(self._waiting.keys() - blocked)) is not None:
            if not self._shares.may_enter(tenant):
                blocked.add(tenant)
                continue
            turn = self._waiting[tenant][0]
            self._forget(tenant, turn)
            if turn.set_running_or_notify_cancel():
                self._shares.take(tenant)
                turn.set_result(None)

    def _forget(self, tenant: str, turn: Future[None]) -> None:
        turns = self._waiting.get(tenant, deque())
        if turn in turns:
            turns.remove(turn)
        if not turns:
            self._waiting.pop(tenant, None)
