"""Turns between tenants, counted."""

import asyncio
import threading
from collections import Counter

import pytest

from mico_chat.errors import ModelError
from mico_chat.fair import FairQueue, Shares
from tests.support.tiny import in_loop
from tests.support.waiting import PATIENCE_S


def test_a_tenant_that_holds_none_may_have_one_more() -> None:
    shares = Shares(2)
    for _ in range(2):
        assert shares.may_enter("greedy")
        shares.take("greedy")
    assert not shares.may_enter("greedy")
    assert shares.may_enter("greedy/a user"), "another user of the same key"
    assert shares.may_enter("small")
    shares.take("small")
    assert not shares.may_enter("small")
    shares.give_back("greedy")
    shares.give_back("greedy")
    assert shares.may_enter("small")


def test_owners_come_before_users() -> None:
    shares = Shares(10)
    for user in ("a/1", "a/2", "a/3"):
        shares.take(user)
    assert shares.next(["a/4", "b"]) == "b", "many users give an owner no more turns"
    shares.take("b")
    assert shares.next(["a/4", "b"]) == "b"
    assert shares.next([]) is None


@in_loop
async def test_a_small_request_does_not_wait_behind_a_load() -> None:
    queue = FairQueue(2, most=3)
    order: list[str] = []
    gate = asyncio.Event()

    async def one(tenant: str) -> None:
        async with queue.place(tenant):
            order.append(tenant)
            await gate.wait()

    tasks = [asyncio.create_task(one("greedy")) for _ in range(50)]
    await asyncio.sleep(0)
    tasks.append(asyncio.create_task(one("small")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert Counter(order) == {"greedy": 2, "small": 1}
    gate.set()
    tasks.append(asyncio.create_task(one("late")))
    await asyncio.gather(*tasks)
    assert order.index("late") < 6


@in_loop
async def test_a_place_is_given_back_however_the_work_ends() -> None:
    queue = FairQueue(1, most=1)
    running, release = threading.Event(), threading.Event()

    def work() -> None:
        running.set()
        release.wait(PATIENCE_S)

    first = asyncio.create_task(queue.run("a", work))
    await asyncio.to_thread(running.wait, PATIENCE_S)
    waiting = [asyncio.create_task(queue.run("a", int, "1")) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    first.cancel()  # nobody waits any more, but the thread still works: so does its place
    await asyncio.gather(first, waiting[0], return_exceptions=True)
    assert not waiting[1].done()
    release.set()
    assert await asyncio.gather(*waiting[1:]) == [1, 1]
    with pytest.raises(ValueError, match="invalid"):
        await queue.run("a", int, "x")
    assert await queue.run("b", int, "2") == 2
    queue.close()
    with pytest.raises(ModelError, match="closed"):
        await queue.run("a", int, "1")


def test_many_loops_share_the_places() -> None:
    queue = FairQueue(2)
    at_once, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        with lock:
            at_once -= 1

    async def many(tenant: str) -> None:
        await asyncio.gather(*(queue.run(tenant, work) for _ in range(50)))

    threads = [threading.Thread(target=lambda t=tenant: asyncio.run(many(t))) for tenant in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= most <= 4
    assert queue._shares.total == 0
