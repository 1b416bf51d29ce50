"""Print what pip installs for mico-chat and some of its extras, from pyproject.toml alone.

So the image's layer of dependencies, which takes gigabytes and minutes, stays as it is when only
the package changed.

    python3 requirements.py pyproject.toml server,ui [NAME ...]

With names, those packages' requirements alone.
"""

import re
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path


def requirements(pyproject: Path, extras: Collection[str], only: Collection[str] = ()) -> list[str]:
    """The requirements of the package and of ``extras``; with ``only``, those of these names."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    if unknown := sorted(set(extras) - set(optional)):
        raise ValueError(f"no extra {', '.join(unknown)}; there are {', '.join(optional)}")
    found = {*project["dependencies"], *(one for extra in extras for one in optional[extra])}
    by_name = {requirement: re.split(r"[^\w.-]", requirement)[0] for requirement in found}
    if unknown := sorted(set(only) - set(by_name.values())):
        raise ValueError(f"no requirement {', '.join(unknown)} in {pyproject}")
    return sorted(r for r, name in by_name.items() if not only or name in only)


if __name__ == "__main__":
    try:
        named = [extra for extra in sys.argv[2].split(",") if extra]
        print("\n".join(requirements(Path(sys.argv[1]), named, sys.argv[3:])))
    except ValueError as error:
        sys.exit(f"error: {error}")
