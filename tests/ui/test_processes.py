"""``mico-chat ui`` and ``mico-chat chat`` as processes, and the server that they may start."""

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from mico_chat.cli.main import main as mico_chat
from mico_chat.errors import ConfigError
from mico_ui import local_server, routes
from mico_ui.browser.serve import _check_keys, main
from mico_ui.client import ApiError, Client
from mico_ui.local_server import local_url, server_beside
from tests.server.support.running import new_key
from tests.support.fakes import FakeAssistant
from tests.support.waiting import PATIENCE_S
from tests.ui.conftest import served
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
    _check_keys(client.api, "0.0.0.0")  # no error: the server asks for a key now


# It ends with status 0 nine times, and then with status 2; its last argument is a file.
NINE_TIMES = """
import sys
with open(sys.argv[-1], "a") as starts:
    starts.write("x")
    raise SystemExit(2 if starts.tell() > 9 else 0)
"""


@pytest.mark.parametrize(
    ("program", "limit", "n", "end"),
    [
        ("raise SystemExit(2)", 300.0, 0, "status 2"),  # how a server refuses its settings
        ("import os; os.kill(os.getpid(), 9)", 300.0, 3, "SIGKILL, 4 times in a row"),
        (NINE_TIMES, 0.0, 9, "status 2"),  # one that runs long may die again
    ],
)
def test_a_server_that_dies_is_started_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, limit: float, n: int, end: str
) -> None:
    monkeypatch.setattr(local_server, "_MAIN", program)
    monkeypatch.setattr(local_server, "RESTARTS_S", limit)
    told: list[str] = []
    ended = pytest.raises(ConfigError, match=f"^the server ended with {end}, for .*--api-port")
    with ended, server_beside([str(tmp_path / "starts")], told.append):
        time.sleep(60)
    assert len(told) == n
    assert all(line.endswith("; it is started again") for line in told)


