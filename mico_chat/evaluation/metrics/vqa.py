"""Is an answer to a question right? By the rules of the data sets' own evaluations.

* ``vqa_accuracy``: VQA v2 (Antol et al. 2015; Goyal et al. 2017). Ten people answered a question;
  an answer that three others gave is right, fewer count in part, and the figure is the mean over
  leaving each of the ten out. Written anew from the rules of the official evaluation program, odd
  corners included: figures to compare with it must have them.
* ``exact_match``: open-ended video QA (MSRVTT-QA, MSVD-QA, TGIF-FrameQA, ActivityNet-QA,
  MUSIC-AVQA), as VALOR scores them: the answer is the true one, word for word, in lower case and
  without punctuation. VALOR cleans the answers it trains on and compares with the annotation as it
  stands; here both sides are cleaned, so that an annotated "t-shirt" can be met at all. For single
  lower-case words, which MSRVTT-QA, MSVD-QA and TGIF have, it is the same.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from mico_chat.errors import DataError
from mico_chat.evaluation.scoring import NUMBERS

DIGITS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Neither the apostrophe, the full stop (which has a rule of its own) nor the colon."""

_SINGLE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're "
    "they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's "
    "where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd "
    "you'll you're you've"
)
_DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've "
    "somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've "
    "y'all'll y'all'd've you'd've"
)


def _contractions() -> dict[str, str]:
    """Misspelt contraction -> the contraction: one of two or three apostrophes left out, or all."""
    found = {word.replace("'", ""): word for word in _SINGLE.split()}
    for word in _DOUBLE.split():
        for place in (index for index, letter in enumerate(word) if letter == "'"):
            found[word[:place] + word[place + 1 :]] = word
    # The one entry of the official table that goes the other way.
    return found | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32
"""At most so many are removed: the official program passes a flag where a count belongs."""
_THOUSANDS = re.compile(r"\d,\d")


def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """VQA v2's accuracy of an answer in 0 .. 1, by the answers of (ten) people.

    Answers are normalised only where the people differ, as the official program does: an answer
    that all gave must be met letter by letter.

    Raises:
        DataError: no human answers.
    """
    if not humans:
        raise DataError(
            "VQA accuracy", None, f"the human answers to compare {answer!r} with are missing"
        )
    given, truths = _trim(answer), [_trim(human) for human in humans]
    if len(set(truths)) > 1:
        given, truths = vqa_normal(given), [vqa_normal(truth) for truth in truths]
    agree = sum(truth == given for truth in truths)
    each = (min(1.0, (agree - (truth == given)) / 3) for truth in truths)
    return sum(each) / len(truths)


def vqa_normal(answer: str) -> str:
    """VQA v2's form of an answer: ``"Two dogs, the cat."`` -> ``"2 dogs cat"``."""
    text = answer
    for mark in PUNCTUATION:
        alone = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if alone or _THOUSANDS.search(answer) else " ")
    text = _FULL_STOP.sub("", text, count=_FULL_STOPS)
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def exact_match(answer: str, truth: str) -> bool:
    """Whether an answer is the true one by the standard of open-ended video QA."""
    return plain(answer) == plain(truth)


def plain(text: str) -> str:
    """Lower case, without ASCII punctuation, single spaces: ``" T-shirt. "`` -> ``"tshirt"``."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _trim(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
