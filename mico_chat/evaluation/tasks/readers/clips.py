"""Clips with captions of their own: MSRVTT, YouCook2, VALOR-32K, VATEX."""

from __future__ import annotations

from pathlib import Path

from mico_chat.errors import DataError
from mico_chat.evaluation.tasks.files import (
    MediaFolder,
    listed,
    objects,
    read_json,
    read_table,
    records,
)
from mico_chat.evaluation.tasks.task import Contents, Split


def msrvtt(folder: Path, split: Split) -> Contents:
    """``test_videodatainfo.json`` of the 2016 challenge: 2,990 clips, 20 captions each.

    Training clips are those that ``train_val_videodatainfo.json`` marks ``train``.
    """
    name = {"test": "test_videodatainfo.json", "train": "train_val_videodatainfo.json"}[split]
    content = read_json(folder / name, dict)
    clips = MediaFolder(folder / "videos", "video")
    texts: dict[str, list[object]] = {}
    for row in records(content, "sentences", folder / name):
        texts.setdefault(str(row.get("video_id")), []).append(row.get("caption"))
    contents = Contents()
    for row in records(content, "videos", folder / name):
        if row.get("split") == split:
            id = str(row.get("video_id"))
            contents.caption(id, clips.stem(id), texts.get(id, []))
    return contents


def msrvtt_1ka(folder: Path, split: Split) -> Contents:
    """``MSRVTT_JSFUSION_test.csv``, the 1k-A test set: 1,000 clips with one caption each.

    Its training clips are the 9,000 of ``MSRVTT_train.9k.csv``, with the captions that both files
    of the challenge have of them.
    """
    clips = MediaFolder(folder / "videos", "video")
    contents = Contents()
    if split == "test":
        table = folder / "MSRVTT_JSFUSION_test.csv"
        for row in read_table(table, ("video_id", "sentence")):
            contents.caption(row["video_id"], clips.stem(row["video_id"]), row["sentence"])
        return contents
    texts: dict[str, list[object]] = {}
    for name in ("train_val_videodatainfo.json", "test_videodatainfo.json"):
        for sentence in records(read_json(folder / name, dict), "sentences", folder / name):
            texts.setdefault(str(sentence.get("video_id")), []).append(sentence.get("caption"))
    for row in read_table(folder / "MSRVTT_train.9k.csv", ("video_id",)):
        id = row["video_id"]
        contents.caption(id, clips.stem(id), texts.get(id, []))
    return contents


def youcook2(folder: Path, split: Split) -> Contents:
    """``youcookii_annotations_trainval.json``: a clip and a caption for each marked segment.

    The test split's captions are not published: figures are of ``validation``, 3,492 segments.
    """
    path = folder / "youcookii_annotations_trainval.json"
    subset = {"test": "validation", "train": "training"}[split]
    database = read_json(path, dict).get("database")
    if not isinstance(database, dict):
        raise DataError(path, None, "the object 'database' is missing; is this the right file?")
    clips = MediaFolder(folder / "clips", "video")
    contents = Contents()
    for video, row in database.items():
        if not isinstance(row, dict) or not isinstance(row.get("annotations", []), list):
            contents.lose(video, "the record is not a video with annotations")
        elif row.get("subset") == subset:
            for segment in row.get("annotations", []):
                id = f"{video}_{segment.get('id')}"
                contents.caption(id, clips.stem(id), segment.get("sentence"))
    return contents


def valor32k(folder: Path, split: Split) -> Contents:
    """``desc_test.json``: 3,500 clips of 10 s with a caption of what is seen and heard."""
    clips = MediaFolder(folder / "videos", "video")
    contents = Contents()
    for row in objects(folder / f"desc_{split}.json"):
        id = str(row.get("video_id"))
        contents.caption(id, clips.stem(id), row.get("desc"))
    return contents


def vatex(folder: Path, split: Split) -> Contents:
    """English captions of VATEX, ten of each clip.

    Retrieval is measured on the 1,500 validation clips that ``test_list.txt`` names, one a line:
    the split of HGR (arXiv 2003.00392), which the field shares. Without the list, on all 3,000.
    """
    name = {"test": "vatex_validation_v1.0.json", "train": "vatex_training_v1.0.json"}[split]
    wanted = listed(folder / "test_list.txt") if split == "test" else None
    clips = MediaFolder(folder / "videos", "video")
    contents = Contents()
    for row in objects(folder / name):
        id = str(row.get("videoID"))
        if wanted is None or id in wanted:
            contents.caption(id, clips.stem(id), row.get("enCap", []))
    return contents
