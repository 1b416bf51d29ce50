"""A kind of medium is a row of one table: a new row shows in all that reads the table."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mico_chat.media import kinds

ROW = """
from mico_chat.media.kinds import KindRow

KINDS = {
    "scan": KindRow(
        noun="scan",
        words="a scan",
        label="Scan: ",
        layout="still",
        decoder="image.decode_image",
        formats=("gzip",),
        files="gzip of a scanner",
        endings=(".scan",),
        made_of=("image",),
    ),
}
"""

SHOWN = """
import json, typer.main

from mico_chat.media import kinds
from mico_chat.adapters.base import shown_kinds
from mico_chat.cli.main import app
from mico_chat.media.file import MediaFile, looks_like
from mico_chat.messages import from_openai
from mico_chat.wire import MediaObject
from mico_server.dialects.chat import chat_body
from mico_ui.browser.cards import kinds_of
from mico_ui.terminal.chat import COMMANDS
from mico_ui.terminal.talk import kind_of

part = {"type": "scan_url", "scan_url": {"url": "data:;base64,aGk="}}
(message,) = from_openai([{"role": "user", "content": [part]}])
form = chat_body()["requestBody"]["content"]["multipart/form-data"]["schema"]
commands = typer.main.get_command(app).commands.items()
print(json.dumps({
    "flags": {n: p.help for n, command in commands for p in command.params if "--scan" in p.opts},
    "field": form["properties"]["scan"]["items"]["format"],
    "part": message.files[0].kind,
    "schema": MediaObject.model_json_schema()["properties"]["kind"]["enum"],
    "page": kinds.listed()["scan"],
    "terminal": COMMANDS["scan"].help,
    "dropped": kind_of("a.scan"),
    "guessed": kinds_of(bytes([31, 139]), "a.gz"),
    "of_pictures": shown_kinds(["image"]),
    "of_sounds": shown_kinds(["audio"]),
    "looks": looks_like("gzip", b""),
    "modalities": kinds.MODALITIES,
}))
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the parts of the project show of a table that has another row."""
    folder = tmp_path_factory.mktemp("kinds")
    (folder / "scans.py").write_text(ROW)
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", SHOWN],
        env=os.environ | {"PYTHONPATH": path, "MICO_KINDS": "scans"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("flags", dict.fromkeys(("ask", "chat"), "Ask about a scan. Repeatable.")),
        ("field", "binary"),
        ("part", "scan"),
        ("schema", [*kinds.KINDS, "scan"]),
        ("terminal", "attach a scan to the question"),
        ("dropped", "scan"),
        ("guessed", ["scan"]),
        ("looks", "are a scan (gzip)"),
        ("of_pictures", ["image", "depth", "normal", "document", "scan"]),
        ("of_sounds", ["audio", "document", "scan"]),
        ("modalities", list(kinds.MODALITIES)),
    ],
)
def test_a_new_row_shows_everywhere(shown: dict[str, Any], where: str, what: Any) -> None:
    assert shown[where] == what


def test_the_page_gets_the_row(shown: dict[str, Any]) -> None:
    asked = ("noun", "plural", "layout", "endings", "player", "made_of")
    row = [shown["page"][name] for name in asked]
    assert row == ["scan", "scans", "still", [".scan"], "", ["image"]]


def test_no_script_of_the_page_names_a_kind() -> None:
    web = Path(__file__).parents[2] / "ui/mico_ui/browser/web"
    named = {
        (script.name, kind)
        for script in web.glob("*.js")
        for kind in kinds.KINDS
        if f'kind === "{kind}"' in script.read_text() or f'includes("{kind}")' in script.read_text()
    }
    assert not named
