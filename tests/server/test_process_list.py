"""No user of the machine reads a database's password in the list of processes, or in an error."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mico_chat.cli.main import main
from mico_chat.cli.process_list import without_addresses

PASSWORD = "open%20sesame"
URL = f"postgresql://mico:{PASSWORD}@127.0.0.1:1/mico"
COMMANDS = {
    "serve": ["--database-url", URL],
    "ui": [f"--database-url={URL}"],
    "keys": ["list", "--database-url", URL],
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_running_command_shows_no_password(command: str, tmp_path: Path) -> None:
    pipe = tmp_path / "settings.toml"
    os.mkfifo(pipe)
    words = [sys.executable, "-m", "mico_chat.cli", command, *COMMANDS[command]]
    settings = {"MICO_SERVER_CONFIG": str(pipe)}
    with subprocess.Popen(words, env=os.environ | settings, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        writing = None
        while writing is None and process.poll() is None:
            try:
                writing = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                time.sleep(0.02)  # nobody reads: the command has not come to its settings
        assert writing is not None, process.stderr.read()
        line = psutil.Process(process.pid).cmdline()
        os.write(writing, b"no settings")
        os.close(writing)
        said = process.stderr.read().decode()
    assert PASSWORD not in " ".join(line)
    assert line[1:] == [word for word in words[1:] if "-url" not in word and "://" not in word]
    assert (process.returncode, PASSWORD in said) == (2, False), said
    assert "no TOML file to read" in said


def test_an_option_counts_though_it_is_moved() -> None:
    words = ["--database-url", URL, "--rate-limit-store=redis://:sesame@127.0.0.1"]
    command = [sys.executable, "-m", "mico_chat.cli", "serve", "--show-settings", *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
