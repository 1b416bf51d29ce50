"""Media with captions: pictures, sounds, clips, long videos with paragraphs, and our own shards."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from mico_chat.errors import DataError
from mico_chat.evaluation.datasets import files
from mico_chat.evaluation.datasets.files import MediaFolder, objects, read_table, records
from mico_chat.evaluation.task import Contents, Split
from mico_chat.media import MediaFile
from mico_chat.media.file import TarMember
from mico_chat.media.kinds import KINDS, Kind

KARPATHY: dict[Split, tuple[str, ...]] = {"test": ("test",), "train": ("train", "restval")}
"""The splits of dataset_coco.json and dataset_flickr30k.json; the field trains on both."""


def _captioned(
    rows: Iterable[tuple[str, object]], file: Callable[[str], MediaFile | str]
) -> Contents:
    """Media by their ids, with their captions."""
    contents = Contents()
    for id, captions in rows:
        contents.caption(id, file(id), captions)
    return contents


# --- pictures -----------------------------------------------------------------------------------


def coco(folder: Path, split: Split) -> Contents:
    """``dataset_coco.json``: 5,000 pictures of val2014 to test, each with all its captions."""
    found: dict[str, MediaFolder] = {}

    def picture(row: dict[str, Any]) -> MediaFile | str:
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
    path: Path, split: Split, picture: Callable[[dict[str, Any]], MediaFile | str]
) -> Contents:
    contents = Contents()
    for row in records(path, "images"):
        if row.get("split") in KARPATHY[split]:
            id = str(row.get("cocoid", row.get("filename", "?")))
            contents.caption(id, picture(row), files.texts_at(row, "sentences", "raw"))
    return contents


# --- sounds -------------------------------------------------------------------------------------


def clotho(folder: Path, split: Split) -> Contents:
    """``clotho_captions_evaluation.csv``: 1,045 sounds of 15 to 30 s, each with five captions.

    Versions 1 and 2.1 have the same evaluation table (its checksum on Zenodo is the same) and
    different development sets.
    """
    part = {"test": "evaluation", "train": "development"}[split]
    captions = [f"caption_{number}" for number in range(1, 6)]
    table = read_table(folder / f"clotho_captions_{part}.csv", "file_name", *captions)
    rows = ((row["file_name"], [row[caption] for caption in captions]) for row in table)
    return _captioned(rows, MediaFolder(folder / part, "audio").named)


def audiocaps(folder: Path, split: Split) -> Contents:
    """``test.csv``: a caption on each row, five of each sound of 10 s; training sounds have one.

    Videos vanish from YouTube, so that everyone has fewer than were published. Where the file
    ``retrieval_test.txt`` lists ids, one on each line, only these are used: the field's retrieval
    figures are of the 816 sounds that were left when its benchmark was made.
    """
    sounds = MediaFolder(folder / split, "audio")
    wanted = files.listed(folder / "retrieval_test.txt") if split == "test" else None
    texts: dict[str, list[str]] = {}
    stems: dict[str, tuple[str, ...]] = {}
    for row in read_table(folder / f"{split}.csv", "youtube_id", "start_time", "caption"):
        id = row["youtube_id"]
        if wanted is None or id in wanted:
            name = id or "(no youtube_id)"
            texts.setdefault(name, []).append(row["caption"])
            stems[name] = (id, f"{id}_{row['start_time']}", f"Y{id}")
    return _captioned(texts.items(), lambda name: sounds.stem(*stems[name]))


# --- clips --------------------------------------------------------------------------------------


def _msrvtt_captions(*paths: Path) -> dict[str, list[object]]:
    texts: dict[str, list[object]] = {}
    for path in paths:
        for row in records(path, "sentences"):
            texts.setdefault(str(row.get("video_id")), []).append(row.get("caption"))
    return texts


def msrvtt(folder: Path, split: Split) -> Contents:
    """``test_videodatainfo.json`` of the 2016 challenge: 2,990 clips, 20 captions each.

    Training clips are those that ``train_val_videodatainfo.json`` marks ``train``.
    """
    path = folder / f"{'test' if split == 'test' else 'train_val'}_videodatainfo.json"
    texts = _msrvtt_captions(path)
    ids = [str(v.get("video_id")) for v in records(path, "videos") if v.get("split") == split]
    clips = MediaFolder(folder / "videos", "video")
    return _captioned(((id, texts.get(id, [])) for id in ids), clips.stem)


def msrvtt_1ka(folder: Path, split: Split) -> Contents:
    """``MSRVTT_JSFUSION_test.csv``, the 1k-A test set: 1,000 clips with one caption each.

    Its training clips are the 9,000 of ``MSRVTT_train.9k.csv``, with the captions that both files
    of the challenge have of them.
    """
    clips = MediaFolder(folder / "videos", "video")
    if split == "test":
        table = read_table(folder / "MSRVTT_JSFUSION_test.csv", "video_id", "sentence")
        return _captioned(((row["video_id"], row["sentence"]) for row in table), clips.stem)
    texts = _msrvtt_captions(
        folder / "train_val_videodatainfo.json", folder / "test_videodatainfo.json"
    )
    ids = [row["video_id"] for row in read_table(folder / "MSRVTT_train.9k.csv", "video_id")]
    return _captioned(((id, texts.get(id, [])) for id in ids), clips.stem)


def youcook2(folder: Path, split: Split) -> Contents:
    """``youcookii_annotations_trainval.json``: a clip and a caption for each marked segment.

    The test split's captions are not published: figures are of ``validation``, 3,492 segments.
    """
    path = folder / "youcookii_annotations_trainval.json"
    subset = {"test": "validation", "train": "training"}[split]
    database = files.read_json(path).get("database")
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
    found = objects(folder / f"desc_{split}.json")
    rows = ((str(row.get("video_id")), row.get("desc")) for row in found)
    return _captioned(rows, MediaFolder(folder / "videos", "video").stem)


def vatex(folder: Path, split: Split) -> Contents:
    """English captions of VATEX, ten of each clip.

    Retrieval is measured on the 1,500 validation clips that ``test_list.txt`` names, one a line:
    the split of HGR (arXiv 2003.00392), which the field shares. Without the list, on all 3,000.
    """
    name = {"test": "vatex_validation_v1.0.json", "train": "vatex_training_v1.0.json"}[split]
    wanted = files.listed(folder / "test_list.txt") if split == "test" else None
    rows = ((str(row.get("videoID")), row.get("enCap", [])) for row in objects(folder / name))
    used = ((id, captions) for id, captions in rows if wanted is None or id in wanted)
    return _captioned(used, MediaFolder(folder / "videos", "video").stem)


# --- videos found by a paragraph ------------------------------------------------------------------


def didemo(folder: Path, split: Split) -> Contents:
    """``test_data.json``: the descriptions of a video in the file's order are its paragraph.

    The order is the field's (as in ClipBERT's and Frozen's code): moments carry several annotators'
    times, so that no order of them is given.
    """
    videos = MediaFolder(folder / "videos", "video")
    texts: dict[str, list[str]] = {}
    contents = Contents()
    for row in objects(folder / f"{split}_data.json"):
        video, text = row.get("video"), row.get("description")
        id = f"annotation {row.get('annotation_id')}"
        if not isinstance(video, str) or not video:
            contents.lose(id, "the record does not name a video")
            continue
        sentences = texts.setdefault(video, [])
        if isinstance(text, str) and text.strip():
            sentences.append(text.strip())
        else:
            contents.lose(id, "the record lacks a description")
    for video, sentences in texts.items():
        media = videos.named(video)
        if isinstance(media, str):  # published as .avi, .mov, .3gp, ..: many have re-encoded them
            media = videos.stem(video, video.rsplit(".", 1)[0])
        contents.caption(video, media, " ".join(sentences))
    return contents


def activitynet(folder: Path, split: Split) -> Contents:
    """``val_1.json``: 4,917 videos; their sentences, which are in the order of time, joined."""
    name = {"test": "val_1.json", "train": "train.json"}[split]
    rows = []
    for video, row in files.read_json(folder / name).items():
        sentences = row.get("sentences") if isinstance(row, dict) else None
        texts = [s.strip() for s in sentences or [] if isinstance(s, str)]
        rows.append((video, " ".join(texts)))
    return _captioned(rows, MediaFolder(folder / "videos", "video").stem)


# --- the shards of this project's data engine -----------------------------------------------------


def world(folder: Path, split: Split) -> Contents:
    """Every medium of the shards that has captions: pictures, sounds, clips, depth and normals.

    Captions are made of few words, so that many scenes share one: it is right for all of them.
    """
    names = {"test": "validation-*.tar", "train": "train-*.tar"}[split]
    shards = sorted(folder.glob(names))
    if not shards:
        raise DataError(folder, None, f"no file in this folder is named like {names}")
    contents = Contents(same_words=True)
    for path in shards:
        try:
            with tarfile.open(path) as tar:
                _read(path, tar, contents)
        except tarfile.TarError as error:
            raise DataError(path, None, "this is not a tar file that can be read") from error
    return contents


def _read(path: Path, tar: tarfile.TarFile, contents: Contents) -> None:
    members: dict[str, TarMember] = {}
    samples: list[dict[str, Any]] = []
    for info in tar:
        if not info.name.endswith(".json"):
            members[info.name] = TarMember(path, info.offset_data, info.size)
            continue
        member = tar.extractfile(info)
        assert member is not None, info.name
        try:
            samples.append(json.loads(member.read()))
        except ValueError as error:
            raise DataError(path, None, f"{info.name} is not JSON") from error
    for sample in samples:
        for name, captions in sample["captions"].items():
            id = f"{sample['id']}.{name}"
            kind = name.split(".", 1)[0].rstrip("0123456789")
            media: MediaFile | str = "the shard lacks this file"
            if id in members:
                media = f"its kind is unknown; the kinds are {', '.join(KINDS)}"
                if kind in KINDS:
                    media = MediaFile(cast(Kind, kind), members[id], path.name)
            contents.caption(id, media, captions)
