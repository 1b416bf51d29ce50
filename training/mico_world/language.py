"""Questions and answers out of the templates in ``phrases.yaml``.

A question that names alternatives
names them in random order, so that their order does not give the answer away.
"""

from pathlib import Path

from mico_training.data.language.english import Rng, pick, sentence
from mico_training.data.table import Table

_SENTENCES = 0.35  # share of whole sentences among the answers that may also be short


class Templates(Table):
    questions: tuple[str | dict[str, str], ...] = ()
    short: str = ""
    sentences: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


class Phrases(Table):
    turns: dict[str, Templates]
    words: dict[str, tuple[str, ...]]
    accepted: dict[str, tuple[str, ...]]


phrases = Phrases.reader(Path(__file__).with_name("phrases.yaml"))


def word(rng: Rng, meaning: str) -> str:
    return pick(rng, phrases().words[meaning])


def accepted(answer: str) -> tuple[str, ...]:
    return phrases().accepted.get(answer, (answer,))


def draw_question(rng: Rng, sort: str, form: str = "") -> str:
    """A question of the sort ``sort`` with its gaps; ``form`` chooses among a template's forms."""
    chosen = pick(rng, phrases().turns[sort].questions)
    return chosen if isinstance(chosen, str) else chosen[form]


def fill(template: str, **facts: str) -> str:
    """The template with ``facts`` in its gaps; "{Is}" becomes the fact "is" with a capital."""
    capital = {gap.capitalize(): text[:1].upper() + text[1:] for gap, text in facts.items()}
    return template.format_map(capital | facts)


def ask(rng: Rng, sort: str, *, form: str = "", **facts: str) -> str:
    return fill(draw_question(rng, sort, form), **facts)


def answer(rng: Rng, sort: str, **facts: str) -> str:
    templates = phrases().turns[sort]
    if templates.answers:
        return fill(pick(rng, templates.answers), **facts)
    whole = templates.sentences and rng.random() < _SENTENCES
    return sentence(fill(pick(rng, templates.sentences) if whole else templates.short, **facts))


def say(rng: Rng, sort: str, *, form: str = "", **facts: str) -> tuple[str, str]:
    return ask(rng, sort, form=form, **facts), answer(rng, sort, **facts)
