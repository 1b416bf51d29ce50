"""A late import runs a module when it is first used: once, in any thread, and errors show there."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mico_chat
from mico_chat.late import late

RUNS: list[str] = []


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module mico_chat.trial, which writes down when it runs."""
    monkeypatch.setattr(mico_chat, "__path__", [*mico_chat.__path__, str(tmp_path)])
    monkeypatch.setattr(mico_chat, "trial", None, raising=False)
    monkeypatch.delattr(mico_chat, "trial")
    RUNS.clear()
    monkeypatch.setitem(sys.modules, "trial_runs", ModuleType("trial_runs"))
    vars(sys.modules["trial_runs"])["RUNS"] = RUNS
    file = tmp_path / "trial.py"
    file.write_text("from trial_runs import RUNS\nRUNS.append(__name__)\nanswer = 42\n")
    yield file
    sys.modules.pop("mico_chat.trial", None)


def imported() -> Any:
    with late():
        from mico_chat import trial
    return trial


def test_a_module_runs_when_it_is_used(module: Path) -> None:
    trial = imported()
    assert trial.__file__ == str(module)
    assert not RUNS
    assert trial.answer == 42
    assert imported() is trial is sys.modules["mico_chat.trial"]
    assert RUNS == ["mico_chat.trial"]


def test_an_ordinary_import_runs_it(module: Path) -> None:
    trial = imported()
    from mico_chat.trial import answer  # type: ignore[import-not-found]

    assert (answer, RUNS) == (42, ["mico_chat.trial"])
    assert type(trial) is ModuleType


def test_threads_run_it_once_and_wait_for_it(module: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()
    events = {"begun": begun, "go_on": go_on}
    vars(sys.modules["trial_runs"]).update(events)
    wait = "early = 1\nfrom trial_runs import begun, go_on\nbegun.set()\ngo_on.wait()\n"
    module.write_text(wait + module.read_text())
    trial, found = imported(), []
    threads = [threading.Thread(target=lambda: found.append(trial.early)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert not found  # nobody sees half of it
    go_on.set()
    for thread in threads:
        thread.join()
    assert (found, RUNS) == ([1] * 4, ["mico_chat.trial"])


def test_an_error_is_raised_at_each_use(module: Path) -> None:
    module.write_text("import no_such_library\n")
    trial = imported()
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_library"):
            _ = trial.answer


def test_what_it_lacks_is_an_error_as_ever(module: Path) -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = imported().nothing
    with late(), pytest.raises(ImportError, match="no_such_module"):
        from mico_chat import no_such_module  # type: ignore[attr-defined]  # noqa: F401
    with late():
        import wave  # another project's module is imported at once

    assert type(wave) is ModuleType
