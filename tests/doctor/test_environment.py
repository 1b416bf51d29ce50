"""Variables, folders, ports, shared memory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mico_chat.cli.doctor.environment import (
    LIBRARY,
    Source,
    folder_finding,
    port_finding,
    shm_finding,
    variable_findings,
    variables_of,
)
from mico_chat.cli.main import app
from mico_server.settings import ServerSettings, read_settings

SERVER = Source(ServerSettings, read_settings)
SOURCES = (*LIBRARY, SERVER)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MICO_"):
            monkeypatch.delenv(name)


def test_no_variables() -> None:
    (found,) = variable_findings({"PATH": "/bin", "MICOSCOPE": "1"}, SOURCES)
    assert (found.mark, found.text) == ("ok", "none is set")


def test_known_variables() -> None:
    names = ["MICO_CACHE_DIR", "MICO_MEDIA_MAX_FRAMES", "MICO_SERVER_MAX_RUNNING", "MICO_API"]
    (found,) = variable_findings(dict.fromkeys(names, "1"), SOURCES, ["MICO_API"])
    assert found.mark == "ok"
    assert found.facts["names"] == sorted(names)


def test_a_variable_that_nothing_reads() -> None:
    (found,) = variable_findings({"MICO_SERVER_PROT": "1"}, SOURCES)
    assert found.mark == "warning"
    assert found.text == "nothing reads MICO_SERVER_PROT; did you mean MICO_SERVER_PORT?"
    assert found.mend == 'export MICO_SERVER_PORT="$MICO_SERVER_PROT"; unset MICO_SERVER_PROT'
    (found,) = variable_findings({"MICO_XYZZY": "1"}, SOURCES)
    assert found.mend == "unset MICO_XYZZY"


def test_values_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"MICO_MEDIA_MAX_FRAMES": "many", "MICO_SERVER_PORT": "99999"}
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    frames, port = variable_findings(wrong, SOURCES)
    assert (frames.mark, port.mark) == ("problem", "problem")
    assert frames.text.startswith("MICO_MEDIA_MAX_FRAMES: ")
    assert "got 'many'" in frames.text
    assert port.text.startswith("MICO_SERVER_PORT: ")
    assert port.mend == "unset MICO_SERVER_PORT"


def test_a_settings_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICO_SERVER_CONFIG", str(tmp_path / "nowhere.toml"))
    (found,) = variable_findings(os.environ, SOURCES)
    assert found.mark == "problem"
    assert "nowhere.toml: no TOML file to read" in found.text


def test_the_command_lines_own_variables() -> None:
    import typer

    assert {"MICO_API", "MICO_API_KEY"} <= variables_of(typer.main.get_command(app))


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_that_is_not_made_yet(tmp_path: Path) -> None:
    found = folder_finding(tmp_path / "a" / "b")
    assert (found.mark, found.text) == ("ok", f"{tmp_path / 'a' / 'b'}, which will be made")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to() -> None:
    found = folder_finding(Path("/proc/mico"))
    assert found.mark == "problem"
    assert "/proc cannot be written to" in found.text
    assert "MICO_CACHE_DIR" in (found.mend or "")


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert folder_finding(file / "cache").mark == "problem"


# --- ports --------------------------------------------------------------------------------------


def test_a_port_in_use_and_by_whom() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = port_finding("API port", "127.0.0.1", port, "end it")
    assert (taken.mark, taken.mend) == ("warning", "end it")
    assert f"127.0.0.1:{port} cannot be used" in taken.text
    assert f"({os.getpid()})" in taken.text
    assert port_finding("API port", "127.0.0.1", port, "end it").mark == "ok"


def test_an_address_that_is_not_ours() -> None:
    assert port_finding("API port", "192.0.2.1", 8000, "").mark == "warning"


def test_shared_memory() -> None:
    assert shm_finding(None, True) is None
    small, large = shm_finding(64 << 20, True), shm_finding(8 << 30, True)
    assert small is not None
    assert large is not None
    assert (small.mark, large.mark) == ("warning", "ok")
    assert "--shm-size" in (small.mend or "")
    unused = shm_finding(64 << 20, False)
    assert unused is not None
    assert unused.mark == "note"
