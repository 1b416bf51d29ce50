"""What a thing is and what it is used for, in a phrase each.

Most phrases are WordNet's (the package ``wordnet-base``): of an ImageNet class those of its synset,
of another name those of a sense that can be seen or heard. ``glosses.yaml`` has phrases of
its own where WordNet knows no such thing or means another one.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from timm.data import ImageNetInfo

from mico_training.data.table import Table
from mico_world.sources import source

# WordNet's lexicographer files, from the one whose senses are meant most often when something is
# seen or heard: animals, artefacts, food, plants, objects, substances, the body, shapes; what
# happens; and persons.
_KINDS = ["05", "06", "13", "20", "17", "27", "08", "25", "11", "04", "19", "18"]
_LONGEST = 110  # characters of a phrase


class Glosses(Table):
    """Phrases by name. ``uses`` goes on after "used": "to sit on"."""

    glosses: dict[str, str]
    uses: dict[str, str]


table = Glosses.reader(Path(__file__).with_name("glosses.yaml"))


@cache
def _wordnet() -> tuple[dict[str, list[str]], dict[str, tuple[str, str]]]:
    """The numbers of each noun's synsets, the most frequent first; and of each synset the number of
    its lexicographer file and its gloss. Names of single persons and places are left out."""
    (folder,) = source("wordnet-base").rglob("wordnet")
    synsets = {}
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        facts, bar, gloss = line.partition(" | ")
        if bar and " @i " not in facts:
            synsets[facts[:8]] = facts[9:11], gloss
    nouns = {}
    for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            noun, _, count, *rest = line.split()
            nouns[noun.replace("_", " ")] = rest[-int(count) :]
    return nouns, synsets


def _parts(name: str, number: int | None) -> Iterator[str]:
    """The parts of the gloss, without examples and what stands in brackets."""
    nouns, synsets = _wordnet()
    if number is not None:
        chosen = [ImageNetInfo("imagenet-1k").index_to_label_name(number)[1:]]
    else:
        lower = name.lower()
        endings = (("", ""), ("ies", "y"), ("es", ""), ("s", ""))  # of plurals
        forms = [re.sub(f"{many}$", one, lower) for many, one in endings]
        found: list[str] = next((nouns[form] for form in forms if form in nouns), [])
        senses = [synset for synset in found if synsets.get(synset, ("",))[0] in _KINDS]
        chosen = sorted(senses, key=lambda synset: _KINDS.index(synsets[synset][0]))
    for part in synsets[chosen[0]][1].split('; "')[0].split("; ") if chosen else ():
        yield re.sub(r" ?\([^)]*\)", "", part).replace("`", "'").strip()


def gloss(name: str, number: int | None = None) -> str | None:
    """What ``name`` is: "a seat for one person, with a support for the back"; None if unknown.

    ``number`` is the ImageNet class whose name it is, if any.
    """
    if number is None and name in table().glosses:
        return table().glosses[name]
    text = ""
    for part in _parts(name, number):
        if text and len(text) + len(part) > _LONGEST:
            break
        text = f"{text}; {part}" if text else part
    return text or None


def use(name: str, number: int | None = None) -> str | None:
    """What ``name`` is used for, as it goes on after "used": "to clean teeth"; None if unknown."""
    if number is None and name in table().uses:
        return table().uses[name]
    for part in _parts(name, number):
        for pattern in (r"\bused ((?:to|for|in|as) .+)", r"\b(for \w+ing .+)"):
            if said := re.search(pattern, part):
                return said[1]
    return None
