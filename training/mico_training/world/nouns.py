"""English nouns as the data engine needs them: articles, plurals, number words, clean names."""

from __future__ import annotations

import re

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
COLOUR_WORDS = frozenset(
        {"red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black",
     "white", "grey", "gray", "golden", "silver", "colorful", "colourful"}
)  # fmt: skip
# Nouns in -s that are one thing; others in -s are plural already ("scissors", "cherries").
SINGULAR_IN_S = frozenset(
    {"lens", "gas", "bellows", "rhinoceros", "albatross", "canvas"}
)  # fmt: skip
_SINGULAR_ENDINGS = ("ss", "us", "is")
MASS = frozenset(
        {"bread", "cheese", "broccoli", "garlic", "ginger", "popcorn", "spaghetti", "sushi",
     "rice", "lettuce", "bacon", "butter", "corn", "soap", "wood", "fire", "coral", "bamboo",
     "milk", "knitting", "yarn", "thread", "salt", "sugar", "salad", "ice", "paper", "food",
     "lavender", "meat", "paint", "hay", "grass", "sand", "water", "wool", "cloth", "lemonade",
     "holly"}
)  # fmt: skip
_IRREGULAR = {
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
    "man": "men",
    "woman": "women",
    "child": "children",
    "leaf": "leaves",
    "knife": "knives",
    "loaf": "loaves",
    "wolf": "wolves",
    "calf": "calves",
    "scarf": "scarves",
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "moose": "moose",
    "bison": "bison",
    "shrimp": "shrimp",
    "squid": "squid",
    "aircraft": "aircraft",
    "cactus": "cacti",
    "die": "dice",
    "dice": "dice",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "mosquito": "mosquitoes",
}


def head(name: str) -> str:
    """The noun that decides number: "cup of coffee" -> "cup"."""
    return name.partition(" of ")[0].split()[-1]


def is_plural(name: str) -> bool:
    """Whether ``name`` takes "are" and no article ("scissors")."""
    noun = head(name)
    return noun.endswith("s") and not noun.endswith(_SINGULAR_ENDINGS) and noun not in SINGULAR_IN_S


def countable(name: str) -> bool:
    """Whether one can say "three NAMEs": neither a mass noun nor plural already."""
    return head(name) not in MASS and not is_plural(name)


def article(phrase: str) -> str:
    """``phrase`` with its indefinite article: "an apple", "a red apple", "scissors", "bread"."""
    if is_plural(phrase) or head(phrase) in MASS:
        return phrase
    first = phrase.split()[0].lower()
    silent = first.startswith(("hour", "honest", "heir"))
    spoken_you = first.startswith(("uni", "eu", "ukulele", "uten", "usb", "one", "ufo"))
    vowel = (first[0] in "aeiou" and not spoken_you) or silent
    return f"{'an' if vowel else 'a'} {phrase}"


def plural(name: str) -> str:
    """The plural of a noun phrase: "toy car" -> "toy cars"."""
    if is_plural(name):
        return name
    if " of " in name:  # "cups of coffee"
        counted, _, rest = name.partition(" of ")
        return f"{plural(counted)} of {rest}"
    *before, noun = name.split()
    if noun in _IRREGULAR:
        many = _IRREGULAR[noun]
    elif noun.endswith("fish"):
        many = noun
    elif noun.endswith("man") and noun not in ("human", "caiman", "walkman"):
        many = noun[:-3] + "men"
    elif re.search(r"(s|x|z|ch|sh)$", noun):
        many = noun + "es"
    elif re.search(r"[^aeiou]y$", noun):
        many = noun[:-1] + "ies"
    else:
        many = noun + "s"
    return " ".join([*before, many])


def be(name: str) -> str:
    """ "is" or "are", as ``name`` needs."""
    return "are" if is_plural(name) else "is"


def sentence(text: str) -> str:
    """``text`` with a capital and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
