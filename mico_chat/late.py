"""Imports of modules that run when they are first used, so that a command starts quickly.

Modules that bring torch or another slow library are imported in a block at the end of a module's
imports; type checkers see ordinary imports::

    with late():
        from mico_chat.checkpoints import load as checkpoint_load

The block binds a module that has not run. Reading one of its attributes runs it, once, in whichever
thread comes first; an error of its imports is raised there. The block takes modules of this project
(``from package import module``): a name inside a module would have to be read at once, and a
package's ``__init__`` runs at once. A slow library stands at the top of a module that is imported
late.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OURS = {"benchmarks", "mico_chat", "mico_corpus", "mico_research", "mico_server", "mico_training"}
OURS |= {"mico_ui", "mico_world"}


@contextmanager
def late() -> Iterator[None]:
    """Import the project's modules of this block when they are first used."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def run(*modules: ModuleType) -> None:
    """Run late modules now, to meet the errors of their imports here."""
    for module in modules:
        loader: Any = getattr(module.__spec__, "loader", None)
        if isinstance(loader, _LateLoader):
            loader.run(module)


def unrun(name: str) -> ModuleType:
    """A library's package whose own code runs when one of its names is used that it lacks.

    Its modules can be imported before that. Where it has been imported, it is as it is.
    """
    if (there := sys.modules.get(name)) is not None:
        return there
    if (spec := importlib.util.find_spec(name)) is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    package, lock = importlib.util.module_from_spec(spec), threading.RLock()
    to_run = [spec.loader.exec_module]

    def missing(wanted: str) -> Any:
        with lock:  # other threads wait until it has run
            if to_run:
                to_run.pop()(package)
        if wanted not in vars(package):
            raise AttributeError(f"module {name!r} has no attribute {wanted!r}", name=wanted)
        return vars(package)[wanted]

    vars(package)["__getattr__"] = missing
    sys.modules[name] = package
    if parent := sys.modules.get(name.rpartition(".")[0]):
        setattr(parent, name.rpartition(".")[2], package)
    return package


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if threading.get_ident() != self._thread or name.partition(".")[0] not in OURS:
            return None
        for finder in sys.meta_path:
            if not isinstance(finder, _Finder) and (spec := finder.find_spec(name, path, target)):
                if spec.loader is not None and spec.submodule_search_locations is None:
                    spec.loader = _LateLoader(spec.loader)
                return spec
        return None


class _LateLoader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader
        # Imports run in no circle, so that threads that wait for each other's modules come to an
        # end: each waits for modules below its own alone.
        self._lock = threading.RLock()
        self._running = False

    def __getattr__(self, name: str) -> Any:  # source, file name and resources, for tracebacks
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _LateModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is: its first use runs it."""

    def run(self, module: ModuleType) -> None:
        with self._lock:
            if self._running or type(module) is not _LateModule:
                return
            self._running = True
            try:
                self._loader.exec_module(module)
                object.__setattr__(module, "__class__", ModuleType)
            finally:
                self._running = False


class _LateModule(ModuleType):
    """A module that runs when one of its own names is read.

    What a module has before it runs (``__file__``, ``__spec__``) is given without running it:
    Python's own tools ask all modules for it.
    """

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__"):
            ModuleType.__getattribute__(self, "__spec__").loader.run(self)
        return ModuleType.__getattribute__(self, name)  # it has another class by now
