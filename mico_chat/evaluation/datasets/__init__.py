"""The data sets of the tasks (``datasets.yaml``): their files on disk and their items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from mico_chat.errors import DataError
from mico_chat.evaluation.datasets.readers import CHANGES, Annotations, read_annotations, world
from mico_chat.evaluation.task import Contents, Split, read_items

TEXT = Path(__file__).parents[1] / "text.jsonl"
"""Questions without media, which come with the package."""


def mini_skills(folder: Path, split: Split) -> Contents:
    files = [folder / "mini/items/items.jsonl", folder / "everyday/items.jsonl", TEXT]
    return Contents([item for path in files for item in read_items(path)])


class DataSet(BaseModel, extra="forbid", frozen=True):
    """A data set as its publishers distribute it; ``datasets.yaml`` explains the fields."""

    name: str
    folder: str
    page: str
    tree: dict[str, str]
    command: str = ""
    items: Annotations | None = None
    train: dict[str, Any] = {}

    def layout(self, data: Path) -> str:
        """The folder tree that the data set needs, and where to get it."""
        width = max(len(name) for name in self.tree)
        lines = [f"  {name:<{width}}  {what}".rstrip() for name, what in self.tree.items()]
        return "\n".join([f"{data / self.folder}/", *lines, f"from: {self.page}"])

    def missing(self, data: Path) -> list[str]:
        folder = data / self.folder
        needed = [name for name in self.tree if not name.startswith("[")]
        return [name for name in needed if not any(folder.glob(name.rstrip("/")))]

    def read(self, data: Path, split: Split = "test") -> Contents:
        """The items that a test measures, or those that fine-tuning reads."""
        folder = data / self.folder
        if self.items is None:
            contents = (world if self.name == "world" else mini_skills)(folder, split)
        else:
            changed = self.train if split == "train" else {}
            form = Annotations(**self.items.model_dump() | changed)
            change = CHANGES[self.name](folder) if self.name in CHANGES else dict
            contents = read_annotations(folder, form, change)
        if not contents.items:
            why = f"none of {len(contents.broken)} items can be used"
            if contents.broken:
                why += f"; the first: {': '.join(contents.broken[0])}"
            raise DataError(folder, None, why)
        return contents


DATASETS: dict[str, DataSet] = {
    name: DataSet(name=name, **row)
    for name, row in yaml.safe_load(
        Path(__file__).with_name("datasets.yaml").read_text(encoding="utf-8")
    ).items()
}
