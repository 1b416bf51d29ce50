"""One reader for each data set: media with captions, and questions about media with their answers.

A reader's name is its data set's; both versions of Clotho share one. Its ``split`` is what a test
measures, or what fine-tuning reads.
"""

from __future__ import annotations

import ast
import json
import re
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
    """``clotho_captions_evaluation.csv``, the same for both versions: 1,045 sounds, five captions
    each.
    """
    part = {"test": "evaluation", "train": "development"}[split]
    captions = [f"caption_{number}" for number in range(1, 6)]
    table = read_table(folder / f"clotho_captions_{part}.csv", "file_name", *captions)
    rows = ((row["file_name"], [row[caption] for caption in captions]) for row in table)
    return _captioned(rows, MediaFolder(folder / part, "audio").named)


def audiocaps(folder: Path, split: Split) -> Contents:
    """``test.csv``: a caption on each row, five of each sound of 10 s; training sounds have one.

    Where ``retrieval_test.txt`` lists ids, one on each line, only these are used: the field's
    retrieval figures are of the 816 sounds that were on YouTube when its benchmark was made.
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
    """``test_videodatainfo.json`` of the 2016 challenge: 2,990 clips, 20 captions each."""
    path = folder / f"{'test' if split == 'test' else 'train_val'}_videodatainfo.json"
    texts = _msrvtt_captions(path)
    ids = [str(v.get("video_id")) for v in records(path, "videos") if v.get("split") == split]
    clips = MediaFolder(folder / "videos", "video")
    return _captioned(((id, texts.get(id, [])) for id in ids), clips.stem)


def msrvtt_1ka(folder: Path, split: Split) -> Contents:
    """``MSRVTT_JSFUSION_test.csv``, the 1k-A test set: 1,000 clips with one caption each."""
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
    """A clip and a caption for each of 3,492 validation segments; the test captions are not
    published.
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
    the split of HGR (arXiv 2003.00392). Without the list, all 3,000 are used.
    """
    name = {"test": "vatex_validation_v1.0.json", "train": "vatex_training_v1.0.json"}[split]
    wanted = files.listed(folder / "test_list.txt") if split == "test" else None
    rows = ((str(row.get("videoID")), row.get("enCap", [])) for row in objects(folder / name))
    used = ((id, captions) for id, captions in rows if wanted is None or id in wanted)
    return _captioned(used, MediaFolder(folder / "videos", "video").stem)


# --- videos found by a paragraph ------------------------------------------------------------------


def didemo(folder: Path, split: Split) -> Contents:
    """``test_data.json``: the descriptions of a video, in the file's order, are its paragraph."""
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


# --- questions -----------------------------------------------------------------------------------


def vqav2(folder: Path, split: Split) -> Contents:
    """The questions and ten answers each of VQA v2's validation set."""
    part = {"test": "val2014", "train": "train2014"}[split]
    answers = {
        row.get("question_id"): files.texts_at(row, "answers", "answer")
        for row in records(folder / f"v2_mscoco_{part}_annotations.json", "annotations")
    }
    pictures = MediaFolder(folder / part, "image")
    contents = Contents()
    path = folder / f"v2_OpenEnded_mscoco_{part}_questions.json"
    for row in records(path, "questions"):
        id, image = row.get("question_id"), row.get("image_id")
        media: MediaFile | str = f"its image_id is {image!r}, expected a whole number"
        if isinstance(image, int):
            media = pictures.named(f"COCO_{part}_{image:012d}.jpg")
        contents.ask(str(id), media, row.get("question"), answers.get(id, []))
    return contents


def clotho_aqa(folder: Path, split: Split) -> Contents:
    """``clotho_aqa_test.csv``: 2,838 questions about 473 sounds, a row for each answer."""
    sounds = MediaFolder(folder / "audio_files", "audio")
    asked: dict[tuple[str, str], list[str]] = {}
    table = folder / f"clotho_aqa_{split}.csv"
    for row in read_table(table, "file_name", "QuestionText", "answer"):
        asked.setdefault((row["file_name"], row["QuestionText"]), []).append(row["answer"])
    contents = Contents()
    for (name, question), answers in asked.items():
        contents.ask(f"{name}: {question}", sounds.named(name), question, answers)
    return contents


