"""Work in a process of its own: what it gives and raises, and what is left when it dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from mico_chat.errors import ModelError
from mico_corpus.cutting.isolated import Isolated
from mico_corpus.rows import Row


def work(row: Row) -> Row:
    print("a library prints")
    match row["do"]:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "sleep":
            time.sleep(600)
        case "raise":
            raise ModelError("this row")
    return row | {"process": os.getpid()}


def crashed(row: Row, how: str) -> Row:
    return row | {"how": how}


@pytest.fixture
def apart() -> Iterator[Isolated]:
    made = Isolated(work, crashed)
    yield made
    made.close()


def rows(*asked: str) -> list[Row]:
    return [{"do": do, "number": i} for i, do in enumerate(asked)]


def test_a_crash_costs_one_row(apart: Isolated) -> None:
    found = list(apart(rows("well", "crash", "well", "exit", "well", "well")))
    assert [row["number"] for row in found] == [*range(6)]
    assert [row.get("how", "") for row in found] == ["", "signal 11", "", "exit status 3", "", ""]
    processes = [row["process"] for row in found if "process" in row]
    assert len(set(processes)) == 3
    assert os.getpid() not in processes
    assert processes[2] == processes[3]


def test_an_error_of_the_work_is_raised_here(apart: Isolated) -> None:
    given = apart(rows("well", "raise", "well"))
    first = next(given)
    with pytest.raises(ModelError, match="this row"):
        next(given)
    assert next(given)["process"] == first["process"]


def test_who_asks_again_finds_the_process_started(apart: Isolated) -> None:
    (first,) = apart(rows("well"))
    (second,) = Isolated(work, crashed)(rows("well"))
    assert first["process"] == second["process"]
    apart.close()
    assert not psutil.pid_exists(first["process"])


def test_the_process_ends_with_who_started_it() -> None:
    script = (
        "from tests.mico_corpus.cutting.test_isolated import *; import time\n"
        "print(next(Isolated(work, crashed)(rows('well')))['process'], flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        process = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
    assert process.wait(timeout=60) is not psutil.STATUS_RUNNING


def test_an_interrupt_does_not_wait_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = Isolated(work, crashed)
    (first,) = apart(rows("well"))

    def interrupted(stream: object, n: int) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mico_corpus.cutting.isolated.read_frame", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(apart(rows("sleep")))
    assert not psutil.pid_exists(first["process"])
    (second,) = apart(rows("well"))
    assert second["number"] == 0
    apart.close()
