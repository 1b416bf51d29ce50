"""transformers' Auto classes, without a second search.

transformers reads the files of all its models to find the names in them (0.3 s): when it is
imported, and again for ``transformers.models``. Here the second time gets what the first one found.
"""

import importlib
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers.utils import import_utils

__all__ = ["AutoConfig", "AutoTokenizer"]

UNTRIED = Version("5.25")
"""From this version on transformers searches twice: its own function may have changed."""


def _import_models() -> None:
    search: Any = import_utils.define_import_structure  # it keeps what it found
    folder = Path(transformers.__file__).parent

    def found(file: Any, prefix: str | None = None) -> Any:
        if Path(file) != folder / "models/__init__.py":
            return search(file, prefix)
        known = search(folder / "models", prefix="models").items()  # called as there
        return {
            needs: {n.removeprefix("models."): m for n, m in of.items() if n.startswith("models.")}
            for needs, of in known
        }

    vars(import_utils)["define_import_structure"] = found
    try:
        importlib.import_module("transformers.models")
    finally:
        vars(import_utils)["define_import_structure"] = search


if Version(transformers.__version__) < UNTRIED:
    _import_models()

from transformers import AutoConfig, AutoTokenizer  # noqa: E402
