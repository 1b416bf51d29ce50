"""No package, folder or function is larger than ``size.toml`` allows."""

import ast
import os
import subprocess
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMITS = tomllib.loads((ROOT / "size.toml").read_text(encoding="utf-8"))
CODE = (".py", ".js", ".css", ".html")


def git(*arguments: str) -> list[str]:
    """The lines that git prints; none where it fails, as outside a clone."""
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.splitlines() if result.returncode == 0 else []


def project_files() -> list[str]:
    """The files that git knows or would add; without git all but hidden and compiled ones."""
    if (ROOT / ".git").exists():
        listed = git("ls-files", "--cached", "--others", "--exclude-standard")
        return [name for name in listed if (ROOT / name).is_file()]
    walked = ((Path(folder), names) for folder, _, names in os.walk(ROOT))
    paths = ((folder / name).relative_to(ROOT) for folder, names in walked for name in names)
    return [str(p) for p in paths if not any(x[0] == "." or x == "__pycache__" for x in p.parts)]


FILES = project_files()


def package(file: str) -> str:
    fitting: list[str] = [name for name in LIMITS["packages"] if file.startswith(f"{name}/")]
    assert fitting, f"{file} is in no package of size.toml"
    return max(fitting, key=len)


def grown(lines: Counter[str]) -> Counter[str]:
    """The lines that each file has got on this branch, or else since the limits were last set."""
    begins = [*git("merge-base", "HEAD", "origin/HEAD"), *git("merge-base", "HEAD", "main")]
    for commit in [*begins, *git("log", "-1", "--format=%H", "--", "size.toml")]:
        rows = git("grep", "--count", "", commit, "--", *(f"*{suffix}" for suffix in CODE))
        counts = (row.partition(":")[2].rpartition(":") for row in rows)
        more = lines - Counter({name: int(count) for name, _, count in counts})
        if rows and more:
            return more
    return Counter()


@pytest.mark.parametrize("name", LIMITS["packages"])
def test_no_package_is_too_large(name: str) -> None:
    code = (file for file in FILES if file.endswith(CODE) and package(file) == name)
    lines = Counter({file: len((ROOT / file).read_bytes().splitlines()) for file in code})
    most = LIMITS["packages"][name]
    if lines.total() > most["lines"] or len(lines) > most["files"]:
        more = grown(lines)
        word = "more " if more else ""
        rows = [f"  {n} lines {word}in {file}" for file, n in (more or lines).most_common(10)]
        head = f"{name}: {lines.total()} lines in {len(lines)} files, but size.toml allows {most}"
        pytest.fail("\n".join([head, *rows]), pytrace=False)


def test_no_folder_has_too_many_entries() -> None:
    entries: dict[str, set[str]] = defaultdict(set)
    for parts in (name.split("/") for name in FILES):
        for depth in range(1, len(parts)):
            entries["/".join(parts[:depth])].add(parts[depth])
    full = []
    for folder, found in sorted(entries.items()):
        most = LIMITS["folders"].get(folder, LIMITS["entries"])
        free = any(f"{folder}/".startswith(f"{name}/") for name in LIMITS["free_folders"])
        if len(found) > most and not free:
            full.append(f"{folder}: {len(found)} entries, at most {most}")
    assert not full, "\n".join(full)


def test_no_function_is_too_long() -> None:
    long = {}
    for file in (name for name in FILES if name.endswith(".py")):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name, lines = f"{file}::{node.name}", (node.end_lineno or 0) - node.lineno + 1
                if lines > LIMITS["functions"].get(name, LIMITS["function_lines"]):
                    long[name] = lines
    assert not long, f"functions over {LIMITS['function_lines']} lines: {long}"
