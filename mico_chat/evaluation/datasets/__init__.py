"""The data sets of the tasks (``datasets.yaml``): their layout on disk, and their readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from mico_chat.errors import DataError
from mico_chat.evaluation.datasets import captions, questions
from mico_chat.evaluation.task import Contents, Split, read_items

SKILLS_FILES = ("mini/items/items.jsonl", "everyday/items.jsonl")
TEXT = Path(__file__).parents[1] / "text.jsonl"
"""Questions without media, which come with the package."""


def mini_skills(folder: Path, split: Split) -> Contents:
    files = [*(folder / name for name in SKILLS_FILES), TEXT]
    return Contents([item for path in files for item in read_items(path)])


READERS: dict[str, Callable[[Path, Split], Contents]] = {
    "coco": captions.coco,
    "flickr30k": captions.flickr30k,
    "vqav2": questions.vqav2,
    "clothov1": captions.clotho,
    "clothov2": captions.clotho,
    "clotho-aqa": questions.clotho_aqa,
    "audiocaps": captions.audiocaps,
    "msrvtt-1ka": captions.msrvtt_1ka,
    "msrvtt": captions.msrvtt,
    "msrvtt-qa": questions.msrvtt_qa,
    "msvd-qa": questions.msvd_qa,
    "tgif-qa": questions.tgif_qa,
    "youcook2": captions.youcook2,
    "valor32k": captions.valor32k,
    "vatex": captions.vatex,
    "didemo": captions.didemo,
    "activitynet": captions.activitynet,
    "activitynet-qa": questions.activitynet_qa,
    "music-avqa": questions.music_avqa,
    "world": captions.world,
    "mini-skills": mini_skills,
}


class DataSet(BaseModel):
    """A data set as its publishers distribute it; ``datasets.yaml`` explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    folder: str
    page: str
    tree: dict[str, str]
    command: str = ""

    def layout(self, data: Path) -> str:
        width = max(len(name) for name in self.tree)
        lines = [f"  {name:<{width}}  {what}".rstrip() for name, what in self.tree.items()]
        return "\n".join([f"{data / self.folder}/", *lines, f"from: {self.page}"])

    def missing(self, data: Path) -> list[str]:
        folder = data / self.folder
        needed = [name for name in self.tree if not name.startswith("[")]
        return [name for name in needed if not any(folder.glob(name.rstrip("/")))]

    def read(self, data: Path, split: Split = "test") -> Contents:
        contents = READERS[self.name](data / self.folder, split)
        if not contents.items:
            first = ": ".join(contents.broken[0]) if contents.broken else ""
            why = f"; the first: {first}" if first else ""
            raise DataError(
                data / self.folder, None, f"none of {len(contents.broken)} items can be used{why}"
            )
        return contents


DATASETS: dict[str, DataSet] = {
    name: DataSet(name=name, **row)
    for name, row in yaml.safe_load(
        Path(__file__).with_name("datasets.yaml").read_text(encoding="utf-8")
    ).items()
}
