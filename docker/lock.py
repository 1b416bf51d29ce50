"""Write the versions that the tests run with: constraints.txt, and the image's lock files.

    make lock

``constraints.txt`` has the versions that ``make setup`` installs, but for PyTorch, of which each
machine needs its own build. The image's locks are of the same versions, with hashes:
``requirements.lock`` has all but PyTorch; ``torch.lock`` has PyTorch and what only its builds for
CUDA need. They are apart because another index (TORCH_INDEX) has other builds, and so other hashes.
A lock holds no address: pip takes the files from where it takes all files. Hashes are those of the
wheels for Linux on x86_64 and aarch64, and of the sources.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.utils import parse_wheel_filename
from packaging.version import Version

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHONS = ("3.11", "3.12", "3.13")
"""Those that pyproject.toml names; the image's is 3.12, and another base may have another."""

MACHINES = ("x86_64", "aarch64")

CONSTRAINTS_HEAD = """\
# `make setup` installs these versions: those that the tests have run with. `make lock` writes them.
# Each machine needs its own build of PyTorch (make TORCH=...): the next line is tried first.
# {torch}
"""

OF_TORCH = re.compile(r"torch|torchvision|triton|(cuda|nvidia)-.*")

UNBOUND = re.compile(rf"({OF_TORCH.pattern}|pip|setuptools)==")
"""Packages that constraints.txt leaves to PyTorch's build and to Python's environment."""

ELSEWHERE = ("bench", "lmms", "talk", "vllm")
"""Extras that have an environment of their own, or that the tests do not install."""


def default_extras() -> str:
    """The Dockerfile's; LOCKED says for which extras the locks are."""
    (found,) = re.findall(r"^ARG LOCKED=(.*)$", (HERE / "Dockerfile").read_text(), re.MULTILINE)
    return str(found)


def compiled(extras: Collection[str], constraints: str, file: str) -> str:
    """What uv writes of the project and these extras, for all platforms, within constraints.

    The name of the file says in which format.
    """
    uv = [str(Path(sys.executable).with_name("uv")), "--quiet", "pip", "compile", "--universal"]
    uv += ["--python-version", PYTHONS[0], "--no-annotate", "--no-header"]
    with tempfile.TemporaryDirectory() as folder:
        versions, output = Path(folder, "versions.txt"), Path(folder, file)
        versions.write_text(constraints)
        uv += ["--constraints", str(versions), "--output-file", str(output)]
        uv += [word for extra in extras for word in ("--extra", extra)]
        subprocess.run([*uv, str(ROOT / "pyproject.toml")], check=True)
        return output.read_text()


def tested_versions() -> str:
    """A line for each package that the tests may use, in the version that is installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for name in project["optional-dependencies"] if name not in ELSEWHERE]
    here = {found.name: Version(found.version).public for found in distributions()}
    installed = "".join(f"{name}=={version}\n" for name, version in here.items())
    return compiled(extras, installed, "requirements.txt")


def on_linux(marker: str | None) -> str | None:
    """The marker for pip on Linux: empty if it always holds there, None if it never does."""
    if marker is None:
        return ""
    holds = {
        Marker(marker).evaluate(
            {
                "sys_platform": "linux",
                "platform_system": "Linux",
                "platform_machine": machine,
                "platform_python_implementation": "CPython",
                "python_version": python,
                "python_full_version": f"{python}.0",
            }
        )
        for python in PYTHONS
        for machine in MACHINES
    }
    return None if holds == {False} else "" if holds == {True} else f" ; {marker}"


def fits(wheel: str) -> bool:
    """Whether the image may install this wheel."""
    pythons = {f"cp{python.replace('.', '')}" for python in PYTHONS}
    return any(
        (
            tag.platform == "any"
            or re.fullmatch(rf"manylinux.*_({'|'.join(MACHINES)})", tag.platform)
        )
        and (tag.interpreter.startswith("py3") or tag.abi == "abi3" or tag.abi in pythons)
        for tag in parse_wheel_filename(wheel)[3]
    )


def locked(packages: list[dict[str, Any]]) -> Iterator[str]:
    """A requirement for each package that Linux needs."""
    for package in packages:
        marker = on_linux(package.get("marker"))
        if marker is None:
            continue
        wheels = [w for w in package.get("wheels", []) if fits(w["url"].rpartition("/")[2])]
        files = [*wheels, *([package["sdist"]] if "sdist" in package else [])]
        if not files:
            sys.exit(f"error: {package['name']} {package['version']} has no file for Linux")
        hashes = sorted(f"--hash=sha256:{file['hashes']['sha256']}" for file in files)
        yield " \\\n    ".join([f"{package['name']}=={package['version']}{marker}", *hashes]) + "\n"


def main() -> None:
    tested = tested_versions()
    lines = tested.splitlines(keepends=True)
    torch = " ".join(re.findall(r"^torch(?:vision)?==[^ \n]+", tested, re.MULTILINE))
    kept = "".join(line for line in lines if not UNBOUND.match(line))
    (ROOT / "constraints.txt").write_text(CONSTRAINTS_HEAD.format(torch=torch) + kept)

    extras = default_extras()
    compiled_lock = compiled(extras.split(","), tested, "pylock.toml")
    packages = tomllib.loads(compiled_lock)["packages"]
    of_torch = [p for p in packages if OF_TORCH.fullmatch(p["name"])]
    others = [p for p in packages if p not in of_torch]
    for name, these in (("requirements.lock", others), ("torch.lock", of_torch)):
        head = f"# `make lock` writes this file, for the extras {extras}.\n"
        (HERE / name).write_text(head + "".join(locked(these)))


if __name__ == "__main__":
    main()
