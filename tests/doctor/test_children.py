"""Probes in processes: what comes back, from those that die and hang too."""

from __future__ import annotations

import time

import pytest

from mico_chat.cli.doctor import children
from mico_chat.cli.doctor.children import Children, Outcome

PRELUDE = (
    "import json, os, signal, subprocess, sys, time\n"
    "say = lambda **line: print(json.dumps(line), flush=True)\n"
)


def outcomes(
    monkeypatch: pytest.MonkeyPatch, script: str, seconds: float = 30
) -> dict[str, Outcome]:
    """What is made of a process that runs ``script`` for the probes a, b and c."""
    monkeypatch.setattr(children, "_MAIN", PRELUDE + script)
    with Children() as started:
        return started.start(["a", "b", "c"], {}, seconds).result()


GOOD = "say(begin='a'); say(end='a', facts={'n': 1}); say(begin='b');"


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcomes(monkeypatch, GOOD + "os.kill(os.getpid(), signal.SIGILL)")
    assert found["a"].facts == {"n": 1}
    assert (found["b"].error, found["b"].signal) == ("killed by SIGILL", "SIGILL")
    assert found["c"].error == "not tried: b ended the process"
    assert found["c"].signal is None


def test_a_process_that_hangs_with_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = "subprocess.Popen(['sleep', '60']); time.sleep(60)"
    started = time.monotonic()
    found = outcomes(monkeypatch, GOOD + hangs, seconds=1.5)
    assert found["b"].error == "no answer within 2 s"
    assert time.monotonic() - started < 30


def test_a_process_that_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    found = outcomes(monkeypatch, "sys.exit('no such module')")
    assert found["a"].error == "ended with status 1: no such module"
    assert outcomes(monkeypatch, "os._exit(3)")["a"].error == "ended with status 3: it said nothing"


def test_processes_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_MAIN", "import time; time.sleep(60)")
    started = time.monotonic()
    with Children() as running:
        future = running.start(["a"], {}, 60)
    assert future.result()["a"].error == "killed by SIGKILL"
    assert time.monotonic() - started < 30


def test_real_probes_report_facts_and_errors() -> None:
    with Children() as started:
        found = started.start(["codecs", "no such probe", "decoder"], {}, 60).result()
    assert found["codecs"].facts is not None
    assert found["no such probe"].error == "KeyError: 'no such probe'"
    assert found["decoder"].facts is not None
