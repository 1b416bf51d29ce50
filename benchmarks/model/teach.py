"""How well taught names are told apart: 3D models before photographs, and recordings.

Things that no learned name covers are taught by a few views each. Counted are the other views that
get the right or another taught name, and the other photographs that get any of them.
"""

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Report
from mico_chat.adapters.mico import MicoAdapter
from mico_chat.checkpoints.load import load_encoder
from mico_chat.media import Audio, Image, Medium
from mico_chat.media.kinds import Kind
from mico_chat.media.taught import TaughtName
from mico_chat.model.mini.taught import Taught, taught_ids
from mico_training.data.sources.written import Split
from mico_world.pictures.labelled import labelled
from mico_world.rooms.meshes import Mesh, MeshModel, cast, load, models_of, shade
from mico_world.sounds.bank import sound_bank
from mico_world.sources import source
from mico_world.things.catalogue import furniture
from mico_world.things.photographs import photographs

SPLITS: tuple[Split, ...] = ("train", "validation")
SIDE, TAN_HALF = 336, 0.4
OTHERS = 5  # views of each thing that are asked about

Rows = NDArray[np.float32]


def unnamed(n: int) -> list[Mesh]:
    """Models whose kind of furniture has no name in the mini's world."""
    named = {one.id for split in SPLITS for m in models_of(split).values() for one in m}
    found = []
    for archive in sorted(source("sweethome3d-furniture").rglob("*.sh3f")):
        for one in furniture(archive):
            size = tuple(float(one[side]) / 100 for side in ("width", "height", "depth"))
            hangs = float(one.get("elevation", "0")) > 0
            if one["id"] not in named and not hangs and min(size) > 0.08 and max(size) < 3:
                file = one["model"].lstrip("/")
                turn = tuple(map(float, one.get("modelRotation", "").split())) or None
                found.append(MeshModel(one["id"], one["name"], archive, file, size, turn))
    return [load(one) for one in random.Random(1).sample(found, n)]


def view(rng: np.random.Generator, mesh: Mesh) -> Image:
    """A mesh from somewhere before it, before a photograph, in some light."""
    yaw, pitch = rng.uniform(-1.3, 1.3), rng.uniform(0.05, 0.55)
    points = mesh.vertices - [0, np.ptp(mesh.vertices[:, 1]) / 2, 0]
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    cos, sin = np.cos(pitch), np.sin(pitch)
    tilt = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    away = np.linalg.norm(points, axis=1).max() / TAN_HALF * rng.uniform(0.95, 1.4)
    aside = rng.uniform(-0.12, 0.12, 2) * away * TAN_HALF
    points = (points @ turn.T @ tilt.T + [*aside, -away]).astype(np.float32)
    light = np.array([rng.uniform(-0.7, 0.7), *rng.uniform(0.3, 1, 2)], np.float32)
    light /= np.linalg.norm(light)
    hits = cast([(points, mesh.faces)], SIDE, TAN_HALF, light)
    shaded = shade(mesh.colours[hits.face.clip(0)], hits.normal, light, 0.5, hits.lit)
    kind = rng.choice(["scene", "surface"])
    behind = np.asarray(photographs().view(rng, "train", kind, (SIDE, SIDE)))
    shown = np.where(hits.owner[..., None] >= 0, shaded, behind)
    return Image((shown * rng.uniform(0.7, 1.1)).clip(0, 255).astype(np.uint8))


def told(
    adapter: MicoAdapter, kind: Kind, things: Sequence[Rows], others: Rows, n: int
) -> list[str]:
    """The shares of right, of other and of false names, in words, with ``n`` examples each."""
    names = [TaughtName(str(i), kind, rows[:n], (i,)) for i, rows in enumerate(things)]
    taught = adapter.taught_of(names)

    def said(rows: Rows) -> NDArray[np.int64]:
        own: list[Taught | None] = [taught] * len(rows)
        return taught_ids(torch.from_numpy(rows), own, taught.ids.shape[1])[:, 0].numpy()

    asked = np.concatenate([said(rows[-OTHERS:]) for rows in things])
    right = np.repeat(np.arange(len(things)), [len(rows[-OTHERS:]) for rows in things])
    shares = [(asked == right), (asked != right) & (asked >= 0), said(others) >= 0]
    return [kind, f"{n}", *(f"{share.mean():.0%}" for share in shares)]


def measure(things: int = 20, photos: int = 200) -> Report:
    rng = np.random.default_rng(0)
    adapter = MicoAdapter(*load_encoder("mini"))

    def examples(media: Sequence[Medium]) -> Rows:
        return np.concatenate([adapter.examples([adapter.prepare(one, ())]) for one in media])

    views = [examples([view(rng, mesh) for _ in range(3 + OTHERS)]) for mesh in unnamed(things)]
    known = [one for split in SPLITS for found in labelled(split).values() for one in found]
    chosen = random.Random(0).sample(known, photos)
    pictures = examples([Image(np.array(one.image())) for one in chosen])
    bank, takes = sound_bank(), defaultdict(list)
    for entry in bank.entries:
        takes[entry.name, entry.identity].append(entry)
    several = [key for key, found in takes.items() if len(found) >= 6 and key[0] != "speech"]
    sounds = random.Random(0).sample(several, things)
    heard = [examples([Audio(bank.signal(e)) for e in takes[key][:6]]) for key in sounds]
    taken = {name for name, _ in sounds}
    rest = [found[0] for key, found in takes.items() if key[0] not in taken]
    noises = examples([Audio(bank.signal(e)) for e in random.Random(0).sample(rest, photos)])
    sets: tuple[tuple[Kind, list[Rows], Rows], ...] = (
        ("image", views, pictures),
        ("audio", heard, noises),
    )
    rows = [told(adapter, *one, n) for one in sets for n in (1, 3)]
    return Report({"rows": rows})
