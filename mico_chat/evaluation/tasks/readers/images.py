"""COCO and Flickr30K by Karpathy's splits, and VQA v2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mico_chat.evaluation.tasks.files import MediaFolder, read_json, records
from mico_chat.evaluation.tasks.task import Contents, ItemMedia, Split

KARPATHY: dict[Split, tuple[str, ...]] = {"test": ("test",), "train": ("train", "restval")}
"""The splits of dataset_coco.json and dataset_flickr30k.json; the field trains on both."""


def coco(folder: Path, split: Split) -> Contents:
    """``dataset_coco.json``: 5,000 pictures of val2014 to test, each with all its captions."""
    found: dict[str, MediaFolder] = {}

    def picture(row: dict[str, object]) -> ItemMedia | str:
        part = row.get("filepath")
        if not isinstance(part, str) or part not in ("train2014", "val2014"):
            return f"its filepath is {part!r}, expected train2014 or val2014"
        if part not in found:
            found[part] = MediaFolder(folder / part, "image")
        return found[part].named(row.get("filename"))

    return _karpathy(folder / "dataset_coco.json", split, picture)


def flickr30k(folder: Path, split: Split) -> Contents:
    """``dataset_flickr30k.json``: 1,000 pictures to test, each with five captions."""
    pictures = MediaFolder(folder / "flickr30k-images", "image")
    return _karpathy(
        folder / "dataset_flickr30k.json", split, lambda row: pictures.named(row.get("filename"))
    )


def _karpathy(
    path: Path, split: Split, picture: Callable[[dict[str, object]], ItemMedia | str]
) -> Contents:
    contents = Contents()
    for row in records(read_json(path, dict), "images", path):
        if row.get("split") not in KARPATHY[split]:
            continue
        id = str(row.get("cocoid", row.get("filename", "?")))
        sentences = row.get("sentences")
        sentences = sentences if isinstance(sentences, list) else []
        texts = [s.get("raw") if isinstance(s, dict) else None for s in sentences]
        contents.caption(id, picture(row), texts)
    return contents


def vqav2(folder: Path, split: Split) -> Contents:
    """The questions and the ten answers of each of VQA v2's validation (or training) set.

    The test sets' answers are the organisers' own.
    """
    part = {"test": "val2014", "train": "train2014"}[split]
    path = folder / f"v2_mscoco_{part}_annotations.json"
    answers: dict[object, list[object]] = {}
    for row in records(read_json(path, dict), "annotations", path):
        given = row.get("answers")
        given = given if isinstance(given, list) else []
        answers[row.get("question_id")] = [
            a.get("answer") if isinstance(a, dict) else None for a in given
        ]
    path = folder / f"v2_OpenEnded_mscoco_{part}_questions.json"
    pictures = MediaFolder(folder / part, "image")
    contents = Contents()
    for row in records(read_json(path, dict), "questions", path):
        id, image = row.get("question_id"), row.get("image_id")
        media: ItemMedia | str = f"its image_id is {image!r}, expected a whole number"
        if isinstance(image, int):
            media = pictures.named(f"COCO_{part}_{image:012d}.jpg")
        contents.ask(str(id), media, row.get("question"), answers.get(id, []))
    return contents
