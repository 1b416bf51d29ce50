"""Long videos that are sought by a paragraph: DiDeMo and ActivityNet Captions."""

from __future__ import annotations

from pathlib import Path

from mico_chat.evaluation.tasks.files import MediaFolder, objects, read_json
from mico_chat.evaluation.tasks.task import Contents, Split


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
        if not isinstance(video, str) or not video:
            contents.lose(
                f"annotation {row.get('annotation_id')}", "the record does not name a video"
            )
        elif not isinstance(text, str) or not text.strip():
            texts.setdefault(video, [])
            contents.lose(
                f"annotation {row.get('annotation_id')}", "the record lacks a description"
            )
        else:
            texts.setdefault(video, []).append(text.strip())
    for video, sentences in texts.items():
        media = videos.named(video)
        if isinstance(media, str):  # published as .avi, .mov, .3gp, ..: many have re-encoded them
            media = videos.stem(video, video.rsplit(".", 1)[0])
        contents.caption(video, media, " ".join(sentences))
    return contents


def activitynet(folder: Path, split: Split) -> Contents:
    """``val_1.json``: 4,917 videos; their sentences, which are in the order of time, joined."""
    name = {"test": "val_1.json", "train": "train.json"}[split]
    videos = MediaFolder(folder / "videos", "video")
    contents = Contents()
    for video, row in read_json(folder / name, dict).items():
        sentences = row.get("sentences") if isinstance(row, dict) else None
        texts = [s.strip() for s in sentences or [] if isinstance(s, str)]
        contents.caption(video, videos.stem(video), " ".join(texts))
    return contents
