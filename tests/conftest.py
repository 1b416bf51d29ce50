"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that the library uses."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MICO_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def offline_environment() -> dict[str, str]:
    """An environment for subprocesses that cannot reach a hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": ""}
