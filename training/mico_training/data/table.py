"""Tables of words and settings in YAML, with a fixed set of keys."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mico_chat.errors import ConfigError


class Table(BaseModel):
    """A YAML file, or a part of one, with a fixed set of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            rows = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        return cls.of(rows, path.name)

    @classmethod
    def reader(cls, path: Path) -> Callable[[], Self]:
        """A function that reads the table at its first call."""
        return cache(lambda: cls.read(path))

    @classmethod
    def of(cls, rows: Any, name: str) -> Self:
        """The table with these ``rows``; the ConfigError for wrong ones names it ``name``."""
        try:
            return cls.model_validate(rows)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise ConfigError(f"{name}: {key}: {first['msg']}") from error
