"""The project's own files agree with each other."""

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docker.lock import ELSEWHERE
from mico_chat import __version__


@pytest.fixture
def pyproject(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_shipped_and_typed(root: Path, pyproject: dict[str, Any]) -> None:
    lab = [f"training/mico_{name}" for name in ("training", "world", "corpus", "research")]
    roots = ["mico_chat", "server/mico_server", "ui/mico_ui", *lab]
    there = [package for package in roots if (root / package).is_dir()]
    assert pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == there
    for package in there:
        assert (root / package / "__init__.py").is_file()
        assert (root / package / "py.typed").is_file()
    # Nothing generic may land in site-packages.
    assert not [
        name for name in ("server", "ui", "training") if (root / name / "__init__.py").exists()
    ]


def test_every_dependency_has_both_bounds(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    for requirement in sum(extras.values(), project["dependencies"]):
        assert requirement.startswith("mico-chat[") or re.search(r">=[^,]+,<", requirement), (
            requirement
        )


def test_tested_versions_are_within_the_bounds(root: Path, pyproject: dict[str, Any]) -> None:
    """One version for each package: names and versions alone, and no build of PyTorch."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {one.name: str(one.specifier).removeprefix("==") for one in pinned}
    assert len(versions) == len(pinned)
    assert not [line for line in lines if "://" in line or "+" in line]
    assert not {"torch", "torchvision", "triton"} & set(versions)
    extras = pyproject["project"]["optional-dependencies"]
    within = [text for name, texts in extras.items() if name not in ELSEWHERE for text in texts]
    for asked in map(Requirement, [*pyproject["project"]["dependencies"], *within]):
        if asked.name not in ("torch", "torchvision", "mico-chat"):
            version = versions.get(canonicalize_name(asked.name))
            assert version is not None, f"{asked}: make lock"
            assert asked.specifier.contains(version), f"{asked}: make lock"


def test_the_image_has_the_tested_versions(root: Path) -> None:
    read = re.compile(r"^([\w.-]+)==([^ ;\n]+)", re.MULTILINE)
    tested = dict(read.findall((root / "constraints.txt").read_text(encoding="utf-8")))
    locked = dict(read.findall((root / "docker/requirements.lock").read_text(encoding="utf-8")))
    # pip and setuptools are of the environment.
    assert not {name for name in locked if name in tested and tested[name] != locked[name]}
    assert set(locked) - set(tested) <= {"pip", "setuptools"}


def test_commits_run_what_make_check_runs(root: Path) -> None:
    config = yaml.safe_load((root / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repo,) = config["repos"]
    assert repo["repo"] == "local"
    assert {hook["language"] for hook in repo["hooks"]} == {"system"}
    check = (root / "Makefile").read_text().split("\ncheck:", 1)[1].split("\n\n", 1)[0]
    steps = [line.strip() for line in check.splitlines()[1:] if "PYTEST" not in line]
    entries = [hook["entry"].replace(".venv/bin", "$(BIN)") for hook in repo["hooks"]]
    assert set(steps) <= set(entries)
    assert entries[-1] == "make check"


def test_ci_checks_format_lint_types_and_tests(root: Path) -> None:
    script, makefile = root / ".ci" / "run", (root / "Makefile").read_text()
    assert "make check" in script.read_text()
    assert script.stat().st_mode & stat.S_IXUSR
    check = makefile.split("\ncheck:", 1)[1].split("\n\n", 1)[0]
    for step in ("ruff format --check", "ruff check", "mypy", "$(PYTEST)"):
        assert step in check
    assert re.search(r"^PYTEST = .*python -m pytest ", makefile, re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("given", [None, "-DGGML_CUDA=ON"])
def test_make_setup_builds_llama_cpp_as_the_user_says(root: Path, given: str | None) -> None:
    environment = {name: os.environ[name] for name in ("PATH",)}
    environment |= {} if given is None else {"CMAKE_ARGS": given}
    print_all = ["make", "--print-data-base", "--dry-run", "setup"]
    result = subprocess.run(print_all, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.replace("$(CURDIR)", str(root))
    (arguments,) = set(re.findall(r"^CMAKE_ARGS = (.*)$", printed, re.MULTILINE))
    assert arguments == given or (given is None and "-DMTMD_VIDEO=OFF" in arguments)
    assert re.search(r"^CMAKE_BUILD_PARALLEL_LEVEL = ", result.stdout, re.MULTILINE)


def test_version_and_licence(root: Path, pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["version"] == __version__
    assert pyproject["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (root / "LICENSE").read_text()
