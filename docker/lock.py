"""Write the image's lock files: each package in the version that the tests run with, and hashes.

    make lock

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
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.utils import parse_wheel_filename
from packaging.version import Version

HERE = Path(__file__).parent
PYTHONS = ("3.11", "3.12", "3.13")
"""Those that pyproject.toml names; the image's is 3.12, and another base may have another."""

MACHINES = ("x86_64", "aarch64")

OF_TORCH = re.compile(r"torch|torchvision|triton|(cuda|nvidia)-.*")


def default_extras() -> str:
    """The Dockerfile's; LOCKED says for which extras the locks are."""
    (found,) = re.findall(r"^ARG LOCKED=(.*)$", (HERE / "Dockerfile").read_text(), re.MULTILINE)
    return str(found)


def resolved(extras: str) -> list[dict[str, Any]]:
    """All packages of the project and these extras, in the versions that are installed here."""
    installed = {found.name: Version(found.version).public for found in distributions()}
    uv = [str(Path(sys.executable).with_name("uv")), "--quiet", "pip", "compile"]
    options = [word for extra in extras.split(",") for word in ("--extra", extra)]
    with tempfile.TemporaryDirectory() as folder:
        versions, lock = Path(folder, "versions.txt"), Path(folder, "pylock.toml")
        versions.write_text("".join(f"{name}=={at}\n" for name, at in installed.items()))
        subprocess.run(
            [
                *uv,
                *("--universal", "--python-version", PYTHONS[0], "--constraints", str(versions)),
                *("--format", "pylock.toml", "--output-file", str(lock), *options),
                str(HERE.parent / "pyproject.toml"),
            ],
            check=True,
        )
        packages: list[dict[str, Any]] = tomllib.loads(lock.read_text())["packages"]
        return packages


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
    extras = default_extras()
    packages = resolved(extras)
    of_torch = [p for p in packages if OF_TORCH.fullmatch(p["name"])]
    others = [p for p in packages if p not in of_torch]
    for name, these in (("requirements.lock", others), ("torch.lock", of_torch)):
        head = f"# `make lock` writes this file, for the extras {extras}.\n"
        (HERE / name).write_text(head + "".join(locked(these)))


if __name__ == "__main__":
    main()
