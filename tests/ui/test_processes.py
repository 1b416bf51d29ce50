"""``mico-chat ui`` and ``mico-chat chat`` as processes, and the server that they may start."""

from __future__ import annotations

import fcntl
import io
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mico_chat.cli.main import main as mico_chat
from mico_chat.errors import ConfigError
from mico_ui import local_server, routes
from mico_ui.browser.serve import main
from mico_ui.client import ApiError, Client
from mico_ui.local_server import KeptRunning, local_url, server_beside
from tests.fakes import FakeAssistant
from tests.server.running import new_key
from tests.ui.conftest import served
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
    """Run one program after another until KeptRunning gives up; also its announcements."""
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


CHAT = [sys.executable, "-m", "mico_chat.cli", "chat"]
PATIENCE_S = 60.0


@pytest.fixture
def environment(tmp_path: Path, offline_environment: dict[str, str]) -> dict[str, str]:
    removed = ("MICO_API", "MICO_API_KEY", "NO_COLOR")
    kept = {name: text for name, text in offline_environment.items() if name not in removed}
    return {
        **kept,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "MICO_SERVER_DATA_DIR": str(tmp_path / "own"),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
    }


def _take_terminal() -> None:
    """Makes standard input the terminal of the session, so that its Ctrl-C is a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it


class Terminal:
    """A pseudo-terminal with a program in it; ``shown`` is its output without colours."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.end, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(inner)
        self.raw = ""
        self._seen = 0

    @property
    def shown(self) -> str:
        return re.sub(r"\x1b\[[\d;?]*[ -/]*[@-~]|\x1b[=>]", "", self.raw)

    def keys(self, text: str) -> None:
        os.write(self.end, text.encode())

    def expect(self, text: str) -> None:
        """Wait for a text behind the last text that was waited for."""
        until = time.monotonic() + PATIENCE_S
        while (found := self.shown.find(text, self._seen)) < 0:
            assert self._read(until), f"no {text!r} in:\n{self.shown[self._seen :]}"
        self._seen = found + len(text)

    def ends(self) -> int:
        until = time.monotonic() + PATIENCE_S
        while self._read(until):
            pass
        return self.process.wait(PATIENCE_S)

    def _read(self, until: float) -> bool:
        ready, _, _ = select.select([self.end], [], [], max(until - time.monotonic(), 0))
        if not ready:
            return False
        try:
            data = os.read(self.end, 65536)
        except OSError:  # how a terminal without a program in it ends
            return False
        self.raw += data.decode(errors="replace")
        if "\x1b[6n" in data.decode(errors="replace"):  # where is the cursor?
            os.write(self.end, b"\x1b[1;1R")
        return bool(data)


@contextmanager
def terminal(command: Sequence[str], environment: dict[str, str]) -> Iterator[Terminal]:
    found = Terminal(command, environment)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()
        os.close(found.end)


def test_a_chat(
    client: Client,
    assistant: FakeAssistant,
    halfway: threading.Event,
    environment: dict[str, str],
    picture: Path,
) -> None:
    with terminal([*CHAT, "--api", client.api], environment) as screen:
        screen.expect("fake at http://127.0.0.1")
        screen.keys(f"/image '{picture.parent}/red")
        screen.expect("red circle.png")  # in the menu
        screen.keys("\t")
        screen.expect(" circle.png")
        screen.keys("\r")
        screen.expect("1 image red circle.png")
        screen.expect("▀")
        assert "\x1b[38;2;255;255;255;48;2;255;255;255m▀" in screen.raw
        screen.expect("[red circle.png] > ")
        screen.keys("What is it?\r")
        screen.expect("[image red circle.png] What is it?")
        screen.expect("10 tokens (1 of media) + 2")
        halfway.clear()
        screen.keys("A long story\r")
        screen.expect("[image")
        screen.keys("\x03")
        screen.expect("stopped")
        assert assistant.cancelled.wait(timeout=30)  # the server has stopped, too
        halfway.set()
        screen.keys("And now?\r")
        screen.expect("[image red circle.png] And now?")
        screen.expect("10 tokens")
        screen.expect("> ")  # an end of input is for the prompt
        screen.keys("\x04")
        assert screen.ends() == 0
    (summary,) = client.send(routes.conversations()).data
    turns = client.send(routes.conversation(summary.id)).turns
    assert [turn.message for turn in turns][0::2] == ["What is it?", "And now?"]