def test_the_local_secret_is_in_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "def main(argv, local_secret): print(local_secret, flush=True); sys.stdin.read()"
    stub = local_server._MAIN.replace("from mico_chat.cli.main import main", command)
    assert stub != local_server._MAIN
    monkeypatch.setattr(local_server, "_MAIN", stub)
    with local_server._start([], "ours-secret", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ours-secret\n"
        child = psutil.Process(process.pid)
        assert "ours-secret" not in f"{child.environ()} {child.cmdline()}"
    got: list[str | None] = []
    monkeypatch.setattr("mico_server.app.main", lambda *arguments: got.append(arguments[-1]))
    for secret in ("ours-secret", None):
        with pytest.raises(SystemExit):
            mico_chat(["serve"], local_secret=secret)
    assert got == ["ours-secret", None]


@pytest.mark.slow
def test_the_server_ends_with_us_however_we_end() -> None:
    script = (
        "import time\nfrom mico_ui.local_server import server_beside\n"
        f"with server_beside(['--port', '{free_port()}'], print):\n"
        "    print('started', flush=True)\n    time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        assert ours.stdout.readline() == b"started\n"
        children = psutil.Process(ours.pid).children()
        assert len(children) == 1
        ours.kill()
    _, left = psutil.wait_procs(children, timeout=PATIENCE_S)
    assert left == []


CHAT = [sys.executable, "-m", "mico_chat.cli", "chat"]

Piped = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MICO_API", "MICO_API_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    changes = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "", "TERM": "xterm-256color"}
    changes |= {"COLORTERM": "truecolor", "XDG_STATE_HOME": str(tmp_path / "state")}
    for name, value in (changes | {"MICO_SERVER_DATA_DIR": str(tmp_path / "own")}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Piped:
    """Runs ``mico-chat chat`` with the text of a pipe; gives its exit status, output and errors."""

    def run(*arguments: str, text: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
        with pytest.raises(SystemExit) as ended:
            mico_chat(["chat", *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def _take_terminal() -> None:
    """Makes standard input the terminal of the session, so that its Ctrl-C is a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background ignore it


class Terminal:
    """A pseudo-terminal with a program in it; ``shown`` is its output without colours."""

    def __init__(self, command: Sequence[str]) -> None:
        self.end, inner = os.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        streams: Any = dict.fromkeys(("stdin", "stdout", "stderr"), inner)
        self.process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=_take_terminal, **streams
        )
        os.close(inner)
        self.raw = ""
        self._seen = 0

    @property
    def shown(self) -> str:
        return re.sub(r"\x1b\[[\d;?]*[ -/]*[@-~]|\x1b[=>]", "", self.raw)

    def keys(self, text: str, *shown: str) -> None:
        """Type a text, and wait for what is shown then."""
        os.write(self.end, text.encode())
        for one in shown:
            self.expect(one)

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


@pytest.fixture
def screen(client: Client) -> Iterator[Terminal]:
    found = Terminal([*CHAT, "--api", client.api])
    yield found
    found.process.kill()
    found.process.wait()
    os.close(found.end)


def test_a_chat(
    client: Client,
    screen: Terminal,
    assistant: FakeAssistant,
    halfway: threading.Event,
    picture: Path,
) -> None:
    screen.expect("fake at http://127.0.0.1")
    screen.keys(f"/image '{picture.parent}/red", "red circle.png")  # in the menu
    screen.keys("\t", " circle.png")
    screen.keys("\r", "1 image red circle.png", "▀")
    assert "\x1b[38;2;255;255;255;48;2;255;255;255m▀" in screen.raw
    screen.expect("[red circle.png] > ")
    screen.keys("What is it?\r", "[image red circle.png] What is it?", "10 tokens (1 of media) + 2")
    halfway.clear()
    screen.keys("A long story\r", "[image")
    screen.keys("\x03", "stopped")
    assert assistant.cancelled.wait(timeout=PATIENCE_S)  # the server has stopped, too
    halfway.set()
    screen.keys("And now?\r", "[image red circle.png] And now?", "10 tokens")
    screen.expect("> ")  # an end of input is for the prompt
    screen.keys("\x04")
    assert screen.ends() == 0
    (summary,) = client.send(routes.conversations()).data
    turns = client.send(routes.conversation(summary.id)).turns
    assert [turn.message for turn in turns][0::2] == ["What is it?", "And now?"]


def test_in_a_pipe_there_is_the_answer_alone(
    client: Client, piped: Piped, picture: Path, assistant: FakeAssistant
) -> None:
    piped("--api", client.api, text=b"Older\n")
    (older,) = client.send(routes.conversations()).data
    client.send(routes.change_conversation(older.id, pinned=True))
    first = ("--api", client.api, "--image", str(picture), "--set", "seed=3")
    assert piped(*first, text=b"What?\n") == (0, "[image red circle.png] What?\n", "")
    assert assistant.options[1].seed == 3
    again = piped("--api", client.api, "--continue", "Sum up:", text=b"one\ntwo\xff\n")
    assert again == (0, "[image red circle.png] Sum up:\n\none\ntwo\ufffd\n", "")
    (summary,) = client.send(routes.conversations(pinned=False)).data
    assert len(client.send(routes.conversation(summary.id)).turns) == 2


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["refuse"], b"", "error: refused\n"),
        ([], b" \n", "error: there is no question"),
        (["x", "--image", "/nothing.png"], b"", "error: /nothing.png: No such file"),
        (["x", "--set", "nonsense"], b"", "error: --set nonsense: expected NAME=VALUE"),
        (["x", "--engine", "auto"], b"", "error: --engine is for a server that is started here"),
        (["x", "--model", "mini"], b"", "error: no model 'mini' there; the server has fake"),
    ],
)
def test_errors_in_a_pipe(
    client: Client, piped: Piped, arguments: list[str], text: bytes, said: str
) -> None:
    status, shown, error = piped("--api", client.api, *arguments, text=text)
    assert (status, shown, error.count("\n")) == (2, "", 1)
    assert error.startswith(said)


def test_a_key_is_asked_for_and_taken_from_the_environment(
    tmp_path: Path, piped: Piped, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = new_key(tmp_path / "data", "alice")
    with served(tmp_path, FakeAssistant()) as client:
        status, _, error = piped("--api", client.api, "Hi")
        assert status == 2
        assert error.startswith("error: this server asks for a key: give it with --key")
        monkeypatch.setenv("MICO_API", client.api)
        monkeypatch.setenv("MICO_API_KEY", secret)
        assert piped("Hi") == (0, "[] Hi\n", "")


def test_a_reader_may_close_the_pipe(client: Client, assistant: FakeAssistant) -> None:
    assistant.engine.max_position = 10_000  # whose question has more bytes than a pipe holds
    command = [*CHAT, "--api", client.api, "word " * 20_000]
    none, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, stdin=none, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.communicate()[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_server_that_cannot_start_says_why(piped: Piped) -> None:
    status, shown, error = piped("--config", "/nothing.toml", "Hi")
    assert (status, shown, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: the server could not start: /nothing.toml: no TOML file")


@pytest.mark.base_llm
def test_a_server_of_its_own_with_the_real_model(
    base_llm_folder: Path, tmp_path: Path, piped: Piped, picture: Path
) -> None:
    new_key(tmp_path / "own", "me")  # who starts the server needs no key
    status, shown, error = piped("--image", str(picture), "What is in the picture?")
    assert (status, error) == (0, "")
    assert "circle" in shown
