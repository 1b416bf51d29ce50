"""Whether lmms-eval can be tested here: ``make test-lmms`` has it in an environment of its own."""

from __future__ import annotations

import importlib.util

import pytest

needs_lmms = [
    pytest.mark.lmms,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="lmms-eval is not installed here; `make test-lmms` has it",
    ),
    # What it imports is given up here and there.
    pytest.mark.filterwarnings("ignore"),
]
"""Marks of a module's tests."""
