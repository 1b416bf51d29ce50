"""Evaluation items of conversations: yes-or-no questions, a second medium, an absent one, words.

They ask about the photographs and recordings of :mod:`mico_world.mini.real`, as people go on
asking. Earlier answers are given and right: each item measures the last answer alone.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mico_training.data.language.english import agreement, article, sentence
from mico_training.data.table import Table
from mico_world.language import fill
from mico_world.mini.real import Item

TABLE = Path(__file__).with_name("talks.yaml")

Row = dict[str, Any]


class Talks(Table):
    """Questions of each sort, of which an item takes the next one; ``none`` are words of an answer
    that says that a medium is not there."""

    questions: dict[str, tuple[str, ...]]
    absent: dict[str, tuple[str, ...]]
    none: tuple[str, ...]
    chats: tuple[tuple[str, str], ...]
    signs: tuple[str, ...]


def talks(items: Sequence[Item], media: Path) -> Iterator[Row]:
    """The items, whose media have the names that the single ones were written by; drawn signs are
    written into ``media``."""
    table, rng = Talks.read(TABLE), Random(4)
    texts = {sort: cycle(questions) for sort, questions in table.questions.items()}
    photographs = [item for item in items if item.skill == "real photographs"]
    sounds = [item for item in items if item.skill == "real sounds"]
    yield from _yes_or_no(photographs, texts["there"], rng)
    yield from _second(photographs, sounds, texts, rng)
    yield from _absent(photographs, sounds, table, rng)
    yield from _words(photographs, table, texts["words"], media, rng)


def _row(id: str, skill: str, question: str, accept: Sequence[str], **more: Any) -> Row:
    return {"id": id, "skill": skill, "message": question, "accept": list(accept), **more}


def _shown(item: Item) -> list[Row]:
    return [{"kind": item.kind, "path": f"media/{item.name}"}]


def _turn(item: Item, question: str) -> Row:
    return {"message": question, "media": _shown(item), "answer": sentence(article(item.accept[0]))}


def _others(item: Item, among: Sequence[Item], rng: Random) -> Item:
    """Another item that shares no word with this one."""
    own = {word for text in item.accept for word in text.split()}
    words = ((one, {w for text in one.accept for w in text.split()}) for one in among)
    return rng.choice([one for one, said in words if own.isdisjoint(said)])


def _yes_or_no(photographs: Sequence[Item], texts: Iterator[str], rng: Random) -> Iterator[Row]:
    """As POPE asks (arXiv 2305.10355): of each photograph a thing that is there, and one that is
    not, which another photograph shows."""
    for item in rng.sample(photographs, min(200, len(photographs))):
        for said, of in (("yes", item), ("no", _others(item, photographs, rng))):
            name = of.accept[0]
            question = fill(next(texts), one=article(name), **agreement(name))
            more = {"media": _shown(item), "choices": ["yes", "no"]}
            yield _row(f"{item.id}-{said}", "real yes or no", question, [said], **more)


def _second(
    photographs: Sequence[Item], sounds: Sequence[Item], texts: dict[str, Any], rng: Random
) -> Iterator[Row]:
    for number, first in enumerate(rng.sample(photographs, min(90, len(photographs)))):
        heard = number % 3 == 0
        second = _others(first, sounds if heard else photographs, rng)
        earlier = [_turn(first, next(texts["first"]))]
        asked = next(texts["heard" if heard else "second"])
        if number % 3 == 1:
            earlier.append(_turn(second, next(texts["second"])))
            question, skill = next(texts["back"]), "real earlier medium"
            more: Row = {"reject": list(second.accept), "earlier": earlier}
            yield _row(f"back-{number:02}", skill, question, first.accept, **more)
            continue
        more = {"reject": list(first.accept), "earlier": earlier, "media": _shown(second)}
        yield _row(f"second-{number:02}", "real second medium", asked, second.accept, **more)


def _absent(
    photographs: Sequence[Item], sounds: Sequence[Item], table: Talks, rng: Random
) -> Iterator[Row]:
    """About a medium that is not there: with none at all, after a chat, or with another one."""
    for kind, questions in table.absent.items():
        shown = rng.choices(photographs if kind == "audio" else sounds, k=len(questions))
        for number, (question, item) in enumerate(zip(questions, shown, strict=True)):
            chat, answer = rng.choice(table.chats)
            for case, more in {
                "alone": {},
                "chat": {"earlier": [{"message": chat, "answer": answer}]},
                "other": {"media": _shown(item)},
            }.items():
                id = f"absent-{kind}-{number}-{case}"
                yield _row(id, "absent medium", question, table.none, **more)


def _words(
    photographs: Sequence[Item], table: Talks, texts: Iterator[str], media: Path, rng: Random
) -> Iterator[Row]:
    """Words on a sign are asked for after a turn about something else, or again after a chat."""
    for number, words in enumerate(table.signs):
        name = f"sign-{number:02}.png"
        _sign(words, rng).save(media / name)
        sign: Row = {"message": "What is this?", "answer": "A sign."}
        if number % 2:
            sign = {"message": "What does it say?", "answer": f'It says "{words}".'}
        sign["media"] = [{"kind": "image", "path": f"media/{name}"}]
        between = _turn(rng.choice(photographs), "And what is in this picture?")
        if number % 4 < 2:
            between = dict(zip(("message", "answer"), rng.choice(table.chats), strict=True))
        earlier = [sign, between] if number % 2 else [sign]
        yield _row(f"sign-{number:02}", "words later", next(texts), [words], earlier=earlier)


def _sign(words: str, rng: Random) -> Image.Image:
    """A sign with words in its middle."""
    dark, light = [(rng.randrange(low, low + 70),) * 3 for low in (0, 180)]
    image = Image.new("RGB", (480, 320), light)
    frame = ImageDraw.Draw(image)
    frame.rectangle((30, 60, 450, 260), outline=dark, width=6)
    font = ImageFont.load_default(rng.randint(30, 44))
    frame.text((240, 160), words, dark, font, anchor="mm")
    return image
