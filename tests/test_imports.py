"""Imports run one way, and importing does nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = {
    "mico_chat": "mico_chat",
    "mico_server": "server/mico_server",
    "mico_ui": "ui/mico_ui",
    "mico_training": "training/mico_training",
}
# The UI talks HTTP to the server, never to the model; it decodes in the media layer's process.
ALLOWED = {
    "mico_chat": set(),
    "mico_server": {"mico_chat"},
    "mico_ui": {"mico_chat.media", "mico_chat.errors", "mico_chat.wire"},
    "mico_training": {"mico_chat"},
}
HEAVY = {"torch", "transformers", "timm", "av", "peft", "fastapi", "datasets"}


def imported(file: Path) -> Iterator[str]:
    """Names of all modules a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(root: Path, package: str) -> None:
    forbidden = set(PACKAGES) - ALLOWED[package] - {package}
    bad = {
        f"{file.relative_to(root)} imports {name}"
        for file in (root / PACKAGES[package]).rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] in forbidden and not _is_in(name, ALLOWED[package])
        if root / "mico_chat" / "cli" not in file.parents  # it knows everything
    }
    assert not bad


def _is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def loaded_by(code: str) -> set[str]:
    """The heavy packages a Python process has loaded after ``code``."""
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return HEAVY & set(result.stdout.rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["ask", "--help"],
        ["chat", "--help"],
        ["doctor", "--help"],
        ["serve", "--help"],
        ["ui", "--help"],
        ["export", "gguf", "--help"],
        ["keys", "create", "--help"],
        ["version"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "from mico_chat.cli.main import main\n"
        f"try:\n    main({arguments!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    assert not loaded_by(code) - {"av"}  # the media package brings its decoder


@pytest.mark.parametrize(
    "module",
    [
        *("mico_chat", "mico_chat.messages", "mico_chat.engine", "mico_chat.load"),
        *("mico_chat.assistant", "mico_chat.cli.ask", "mico_server.service"),
    ],
)
def test_import_does_not_load_torch(module: str) -> None:
    assert not loaded_by(f"import {module}") & {"torch", "transformers"}
