"""Is an answer to a question right? By the rules of the data sets' own evaluations, and ours.

* ``is_right``, for questions with skills: the answer says an accepted text in whole words,
  whatever stands around them.
* ``vqa_accuracy``: VQA v2 (Antol et al. 2015; Goyal et al. 2017). Ten people answered a question;
  an answer that three others gave is right, fewer count in part, and the figure is the mean over
  leaving each of the ten out. The odd corners are those of the official evaluation program.
* ``exact_match``: open-ended video QA, as VALOR scores it: the answer is the true one, word for
  word, in lower case and without punctuation. VALOR does not clean the annotation; here both sides
  are cleaned, so that an annotated "t-shirt" can be met at all. For single lower-case words, which
  MSRVTT-QA, MSVD-QA and TGIF have, both ways are the same.
* ``clotho_aqa``: ClothoAQA (Lipping et al. 2022), a question about a sound, answered by three
  people in one word. The three often differ, so an accuracy needs a rule, and papers take different
  ones. MiCo's Table 5 (63.9) says "Acc." and no more, beside baselines of several rules.

  * ``each``: the three are three items, as the test file lists them and Qwen-Audio scores them. The
    people's own disagreement bounds it well below 1.
  * ``majority``, ``unanimous``: one item a question, the answer that two (all three) gave; other
    questions are left out. The data set's paper has both for its yes-no questions.
  * ``any``: one item a question, right with any of the three (Audio Flamingo, but for yes-no).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import yaml

from mico_chat.evaluation.metrics import Score

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SPELLINGS = {"gray": "grey", "nearer": "closer", "further": "farther", "color": "colour"}
"""Words of one meaning; both sides of a comparison are brought to the second."""


def normal_words(text: str) -> list[str]:
    """Lower-case words, numbers spelled out, one spelling: ``"2 Gray cats!"`` -> two grey cats."""
    found = re.findall(r"[a-z]+|\d+", text.lower())
    spelled = [NUMBERS[int(w)] if w.isdigit() and int(w) <= 10 else w for w in found]
    return [SPELLINGS.get(word, word) for word in spelled]


def singular(word: str) -> str:
    """A word without its plural ending, so that "dogs" says "dog"."""
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def position(answer: str, phrase: str) -> int | None:
    """The number of words before ``phrase`` in ``answer``, singular or plural; None without it."""
    said, sought = ([singular(word) for word in normal_words(text)] for text in (answer, phrase))
    for start in range(len(said) - len(sought) + 1):
        if sought and said[start : start + len(sought)] == sought:
            return start
    return None


def is_right(answer: str, accept: Sequence[str], choices: Sequence[str] = ()) -> bool:
    """Whether an answer says an accepted text, before any choice that is not accepted."""
    places = [place for text in accept if (place := position(answer, text)) is not None]
    wrong = (position(answer, text) for text in choices if text not in accept)
    return bool(places) and not any(place is not None and place < min(places) for place in wrong)


DIGITS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Neither the apostrophe, the full stop (which has a rule of its own) nor the colon."""


def _contractions() -> dict[str, str]:
    """Misspelt contraction -> the contraction: its one apostrophe, or one of several, left out."""
    text = Path(__file__).with_name("contractions.yaml").read_text(encoding="utf-8")
    table: dict[str, str] = yaml.safe_load(text)
    found = {word.replace("'", ""): word for word in table["single"].split()}
    for word in table["double"].split():
        for place in (index for index, letter in enumerate(word) if letter == "'"):
            found[word[:place] + word[place + 1 :]] = word
    # One entry of the official table maps a contraction to its misspelling.
    return found | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32
"""At most this many full stops are removed: the official program passes a flag as the count."""
_THOUSANDS = re.compile(r"\d,\d")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """VQA v2's accuracy of an answer in 0 .. 1, by the answers of (ten) people.

    As in the official program, an answer that all people gave must be met letter by letter.
    """
    given, *truths = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *humans))
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
    found = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in found if word not in ARTICLES)


def exact_match(answer: str, truth: str) -> bool:
    return plain(answer) == plain(truth)


def plain(text: str) -> str:
    """Lower case, without ASCII punctuation, single spaces: ``" T-shirt. "`` -> ``"tshirt"``."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


Rule = Literal["each", "majority", "unanimous", "any"]
YES_NO = frozenset(("yes", "no"))


def clotho_aqa(
    answers: Mapping[str, str], humans: Mapping[str, Sequence[str]], rule: Rule = "each"
) -> Score:
    """Accuracy by a rule; of an answer to a yes-no question the first word counts."""
    each = {}
    for question, answer in answers.items():
        truths = [plain(human) for human in humans[question]]
        said = plain(answer)
        first = said.split(" ")[0]
        if first in YES_NO and YES_NO.issuperset(truths):
            said = first
        if (value := _right(said, truths, rule)) is not None:
            each[question] = value
    return Score.over(each, f"ClothoAQA, {rule} of all questions")


def _right(said: str, truths: Sequence[str], rule: Rule) -> float | None:
    """The share of an answer that is right; None if the rule leaves the question out."""
    truth, count = Counter(truths).most_common(1)[0]
    if rule == "each":
        return truths.count(said) / len(truths)
    if rule == "any":
        return float(said in truths)
    needed = len(truths) if rule == "unanimous" else len(truths) // 2 + 1
    return float(said == truth) if count >= needed else None
