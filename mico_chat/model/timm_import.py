"""timm without torch's compiler, which nothing of this project uses.

timm and torchvision only mark functions for it, but import all of it for that: 1.3 of the 4 s that
the imports of an answer from cold took. While they are imported, small stand-ins take the marks.
What needs the compiler later imports the real one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_UTILS = f"{_COMPILER}.utils"


def import_timm() -> Any:
    """The module timm."""
    if _COMPILER not in sys.modules:
        try:
            with _stand_ins():
                importlib.import_module("timm")
        except (ImportError, AttributeError):
            pass  # another release of them wants more of the compiler: import it
    return importlib.import_module("timm")


@contextmanager
def _stand_ins() -> Iterator[None]:
    compiler, utils = ModuleType(_COMPILER), ModuleType(_UTILS)
    vars(compiler)["disable"] = _unmarked
    vars(utils)["is_compile_supported"] = _is_compile_supported
    sys.modules.update({_COMPILER: compiler, _UTILS: utils})
    try:
        yield
    finally:
        for name, module in ((_COMPILER, compiler), (_UTILS, utils)):
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """``torch._dynamo.disable``, as a decorator with and without arguments."""
    same: Callable[[Any], Any] = lambda given: given  # noqa: E731
    return same if function is None else function


def _is_compile_supported(device: str) -> bool:
    """For torchvision, which asks when an operator is called."""
    supported: bool = importlib.import_module(_UTILS).is_compile_supported(device)
    return supported
