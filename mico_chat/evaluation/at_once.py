"""Many requests at a time, where nothing that came back is lost when one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Key = TypeVar("Key")
Asked = TypeVar("Asked")
Reply = TypeVar("Reply")


def at_once(
    ask: Callable[[Asked], Reply], items: Iterable[tuple[Key, Asked]], concurrency: int
) -> Iterator[tuple[Key, Reply]]:
    """Replies by key, each as it comes.

    Args:
        ask: called in threads.
        items: taken as they are needed.
        concurrency: calls at a time.

    Raises:
        Exception: what a call raised, after the replies of all calls that were under way.
    """
    running: dict[Future[Reply], Key] = {}

    def finished() -> Iterator[tuple[Key, Reply]]:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        if any(future.exception() for future in done):
            done, _ = wait(running)
        for future in sorted(done, key=lambda future: future.exception() is not None):
            yield running.pop(future), future.result()

    with ThreadPoolExecutor(concurrency, thread_name_prefix="ask") as pool:
        for key, item in items:
            running[pool.submit(ask, item)] = key
            if len(running) >= concurrency:
                yield from finished()
        while running:
            yield from finished()
