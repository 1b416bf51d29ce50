"""Files of evaluation items: questions of validation shards, and real media."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mico_training.data.sources.written import kind_of, read_shard
from mico_world.mini.real import real_items
from mico_world.mini.talks import talks
from mico_world.mini.unscripted import unscripted

MOST_OF_A_SKILL = 300


def shard_items(shards: Sequence[Path], output: Path) -> int:
    """Write ``items.jsonl`` and the media of the shards' questions; returns how many items."""
    (output / "media").mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = defaultdict(int)
    rows = []
    for sample in chain.from_iterable(map(read_shard, shards)):
        for number, turn in enumerate(sample.turns):
            skill = turn.skill
            if skill == "nearer" and turn.media == ("depth.png",):
                skill = "nearer (depth alone)"
            elif skill == "present" and turn.answer.startswith("No"):
                skill = "absent"
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


def write_real_items(output: Path) -> int:
    (output / "media").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    asked = real_items()
    for item, question in asked:
        path = f"media/{item.name}"
        (output / path).write_bytes(item.data)
        row = {"id": item.id, "skill": item.skill, "message": question, "accept": item.accept}
        media = [{"kind": item.kind, "path": path}]
        rows.append({**row, "media": media, "choices": item.choices, "reject": item.reject})
    rows += talks([item for item, _ in asked], output / "media")
    rows += unscripted(output)
    return _write(output / "items.jsonl", rows)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
