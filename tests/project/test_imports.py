"""Imports run one way, string imports too, in no circle; and importing does nothing heavy."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = {
    "mico_chat": ROOT / "mico_chat",
    "mico_server": ROOT / "server/mico_server",
    "mico_ui": ROOT / "ui/mico_ui",
    "mico_training": ROOT / "training/mico_training",
    "mico_world": ROOT / "training/mico_world",
    "mico_corpus": ROOT / "training/mico_corpus",
    "mico_research": ROOT / "training/mico_research",
    "benchmarks": ROOT / "benchmarks",
}

LAYERS = (
    ("errors", "late", "settings", "system"),
    ("fair", "fields", "media", "prompt_parts"),
    ("options",),
    ("ask", "calls", "chats", "client_text", "messages", "thoughts", "tools", "wire"),
    ("chat_template",),
    ("model",),
    ("checkpoints",),
    ("engine",),
    ("reading", "speech"),
    ("adapters",),
    ("engines",),
    ("encode", "similarity", "assistant", "explain"),
    ("load",),
    ("evaluation",),
    ("cli",),
)
"""The rooms of mico_chat from the lowest to the highest: each imports those below it, and its own.
Rooms of one line may import each other, as long as no circle of modules comes of it."""

ALLOWED = {
    "mico_server": ("mico_chat",),
    "mico_training": ("mico_chat",),
    "mico_world": ("mico_chat", "mico_training"),
    "mico_corpus": ("mico_chat", "mico_training"),
    "mico_research": ("mico_chat", "mico_training", "mico_world"),
    "mico_ui": (
        "mico_chat.errors",
        "mico_chat.late",
        "mico_chat.media",
        "mico_chat.messages",
        "mico_chat.options",
        "mico_chat.system",
        "mico_chat.wire",
        "mico_chat.__version__",
    ),
}
"""What of the project a package may import beside itself. The page talks HTTP to the server."""

EXCEPTIONS = {("mico_ui.local_server", "mico_chat.cli")}
"""Imports that may run upwards, as (importing module, imported room): the page starts the server's
process, whose code names the command line."""

HEAVY = {"torch", "transformers", "timm", "av", "peft", "fastapi", "datasets"}

_NAME = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)*(?::\w+)?")


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(tree: ast.AST, *, strings: bool = True) -> Iterator[str]:
    """Names of the modules that code imports, wherever in it.

    With ``strings`` also those that it names as text, for importlib, ``-m`` or an entry point, and
    those that code in a text imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            for name in node.names:  # a name may be a module of the package
                inner = f"{node.module}.{name.name}"
                yield inner if inner in modules() else node.module or ""
        elif strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if _NAME.fullmatch(text) and text.partition(":")[0] in modules() and "." in text:
                yield text.partition(":")[0]
            elif re.search(r"(?m)(?:^|; )(?:import|from) (?:mico|benchmarks)", text):
                try:
                    yield from imports(ast.parse(text))
                except SyntaxError:
                    continue  # prose


@cache
def imported(module: str) -> frozenset[str]:
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return frozenset(name for name in imports(tree) if name.split(".")[0] in PACKAGES)


def room(module: str) -> int:
    """The layer of a module of mico_chat; -1 for the package itself."""
    name = module.split(".")[1] if "." in module else ""
    found = [number for number, rooms in enumerate(LAYERS) if name in rooms]
    assert found or name in ("", "__version__"), f"{module} is in no layer: name it in LAYERS"
    return found[0] if found else -1


def upwards(module: str, name: str) -> bool:
    package, other = module.split(".")[0], name.split(".")[0]
    if package == "mico_chat":
        if other == "mico_chat":
            return room(name) > room(module)
        return not module.startswith("mico_chat.cli")
    if package == other or package == "benchmarks":
        return False
    return not any(name == ok or name.startswith(f"{ok}.") for ok in ALLOWED[package])


def test_imports_run_downwards() -> None:
    found = {
        (module, name) for module in modules() for name in imported(module) if upwards(module, name)
    }
    unknown = {
        (module, name)
        for module, name in found
        if (module, ".".join(name.split(".")[:2])) not in EXCEPTIONS
    }
    assert not unknown, "\n".join(f"{m} imports {n}" for m, n in sorted(unknown))


def test_entry_points_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tables = [project["scripts"], *project["entry-points"].values()]
    for entry in (entry for table in tables for entry in table.values()):
        module, _, name = entry.partition(":")
        assert f"def {name}(" in modules()[module].read_text(encoding="utf-8"), entry


def in_functions(module: str) -> set[str]:
    """The project's modules that functions of a module import."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    inside = [imports(n, strings=False) for n in ast.walk(tree) if isinstance(n, functions)]
    return {name for names in inside for name in names if name in modules()}


def test_functions_import_nothing_of_the_project() -> None:
    """What is imported late is imported in a block of mico_chat.late, at a module's top."""
    found = {module: in_functions(module) for module in modules()}
    assert not {module: names for module, names in found.items() if names}


def below(module: str) -> set[str]:
    """The modules that a module imports, wherever: late and for type checkers alone too."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    return {name for name in imports(tree, strings=False) if name in modules()} - {module}


def test_no_circles() -> None:
    graph = {module: below(module) for module in modules()}
    while free := [module for module, names in graph.items() if not names & graph.keys()]:
        for module in free:
            del graph[module]
    above = {name for names in graph.values() for name in names}
    assert not graph, f"a circle among {sorted(graph.keys() & above)}"


def loaded_by(code: str) -> set[str]:
    """The heavy packages a Python process has loaded after ``code``."""
    script = f"import sys\n{code}\nprint('LOADED', *sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return HEAVY & set(result.stdout.rsplit("LOADED", 1)[1].split())


def test_help_loads_nothing_heavy() -> None:
    commands = ["", "ask", "chat", "doctor", "serve", "ui", "export gguf", "keys create"]
    commands += ["pull", "push", "list", "rm", "ps", "mcp"]
    code = (
        "from mico_chat.cli.main import main\n"
        f"for command in {commands!r}:\n"
        "    try:\n        main([*command.split(), '--help'])\n"
        "    except SystemExit as end:\n        assert not end.code, end.code"
    )
    assert not loaded_by(code) - {"av"}  # the media package brings its decoder


def test_imports_do_not_load_torch() -> None:
    inside = "messages", "engine.base", "media.worker", "load", "assistant", "cli.ask"
    names = ["mico_server.service", *(f"mico_chat.{name}" for name in inside)]
    assert not loaded_by(f"import {', '.join(names)}") & {"torch", "transformers"}
