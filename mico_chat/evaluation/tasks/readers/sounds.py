"""Clotho, ClothoAQA and AudioCaps."""

from __future__ import annotations

from pathlib import Path

from mico_chat.evaluation.tasks.files import MediaFolder, listed, read_table
from mico_chat.evaluation.tasks.task import Contents, Split

CLOTHO: dict[Split, str] = {"test": "evaluation", "train": "development"}


def clotho(folder: Path, split: Split) -> Contents:
    """``clotho_captions_evaluation.csv``: 1,045 sounds of 15 to 30 s, each with five captions.

    Versions 1 and 2.1 have the same evaluation table (its checksum on Zenodo is the same); what
    differs is the development set.
    """
    part = CLOTHO[split]
    captions = tuple(f"caption_{number}" for number in range(1, 6))
    sounds = MediaFolder(folder / part, "audio")
    contents = Contents()
    table = folder / f"clotho_captions_{part}.csv"
    for row in read_table(table, ("file_name", *captions)):
        name = row["file_name"]
        contents.caption(name, sounds.named(name), [row[caption] for caption in captions])
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


def audiocaps(folder: Path, split: Split) -> Contents:
    """``test.csv``: a caption a row, five of each sound of 10 s; training sounds have one.

    Videos vanish from YouTube, so that everyone has fewer than were published. Where a file
    ``retrieval_test.txt`` lists ids, one a line, the others are left out: the field's retrieval
    figures are of the 816 sounds that were left when its benchmark was made.
    """
    sounds = MediaFolder(folder / split, "audio")
    wanted = listed(folder / "retrieval_test.txt") if split == "test" else None
    texts: dict[str, list[str]] = {}
    stems: dict[str, tuple[str, ...]] = {}
    for row in read_table(folder / f"{split}.csv", ("youtube_id", "start_time", "caption")):
        id = row["youtube_id"]
        if wanted is not None and id not in wanted:
            continue
        texts.setdefault(id, []).append(row["caption"])
        stems[id] = (id, f"{id}_{row['start_time']}", f"Y{id}")
    contents = Contents()
    for id, captions in texts.items():
        contents.caption(id or "(no youtube_id)", sounds.stem(*stems[id]), captions)
    return contents
