"""Questions and answers about a view of things at known places and depths.

Everything is drawn so that nothing leaks: the order of "A or B" is a coin, "yes" and "no" are
asked equally often, and whether the left or the right thing is nearer is the layout's own coin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mico_training.world import colours, nouns
from mico_training.world.nouns import article, sentence
from mico_training.world.room_things import (
    KIND_WORDS,
    SIDES,
    Thing,
    clearly_nearer,
    depth_ends,
    listing,
)
from mico_training.world.sample import Turn, kind_of


class Asker:
    """Draws the turns of one view.

    ``things`` are sorted from left to right. ``members`` are the sample's files; ``floor`` tells
    whether the things stand on a floor, ``named`` whether they are things and not bare outlines.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        things: Sequence[Thing],
        members: Sequence[str],
        *,
        floor: bool,
        named: bool,
    ) -> None:
        self.rng = rng
        self.things = list(things)
        self.members = [m for m in ("image.jpg", "depth.png", "normal.png") if m in members]
        self.floor = floor
        self.named = named
        self.unique = len({thing.name for thing in things}) == len(things)
        self.turns: list[Turn] = []

    def _coin(self, chance: float = 0.5) -> bool:
        return bool(self.rng.random() < chance)

    def _pick(self, *texts: str) -> str:
        return texts[int(self.rng.integers(len(texts)))]

    def _depth_media(self) -> tuple[str, ...]:
        """The depth map alone or with the picture, in either order."""
        if "image.jpg" not in self.members or self._coin(0.55):
            return ("depth.png",)
        pair = ("image.jpg", "depth.png")
        return pair if self._coin() else pair[::-1]

    def _any_medium(self) -> tuple[str, ...]:
        return (self.members[int(self.rng.integers(len(self.members)))],)

    def _add(
        self,
        question: str,
        answer: str,
        skill: str,
        media: tuple[str, ...],
        choices: Sequence[str] = (),
        accept: Sequence[str] = (),
    ) -> None:
        self.turns.append(Turn(question, answer, skill, media, tuple(choices), tuple(accept)))

    def ask(self) -> tuple[Turn, ...]:
        """All turns of the view, about 4 to 8, in random order."""
        if "depth.png" in self.members:
            self._ask_nearer_side()
            self._ask_nearer_name()
            self._ask_nearer_colour()
            self._ask_distance()
        for ask, chance in (
            (self._ask_count, (0.5, 0.35, 0.6, 0.9)[min(len(self.things), 4) - 1]),
            (self._ask_name, 0.6),
            (self._ask_position, 0.5),
            (self._ask_colour, 0.4),
            (self._ask_kind, 0.12),
        ):
            if self._coin(chance):
                ask()
        while not self.turns:
            self._ask_count()
        self.rng.shuffle(self.turns)
        return tuple(self.turns)

    def _ask_nearer_side(self) -> None:
        ends, sides = depth_ends(self.things), SIDES.get(len(self.things), ())
        if ends is None or not sides:
            return
        for farther in (False, True):
            if self._coin(0.45 if farther else 0.1):
                continue
            side = sides[self.things.index(ends[farther])]
            word = self._pick("farther", "farther away") if farther else self._pick("nearer")
            most = "farthest" if farther else self._pick("nearest", "closest")
            more = word if farther else self._pick("nearer", "closer", "closer to the camera")
            if len(sides) == 2:
                a, b = sides if self._coin(0.7) else sides[::-1]
                question = self._pick(
                    f"Which of the two things is {more}, the {a} one or the {b} one?",
                    f"Is the {a} or {b} object {more}?",
                    f"Is the {a} or the {b} thing {more}?",
                    f"Which side is {more}?",
                    f"Which is {more}, the {a} one or the {b} one?",
                    f"Which object is {more}: {a} or {b}?",
                    f"Which one is {more}, {a} or {b}?",
                    f"Two things are here. Which one is {more}, the {a} or the {b} one?",
                    f"Look at the depth. Which of the two is {more}?",
                    f"Which thing is {more} to the viewer, the {a} or the {b}?"
                    if more in ("closer", "nearer")
                    else f"Which thing is {more}, left or right?",
                    f"What is {more}, the {a} object or the {b} object?",
                )
                full = f"The {side} one is {more.removesuffix(' to the camera')}."
            else:
                question = self._pick(
                    f"Which thing is the {most}, the left, the middle or the right one?",
                    f"Three things are here. Which one is {most}?",
                    f"Which of the three is the {most}: left, middle or right?",
                )
                full = f"The {side} one is the {most}."
            style = self.rng.random()
            answer = f"the {side} one" if style < 0.5 else side if style < 0.65 else full
            if style < 0.5 and self._coin():
                answer = f"The {side} one."
            self._add(question, answer, "nearer", self._depth_media(), sides, (side,))

    def _ask_nearer_name(self) -> None:
        pairs = [
            (a, b)
            for a in self.things
            for b in self.things
            if a.name != b.name and clearly_nearer(a, b)
        ]
        if not self.unique or not pairs:
            return
        for _ in range(2):
            near, far = pairs[int(self.rng.integers(len(pairs)))]
            a, b = (near.name, far.name) if self._coin() else (far.name, near.name)
            if self._coin(0.3):
                nearer = self._coin()
                word = (
                    self._pick("nearer", "closer")
                    if nearer
                    else self._pick("farther away", "farther")
                )
                right = nearer == (a == near.name)
                yes = "yes" if right else "no"
                full = f"{yes.capitalize()}, the {near.name} is nearer than the {far.name}."
                self._add(
                    f"Is the {a} {word} than the {b}?",
                    self._pick(yes, f"{yes.capitalize()}.", full),
                    "nearer",
                    self._depth_media(),
                    ("yes", "no"),
                    (yes,),
                )
                continue
            farther = self._coin(0.35)
            thing = far if farther else near
            word = (
                self._pick("farther", "farther away")
                if farther
                else self._pick("nearer", "closer", "closer to the camera")
            )
            self._add(
                self._pick(
                    f"Which is {word}, the {a} or the {b}?",
                    f"What is {word}, the {a} or the {b}?",
                    f"Which thing is {word}: the {a} or the {b}?",
                    f"Is the {a} or the {b} {word}?",
                ),
                self._pick(
                    f"the {thing.name}",
                    f"The {thing.name}.",
                    f"The {thing.name} is {word.removesuffix(' to the camera')}.",
                ),
                "nearer",
                self._depth_media(),
                (a, b),
                (thing.name,),
            )

    def _ask_nearer_colour(self) -> None:
        """The picture tells which is red, the depth map which is nearer: both are needed."""
        ends = depth_ends(self.things)
        hues = [thing.colour for thing in self.things]
        if ends is None or "image.jpg" not in self.members or len(self.things) != 2:
            return
        if None in hues or hues[0] == hues[1] or self._coin(0.3):
            return
        a, b = hues if self._coin() else hues[::-1]
        farther = self._coin(0.35)
        word = "farther away" if farther else self._pick("nearer", "closer")
        colour = str(ends[farther].colour)
        media = ("image.jpg", "depth.png") if self._coin() else ("depth.png", "image.jpg")
        self._add(
            self._pick(
                f"Which is {word}, the {a} thing or the {b} one?",
                f"Is the {a} or the {b} thing {word}?",
                f"Which colour is the {word} thing, {a} or {b}?",
            ),
            self._pick(colour, f"the {colour} one", f"The {colour} one is {word}."),
            "nearer",
            media,
            (str(a), str(b)),
            colours.accept(colour),
        )

    def _ask_distance(self) -> None:
        if not self._coin(0.3):
            return
        nearest = min(self.things, key=lambda thing: thing.near)
        step = 0.5 if nearest.near < 5 else 1.0
        rounded = max(round(nearest.near / step) * step, 0.5)
        number = f"{rounded:g}"
        unit = "metre" if rounded == 1 else "metres"
        words = "half a metre" if rounded == 0.5 else f"{number} {unit}"
        accept = (
            words,
            f"{number} {unit}",
            f"{number} {unit.replace('re', 'er')}",
            f"{number} m",
            f"{number}m",
        )
        single = len(self.things) == 1
        self._add(
            self._pick(
                "How far away is the nearest thing?",
                "How far is the closest object?",
                "At what distance is the nearest thing?",
                "How many metres away is the nearest object?",
                "How far away is it?" if single else "About how far is the nearest thing?",
            ),
            self._pick(f"about {words}", f"About {words}.", f"It is about {words} away."),
            "distance",
            self._depth_media(),
            (),
            accept,
        )

    def _ask_count(self) -> None:
        for medium in self.members:
            if self._coin(0.4):
                continue
            count = len(self.things)
            word = nouns.NUMBER_WORDS[count]
            what = KIND_WORDS[kind_of(medium)]
            thing = "thing" if count == 1 else "things"
            self._add(
                self._pick(
                    f"How many things do you see in this {what}?",
                    "How many things are there?",
                    f"How many objects does this {what} show?",
                    "How many things stand on the floor?"
                    if self.floor
                    else "How many shapes are in front of the background?",
                    "Count the objects.",
                ),
                self._pick(
                    word, str(count), f"There {'is' if count == 1 else 'are'} {word} {thing}."
                ),
                "count",
                (medium,),
                ("one", "two", "three", "four"),
                (word, str(count)),
            )

    def _ask_name(self) -> None:
        if len(self.things) > 2:
            return
        names = [thing.name for thing in self.things]
        (medium,) = self._any_medium()
        what = KIND_WORDS[kind_of(medium)]
        answer = listing(names)
        single = len(names) == 1
        outlines = "What shape is it?" if single else "Which shapes are these?"
        self._add(
            self._pick(
                f"What do you see in this {what}?",
                f"What does this {what} show?",
                ("What is this?" if single else "What are these things?")
                if self.named
                else outlines,
                f"Name what is in the {what}.",
            ),
            self._pick(answer, sentence(answer), f"I see {answer}."),
            "name" if self.named else "shape",
            (medium,),
            (),
            tuple(dict.fromkeys(names)) if single else (answer, *dict.fromkeys(names)),
        )

    def _ask_position(self) -> None:
        """Which thing is left or right (by name), in any one medium."""
        if len(self.things) != 2 or not self.unique:
            return
        left, right = self.things
        medium = self._any_medium()
        ask_right = self._coin()
        side, thing, other = ("right", right, left) if ask_right else ("left", left, right)
        a, b = (left.name, right.name) if self._coin() else (right.name, left.name)
        if self._coin(0.6):
            self._add(
                self._pick(
                    f"What is on the {side}, the {a} or the {b}?",
                    f"Which is on the {side}: the {a} or the {b}?",
                    f"What is on the {side} side?",
                ),
                self._pick(f"the {thing.name}", f"The {thing.name}.", article(thing.name)),
                "position",
                medium,
                (a, b),
                (thing.name,),
            )
        else:
            self._add(
                self._pick(
                    f"Is the {thing.name} left or right of the {other.name}?",
                    f"On which side is the {thing.name}, left or right?",
                ),
                self._pick(side, f"on the {side}", f"The {thing.name} is on the {side}."),
                "position",
                medium,
                ("left", "right"),
                (side,),
            )

    def _ask_colour(self) -> None:
        coloured = [thing for thing in self.things if thing.colour is not None]
        if "image.jpg" not in self.members or not coloured or not self.unique:
            return
        thing = coloured[int(self.rng.integers(len(coloured)))]
        colour = str(thing.colour)
        name = "thing" if len(self.things) == 1 and self._coin() else thing.name
        self._add(
            self._pick(f"What colour is the {name}?", f"Which colour does the {name} have?"),
            self._pick(colour, f"{colour.capitalize()}.", f"The {name} is {colour}."),
            "colour",
            ("image.jpg",),
            (),
            colours.accept(colour),
        )

    def _ask_kind(self) -> None:
        medium = self._any_medium()
        what = KIND_WORDS[kind_of(medium[0])]
        self._add(
            self._pick(
                "What kind of picture is this?",
                "Is this a depth map, a normal map or an ordinary picture?",
                "Is this an ordinary picture, a normal map or a depth map?",
            ),
            self._pick(f"a {what}", f"It is {article(what)}.", f"This is a {what}."),
            "kind",
            medium,
            ("depth map", "normal map", "picture"),
            (what,),
        )
