"""A thing's gloss and use are those of what can be seen, in WordNet or in the table."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mico_world import glosses
from mico_world.glosses import gloss, use

NOUNS = {
    "whale": "10773665 02062744",
    "toothbrush": "04453156",
    "cherry": "12640839 07757132",
    "hay": "07802026",
    "justice": "01129920",
}
SYNSETS = {
    "10773665 18": "a very large person; impressive in size or qualities",
    "02062744 05": "any of the larger cetacean mammals; breathes through a blowhole",
    "04453156 06": 'small brush (of plastic); used to clean teeth; "he lost his toothbrush"',
    "12640839 20": "wood of any of various cherry trees",
    "07757132 13": "a red fruit with a single hard stone",
    "07802026 13": "grass mowed and cured for use as fodder",
    "01129920 28": "judgment involved in the determination of rights",
}


@pytest.fixture(autouse=True)
def wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "usr" / "share" / "wordnet"
    folder.mkdir(parents=True)
    index = [f"{n} n {len(o.split())} 0 {len(o.split())} 0 {o}  " for n, o in NOUNS.items()]
    (folder / "index.noun").write_text("\n".join(["  1 This is a licence.", *index]))
    data = [f"{k} n 01 x 0 001 @ 00001740 n 0000 | {text}" for k, text in SYNSETS.items()]
    named = "00000001 05 n 01 whale 0 001 @i 00001740 n 0000 | a single whale of a book"
    (folder / "data.noun").write_text("\n".join([named, *data]))
    monkeypatch.setattr(glosses, "source", lambda name: tmp_path)
    glosses._wordnet.cache_clear()
    yield
    glosses._wordnet.cache_clear()


def test_a_sense_that_is_seen_goes_before_a_person_and_before_what_a_thing_is_made_of() -> None:
    assert gloss("whale") == "any of the larger cetacean mammals; breathes through a blowhole"
    assert gloss("cherries") == "a red fruit with a single hard stone"


def test_a_use_is_what_the_gloss_says_without_brackets_and_examples() -> None:
    assert gloss("Toothbrush") == "small brush; used to clean teeth"
    assert use("Toothbrush") == "to clean teeth"
    # An ImageNet class has the gloss of its synset.
    assert gloss("dried grass", 958) == SYNSETS["07802026 13"]


@pytest.mark.parametrize("name", ["justice", "xyzzy", "", "s"])
def test_what_cannot_be_seen_or_is_unknown_has_none(name: str) -> None:
    assert gloss(name) is None
    assert use(name) is None


def test_own_phrases_go_before_wordnets_and_fit_into_a_sentence() -> None:
    table = glosses.table()
    assert gloss("shoes") == table.glosses["shoes"]
    assert use("chair") == table.uses["chair"]
    for text in [*table.glosses.values(), *table.uses.values()]:
        assert not text.endswith(".")
    assert all(text.startswith("to ") for text in table.uses.values())
