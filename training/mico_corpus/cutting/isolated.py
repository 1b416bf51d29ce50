"""Work in a process of its own: FFmpeg may crash on a hostile file, and a run must go on.

The process is a new interpreter. It gets the work and then rows through a pipe, and ends when the
pipe does, so that it does not outlive who started it.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from mico_chat.media.worker import read_frame, write_frame
from mico_corpus.rows import Row

MOST_BYTES = 1 << 30
SERVE = "from mico_corpus.cutting.isolated import serve; serve()"

_kept: "dict[bytes, subprocess.Popen[bytes]]" = {}
"""One process for each work: whoever asks again, such as each task of Ray, finds it started."""


class Isolated:
    """``work`` takes one row and gives one; ``crashed`` gives the row of which the process died.

    Both are importable, or partials of such. ``crashed`` gets the row and what killed the process.
    """

    def __init__(self, work: Callable[[Row], Row], crashed: Callable[[Row, str], Row]) -> None:
        self.work = pickle.dumps(work)
        self.crashed = crashed

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        return map(self._one, rows)

    def _one(self, row: Row) -> Row:
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write_frame(process.stdin, pickle.dumps(row))
            process.stdin.flush()
            found: Row | BaseException = pickle.loads(read_frame(process.stdout, MOST_BYTES))
        except (EOFError, BrokenPipeError):
            code = self._end()
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            return self.crashed(row, how)
        except BaseException:  # of an interrupt; the answer would stay in the pipe
            process.kill()
            self._end()
            raise
        if isinstance(found, BaseException):
            raise found
        return found

    def _process(self) -> "subprocess.Popen[bytes]":
        process = _kept.get(self.work)
        if process is None or process.poll() is not None:
            command = [sys.executable, "-c", SERVE]
            pipe = subprocess.PIPE
            process = _kept[self.work] = subprocess.Popen(command, stdin=pipe, stdout=pipe)
            assert process.stdin is not None
            write_frame(process.stdin, self.work)
        return process

    def _end(self) -> int:
        process = _kept.pop(self.work)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # what was not sent is lost with the process
                pipe.close()
        return process.wait()

    def close(self) -> None:
        if self.work in _kept:
            self._end()


def serve() -> None:
    """The process: rows in, rows out, or the exception that the work raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # no library prints into the answers
    work: Any = None
    while True:
        try:
            data = read_frame(requests, MOST_BYTES)
        except EOFError:
            return
        if work is None:
            work = pickle.loads(data)
            continue
        found: Row | BaseException
        try:
            found = work(pickle.loads(data))
        except Exception as error:  # to be raised where the work was asked for
            found = error
        write_frame(answers, pickle.dumps(found))
        answers.flush()
