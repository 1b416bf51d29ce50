"""Marks for tests that need lmms-eval; ``make test-lmms`` runs them in their own environment."""

from __future__ import annotations

import importlib.util

import pytest

needs_lmms = [
    pytest.mark.lmms,
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="lmms-eval is not installed here; `make test-lmms` has it",
    ),
    # Packages that lmms-eval imports give deprecation warnings.
    pytest.mark.filterwarnings("ignore"),
]
"""Marks of a module's tests."""
