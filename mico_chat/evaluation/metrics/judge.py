"""Video QA judged by a language model: Video-ChatGPT's GPT-assisted evaluation (Maaz et al. 2023).

A chat model's sentence seldom equals a one-word annotation, so a judge model reads question, true
answer and given answer, and says yes or no and a score from 0 to 5. *Accuracy* is the share of yes,
*score* the mean. MSVD-QA, MSRVTT-QA and ActivityNet-QA of MiCo's Table 6 are reported so.

The judge is any model behind an OpenAI-compatible URL. Figures of two judges do not compare: the
published ones come from ``gpt-3.5-turbo`` of their day, and even its versions differ by several
points. The instructions ask for what Video-ChatGPT's ask (meaning counts, synonyms and paraphrases
are right; yes or no; an integer 0 .. 5; a dictionary and nothing else) in words of our own; another
text can be given as ``Judge(instructions=, question=)``. A report should name the judge.

The reply is read as there: "yes" anywhere in ``pred`` is a yes, and a fractional score is cut to
its integer. There, a reply that cannot be read is asked for again without end; here ``tries``
times, after which the item is *unjudged*: counted and named, and outside both means.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mico_chat.errors import ConfigError, MissingExtraError
from mico_chat.evaluation.at_once import at_once
from mico_chat.evaluation.metrics.score import Score

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

INSTRUCTIONS = (
    "You grade answers to questions about videos. You are given a question, its correct answer and "
    "an answer somebody predicted. Decide whether the predicted answer means the same as the "
    "correct one.\n"
    "- What counts is whether the meanings match.\n"
    "- A synonym or a paraphrase of the correct answer is a match.\n"
    "- Judge the prediction against the correct answer, not against your own knowledge."
)
QUESTION = (
    "Grade this answer to a question about a video.\n\n"
    "Question: {question}\n"
    "Correct answer: {answer}\n"
    "Predicted answer: {predicted}\n\n"
    "Reply with a Python dictionary of two keys and with nothing else, no explanation: 'pred', the "
    "string 'yes' or 'no', and 'score', an integer from 0 to 5, where 5 is the best match. "
    "For example: {{'pred': 'yes', 'score': 4}}"
)
AGAIN = "That cannot be read. Reply with the dictionary of 'pred' and 'score' alone."


@dataclass(frozen=True)
class Judged:
    """An answer to be judged; ``id`` is the item's."""

    id: str
    question: str
    answer: str
    predicted: str


@dataclass(frozen=True)
class Verdict:
    """What the judge said: whether the answer matches, and how well (0 .. 5)."""

    right: bool
    score: int


@dataclass(frozen=True)
class Unjudged:
    """No verdict on an item, and why."""

    reason: str


@dataclass(frozen=True)
class Judgement:
    """``accuracy`` (0 .. 1) and ``score`` (0 .. 5) of the judged items; the others with reasons."""

    accuracy: Score
    score: Score
    unjudged: dict[str, str]


class Judge:
    """A judge model. A context manager: it holds connections.

    Args:
        model: the judge's name at the server.
        base_url: the server's OpenAI-compatible address, up to ``/v1``; None is OpenAI's.
        api_key: its key; None takes ``OPENAI_API_KEY``, else a placeholder for servers without.
        temperature: 0 makes a verdict repeatable; None leaves it to a server that refuses it.
        tries: replies to ask for until one can be read.
        concurrency: requests at a time.
        instructions, question: the prompt's two messages; the second with ``{question}``,
            ``{answer}``, ``{predicted}``.

    Raises:
        MissingExtraError: the extra ``eval`` is not installed.
        ConfigError: the prompt's fields are other ones.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        temperature: float | None = 0.0,
        tries: int = 3,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        retries: int = 5,
        instructions: str = INSTRUCTIONS,
        question: str = QUESTION,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError("judged question answering", "eval") from error
        self.model = model
        self.temperature = temperature
        self.tries = tries
        self.concurrency = concurrency
        self.instructions = instructions
        self.question = question
        self.prompt(Judged("", "q", "a", "p"))  # a prompt that cannot be filled fails here
        self.client = openai.OpenAI(
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            base_url=base_url,
            timeout=timeout_s,
            max_retries=retries,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()

    def prompt(self, item: Judged) -> list[ChatCompletionMessageParam]:
        """The messages that ask for a verdict on an item."""
        try:
            text = self.question.format(
                question=item.question, answer=item.answer, predicted=item.predicted
            )
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"the judge's question must have the fields {{question}}, {{answer}} and "
                f"{{predicted}}, and doubled braces elsewhere; this question fails on {error}"
            ) from error
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": text},
        ]

    def verdict(self, item: Judged) -> Verdict | Unjudged:
        """The judge's verdict on one answer.

        Raises:
            ConfigError: the server cannot be used at all: not there, no such model, a wrong key.
        """
        import openai

        messages = self.prompt(item)
        settings: dict[str, Any] = (
            {} if self.temperature is None else {"temperature": self.temperature}
        )
        reply = ""
        for _ in range(self.tries):
            try:
                done = self.client.chat.completions.create(
                    model=self.model, messages=messages, **settings
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                return Unjudged(f"the judge refused it: {error.message}")
            except openai.OpenAIError as error:
                raise ConfigError(
                    f"the judge {self.model!r} at {self.client.base_url} does not answer: {error}"
                ) from error
            reply = (done.choices[0].message.content or "") if done.choices else ""
            if (verdict := read(reply)) is not None:
                return verdict
            messages = [
                *self.prompt(item),
                {"role": "assistant", "content": reply},
                {"role": "user", "content": AGAIN},
            ]
        return Unjudged(
            f"the judge gave no readable verdict in {self.tries} replies; the last: {reply[:80]!r}"
        )

    def verdicts(self, items: Iterable[Judged]) -> Iterator[tuple[str, Verdict | Unjudged]]:
        """Verdicts by item id, each as it comes, so that a caller can keep them and go on later.

        Raises:
            ConfigError: as ``verdict``, at the first request that finds out.
        """
        return at_once(self.verdict, ((item.id, item) for item in items), self.concurrency)


def read(reply: str) -> Verdict | None:
    """The verdict that a reply states; None where it states none, several, or one out of range."""
    found = re.findall(r"\{[^{}]*\}", reply)
    if len(found) != 1:
        return None
    try:
        said = json.loads(found[0])
    except json.JSONDecodeError:
        try:
            said = ast.literal_eval(found[0])
        except (ValueError, SyntaxError):
            return None
    if not isinstance(said, dict):
        return None
    word = str(said.get("pred", "")).lower()
    try:
        score = int(float(said.get("score", "")))
    except (TypeError, ValueError, OverflowError):
        return None
    if ("yes" not in word and "no" not in word) or not 0 <= score <= 5:
        return None
    return Verdict(right="yes" in word, score=score)


def judgement(verdicts: Mapping[str, Verdict | Unjudged]) -> Judgement:
    """Accuracy and score of a set of verdicts.

    Raises:
        DataError: none of the items was judged.
    """
    judged = {item: said for item, said in verdicts.items() if isinstance(said, Verdict)}
    return Judgement(
        accuracy=Score.over({item: float(v.right) for item, v in judged.items()}, "judged answers"),
        score=Score.over({item: float(v.score) for item, v in judged.items()}, "judged answers"),
        unjudged={item: v.reason for item, v in verdicts.items() if isinstance(v, Unjudged)},
    )
