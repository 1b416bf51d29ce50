"""``mico-chat say`` and ``mico-chat listen``."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mico_chat.cli.main import main
from mico_chat.media import MediaFile, decode
from mico_chat.reading import speech
from tests.support.fakes import FakeListener

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.ogg", "a.FLAC"])
def test_a_text_becomes_a_file(tmp_path: Path, name: str) -> None:
    assert run("say", "Good *morning*.", "--output", str(tmp_path / name)) == 0
    assert 0.5 < (decode(MediaFile("audio", tmp_path / name)).report.seconds or 0) < 2


def test_a_text_becomes_a_pipe() -> None:
    command = [sys.executable, "-m", "mico_chat.cli", "say", "-", "--speed", "2"]
    done = subprocess.run(command, input=b"Good morning.", capture_output=True, check=True)
    assert 0.2 < (decode(MediaFile("audio", done.stdout, "a.wav")).report.seconds or 0) < 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Hello.", "--output", "a.xyz"], "a.xyz: its name must end with one of .mp3"),
        (["***", "--output", "a.wav"], "nothing in this text can be read aloud"),
        (["Привет", "--output", "a.wav"], "Cyrillic"),
        (["Hello.", "--voice", "bob", "--output", "a.wav"], "no voice 'bob'"),
    ],
)
def test_what_cannot_be_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("say", *words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_terminal_gets_no_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    assert run("say", "Hello.") == 2
    assert "--output hello.wav" in capsys.readouterr().err


def test_a_recording_becomes_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.wav"
    run("say", "Hello.", "--output", str(file))
    listener: Any = FakeListener("Good morning.", "It is late.")
    monkeypatch.setattr(speech, "Listener", lambda: listener)
    monkeypatch.setattr(speech, "folder", lambda: tmp_path)
    assert run("listen", str(file), "--language", "en") == 0
    assert capsys.readouterr().out == "Good morning.\nIt is late.\n"
    assert run("listen", str(file), "--language", "xx") == 2
    assert "none of de, en" in capsys.readouterr().err
    assert run("listen", str(tmp_path / "none.wav")) == 2
    assert "none.wav: no such file" in capsys.readouterr().err
    monkeypatch.setattr(speech, "folder", lambda: tmp_path / "none")
    assert run("listen", str(file)) == 2
    assert "run `mico-chat setup`" in capsys.readouterr().err
