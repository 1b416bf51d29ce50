"""Items of drawn media: squares of four colours, tones, clips and depth maps."""

import io
from pathlib import Path
from typing import Any

from tests.evaluation.conftest import write_items
from tests.server.support import sent
from tests.support.made import write_clip

COLOURS = {"red": (220, 30, 30), "blue": (30, 60, 220), "green": (30, 160, 50)}
COLOURS["yellow"] = (240, 220, 30)


def drawn_items(folder: Path, n: int) -> Path:
    """Write ``items.jsonl`` with ``n`` items of each skill, and their media."""
    folder.mkdir(parents=True, exist_ok=True)
    skills = (_colour, _sound, _clip, _depth)
    return write_items(folder, [skill(folder, i) for skill in skills for i in range(n)])


def _item(folder: Path, i: int, skill: str, kind: str, data: bytes, suffix: str) -> dict[str, Any]:
    name = f"{skill.replace(' ', '-')}-{i}.{suffix}"
    (folder / name).write_bytes(data)
    return {"id": name, "skill": skill, "media": [{"kind": kind, "path": name}]}


def _colour(folder: Path, i: int) -> dict[str, Any]:
    word = list(COLOURS)[i % len(COLOURS)]
    item = _item(folder, i, "colour", "image", sent.png(sent.square(COLOURS[word])), "png")
    question = {"message": "What colour is it?", "accept": [word], "choices": list(COLOURS)}
    return {**item, **question}


def _sound(folder: Path, i: int) -> dict[str, Any]:
    item = _item(folder, i, "sound", "audio", sent.wav(hertz=200.0 * (i + 1)), "wav")
    return {**item, "message": "What do you hear?", "accept": ["a tone"]}


def _clip(folder: Path, i: int) -> dict[str, Any]:
    data = io.BytesIO()
    write_clip(data, "mpeg4", container_format="mp4", n=10 + i, sound="aac")
    item = _item(folder, i, "clip", "video", data.getvalue(), "mp4")
    return {**item, "message": "What happens?", "accept": ["it changes"]}


def _depth(folder: Path, i: int) -> dict[str, Any]:
    item = _item(folder, i, "how far", "depth", sent.depth(), "png")
    return {**item, "message": "Which side is nearer?", "accept": ["left"]}
