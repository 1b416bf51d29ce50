"""Video QA judged by a language model: Video-ChatGPT's GPT-assisted evaluation (Maaz et al. 2023).

A judge model reads the question, the true answer and the given answer. It replies with yes or no,
and with a score from 0 to 5. *Accuracy* is the share of yes, *score* the mean of the scores: the
figures of MSVD-QA, MSRVTT-QA and ActivityNet-QA in MiCo's Table 6. Do not compare figures of two
judges: the published figures come from ``gpt-3.5-turbo`` of their day.

A reply is read as in Video-ChatGPT: "yes" anywhere in ``pred`` is a yes, and a score such as 4.8
counts as 4. An answer without a readable verdict counts in neither figure. A file with verdicts of
another judge, or on other answers, is refused.
"""

import ast
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml
from tqdm import tqdm

from mico_chat.errors import DataError
from mico_chat.evaluation.endpoint import Endpoint, at_once
from mico_chat.evaluation.store import PREDICTIONS, VERDICTS, Record, Store, read_store

_TEXT = Path(__file__).with_name("judge.yaml").read_text(encoding="utf-8")
PROMPT: dict[str, str] = yaml.safe_load(_TEXT)
TRIES = 3


class Verdict(NamedTuple):
    """Whether the answer matches the true one, and the score from 0 to 5."""

    right: bool
    score: int


def verdict(judge: Endpoint, record: Record) -> Verdict | str:
    """The judge's verdict on the answer of a record, or the reason why there is none."""
    words = {"question": record["question"], "predicted": record["answer"]}
    question = PROMPT["question"].format(answer=", ".join(record["references"]), **words)
    messages = [_said("system", PROMPT["instructions"]), _said("user", question)]
    again: list[dict[str, str]] = []
    for _ in range(TRIES):
        reply = judge.ask([*messages, *again])
        if reply.kind == "refused":
            return f"the judge refused the answer: {reply.text}"
        if (found := read(reply.text)) is not None:
            return found
        again = [_said("assistant", reply.text), _said("user", PROMPT["again"])]
    last = again[0]["content"][:80]
    return f"the judge gave no readable verdict in {TRIES} replies; the last: {last!r}"


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def read(reply: str) -> Verdict | None:
    """The verdict in a reply; None for no verdict, several verdicts or an impossible score."""
    found = re.findall(r"\{[^{}]*\}", reply)
    if len(found) != 1:
        return None
    for parse in (json.loads, ast.literal_eval):
        with suppress(KeyError, TypeError, ValueError, OverflowError, SyntaxError):
            said = parse(found[0])
            word, score = str(said["pred"]).lower(), int(float(said["score"]))
            if ("yes" in word or "no" in word) and 0 <= score <= 5:
                return Verdict("yes" in word, score)
    return None


def judge_answers(folder: Path, judge: Endpoint) -> None:
    """Ask the judge about each answer of a finished task that has no verdict yet."""
    header, records = read_store(folder)
    answers = _answers(records)
    words = "\n".join((PROMPT["instructions"], PROMPT["question"]))
    prompt = hashlib.sha256(words.encode()).hexdigest()[:16]
    judged_by: Record = {"judge": judge.name, "temperature": 0.0, "prompt": prompt}
    judged_by |= {"task": header["task"], "answers": _digest(answers)}
    with Store(folder, judged_by, VERDICTS) as store:
        known = {record["id"] for record in store.records}
        open_ = [(record["id"], record) for record in answers if record["id"] not in known]
        coming = at_once(partial(verdict, judge), open_, judge.concurrency)
        for id, found in tqdm(coming, desc=f"{header['task']}: judge", total=len(open_)):
            said = {"unjudged": found} if isinstance(found, str) else found._asdict()
            store.add([{"id": id, **said}])


def read_verdicts(
    folder: Path, records: Sequence[Record]
) -> tuple[Record, dict[str, Verdict | str]]:
    """The header of the verdicts on ``records``, and the verdicts by the ids of the items.

    Both are empty before a judge is asked.
    """
    path = folder / VERDICTS
    if not path.is_file():
        return {}, {}
    header, kept = read_store(folder, VERDICTS)
    answers = _answers(records)
    if header["answers"] != _digest(answers):
        why = f"its verdicts belong to other answers than those in {PREDICTIONS}; remove this file"
        raise DataError(path, None, why)
    found: dict[str, Verdict | str] = {
        r["id"]: r["unjudged"] if "unjudged" in r else Verdict(r["right"], r["score"]) for r in kept
    }
    if missing := [r for r in answers if r["id"] not in found]:
        left = f"{len(missing)} of {len(answers)} answers are left"
        why = f"the judge has not finished: {left}; run the same command again to continue"
        raise DataError(path, None, why)
    return header, found


def _answers(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "answer"]


def _digest(answers: Sequence[Record]) -> str:
    pairs = sorted((r["id"], r["answer"]) for r in answers)
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
