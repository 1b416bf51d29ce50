"""The page's process, and the server that it may bring along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mico_chat.errors import ConfigError
from mico_server.settings import ServerSettings
from mico_ui import calls
from mico_ui.browser.run import local_url, main, server_beside
from mico_ui.client import ApiError, Client
from tests.server.running import new_key
from tests.ui.live import free_port


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
    assert local_url(ServerSettings(host=host, port=8000)) == url


def test_the_servers_port_must_be_known() -> None:
    with pytest.raises(ConfigError, match="any free one"):
        local_url(ServerSettings(port=0))


def test_an_address_that_is_none() -> None:
    with pytest.raises(ConfigError, match="no address of a server"):
        main("nonsense://", "127.0.0.1", free_port(), print)


def test_a_page_for_other_machines_wants_a_server_with_keys(client: Client) -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*no API key.*keys create.*--insecure"):
        main(client.api, "0.0.0.0", free_port(), print)


def test_a_page_for_other_machines_is_served_where_keys_are_asked_for(
    client: Client, tmp_path: Path
) -> None:
    new_key(tmp_path / "data", "alice")
    command = [sys.executable, "-m", "mico_chat.cli", "ui", "--api", client.api]
    command += ["--host", "0.0.0.0", "--port", str(free_port())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as page:
        try:
            assert page.stdout is not None
            assert page.stdout.readline().startswith("chat at http://0.0.0.0:")
        finally:
            page.terminate()


def test_a_page_for_other_machines_asks_for_keys_when_the_server_no_longer_does(
    client: Client, tmp_path: Path
) -> None:
    """The last key in force is revoked: this machine is let in again, others are not."""
    with Client(client.api, "made-up", require_key=True) as passed_on:
        with pytest.raises(ApiError) as refused:
            passed_on.send(calls.models())
        assert refused.value.code == "invalid_api_key"
    assert client.send(calls.models())


@pytest.mark.slow
def test_a_server_that_cannot_start_ends_the_page(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(ConfigError, match=r"ended with status 2.*--api-port"),
        server_beside(["--max-running", "none"]),
    ):
        time.sleep(60)
    assert "max_running" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_server_ends_with_us_however_we_end() -> None:
    script = (
        "import time\nfrom mico_ui.browser.run import server_beside\n"
        f"with server_beside(['--port', '{free_port()}']) as child:\n"
        "    print(child, flush=True)\n    time.sleep(100)"
    )
    ours = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    with ours:
        assert ours.stdout is not None
        child = int(ours.stdout.readline())
        os.kill(child, 0)
        ours.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the server outlived the page")
