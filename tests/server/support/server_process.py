"""The service in a process of its own, which a test may kill: its answers tell what it was asked.

The process is forked from one that has imported everything, so that it starts within a second.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from benchmarks.http_client import address_of
from mico_chat.assistant import Assistant
from mico_chat.media import MediaDecoder
from mico_server.app import serve
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from tests.server.support.echo import echoing_assistant
from tests.support.fakes import FakeDecoder
from tests.support.waiting import PATIENCE_S

_PRELOADED = ["mico_server.app", "mico_chat.encode", "tests.server.support.echo"]


class ServerProcess:
    """A service that runs until it is killed, terminated, or the ``with`` block ends.

    Unless it ``decodes``, anything is a blank medium. Each step of the model takes ``pause_s``
    seconds longer. ``make`` makes the assistant there.
    """

    def __init__(
        self,
        *,
        decodes: bool = False,
        pause_s: float = 0.0,
        make: Callable[..., Assistant] = echoing_assistant,
        **settings: Any,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        told, tell = context.Pipe(duplex=False)
        arguments = (
            ServerSettings(port=0, **settings),
            decodes,
            partial(make, pause_s=pause_s),
            tell,
        )
        self.process: BaseProcess = context.Process(target=_serve, args=arguments)
        self.process.start()
        tell.close()
        try:
            assert told.poll(PATIENCE_S), "the service is not ready, though it has not ended"
            self.url: str = told.recv().split()[-1]
        except BaseException:
            self.kill()
            raise
        finally:
            told.close()
        self.address = address_of(self.url)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def terminate(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGTERM)

    def exit_code(self) -> int | None:
        self.process.join(PATIENCE_S)
        return self.process.exitcode

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _serve(
    settings: ServerSettings, decodes: bool, make: Callable[..., Assistant], tell: Connection
) -> None:
    logging.disable(logging.WARNING)
    decoder: Any = MediaDecoder(workers=2) if decodes else nullcontext(FakeDecoder())
    with decoder as used:
        serve(
            [ModelSource("tiny", lambda: make(used))],
            announce=tell.send,
            settings=settings,
        )
