"""Questions, answers and captions about scenes: many phrasings, short answers, exact truth.

Nothing in a question tells the answer: where it names alternatives, their order is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mico_training.world import colours
from mico_training.world.compose import Placed
from mico_training.world.nouns import NUMBER_WORDS, article, be, is_plural, plural, sentence
from mico_training.world.sample import Turn
from mico_training.world.things import Thing

Rng = np.random.Generator
_SENTENCES = 0.35  # share of answers that are whole sentences

NAME = (
    "What is in this picture?",
    "What is this?",
    "What is shown here?",
    "What do you see?",
    "Name the main thing in the picture.",
    "What can you see in the image?",
    "What object is this?",
    "What does the picture show?",
    "Which thing is this?",
    "Identify the object in this image.",
    "What is the main object?",
    "What's in the photo?",
    "What's this?",
    "Tell me what this is.",
    "What is pictured?",
    "What is the image of?",
    "Say what you see in one or two words.",
    "What does this image contain?",
    "What is depicted here?",
    "Can you tell me what this is?",
    "What is in the image?",
    "What's in the picture?",
    "What is shown in the image?",
)
DESCRIBE = (
    "Describe the picture.",
    "Describe this image.",
    "Describe what you see.",
    "Caption this image.",
    "Write a short caption for the picture.",
    "What is going on in this picture?",
    "Describe the scene.",
    "Give a short description of the image.",
    "What is there in the picture?",
    "Describe the image in one sentence.",
    "Tell me about this picture.",
    "What do you see here?",
)
COUNT = (
    "How many {many} are there?",
    "How many {many} are in the picture?",
    "Count the {many}.",
    "How many {many} do you see?",
    "What is the number of {many}?",
    "How many {many} can you count?",
    "How many {many} are shown?",
    "Number of {many}?",
    "How many {many} are visible in the image?",
    "Tell me how many {many} there are.",
    "In this image, how many {many} are there?",
    "How many {many}?",
    "Can you count the {many} in this picture?",
)
COUNT_ALL = ("things", "objects", "items")
COLOUR = (
    "What colour {is} the {name}?",
    "What color {is} the {name}?",
    "Which colour {is} the {name}?",
    "Which color {is} the {name}?",
    "What is the colour of the {name}?",
    "What is the color of the {name}?",
    "What colour {does} the {name} have?",
    "Tell me the color of the {name}.",
    "The {name}: what colour {is} it?",
    "Name the colour of the {name} in the picture.",
    "What color {is} the {name} in this image?",
    "In the image, what color {is} the {name}?",
    "Look at the {name}. What colour {is} it?",
)
COLOUR_ONE = (
    "What colour is this?",
    "What color is it?",
    "What colour is the thing in the picture?",
    "What color is the object?",
    "Which colour do you see?",
    "What is the main color of the object?",
    "What colour is the object shown?",
)
SIDE_OF = (
    "Is the {a} {one} or {two} the {b}?",
    "Is the {a} {one} the {b} or {two} it?",
    "Where is the {a}: {one} or {two} the {b}?",
    "Is the {a} located {one} or {two} the {b}?",
    "Relative to the {b}, is the {a} {short_one} or {short_two}?",
    "Looking at the picture, is the {a} {one} or {two} the {b}?",
    "Would you say the {a} is {one} or {two} the {b}?",
    "The {a}: is it {one} or {two} the {b}?",
)
WHICH_SIDE = (
    "Which is {place}, the {a} or the {b}?",
    "Which thing is {place}, the {a} or the {b}?",
    "What is {place}: the {a} or the {b}?",
    "Which one is {place}, the {a} or the {b}?",
    "Which object is {further}, the {a} or the {b}?",
    "Is it the {a} or the {b} that is {place}?",
    "Between the {a} and the {b}, which is {place}?",
    "Which is {further}, the {a} or the {b}?",
)
WHAT_IS_AT = (
    "What is {place}?",
    "Which thing is {place}?",
    "What do you see {place}?",
    "What object is {place} of the picture?",
    "Name the thing {place}.",
    "What's {place}?",
)
WHERE_HALF = (
    "Where is the {a}, {one} or {two}?",
    "Is the {a} on the {one} or on the {two} of the picture?",
    "Is the {a} in the {one} or the {two} half of the image?",
    "Which side is the {a} on, {one} or {two}?",
    "On which side of the picture is the {a}: {one} or {two}?",
)
WHERE_HALF_VERTICAL = (
    "Where is the {a}, at the {one} or at the {two}?",
    "Is the {a} in the {one} or the {two} half of the image?",
    "Is the {a} at the {one} or the {two} of the picture?",
)
PRESENT = (
    "Is there {one} in the picture?",
    "Is there {one} in the image?",
    "Do you see {one}?",
    "Can you see {one}?",
    "Does the picture show {one}?",
    "Is {one} visible?",
    "Is there {one} here?",
    "Does this image contain {one}?",
    "Can {one} be seen in this picture?",
)
WHERE = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
PLACE = {
    "left": ("on the left", "on the left side", "to the left"),
    "right": ("on the right", "on the right side", "to the right"),
    "above": ("at the top", "on top", "higher up"),
    "below": ("at the bottom", "lower down"),
}
FURTHER = {
    "left": ("further left", "more to the left"),
    "right": ("further right", "more to the right"),
    "above": ("higher", "higher up"),
    "below": ("lower", "lower down"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_WORDS_FOR = {
    "left": ("left",),
    "right": ("right",),
    "above": ("above", "over", "higher", "top"),
    "below": ("below", "under", "beneath", "lower", "bottom"),
}


def pick(rng: Rng, options: Sequence[str]) -> str:
    """One of ``options``."""
    return options[int(rng.integers(len(options)))]


def shuffled(rng: Rng, *options: str) -> tuple[str, ...]:
    """``options`` in a drawn order."""
    return tuple(options[int(i)] for i in rng.permutation(len(options)))


def reply(rng: Rng, short: str, *full: str) -> str:
    """The short answer or one of the full sentences, as a sentence."""
    return sentence(pick(rng, full) if full and rng.random() < _SENTENCES else short)


def phrase(placed: Placed, *, colour: bool = True) -> str:
    """A thing with its colour, without an article: "red car"."""
    return f"{placed.colour} {placed.name}" if colour and placed.colour else placed.name


def name_turn(rng: Rng, member: str, thing: Thing) -> Turn:
    """What is this? For a picture of one thing."""
    one = article(thing.name)
    this = "these are" if is_plural(thing.name) else "this is"
    answer = reply(rng, one, f"{this} {one}", f"the picture shows {one}", f"it {'shows'} {one}")
    return Turn(pick(rng, NAME), answer, "name", (member,), accept=thing.accept)


def describe_turn(rng: Rng, member: str, caption: str, accept: tuple[str, ...]) -> Turn:
    """Describe the picture: the caption as the answer."""
    return Turn(pick(rng, DESCRIBE), sentence(caption), "describe", (member,), accept=accept)


def count_turn(rng: Rng, member: str, noun: str | None, n: int) -> Turn:
    """How many? ``noun`` None asks for all things."""
    many = pick(rng, COUNT_ALL) if noun is None else plural(noun)
    word = NUMBER_WORDS[n]
    one = {"things": "thing", "objects": "object", "items": "item"}.get(many, noun or many)
    there = f"there is one {one}" if n == 1 else f"there are {word} {many}"
    return Turn(
        pick(rng, COUNT).format(many=many),
        reply(rng, word, there, f"I see {word} {one if n == 1 else many}"),
        "count",
        (member,),
        choices=NUMBER_WORDS[1:5] if 1 <= n <= 4 else (),
        accept=(word, str(n)),
    )


def colour_turn(rng: Rng, member: str, placed: Placed, *, alone: bool) -> Turn:
    """What colour is the thing? It needs a colour."""
    if placed.colour is None:
        raise ValueError(f"the {placed.name} has no one colour to ask for")
    many = is_plural(placed.name)
    template = pick(rng, COLOUR_ONE if alone and rng.random() < 0.3 else COLOUR)
    if many:
        template = template.replace("{is} it?", "{is} they?")
    question = template.format(
        name=placed.name, **{"is": be(placed.name), "does": "do" if many else "does"}
    )
    colour = "gray" if placed.colour == "grey" and "color" in question else placed.colour
    answer = reply(rng, colour, f"the {placed.name} {be(placed.name)} {colour}")
    return Turn(
        question, answer, "colour", (member,), colours.COLOURS, colours.accept(placed.colour)
    )


def relation(a: Placed, b: Placed, axis: str) -> str:
    """Where ``a`` is, seen from ``b``: "left", "right" (axis "x"), "above", "below" ("y")."""
    if axis == "x":
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def side_turn(rng: Rng, member: str, a: Placed, b: Placed, axis: str) -> Turn:
    """Is a left or right of b?"""
    side = relation(a, b, axis)
    one, two = shuffled(rng, *(("left", "right") if axis == "x" else ("above", "below")))
    words = {w: pick(rng, WHERE[w]) for w in (one, two)}
    template = pick(rng, SIDE_OF)
    question = template.format(
        a=a.name,
        b=b.name,
        one=words[one],
        two=words[two],
        short_one=pick(rng, PLACE[one]) if axis == "x" else one,
        short_two=pick(rng, PLACE[two]) if axis == "x" else two,
    )
    if is_plural(a.name):
        question = question.replace("Is the", "Are the").replace(" is the", " are the")
        question = question.replace("is it", "are they")
    answer = reply(rng, side, f"the {a.name} {be(a.name)} {words[side]} the {b.name}")
    return Turn(question, answer, "position", (member,), (one, two), _WORDS_FOR[side])


def which_side_turn(rng: Rng, member: str, a: Placed, b: Placed, axis: str) -> Turn:
    """Which is on the left, a or b?"""
    side = pick(rng, ("left", "right") if axis == "x" else ("above", "below"))
    right = a if relation(a, b, axis) == side else b
    first, second = shuffled(rng, a.name, b.name)
    place = pick(rng, PLACE[side])
    question = pick(rng, WHICH_SIDE).format(
        place=place, further=pick(rng, FURTHER[side]), a=first, b=second
    )
    answer = reply(rng, f"the {right.name}", f"the {right.name} {be(right.name)} {place}")
    return Turn(question, answer, "position", (member,), (first, second), right.thing.accept)


def what_is_at_turn(rng: Rng, member: str, a: Placed, b: Placed, axis: str) -> Turn:
    """What is on the left? What is to the left of the dog? The open form: name by place."""
    side = pick(rng, ("left", "right") if axis == "x" else ("above", "below"))
    right, other = (a, b) if relation(a, b, axis) == side else (b, a)
    place = pick(rng, PLACE[side])
    if rng.random() < 0.5:
        question = f"What is {pick(rng, WHERE[side])} the {other.name}?"
    else:
        template = pick(rng, WHAT_IS_AT if side in ("left", "right") else WHAT_IS_AT[:3])
        question = template.format(place=place)
    one = article(right.name)
    return Turn(
        question,
        reply(rng, one, f"{one} {be(right.name)} {place}"),
        "position_name",
        (member,),
        accept=right.thing.accept,
    )


def half_turn(rng: Rng, member: str, a: Placed, axis: str) -> Turn:
    """Where is the star, left or right? For a thing clearly in one half of the picture."""
    options = ("left", "right") if axis == "x" else ("top", "bottom")
    side = options[0] if (a.x if axis == "x" else a.y) < 0.5 else options[1]
    one, two = shuffled(rng, *options)
    question = pick(rng, WHERE_HALF if axis == "x" else WHERE_HALF_VERTICAL).format(
        a=a.name, one=one, two=two
    )
    if is_plural(a.name):
        question = question.replace("is the", "are the").replace("Is the", "Are the")
    where = f"on the {side}" if axis == "x" else f"at the {side}"
    answer = reply(rng, side, f"the {a.name} {be(a.name)} {where}")
    accept = {"top": ("top", "upper", "above"), "bottom": ("bottom", "lower", "below")}
    return Turn(question, answer, "position", (member,), (one, two), accept.get(side, (side,)))


def present_turn(rng: Rng, member: str, named: str, *, present: bool) -> Turn:
    """Is there a dog in the picture?"""
    question = pick(rng, PRESENT).format(one=article(named))
    there = "there are" if is_plural(named) else "there is"
    if is_plural(named):
        question = question.replace("Is ", "Are ", 1)
    full = f"yes, {there} {article(named)}" if present else f"no, {there} no {named}"
    yes = "yes" if present else "no"
    return Turn(question, reply(rng, yes, full), "present", (member,), ("yes", "no"), (yes,))


def captions(rng: Rng, placed: Sequence[Placed]) -> tuple[str, ...]:
    """True sentences about the scene, for pretraining: count, colour and place in words."""
    if len(placed) == 1:
        return _captions_of_one(rng, placed[0])
    kinds = {p.name for p in placed}
    if len(kinds) == 1:
        return _captions_of_kind(rng, placed)
    if len(placed) == 2:
        return _captions_of_two(rng, *placed)
    groups: list[str] = []
    for name in dict.fromkeys(p.name for p in placed):
        same = [p for p in placed if p.name == name]
        colour = {p.colour for p in same}
        noun = f"{same[0].colour} {name}" if len(colour) == 1 and same[0].colour else name
        groups.append(
            article(noun) if len(same) == 1 else f"{NUMBER_WORDS[len(same)]} {plural(noun)}"
        )
    listed = ", ".join(groups[:-1]) + f" and {groups[-1]}"
    number = NUMBER_WORDS[len(placed)]
    return (sentence(listed), sentence(f"{number} things: {listed}"))


def _captions_of_one(rng: Rng, one: Placed) -> tuple[str, ...]:
    thing = article(phrase(one))
    out = [thing, f"a picture of {thing}"]
    where = ("left" if one.x < 0.4 else "right" if one.x > 0.6 else "") if one.width < 0.6 else ""
    if where:
        out.append(f"{thing} on the {where}")
    return tuple(sentence(text) for text in shuffled(rng, *out))


def _captions_of_kind(rng: Rng, placed: Sequence[Placed]) -> tuple[str, ...]:
    name, number = placed[0].name, NUMBER_WORDS[len(placed)]
    colour = {p.colour for p in placed}
    noun = phrase(placed[0]) if len(colour) == 1 else name
    many = f"{number} {plural(noun)}"
    return tuple(
        sentence(t) for t in shuffled(rng, many, f"a picture of {many}", f"there are {many}")
    )


def _captions_of_two(rng: Rng, a: Placed, b: Placed) -> tuple[str, ...]:
    out = []
    first, second = article(phrase(a)), article(phrase(b))
    if abs(a.x - b.x) > 0.2:
        side = relation(a, b, "x")
        out.append(f"{first} {pick(rng, WHERE[side])} {second}")
        out.append(f"{second} {pick(rng, WHERE[OPPOSITE[side]])} {first}")
    if abs(a.y - b.y) > 0.2:
        side = relation(a, b, "y")
        out.append(f"{first} {pick(rng, WHERE[side])} {second}")
        out.append(f"{second} {pick(rng, WHERE[OPPOSITE[side]])} {first}")
    if not out:
        out = [f"{first} and {second}", f"{second} and {first}"]
    return tuple(sentence(text) for text in shuffled(rng, *out))
