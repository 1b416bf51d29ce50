"""Plain everyday names: "cat" for an Egyptian Mau, "duck" for a red-breasted merganser."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from mico_chat.errors import ConfigError

TABLE = Path(__file__).with_name("plain_names.yaml")


@cache
def _table(path: Path) -> dict[int | str, str]:
    """The plain name of each finer name, which is ImageNet's class number or another name.

    Raises:
        ConfigError: a finer name has two plain names.
    """
    found: dict[int | str, str] = {}
    for plain, finer in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        for part in str(finer).split(", "):
            span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            for key in range(int(span[1]), int(span[2] or span[1]) + 1) if span else (part,):
                if key in found:
                    raise ConfigError(f"{path.name}: {key} is both {found[key]} and {plain}")
                found[key] = plain
    return found


def plain_names(names: Sequence[str], n_imagenet: int = 0, path: Path = TABLE) -> list[str]:
    """The plain name of each of ``names``, the first ``n_imagenet`` of which are ImageNet's.

    A name that the table lacks is plain already.
    """
    table = _table(path)
    return [table.get(i if i < n_imagenet else name, name) for i, name in enumerate(names)]
