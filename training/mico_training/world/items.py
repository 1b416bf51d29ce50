"""Evaluation items out of shards and out of packages that training never sees.

``shard_items`` writes the questions of validation shards; ``everyday_items`` writes photographs
and recordings of the children's programme GCompris, which no training shard draws on: real
animals, instruments and household sounds, named by their authors.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mico_chat.errors import DataError
from mico_training.world.sample import kind_of
from mico_training.world.shards import read_shard
from mico_training.world.sources import source

MOST_OF_A_SKILL = 200

PHOTOS = {
    "erase": """alpaca=llama bee butterfly calf=cow=ox camels=camel=dromedary caterpillar=worm
        chamaeleon=chameleon=lizard cheetah=leopard crab dolphin=whale flying_fox=bat
        gibbon=monkey=ape giraffe goat=ibex gorilla=ape=chimpanzee gosling=goose=duck
        heron=bird=egret=bittern horse kingfisher=bird kitten=cat long_nosed_monkey=monkey
        macaque=monkey meerkats=meerkat=mongoose
        northern_harrier=hawk=bird=kite=eagle=harrier nubian_ibex=ibex=goat penguin
        pika=hare=rabbit=rodent=hamster=mouse red_panda=panda rhinoceros=rhino
        spoonbills=spoonbill=bird squirrel swans=swan=goose toucan""",
    "explore_farm_animals": """cat chicken=hen=rooster cow=ox dog duck=drake horse owl pig=hog
        sheep=ram""",
    "explore_world_animals": """bison=buffalo chameleon=lizard crocodile=alligator giraffe hedgehog
        kangaroo=wallaby koala lemur moose=elk panda polar_bear scarlet_macaw=macaw=parrot""",
}
SOUNDS = {
    "explore_farm_animals": """cat chickens=chicken=hen=rooster cow dog duck horse owl pig
        sheep=lamb=goat""",
    "instruments": """accordion banjo=guitar bongo=drum castanets cello=violin=viola=double_bass
        clarinet cymbal drum_kit=drum electric_guitar=guitar flute_traversiere=flute guitar
        harmonica harp horn=french_horn maracas organ piano saxophone snare_drum=drum
        tambourine timpani=drum triangle trombone trumpet tuba violin=viola=cello""",
    "memory-sound": """LRApplauses_1_LA_cut=applause=clapping LRBark_1_LA_cut=dog=bark
        LRBuddhist_gong_05_LA=gong=bell LRDoor_Open_2_LA=door LRFrogsInPondDuringStormLACut=frog
        LRHeart_beat_01_LA=heartbeat=heart LRRain_in_garden_01_LA_cut=rain
        LRRing_01_LA=telephone=phone=bell=ring LRStartAndStopCarEngine1LACut=car=engine=truck
        LRTrain_slowing_down_01_LA_cut=train guitar_melody=guitar""",
}
SUFFIXES = (".webp", ".png", ".jpg", ".ogg", ".wav")


def shard_items(shards: Sequence[Path], output: Path) -> int:
    """Write ``items.jsonl`` and the media of the questions of ``shards``; returns how many."""
    (output / "media").mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = defaultdict(int)
    rows = []
    for path in shards:
        for sample in read_shard(path):
            for number, turn in enumerate(sample.turns):
                skill = turn.skill
                if skill == "nearer" and turn.media == ("depth.png",):
                    skill = "nearer (depth alone)"
                counts[skill] += 1
                if counts[skill] > MOST_OF_A_SKILL:
                    continue
                media = []
                for member in turn.media:
                    name = f"media/{sample.id}.{member}"
                    if not (output / name).exists():
                        (output / name).write_bytes(sample.files[member])
                    media.append({"kind": kind_of(member), "path": name})
                rows.append(
                    {
                        "id": f"{sample.id}-{number}",
                        "skill": skill,
                        "message": turn.question,
                        "media": media,
                        "accept": turn.accept or (turn.answer,),
                        "choices": turn.choices,
                    }
                )
    return _write(output / "items.jsonl", rows)


def everyday_items(output: Path) -> int:
    """Write ``items.jsonl`` and the media of the everyday set; returns how many items."""
    (output / "media").mkdir(parents=True, exist_ok=True)
    root = source("gcompris-qt-data") / "usr/share/gcompris-qt/rcc"
    rows: list[dict[str, Any]] = []
    for table, kind, skill, question in (
        (PHOTOS, "image", "everyday photographs", "What is in this picture?"),
        (SOUNDS, "audio", "everyday sounds", "What do you hear?"),
    ):
        for activity, listed in table.items():
            wanted = {w.split("=")[0]: w.split("=") for w in listed.split()}
            for name, data in read_rcc(root / f"{activity}.rcc"):
                stem, suffix = Path(name).stem, Path(name).suffix
                is_sound = suffix in (".ogg", ".wav")
                if stem not in wanted or is_sound != (kind == "audio"):
                    continue
                file = f"media/{activity}-{stem}{suffix}"
                (output / file).write_bytes(data)
                rows.append(
                    {
                        "id": f"{activity}-{stem}",
                        "skill": skill,
                        "message": question,
                        "media": [{"kind": kind, "path": file}],
                        "accept": [word.replace("_", " ") for word in wanted.pop(stem)],
                    }
                )
    return _write(output / "items.jsonl", rows)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """Pictures and sounds of a Qt resource file: name and content.

    The format: a header of big-endian offsets to a tree of 22-byte nodes, to data and to names.

    Raises:
        DataError: it is no such file, or compressed in a way other than zlib.
    """
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise DataError(path, None, "not a Qt resource file")
    tree, data, names = struct.unpack(">3I", blob[8:20])

    def name_at(offset: int) -> str:
        at = names + offset
        (length,) = struct.unpack(">H", blob[at : at + 2])
        return blob[at + 6 : at + 6 + 2 * length].decode("utf-16-be")

    def walk(node: int) -> Iterator[tuple[str, bytes]]:
        at = tree + 22 * node
        name, flags = struct.unpack(">IH", blob[at : at + 6])
        if flags & 2:
            count, first = struct.unpack(">II", blob[at + 6 : at + 14])
            for child in range(first, first + count):
                yield from walk(child)
            return
        if not name_at(name).endswith(SUFFIXES):
            return
        (offset,) = struct.unpack(">I", blob[at + 10 : at + 14])
        (size,) = struct.unpack(">I", blob[data + offset : data + offset + 4])
        content = blob[data + offset + 4 : data + offset + 4 + size]
        if flags & 4:
            raise DataError(path, None, f"{name_at(name)} is zstd-compressed")
        yield name_at(name), zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0)
