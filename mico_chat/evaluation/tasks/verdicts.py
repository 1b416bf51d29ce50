"""A judge's verdicts on a task's answers, kept beside these as they come.

A verdict belongs to an answer: with other answers in the folder, or another judge, the file is
refused. An answer without a verdict (a reply that cannot be read, a refusal) is kept as such, and
is not asked about again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mico_chat.errors import DataError
from mico_chat.evaluation.metrics.judge import Judge, Judged, Unjudged, Verdict
from mico_chat.evaluation.tasks.store import PREDICTIONS, VERDICTS, Record, Store, read_store


def judge_answers(folder: Path, judge: Judge) -> None:
    """Ask the judge about the answers of a finished task that it has not judged.

    Raises:
        ConfigError: the judge cannot be used, or the folder has another's verdicts.
    """
    header, records = read_store(folder)
    said = _answers(records)
    with Store(folder, _header(header, said, judge), VERDICTS) as store:
        known = {str(record["id"]) for record in store.records}
        items = [
            Judged(str(r["id"]), str(r["question"]), ", ".join(r["references"]), str(r["answer"]))
            for r in said
            if str(r["id"]) not in known
        ]
        coming = judge.verdicts(items)
        for id, found in tqdm(coming, desc=f"{header['task']}: judge", total=len(items)):
            if isinstance(found, Verdict):
                store.add([{"id": id, "right": found.right, "score": found.score}])
            else:
                store.add([{"id": id, "unjudged": found.reason}])


def read_verdicts(
    folder: Path, records: Sequence[Record]
) -> tuple[Record, dict[str, Verdict | Unjudged]]:
    """Who judged, and the verdicts by item; none where no judge has been asked.

    Args:
        records: of the predictions in the folder.

    Raises:
        DataError: the verdicts are on other answers, or do not cover all.
    """
    if not (folder / VERDICTS).is_file():
        return {}, {}
    header, kept = read_store(folder, VERDICTS)
    said = _answers(records)
    if header["answers"] != _digest(said):
        raise DataError(
            folder / VERDICTS,
            None,
            f"its verdicts belong to other answers than those in {PREDICTIONS}; remove this file",
        )
    found: dict[str, Verdict | Unjudged] = {
        str(r["id"]): Unjudged(str(r["unjudged"]))
        if "unjudged" in r
        else Verdict(bool(r["right"]), int(r["score"]))
        for r in kept
    }
    if missing := [str(r["id"]) for r in said if str(r["id"]) not in found]:
        raise DataError(
            folder / VERDICTS,
            None,
            f"the judge has not finished: {len(missing)} of {len(said)} answers are left; "
            "run the same command again to continue",
        )
    return header, found


def _header(task: Record, said: Sequence[Record], judge: Judge) -> Record:
    prompt = hashlib.sha256(f"{judge.instructions}\n{judge.question}".encode()).hexdigest()[:16]
    return {
        "task": task["task"],
        "judge": judge.model,
        "temperature": judge.temperature,
        "prompt": prompt,
        "answers": _digest(said),
    }


def _answers(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "answer"]


def _digest(said: Sequence[Record]) -> str:
    """Of the answers whatever order they came in."""
    pairs = sorted((str(r["id"]), str(r["answer"])) for r in said)
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
