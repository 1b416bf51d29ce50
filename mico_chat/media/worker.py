"""The decoder process: reads requests on stdin, decodes under hard limits, answers on stdout.

Started by MediaDecoder as a fresh interpreter (no state, files or secrets of the server in it).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
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

_ALARM_GRACE_S = 5
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
    _alarm(limits.timeout_s + _ALARM_GRACE_S)
    try:
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
    finally:
        _alarm(0)


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


def _alarm(seconds: float) -> None:
    if sys.platform != "win32":
        signal.alarm(math.ceil(seconds))


if __name__ == "__main__":
    main()
