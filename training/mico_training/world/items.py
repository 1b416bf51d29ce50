"""Evaluation items: questions of validation shards, and the everyday set.

The everyday set has photographs and recordings of the children's programme GCompris, which no
training shard contains.
"""

import json
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mico_chat.errors import DataError
from mico_training.world.sample import kind_of, read_shard
from mico_training.world.sources import Table, source

MOST_OF_A_SKILL = 200
PICTURES = (".webp", ".png", ".jpg")
SOUNDS = (".ogg", ".wav")
_EVERYDAY = {
    "photographs": ("image", PICTURES, "What is in this picture?"),
    "sounds": ("audio", SOUNDS, "What do you hear?"),
}


def shard_items(shards: Sequence[Path], output: Path) -> int:
    """Write ``items.jsonl`` and the media of the shards' questions; returns how many items."""
    (output / "media").mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = defaultdict(int)
    rows = []
    for sample in chain.from_iterable(map(read_shard, shards)):
        for number, turn in enumerate(sample.turns):
            alone = turn.skill == "nearer" and turn.media == ("depth.png",)
            skill = "nearer (depth alone)" if alone else turn.skill
            counts[skill] += 1
            if counts[skill] > MOST_OF_A_SKILL:
                continue
            media = []
            for member in turn.media:
                name = f"media/{sample.id}.{member}"
                (output / name).write_bytes(sample.files[member])
                media.append({"kind": kind_of(member), "path": name})
            accept = turn.accept or (turn.answer,)
            row = {"id": f"{sample.id}-{number}", "skill": skill, "message": turn.question}
            rows.append({**row, "media": media, "accept": accept, "choices": turn.choices})
    return _write(output / "items.jsonl", rows)


class Everyday(Table):
    photographs: dict[str, dict[str, tuple[str, ...]]]
    sounds: dict[str, dict[str, tuple[str, ...]]]


def everyday_items(output: Path) -> int:
    """Write ``items.jsonl`` and the media of the everyday set; returns how many items."""
    (output / "media").mkdir(parents=True, exist_ok=True)
    root = source("gcompris-qt-data") / "usr/share/gcompris-qt/rcc"
    rows: list[dict[str, Any]] = []
    for group, table in Everyday.read("everyday.yaml"):
        kind, suffixes, question = _EVERYDAY[group]
        for activity, listed in table.items():
            wanted = dict(listed)
            for name, data in read_rcc(root / f"{activity}.rcc"):
                stem = Path(name).stem
                if stem in wanted and name.endswith(suffixes):
                    file = f"media/{activity}-{name}"
                    (output / file).write_bytes(data)
                    row = {"id": f"{activity}-{stem}", "skill": f"everyday {group}"}
                    media = [{"kind": kind, "path": file}]
                    accept = wanted.pop(stem)
                    rows.append({**row, "message": question, "media": media, "accept": accept})
    return _write(output / "items.jsonl", rows)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def read_rcc(path: Path) -> Iterator[tuple[str, bytes]]:
    """The names and contents of the pictures and sounds of a Qt resource file. Its header has
    big-endian offsets: of a tree of 22-byte nodes, of the contents and of the names."""
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
        if not name_at(name).endswith(PICTURES + SOUNDS):
            return
        (offset,) = struct.unpack(">I", blob[at + 10 : at + 14])
        (size,) = struct.unpack(">I", blob[data + offset : data + offset + 4])
        content = blob[data + offset + 4 : data + offset + 4 + size]
        if flags & 4:
            raise DataError(path, None, f"{name_at(name)} is zstd-compressed")
        yield name_at(name), zlib.decompress(content[4:]) if flags & 1 else content

    yield from walk(0)
