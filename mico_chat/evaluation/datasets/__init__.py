"""The data sets of the tasks (``datasets.yaml``): their layout on disk, and their readers."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel

from mico_chat.errors import DataError
from mico_chat.evaluation.datasets import readers
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

    def layout(self, data: Path) -> str:
        """The folder tree that it needs, and where it comes from."""
        width = max(len(name) for name in self.tree)
        lines = [f"  {name:<{width}}  {what}".rstrip() for name, what in self.tree.items()]
        return "\n".join([f"{data / self.folder}/", *lines, f"from: {self.page}"])

    def missing(self, data: Path) -> list[str]:
        folder = data / self.folder
        needed = [name for name in self.tree if not name.startswith("[")]
        return [name for name in needed if not any(folder.glob(name.rstrip("/")))]

    def read(self, data: Path, split: Split = "test") -> Contents:
        folder = data / self.folder
        name = "clotho" if self.name.startswith("clothov") else self.name.replace("-", "_")
        read = mini_skills if name == "mini_skills" else getattr(readers, name)
        contents: Contents = read(folder, split)
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
