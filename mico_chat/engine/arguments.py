"""Arguments that an engine takes by its own names: which it knows, and what is said of others."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from mico_chat.errors import ConfigError

SIZES: dict[str, tuple[str, ...]] = {
    "llamacpp": ("n_cells", "n_slots", "threads"),
    "transformers": ("max_bytes", "max_position", "n_slots"),
}
"""Keyword arguments of this project's own engines' models, all of them numbers."""


def check_sizes(engine: str, arguments: Mapping[str, Any]) -> None:
    """Refuse what ``llamacpp`` or ``transformers`` has not, naming it.

    Raises:
        ConfigError: for a name that is not in :data:`SIZES`, or a value that is no number from 1.
    """
    check_names(engine, arguments, SIZES[engine])
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name}: expected a whole number of at least 1, got {value!r}")


def check_names(engine: str, arguments: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a name that an engine does not know.

    Raises:
        ConfigError: naming it, and the nearest that the engine knows; or all of them, if few.
    """
    for name in arguments:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif len(known) < 10:
            hint = f"its options are {', '.join(sorted(known))}"
        else:
            hint = f"the documentation of {engine} lists its options"
        raise ConfigError(f"the {engine} engine lacks the option {name!r}; {hint}")
