"""No user of the machine reads a database's password in the list of processes, or in an error."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mico_chat.cli.main import main
from mico_chat.cli.process_list import without_addresses
from tests.support.waiting import until

PASSWORD = "open%20sesame"
URL = f"postgresql://mico:{PASSWORD}@127.0.0.1:1/mico"


def test_a_running_command_shows_no_password_and_heeds_its_options(tmp_path: Path) -> None:
    pipe = tmp_path / "settings.toml"
    os.mkfifo(pipe)
    options = ["--database-url", URL, "--rate-limit-store=redis://:sesame@127.0.0.1"]
    words = [sys.executable, "-m", "mico_chat.cli", "serve", "--show-settings"]
    settings = os.environ | {"MICO_SERVER_CONFIG": str(pipe)}
    with subprocess.Popen([*words, *options], env=settings, stdout=subprocess.PIPE) as process:

        def reads() -> int | None:
            try:
                return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                return None  # the command has not come to its settings

        writing = until(reads, lambda: process.poll() is None)
        line = psutil.Process(process.pid).cmdline()
        os.close(writing or 0)
        assert process.stdout is not None
        said = process.stdout.read().decode()
    assert line[1:] == words[1:]
    assert 'database_url = "postgresql://mico:***@127.0.0.1:1/mico"' in said
    assert 'rate_limit_store = "redis://:***@127.0.0.1"' in said


def test_words_without_a_password_stay() -> None:
    for words in (
        ["serve", "--database-url", "sqlite:///file.db", "--port", "1"],
        ["serve", "--database-url", "postgresql://mico@host:1/mico", "--database-url"],
        ["ask", "--database-url", URL],
        [],
    ):
        assert without_addresses(words) == (words, {})
    for command in ("serve", "ui", "keys"):
        assert without_addresses([command, f"--database-url={URL}", "list"])[0] == [command, "list"]
    query = "postgresql://mico@host/mico?password=sesame"
    moved = {"MICO_SERVER_DATABASE_URL": query}
    assert without_addresses(["ui", "--port", "1", "--database-url", query, "--insecure"]) == (
        ["ui", "--port", "1", "--insecure"],
        moved,
    )


@pytest.mark.parametrize(
    "words",
    [
        ["keys", "list", f"redis://:{PASSWORD}@host"],
        ["serve", "--port", URL],
        ["keys", "list", f"postgresql://mico@host/mico?password={PASSWORD}&ssl=require"],
    ],
)
def test_an_error_shows_no_password(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "***" in said
    assert PASSWORD not in said
