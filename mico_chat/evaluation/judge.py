"""Video QA judged by a language model: Video-ChatGPT's GPT-assisted evaluation (Maaz et al. 2023).

A judge model reads question, true answer and given answer, and says yes or no and a score from 0 to
5. *Accuracy* is the share of yes, *score* the mean. MSVD-QA, MSRVTT-QA and ActivityNet-QA of MiCo's
Table 6 are reported so. Figures of two judges do not compare: the published ones come from
``gpt-3.5-turbo`` of their day.

A reply is read as in Video-ChatGPT: "yes" anywhere in ``pred`` is a yes, and a fractional score is
cut to its integer. An answer without a readable verdict is outside both means. A file with another
judge's verdicts, or with verdicts on other answers, is refused.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import yaml
from tqdm import tqdm

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.endpoint import at_once, openai_client
from mico_chat.evaluation.store import PREDICTIONS, VERDICTS, Record, Store, read_store

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

PROMPT: dict[str, str] = yaml.safe_load(
    Path(__file__).with_name("judge.yaml").read_text(encoding="utf-8")
)
TRIES = 3
TEMPERATURE = 0.0


@dataclass(frozen=True)
class JudgedAnswer:
    id: str
    question: str
    truth: str
    predicted: str


class Verdict(NamedTuple):
    """Whether the answer matches, and its score of 0 to 5."""

    right: bool
    score: int


class Judge:
    """The judge ``model`` at ``base_url`` (up to ``/v1``; None is OpenAI's)."""

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str = "none",
        *,
        concurrency: int = 8,
        retries: int = 5,
    ) -> None:
        self.model = model
        self.concurrency = concurrency
        self.client = openai_client(
            "judged question answering", base_url, api_key, timeout=60.0, max_retries=retries
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def verdict(self, item: JudgedAnswer) -> Verdict | str:
        """The judge's verdict on one answer, or the reason why there is none."""
        import openai

        text = PROMPT["question"].format(
            question=item.question, answer=item.truth, predicted=item.predicted
        )
        messages: list[ChatCompletionMessageParam] = [
            {"role": "system", "content": PROMPT["instructions"]},
            {"role": "user", "content": text},
        ]
        again: list[ChatCompletionMessageParam] = []
        reply = ""
        for _ in range(TRIES):
            try:
                done = self.client.chat.completions.create(
                    model=self.model, messages=[*messages, *again], temperature=TEMPERATURE
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                return f"the judge refused it: {error.message}"
            except openai.OpenAIError as error:
                raise ConfigError(
                    f"the judge {self.model!r} at {self.client.base_url} does not answer: {error}"
                ) from error
            reply = (done.choices[0].message.content or "") if done.choices else ""
            if (verdict := read(reply)) is not None:
                return verdict
            again = [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": PROMPT["again"]},
            ]
        return f"the judge gave no readable verdict in {TRIES} replies; the last: {reply[:80]!r}"

    def verdicts(self, items: Iterable[JudgedAnswer]) -> Iterator[tuple[str, Verdict | str]]:
        return at_once(self.verdict, ((item.id, item) for item in items), self.concurrency)


def read(reply: str) -> Verdict | None:
    """The verdict that a reply states; None if it states none, several, or one out of range."""
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


def judge_answers(folder: Path, judge: Judge) -> None:
    """Ask the judge about the answers of a finished task that it has not judged."""
    header, records = read_store(folder)
    answers = _answers(records)
    words = "\n".join((PROMPT["instructions"], PROMPT["question"]))
    prompt = hashlib.sha256(words.encode()).hexdigest()[:16]
    judged_by: Record = {"judge": judge.model, "temperature": TEMPERATURE, "prompt": prompt}
    judged_by |= {"task": header["task"], "answers": _digest(answers)}
    with Store(folder, judged_by, VERDICTS) as store:
        known = {record["id"] for record in store.records}
        items = [
            JudgedAnswer(r["id"], r["question"], ", ".join(r["references"]), r["answer"])
            for r in answers
            if r["id"] not in known
        ]
        coming = judge.verdicts(items)
        for id, found in tqdm(coming, desc=f"{header['task']}: judge", total=len(items)):
            said = {"unjudged": found} if isinstance(found, str) else found._asdict()
            store.add([{"id": id, **said}])


def read_verdicts(
    folder: Path, records: Sequence[Record]
) -> tuple[Record, dict[str, Verdict | str]]:
    """The header and the verdicts by item of ``records``; empty before a judge is asked."""
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
        raise DataError(
            path,
            None,
            f"the judge has not finished: {len(missing)} of {len(answers)} answers are left; "
            "run the same command again to continue",
        )
    return header, found


def _answers(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["kind"] == "answer"]


def _digest(answers: Sequence[Record]) -> str:
    pairs = sorted((r["id"], r["answer"]) for r in answers)
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]