def piped(
    arguments: Sequence[str], environment: dict[str, str], text: bytes = b""
) -> subprocess.CompletedProcess[str]:
    # Bytes are decoded here: line feeds must stay as they are.
    done = subprocess.run([*CHAT, *arguments], input=text, env=environment, capture_output=True)
    out, error = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, error)


def test_in_a_pipe_there_is_the_answer_alone(
    client: Client, environment: dict[str, str], picture: Path, assistant: FakeAssistant
) -> None:
    api = ["--api", client.api]
    asked = piped([*api, "--image", str(picture), "--set", "seed=3"], environment, b"What?\n")
    assert asked.stdout == "[image red circle.png] What?\n"
    assert (asked.returncode, asked.stderr) == (0, "")
    assert assistant.options[0].seed == 3
    again = piped([*api, "--continue", "Sum up:"], environment, b"one\ntwo\xff\n")
    assert again.stdout == "[image red circle.png] Sum up:\n\none\ntwo\ufffd\n"
    (summary,) = client.send(routes.conversations()).data
    assert len(client.send(routes.conversation(summary.id)).turns) == 2


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["refuse"], b"", "error: refused\n"),
        ([], b" \n", "error: there is no question"),
        (["x", "--image", "/nothing.png"], b"", "error: /nothing.png: No such file"),
        (["x", "--set", "nonsense"], b"", "error: --set nonsense: expected NAME=VALUE"),
        (["x", "--model", "mini"], b"", "error: --model is for a server that is started here"),
    ],
)
def test_errors_in_a_pipe(
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: bytes,
    said: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    with pytest.raises(SystemExit, match="2"):
        mico_chat(["chat", "--api", client.api, *arguments])
    shown, error = capsys.readouterr()
    assert (shown, error.count("\n")) == ("", 1)
    assert error.startswith(said)


def test_a_key_is_asked_for_and_taken_from_the_environment(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    secret = new_key(tmp_path / "data", "alice")
    with served(tmp_path, FakeAssistant()) as client:
        api = client.api
        refused = piped(["--api", api, "Hi"], environment)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: this server asks for a key: give it with --key")
        asked = piped(["Hi"], {**environment, "MICO_API": api, "MICO_API_KEY": secret})
        assert (asked.returncode, asked.stdout) == (0, "[] Hi\n")


def test_a_reader_may_close_the_pipe(client: Client, environment: dict[str, str]) -> None:
    command = [*CHAT, "--api", client.api, "word " * 20_000]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_server_that_cannot_start_says_why(environment: dict[str, str]) -> None:
    done = piped(["--config", "/nothing.toml", "Hi"], environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the server could not start: /nothing.toml: no TOML file")
    assert done.stderr.count("\n") == 1


@pytest.mark.base_llm
def test_a_server_of_its_own_with_the_real_model(
    base_llm_folder: Path, environment: dict[str, str], picture: Path
) -> None:
    asked = piped(["--image", str(picture), "What is in the picture?"], environment)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert "circle" in asked.stdout
    new_key(Path(environment["MICO_SERVER_DATA_DIR"]), "me")  # changes nothing for who starts it
    with terminal([*CHAT, "--continue"], environment) as screen:
        screen.expect("starting a server")
        screen.expect("What is in the picture?")
        screen.keys("What colour is it?\r")
        screen.expect("red")
        os.kill(screen.process.pid, signal.SIGKILL)
        screen.ends()
    until = time.monotonic() + 30
    while servers := servers_of(environment["MICO_SERVER_DATA_DIR"]):
        assert time.monotonic() < until, f"still running: {servers}"
        time.sleep(0.1)


def servers_of(data_dir: str) -> list[str]:
    wanted = f"MICO_SERVER_DATA_DIR={data_dir}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            serves = b"\0serve\0" in (folder / "cmdline").read_bytes()
            if serves and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder.name)
        except OSError:  # it has ended meanwhile
            continue
    return found
