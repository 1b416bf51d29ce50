"""Sets of items with a name, so that anyone can say which one a figure is of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mico_chat.errors import DataError

TEXT = Path(__file__).with_name("text.jsonl")
ITEMS = "items"
"""The name that files of items go by which the command line gives."""


@dataclass(frozen=True)
class Suite:
    """Items of several files, those of ``skills`` alone.

    ``files``: in the folder of the data sets, with a word about each; ``packaged``: those that come
    with the package. ``command`` makes what is missing.
    """

    name: str
    skills: tuple[str, ...]
    files: dict[str, str]
    packaged: tuple[Path, ...]
    command: str

    def paths(self, data: Path) -> list[Path]:
        """Its files.

        Raises:
            DataError: naming those that are not there, and the command that makes them.
        """
        found = [data / name for name in self.files]
        missing = [path for path in found if not path.is_file()]
        if missing:
            named = ", ".join(
                f"{path} ({what})"
                for path, what in zip(found, self.files.values(), strict=True)
                if path in missing
            )
            raise DataError(
                data,
                None,
                f"{self.name} needs {named}; in a checkout, `{self.command.format(data=data)}` "
                "makes them without the training shards (--data names the folder)",
            )
        return [*found, *self.packaged]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "mini-skills",
            (
                *("belong", "colour", "count", "motion", "name", "nearer", "nearer (depth alone)"),
                *("position", "sound", "everyday photographs", "everyday sounds", "text only"),
            ),
            {
                "mini/items/items.jsonl": "questions about held-out scenes and sounds",
                "everyday/items.jsonl": "photographs and recordings of GCompris",
            },
            (TEXT,),
            "python -m mico_training.mini items --data {data}/mini",
        ),
    )
}
