"""The commands in the documentation exist, with these options; the first ones of the README run."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import typer

from mico_chat.cli.main import app, main
from mico_server.app import create_app
from mico_server.host import ModelSource
from mico_server.settings import ServerSettings
from tests.support.fakes import FakeAssistant

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "MODEL_CARD.md", "benchmarks/README.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MARKS = {";", "|", "&&", "||", ">", "<"}
EXAMPLES = ROOT / "ui/mico_ui/examples"


class Command(NamedTuple):
    page: str
    words: list[str]
    whole: bool
    """Whether it stands in a block of its own; one within a sentence may lack arguments."""


def commands() -> Iterator[Command]:
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for language, block in FENCED.findall(text):
            if language in ("", "bash", "console"):
                for line in block.replace("\\\n", " ").splitlines() if "+--" not in block else ():
                    yield from (Command(page, one, True) for one in parts(line))
        for inline in re.findall(r"`([^`]+)`", FENCED.sub("", text)):
            if inline.startswith(("mico-chat ", "make ", "python -m ", "curl ")):
                yield from (Command(page, one, False) for one in parts(inline))


def parts(line: str) -> Iterator[list[str]]:
    """The programs of a line with their arguments, without variables in front."""
    line = re.sub(r"\w+=\$\((.*)\)", r"\1", line.removeprefix("$ "))
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        for word in [*lexer, ";"]:
            if word not in MARKS:
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
    except ValueError:  # an output that a console shows
        return


def of(program: str) -> list[Any]:
    found = [one for one in commands() if Path(one.words[0]).name == program]
    inside = [one for one in commands() if one.words[0] == "docker" and program in one.words]
    for one in inside if program == "mico-chat" else ():
        words = one.words[one.words.index(program) :]
        if "build" not in one.words and words[1:]:
            found.append(one._replace(words=words))
    once = {tuple(one.words): one for one in found}
    return [
        pytest.param(one, id=f"{one.page}: {' '.join(words)}"[:90]) for words, one in once.items()
    ]


@pytest.mark.parametrize("command", of("mico-chat"))
def test_mico_chat_takes_these_options(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [word for word in command.words[1:] if word != "..."]
    # A recipe without a folder is one that a command of the page wrote.
    for config in (word for word in arguments if word.endswith(".yaml") and "/" in word):
        assert (ROOT / config).is_file(), f"{config} of {command.page}"
    # These two read their arguments when they run: with another option they run no further.
    end = {"serve": "--show-settings", "evaluate": "--list"}.get(arguments[0])
    if end is not None:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([*arguments, end])
        return
    group: Any = typer.main.get_command(app)
    while arguments not in ([], ["--help"]) and hasattr(group, "commands"):
        assert arguments[0] in group.commands, command
        group, arguments = group.commands[arguments[0]], arguments[1:]
    if arguments not in ([], ["--help"]):
        try:
            group.make_context(group.name, arguments)
        except typer.BadParameter as error:
            if command.whole or type(error).__name__ != "MissingParameter":
                raise


@pytest.mark.parametrize("command", of("make"))
def test_make_has_these_targets(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    targets = [word for word in command.words[1:] if "=" not in word]
    assert targets
    assert set(targets) <= set(phony.split())


@pytest.mark.parametrize("command", of("python"))
def test_python_has_these_modules(command: Command) -> None:
    flag, module = command.words[1:3]
    assert flag == "-m"
    if module not in ("lmms_eval", "venv"):
        assert importlib.util.find_spec(module) is not None, module
    for file in command.words[3:] if module == "pytest" else ():
        assert (ROOT / file).exists(), file


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    settings = ServerSettings(data_dir=tmp_path_factory.mktemp("data"))
    service: Any = create_app([ModelSource("fake", FakeAssistant)], settings)
    found: dict[str, Any] = service.openapi()
    return found


@pytest.mark.parametrize("command", of("curl"))
def test_the_api_has_these_fields(command: Command, description: dict[str, Any]) -> None:
    (url,) = (word for word in command.words if word.startswith("http"))
    forms = values(command.words, "-F")
    bodies = values(command.words, "-d")
    route = description["paths"][urlsplit(url).path]
    content = route["post" if forms or bodies else "get"].get("requestBody", {"content": {}})
    (schema,) = (
        one["schema"]
        for kind, one in content["content"].items()
        if ("json" in kind) == bool(bodies)
    )
    while "$ref" in schema:
        schema = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    given = {form.partition("=")[0] for form in forms}.union(*map(json.loads, bodies))
    assert given <= set(schema["properties"])
    assert set(schema.get("required", ())) <= given


def test_the_api_has_these_routes(description: dict[str, Any]) -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"`(GET|POST|DELETE) (/v1/[^` ?]+)", text))
    known = {(m.upper(), path) for path, methods in description["paths"].items() for m in methods}
    unnamed = {(method, re.sub(r"{\w+}", "{}", path)) for method, path in known}
    assert {(method, re.sub(r"{\w+}", "{}", path)) for method, path in named} <= unnamed


def values(words: list[str], flag: str) -> list[str]:
    return [value for name, value in pairwise(words) if name == flag]


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = (re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)
            assert anchor in slugs, f"{link}#{anchor}"


def samples() -> list[Any]:
    texts = ((page, (ROOT / page).read_text(encoding="utf-8")) for page in PAGES)
    blocks = [
        (page, code)
        for page, text in texts
        for kind, code in FENCED.findall(text)
        if kind == "python"
    ]
    return [pytest.param(code, id=f"{page} {number}") for number, (page, code) in enumerate(blocks)]


@pytest.mark.parametrize("code", samples())
def test_samples_import_what_is_there(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.base_llm
@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_the_questions_of_the_readme(
    base_llm_folder: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = next(x for x in (ROOT / "README.md").read_text().splitlines() if f"ask --{kind}" in x)
    command, _, answer = line.partition("#")
    monkeypatch.chdir(EXAMPLES)
    with pytest.raises(SystemExit, match=r"^0$"):
        main(shlex.split(command)[1:])
    assert capsys.readouterr().out.strip() == answer.strip()


@pytest.mark.base_llm
def test_the_sample_of_the_readme(
    base_llm_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[-1]
    monkeypatch.chdir(EXAMPLES)
    exec(compile(code, "README.md", "exec"), {})
    assert "cat" in capsys.readouterr().out
