"""The decoder process: reads requests on stdin, decodes under hard limits, answers on stdout.

Started by MediaDecoder as a fresh interpreter (no state, files or secrets of the server in it).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import BinaryIO

from mico_chat.errors import MediaError
from mico_chat.media.decoding import decode
from mico_chat.media.limits import MediaLimits
from mico_chat.media.transport import (
    read_frame,
    read_header,
    write_error,
    write_header,
    write_medium,
)

_END_GRACE_S = 5.0
"""How long after the time limit the process ends itself, should its parent be gone."""


def main() -> None:
    """Serve requests until stdin ends."""
    requests, answers = sys.stdin.buffer, _private_stdout()
    limits = MediaLimits.model_validate(read_header(requests))
    logging.disable(logging.CRITICAL)
    _limit_memory(limits.memory_mb)
    write_header(answers, {"ready": True})
    answers.flush()
    _silence_stderr()
    while True:
        try:
            _serve_one(requests, answers, limits)
        except EOFError:
            return


def _serve_one(requests: BinaryIO, answers: BinaryIO, limits: MediaLimits) -> None:
    request = read_header(requests)
    source = request["path"]
    if source is None:
        source = read_frame(requests, limits.max_bytes)
    try:
        with _time_limit(limits, request["name"]):
            medium = decode(
                request["kind"],
                source,
                name=request["name"],
                limits=limits,
                depth_scale=request["depth_scale"],
                brighter_is_nearer=request["brighter_is_nearer"],
            )
    except MediaError as error:
        write_error(answers, error)
    except MemoryError:
        write_error(
            answers, limits.exceeded(request["name"], "memory_mb", "decoding needs more memory")
        )
    else:
        write_medium(answers, medium)


def _private_stdout() -> BinaryIO:
    """The answer pipe, moved where no library can print into it."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _silence_stderr() -> None:
    """Decoders write about hostile files as they like; nobody is to read that."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _limit_memory(memory_mb: int) -> None:
    if sys.platform == "linux":  # macOS has RLIMIT_AS and ignores it
        import resource

        n_bytes = memory_mb * 1024 * 1024
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def _time_limit(limits: MediaLimits, name: str) -> Iterator[None]:
    """Stop decoding between two frames, packets or tags of a file once its time is up.

    Where a library does not come back to Python, the parent kills this process a little later;
    where there is no parent any more, it ends itself.

    Raises:
        LimitError: after ``timeout_s``.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise limits.out_of_time(name)

    faulthandler.dump_traceback_later(limits.timeout_s + _END_GRACE_S, exit=True)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limits.timeout_s)
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
