"""The page's process, and the server that it may bring along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mico_chat.errors import ConfigError
from mico_ui import local_server, routes
from mico_ui.browser.serve import main
from mico_ui.client import ApiError, Client
from mico_ui.local_server import KeptRunning, local_url, server_beside
from tests.server.running import new_key
from tests.ui.live import START_S, MiniSite, free_port


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_where_a_server_of_this_machine_is_reached(host: str, url: str) -> None:
    assert local_url(host, 8000) == url
    with pytest.raises(ConfigError, match="any free one"):
        local_url(host, 0)


def test_a_page_for_other_machines_wants_a_server_with_keys(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no address of a server"):
        main("nonsense://", "127.0.0.1", free_port(), print)
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*no API key.*keys create.*--insecure"):
        main(client.api, "0.0.0.0", free_port(), print)
    # Where the last key was revoked, the server lets in this machine, but nobody through the page.
    with Client(client.api, "made-up", require_key=True) as passed_on:
        with pytest.raises(ApiError) as refused:
            passed_on.send(routes.models())
        assert refused.value.code == "invalid_api_key"
    assert client.send(routes.models())
    new_key(tmp_path / "data", "alice")
    command = [sys.executable, "-m", "mico_chat.cli", "ui", "--api", client.api]
    command += ["--host", "0.0.0.0", "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None
            assert page.stdout.readline().startswith("chat at http://0.0.0.0:")
        finally:
            page.terminate()


@pytest.mark.slow
def test_a_server_that_cannot_start_ends_the_page(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(ConfigError, match=r"ended with status 2.*--api-port"),
        server_beside(["--max-running", "none"]),
    ):
        time.sleep(60)
    assert "max_running" in capfd.readouterr().err


def kept_running(*programs: str) -> tuple[KeptRunning, list[str]]:
    """One program after another, until it is left; and what was announced."""
    told: list[str] = []
    left = threading.Event()
    commands: Iterator[list[str]] = iter([sys.executable, "-c", text] for text in programs)

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(next(commands), text=True)

    kept = KeptRunning(start(), start, announce=told.append, on_left=left.set)
    assert left.wait(60)
    return kept, told


def test_a_server_that_dies_is_started_again_but_not_for_ever() -> None:
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    kept, told = kept_running("raise SystemExit(3)", killed, "", killed)
    assert [line.split(";")[0] for line in told] == [
        "the server ended with status 3",
        "the server ended with SIGKILL",
        "the server ended with status 0",
    ]
    assert kept.left == "the server ended with SIGKILL, 4 times in a row"


def test_a_server_that_runs_long_may_die_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_server, "RESTARTS_S", 0.0)
    kept, told = kept_running(*[""] * 9, "raise SystemExit(2)")
    assert len(told) == 9
    assert kept.left == "the server ended with status 2"


@pytest.mark.slow
@pytest.mark.base_llm
def test_the_page_brings_its_server_back(base_llm_folder: Path, tmp_path: Path) -> None:
    ui = MiniSite(tmp_path, tmp_path / "data")
    ui.start()
    try:
        os.kill(ui.child(), signal.SIGKILL)
        until = time.monotonic() + START_S
        while "it is started again" not in ui.said():
            assert time.monotonic() < until
            time.sleep(0.05)
        ui.wait()
    finally:
        ui.stop()


@pytest.mark.slow
def test_the_server_ends_with_us_however_we_end() -> None:
    script = (
        "import time\nfrom mico_ui.local_server import server_beside\n"
        f"with server_beside(['--port', '{free_port()}']) as child:\n"
        "    print(child, flush=True)\n    time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        child = int(ours.stdout.readline())
        os.kill(child, 0)
        ours.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists():
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the server outlived the page")
        time.sleep(0.1)
