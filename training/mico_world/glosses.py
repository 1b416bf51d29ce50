"""What a thing is and what it is used for, in a phrase each.

The phrases are WordNet's (the package ``wordnet-base``), or those of ``glosses.yaml`` where WordNet
knows no such thing or means another one.
"""

import re
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
    """The numbers of each noun's synsets, each synset's file and gloss, but for proper names."""
    (folder,) = source("wordnet-base").rglob("wordnet")
    lines = (folder / "data.noun").read_text(encoding="utf-8").splitlines()
    facts = [line.partition(" | ")[::2] for line in lines if " | " in line]
    index = (folder / "index.noun").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in index if not line.startswith(" ")]
    nouns = {row[0].replace("_", " "): row[-int(row[2]) :] for row in rows}
    return nouns, {fact[:8]: (fact[9:11], text) for fact, text in facts if " @i " not in fact}


def _parts(name: str, number: int | None) -> list[str]:
    """The parts of the gloss, without examples and what stands in brackets."""
    nouns, synsets = _wordnet()
    if number is not None:
        chosen = [ImageNetInfo("imagenet-1k").index_to_label_name(number)[1:]]
    else:
        endings = (("", ""), ("ies", "y"), ("es", ""), ("s", ""))  # of plurals
        forms = [re.sub(f"{many}$", one, name.lower()) for many, one in endings]
        found: list[str] = next((nouns[form] for form in forms if form in nouns), [])
        senses = [synset for synset in found if synsets.get(synset, ("",))[0] in _KINDS]
        chosen = sorted(senses, key=lambda synset: _KINDS.index(synsets[synset][0]))
    parts = synsets[chosen[0]][1].split('; "')[0].split("; ") if chosen else []
    return [re.sub(r" ?\([^)]*\)", "", part).replace("`", "'").strip() for part in parts]


def gloss(name: str, number: int | None = None) -> str | None:
    """What ``name`` is: "a seat for one person, with a support for the back"; None if unknown.
    ``number`` is the ImageNet class whose name it is, if any."""
    if number is None and name in table().glosses:
        return table().glosses[name]
    parts = _parts(name, number)
    while len(parts) > 1 and len("; ".join(parts)) > _LONGEST:
        parts.pop()
    return "; ".join(parts) or None


def use(name: str, number: int | None = None) -> str | None:
    """What ``name`` is used for, as it goes on after "used": "to clean teeth"; None if unknown."""
    if number is None and name in table().uses:
        return table().uses[name]
    pattern = r"\bused ((?:to|for|in|as) .+)|\b(for \w+ing .+)"
    said = [match for part in _parts(name, number) if (match := re.search(pattern, part))]
    return said[0][1] or said[0][2] if said else None
