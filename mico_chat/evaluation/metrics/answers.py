"""Is an answer to a question right? The rules of the data sets' own evaluations, and our own.

* ``is_right``, for questions with skills: the answer has an accepted text in whole words, with any
  words around it.
* ``vqa_accuracy``: VQA v2 (Antol et al. 2015; Goyal et al. 2017). Ten people answered a question.
  An answer that three of nine people gave is right, and an answer of fewer people is right in part;
  the figure is the mean over the ten groups of nine. Odd details are those of the official program.
* ``exact_match``: open-ended video QA, as VALOR scores it: the answer equals the true one, word for
  word, in lower case and without punctuation. VALOR does not clean the true answer, so that no
  answer can equal "t-shirt"; here both sides are cleaned. For single lower-case words, the answers
  of MSRVTT-QA, MSVD-QA and TGIF, both ways are the same.
* ``clotho_aqa``: ClothoAQA (Lipping et al. 2022). Three people answered a question about a sound,
  each with one word. They often disagree, so an accuracy needs a rule, and papers use different
  rules. MiCo's Table 5 (63.9) names none, beside baselines of several rules.

  * ``each``: each person's answer is an item, as in the test file and in Qwen-Audio's score. People
    disagree, so that no model can come near 1.
  * ``majority``, ``unanimous``: the true answer is that of two people, or of all three; a question
    without such an answer is left out. The data set's paper has both for its yes-no questions.
  * ``any``: the answer of any person is right (Audio Flamingo, except for yes-no questions).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SPELLINGS = {"gray": "grey", "nearer": "closer", "further": "farther", "color": "colour"}
"""Each word has a synonym here; the synonym replaces the word on both sides of a comparison."""


def normal_words(text: str) -> list[str]:
    """Lower-case words, digits as words, one spelling, singular: "2 Gray cats" -> two grey cat."""
    found = re.findall(r"[a-z]+|\d+", text.lower())
    spelled = [NUMBERS[int(w)] if w.isdigit() and int(w) <= 10 else w for w in found]
    return [re.sub(r"(?<=..[^s])s$", "", SPELLINGS.get(word, word)) for word in spelled]


def position(answer: str, phrase: str) -> int | None:
    """The number of words before ``phrase`` in ``answer``; None if the answer lacks the phrase."""
    said, sought = normal_words(answer), normal_words(phrase)
    for start in range(len(said) - len(sought) + 1):
        if sought and said[start : start + len(sought)] == sought:
            return start
    return None


def is_right(
    answer: str, accept: Sequence[str], choices: Sequence[str] = (), reject: Sequence[str] = ()
) -> bool:
    """Whether an answer has an accepted text before any other choice, and no text of ``reject``."""
    if any(position(answer, text) is not None for text in reject):
        return False
    places = [place for text in accept if (place := position(answer, text)) is not None]
    wrong = (position(answer, text) for text in choices if text not in accept)
    return bool(places) and not any(place is not None and place < min(places) for place in wrong)


DIGITS = {word: str(value) for value, word in enumerate(NUMBERS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Without the apostrophe, the colon, and the full stop (which has a rule of its own)."""


def _contractions() -> dict[str, str]:
    """Contractions by their misspellings, which lack the only apostrophe, or one of several."""
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
"""The number of full stops to remove: by mistake, the official program uses a flag as count."""
_THOUSANDS = re.compile(r"\d,\d")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """VQA v2's accuracy of an answer in 0 .. 1, by the answers of (ten) people.

    As in the official program, an answer that all people gave must be matched letter by letter.
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


_LETTER = re.compile(
    r"\W*(?:(?:the|correct|answer|option|choice|is)\b\W*)*([A-J])(?!\w|\s+\w)", re.I
)


def chosen(answer: str, choices: Sequence[str]) -> str:
    """The letter of the one choice that an answer names by its letter or text; else ""."""
    letters = string.ascii_uppercase[: len(choices) or None]
    if (found := _LETTER.match(answer)) and found[1].upper() in letters:
        return found[1].upper()
    said = [n for n, choice in enumerate(choices) if position(answer, choice) is not None]
    return letters[said[0]] if len(said) == 1 else ""


def yes(answer: str) -> bool:
    """POPE's reading of an answer: yes, unless its first sentence has "no" or "not"."""
    return not {"No", "no", "not"} & set(answer.partition(".")[0].replace(",", "").split(" "))


def anls(answer: str, truth: str) -> float:
    """DocVQA's average normalised Levenshtein similarity (arXiv 1907.00490); 0 from half on."""
    said, true = (" ".join(text.lower().split()) for text in (answer, truth))
    row = list(range(len(true) + 1))
    for letter in said:
        before, row = row, [row[0] + 1]
        for n, other in enumerate(true):
            row.append(min(before[n + 1] + 1, row[n] + 1, before[n] + (letter != other)))
    distance = row[-1] / max(len(said), len(true), 1)
    return 1 - distance if distance < 0.5 else 0.0


def _holds(answer: str, truths: Sequence[str], asked: Mapping[str, Any]) -> bool:
    """OCRBench: the answer has a true one in it; in formulas, spaces say nothing."""
    if asked["skill"] == "Handwritten Mathematical Expression Recognition":
        return any("".join(truth.split()) in "".join(answer.split()) for truth in truths)
    return any(" ".join(t.lower().split()) in " ".join(answer.lower().split()) for t in truths)


BENCHMARKS: dict[str, Callable[[str, Sequence[str], Mapping[str, Any]], float]] = {
    "pope": lambda answer, truths, _: yes(answer) == (truths[0] == "yes"),
    "mmstar": lambda answer, truths, asked: chosen(answer, asked["choices"]) in truths,
    "ocrbench": _holds,
    "textvqa": lambda a, truths, _: vqa_accuracy(vqa_normal(a), [*map(vqa_normal, truths)]),
    "docvqa": lambda answer, truths, _: max(anls(answer, truth) for truth in truths),
}
"""The score of an answer, 0 to 1, by the rule of each public benchmark, from its record."""
BENCHMARKS |= dict.fromkeys(("mmbench", "scienceqa", "mmau"), BENCHMARKS["mmstar"])


Rule = Literal["each", "majority", "unanimous", "any"]
YES_NO = frozenset(("yes", "no"))


def clotho_aqa(
    answers: Mapping[str, str], humans: Mapping[str, Sequence[str]], rule: Rule = "each"
) -> dict[str, float]:
    """The accuracy of each question that the rule counts.

    Of an answer to a yes-no question, only the first word counts.
    """
    each = {}
    for question, answer in answers.items():
        truths = [plain(human) for human in humans[question]]
        said = plain(answer)
        first = said.split(" ")[0]
        if first in YES_NO and YES_NO.issuperset(truths):
            said = first
        if (value := _right(said, truths, rule)) is not None:
            each[question] = value
    return each


def _right(said: str, truths: Sequence[str], rule: Rule) -> float | None:
    """The accuracy of an answer in 0 .. 1; None if the rule leaves the question out."""
    truth, count = Counter(truths).most_common(1)[0]
    if rule == "each":
        return truths.count(said) / len(truths)
    if rule == "any":
        return float(said in truths)
    needed = len(truths) if rule == "unanimous" else len(truths) // 2 + 1
    return float(said == truth) if count >= needed else None
