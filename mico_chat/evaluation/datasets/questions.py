"""Questions about media, with the answers that people gave."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

from mico_chat.evaluation.datasets.files import (
    MediaFolder,
    objects,
    read_json,
    read_table,
    read_text,
    records,
)
from mico_chat.evaluation.task import Contents, Split
from mico_chat.media import MediaFile


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
        media: MediaFile | str = f"its image_id is {image!r}, expected a whole number"
        if isinstance(image, int):
            media = pictures.named(f"COCO_{part}_{image:012d}.jpg")
        contents.ask(str(id), media, row.get("question"), answers.get(id, []))
    return contents


def clotho_aqa(folder: Path, split: Split) -> Contents:
    """``clotho_aqa_test.csv``: 2,838 questions about 473 sounds, a row for each of three answers.

    The answers of a question's rows are taken together.
    """
    sounds = MediaFolder(folder / "audio_files", "audio")
    asked: dict[tuple[str, str], list[str]] = {}
    columns = ("file_name", "QuestionText", "answer")
    for row in read_table(folder / f"clotho_aqa_{split}.csv", columns):
        asked.setdefault((row["file_name"], row["QuestionText"]), []).append(row["answer"])
    contents = Contents()
    for (name, question), answers in asked.items():
        contents.ask(f"{name}: {question}", sounds.named(name), question, answers)
    return contents


_PLACE = re.compile(r"<[^<>]+>")


def msrvtt_qa(folder: Path, split: Split) -> Contents:
    """``test_qa.json`` of MSRVTT-QA: 72,821 questions; ``video_id`` 7010 is video7010."""
    clips = MediaFolder(folder / "videos", "video")
    return _xu(folder / f"{split}_qa.json", lambda number: clips.stem(f"video{number}"))


def msvd_qa(folder: Path, split: Split) -> Contents:
    """``test_qa.json`` of MSVD-QA: 13,157 questions; ``video_id`` 1301 is vid1301.

    ``youtube_mapping.txt`` names its file in YouTubeClips; a file called vid1301 will do too.
    """
    clips = MediaFolder(folder / "YouTubeClips", "video")
    files: dict[str, str] = {}
    mapping = folder / "youtube_mapping.txt"
    if mapping.is_file():
        pairs = (line.split() for line in read_text(mapping).splitlines())
        files = {pair[1]: pair[0] for pair in pairs if len(pair) == 2}

    def clip(number: object) -> MediaFile | str:
        name = f"vid{number}"
        return clips.stem(files.get(name, name), name)

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
    for number, row in enumerate(read_table(table, columns, "\t"), 2):
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
            question = _filled(question, row.get("templ_values"))
        except ValueError as error:
            contents.lose(id, str(error))
            continue
        media = videos.stem(str(row.get("video_id")))
        contents.ask(id, media, question, row.get("anser", row.get("answer")))
    return contents


def _filled(question: object, values: object) -> object:
    """A template with its values, which the files have as the text of a list."""
    if not isinstance(question, str):
        return question
    if isinstance(values, str):
        try:
            values = ast.literal_eval(values)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"its templ_values are not a list: {values!r}") from error
    given = [str(value) for value in values] if isinstance(values, list | tuple) else []
    places = _PLACE.findall(question)
    if len(places) != len(given):
        raise ValueError(
            f"its question has {len(places)} places, but there are {len(given)} templ_values"
        )
    filler = iter(given)
    return _PLACE.sub(lambda _: next(filler), question)