def msrvtt_qa(folder: Path, split: Split) -> Contents:
    """``test_qa.json`` of MSRVTT-QA: 72,821 questions; ``video_id`` 7010 is video7010."""
    clips = MediaFolder(folder / "videos", "video")
    return _xu(folder / f"{split}_qa.json", lambda number: clips.stem(f"video{number}"))


def msvd_qa(folder: Path, split: Split) -> Contents:
    """``test_qa.json``: 13,157 questions; ``youtube_mapping.txt`` names the clip of vid1301."""
    clips = MediaFolder(folder / "YouTubeClips", "video")
    clip_of: dict[str, str] = {}
    mapping = folder / "youtube_mapping.txt"
    if mapping.is_file():
        pairs = (line.split() for line in files.read_text(mapping).splitlines())
        clip_of = {pair[1]: pair[0] for pair in pairs if len(pair) == 2}

    def clip(number: object) -> MediaFile | str:
        return clips.stem(clip_of.get(f"vid{number}", f"vid{number}"), f"vid{number}")

    return _xu(folder / f"{split}_qa.json", clip)


def _xu(path: Path, clip: Callable[[object], MediaFile | str]) -> Contents:
    """The format of both data sets of Xu et al. (2017)."""
    contents = Contents()
    for row in objects(path):
        media = clip(row.get("video_id"))
        contents.ask(str(row.get("id")), media, row.get("question"), row.get("answer"))
    return contents


def tgif_qa(folder: Path, split: Split) -> Contents:
    """13,691 questions; the GIFs must be clips (``gifs/NAME.mp4``)."""
    clips = MediaFolder(folder / "gifs", "video")
    contents = Contents()
    columns = ("gif_name", "question", "answer", "vid_id")
    table = folder / f"{split.capitalize()}_frameqa_question.csv"
    for number, row in enumerate(read_table(table, *columns, delimiter="\t"), 2):
        id = f"{row['vid_id'] or row['gif_name']}-{number}"
        contents.ask(id, clips.stem(row["gif_name"]), row["question"], row["answer"])
    return contents


def activitynet_qa(folder: Path, split: Split) -> Contents:
    """``test_q.json`` and ``test_a.json``: 8,000 questions about 800 videos."""
    videos = MediaFolder(folder / "videos", "video")
    answers = {
        row.get("question_id"): row.get("answer") for row in objects(folder / f"{split}_a.json")
    }
    contents = Contents()
    for row in objects(folder / f"{split}_q.json"):
        id, video = row.get("question_id"), str(row.get("video_name"))
        media = videos.stem(f"v_{video}", video)
        contents.ask(str(id), media, row.get("question"), answers.get(id))
    return contents


def music_avqa(folder: Path, split: Split) -> Contents:
    """``avqa-test.json``: questions made from templates; ``templ_values`` fills their places."""
    videos = MediaFolder(folder / "videos", "video")
    contents = Contents()
    for row in objects(folder / f"avqa-{split}.json"):
        id, question = str(row.get("question_id")), row.get("question_content")
        try:
            if isinstance(question, str):
                question = _filled(question, row.get("templ_values"))
        except ValueError as error:
            contents.lose(id, str(error))
            continue
        media = videos.stem(str(row.get("video_id")))
        contents.ask(id, media, question, row.get("anser", row.get("answer")))
    return contents


def _filled(question: str, values: object) -> str:
    """A template with its values, which the files have as the text of a list."""
    if isinstance(values, str):
        try:
            values = ast.literal_eval(values)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"its templ_values are not a list: {values!r}") from error
    given = [str(value) for value in values] if isinstance(values, list | tuple) else []
    parts = re.split(r"<[^<>]+>", question)
    if len(parts) - 1 != len(given):
        raise ValueError(
            f"its question has {len(parts) - 1} places, but there are {len(given)} templ_values"
        )
    return parts[0] + "".join(value + text for value, text in zip(given, parts[1:], strict=True))


# --- the shards of this project's data engine -----------------------------------------------------


def world(folder: Path, split: Split) -> Contents:
    """Every medium of the shards that has captions; equal captions are right for all media."""
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
