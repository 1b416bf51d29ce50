"""Questions about media, with the answers that people gave."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

from mico_chat.evaluation.datasets import files
from mico_chat.evaluation.datasets.files import MediaFolder, objects
from mico_chat.evaluation.task import Contents, Split
from mico_chat.media import MediaFile


def vqav2(folder: Path, split: Split) -> Contents:
    """The questions and the ten answers of each of VQA v2's validation (or training) set.

    The answers of the test sets are not published.
    """
    part = {"test": "val2014", "train": "train2014"}[split]
    answers = {
        row.get("question_id"): files.texts_at(row, "answers", "answer")
        for row in files.records(folder / f"v2_mscoco_{part}_annotations.json", "annotations")
    }
    pictures = MediaFolder(folder / part, "image")
    contents = Contents()
    path = folder / f"v2_OpenEnded_mscoco_{part}_questions.json"
    for row in files.records(path, "questions"):
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
    for row in files.read_table(table, "file_name", "QuestionText", "answer"):
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
    """``test_qa.json`` of MSVD-QA: 13,157 questions; ``video_id`` 1301 is vid1301.

    ``youtube_mapping.txt`` names its file in YouTubeClips; a file called vid1301 will do too.
    """
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
    """``Test_frameqa_question.csv``, tabs between its columns: 13,691 questions.

    The GIFs must be clips (``gifs/NAME.mp4``): the decoder reads an animated GIF as a still.
    """
    clips = MediaFolder(folder / "gifs", "video")
    contents = Contents()
    columns = ("gif_name", "question", "answer", "vid_id")
    table = folder / f"{split.capitalize()}_frameqa_question.csv"
    for number, row in enumerate(files.read_table(table, *columns, delimiter="\t"), 2):
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
    """``avqa-test.json``: questions made from templates; ``templ_values`` fills their places.

    The answer's key is ``anser`` in the published files.
    """
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
