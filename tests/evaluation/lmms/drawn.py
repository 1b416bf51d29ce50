"""Items of drawn media: squares of four colours, tones, clips and depth maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.server import sent

COLOURS = {
    "red": (220, 30, 30),
    "blue": (30, 60, 220),
    "green": (30, 160, 50),
    "yellow": (240, 220, 30),
}


def drawn_items(folder: Path, n: int) -> Path:
    """Write ``items.jsonl`` with ``n`` items of each skill, and their media."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item) for skill in _SKILLS for item in (skill(folder, i) for i in range(n))]
    file = folder / "items.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def _item(folder: Path, i: int, skill: str, kind: str, data: bytes, suffix: str) -> dict[str, Any]:
    name = f"{skill.replace(' ', '-')}-{i}.{suffix}"
    (folder / name).write_bytes(data)
    return {"id": name, "skill": skill, "media": [{"kind": kind, "path": name}]}


def _colour(folder: Path, i: int) -> dict[str, Any]:
    word = list(COLOURS)[i % len(COLOURS)]
    random = np.random.default_rng(i)
    side = int(random.integers(80, 150))
    left, top = random.integers(10, 214 - side, 2)
    pixels = np.full((224, 224, 3), random.integers(225, 256), np.uint8)
    pixels[top : top + side, left : left + side] = COLOURS[word]
    item = _item(folder, i, "colour", "image", sent.png(pixels), "png")
    question = {"message": "What colour is it?", "accept": [word], "choices": list(COLOURS)}
    return {**item, **question}


def _sound(folder: Path, i: int) -> dict[str, Any]:
    item = _item(folder, i, "sound", "audio", sent.wav(hertz=200.0 * (i + 1)), "wav")
    return {**item, "message": "What do you hear?", "accept": ["a tone"]}


def _clip(folder: Path, i: int) -> dict[str, Any]:
    colours = list(COLOURS.values())
    data = sent.mp4((colours[i % 4], colours[(i + 1) % 4]))
    item = _item(folder, i, "clip", "video", data, "mp4")
    return {**item, "message": "What happens?", "accept": ["it changes"]}


def _depth(folder: Path, i: int) -> dict[str, Any]:
    item = _item(folder, i, "how far", "depth", sent.depth(), "png")
    return {**item, "message": "Which side is nearer?", "accept": ["left"]}


_SKILLS = (_colour, _sound, _clip, _depth)
