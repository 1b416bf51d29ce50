"""Trains the small depth network on the world's rooms, whose distances are exact.

::

    python -m mico_world.mini.depth mico_chat/models/mini

It draws the rooms, trains the decoder, measures it on rooms of things that no training room shows,
beside a constant plane and a floor (the mean map of the training rooms), and draws a sheet of
guesses. Draws and checkpoints are in ``runs/depth``: the same command goes on. Losses: Eigen et
al. 2014 (scale-invariant), and the differences of neighbours at four scales (MiDaS).
"""

import argparse
import json
import logging
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mico_chat.model.mini.depth import WEIGHTS, DepthNet, load_stem, pixels_of
from mico_training.data.sources.written import Split
from mico_world.pictures.compose import camera
from mico_world.rooms.scenes import SIZE, room_scene
from mico_world.things.photographs import photographs

logger = logging.getLogger(__name__)

GRID = SIZE // 4
BATCH = 32
LR = 2e-3
VARIANCE = 0.85  # of the scale-invariant loss: 1 forgives any scale, 0 none
COUNTS = (0.2, 0.3, 0.25, 0.25)

Rooms = tuple[NDArray[np.uint8], NDArray[np.float16]]
"""Rooms are pictures (N, S, S, 3) and distances in metres (N, S / 4, S / 4), 0 for nothing."""


def draw(split: Split, number: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    rng = np.random.default_rng([2024, split == "train", number])
    while True:
        count = int(rng.choice(4, p=COUNTS)) + 1
        scene = room_scene(rng, split, count, bool(rng.random() < 0.8), photographs())
        if scene is not None and (scene.depth > 0).mean() > 0.5:
            depth = scene.depth[2::4, 2::4]  # a distance is picked: those at an edge do not mix
            return camera(rng, scene.rgb), depth.astype(np.float16)


def _part(split: Split, start: int, n: int) -> Rooms:
    views = [draw(split, number) for number in range(start, start + n)]
    return np.stack([picture for picture, _ in views]), np.stack([depth for _, depth in views])


def rooms(folder: Path, split: Split, n: int, processes: int, part: int = 200) -> Rooms:
    folder.mkdir(parents=True, exist_ok=True)
    files = {start: folder / f"{split}-{start:06d}.npz" for start in range(0, n, part)}
    todo = [start for start, file in files.items() if not file.is_file()]
    with ProcessPoolExecutor(processes) as pool:
        drawn = pool.map(_part, [split] * len(todo), todo, [part] * len(todo))
        for start, (pictures, depths) in zip(todo, tqdm(drawn, "rooms", len(todo)), strict=True):
            partial = files[start].with_suffix(".part.npz")
            np.savez(partial, pictures=pictures, depths=depths)
            partial.rename(files[start])
    read = [np.load(file) for file in files.values()]
    pictures = np.concatenate([one["pictures"] for one in read])[:n]
    return pictures, np.concatenate([one["depths"] for one in read])[:n]


def loss_of(guess: Tensor, depth: Tensor) -> Tensor:
    """``guess`` log metres and ``depth`` metres (U, G, G), 0 where unknown."""
    known = depth > 0
    error = torch.where(known, guess - depth.clamp_min(1e-3).log(), 0)
    n = known.sum((1, 2)).clamp_min(1)
    mean = error.sum((1, 2)) / n
    loss = ((error**2).sum((1, 2)) / n - VARIANCE * mean**2).clamp_min(1e-8).sqrt().mean()
    for step in (1, 2, 4, 8):
        small, there = error[:, ::step, ::step], known[:, ::step, ::step]
        for axis in (1, 2):
            change = small.diff(dim=axis).abs()
            both = there.narrow(axis, 1, there.shape[axis] - 1) & there.narrow(
                axis, 0, there.shape[axis] - 1
            )
            loss = loss + 0.25 * (change * both).sum() / both.sum().clamp_min(1)
    return loss


def augmented(x: Tensor, depth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirrored, in other light, and as another camera's picture."""
    if torch.rand((), generator=generator) < 0.5:
        x, depth = x.flip(-1), depth.flip(-1)
    gain = torch.rand(len(x), 3, 1, 1, generator=generator) * 0.5 + 0.75
    x = ((x + 1) * gain * (0.7 + 0.6 * torch.rand(len(x), 1, 1, 1, generator=generator)) - 1).clamp(
        -1, 1
    )
    if torch.rand((), generator=generator) < 0.2:
        x = x.mean(1, keepdim=True).expand_as(x)
    return x, depth


def train(net: DepthNet, data: Rooms, epochs: int, folder: Path) -> None:
    pictures, depths = data
    optimizer = torch.optim.AdamW(net.decoder.parameters(), LR, weight_decay=0.01)
    per_epoch = len(pictures) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=epochs * per_epoch, pct_start=0.05
    )
    state, first = folder / "state.pt", 0
    if state.is_file():
        saved = torch.load(state)
        net.decoder.load_state_dict(saved["decoder"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["epoch"]
    net.train()
    for epoch in range(first, epochs):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(pictures), generator=generator).numpy()
        losses = []
        for at in tqdm(range(per_epoch), f"epoch {epoch + 1} of {epochs}"):
            rows = np.sort(order[at * BATCH : (at + 1) * BATCH])
            depth = torch.from_numpy(depths[rows]).float()
            x, depth = augmented(pixels_of(pictures[rows]), depth, generator)
            loss = loss_of(net(x), depth)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.decoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        logger.info("epoch %d: loss %.4f", epoch + 1, np.mean(losses))
        torch.save(
            {
                "decoder": net.decoder.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
            },
            state,
        )


@torch.inference_mode()
def guesses(net: DepthNet, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    net.eval()
    parts = [net(pixels_of(pictures[at : at + BATCH])) for at in range(0, len(pictures), BATCH)]
    return np.asarray(torch.cat(parts).exp().numpy(), np.float32)


def measures(guess: NDArray[Any], depth: NDArray[Any]) -> dict[str, float]:
    """Errors of metres (N, G, G): relative error, share within a factor of 1.25, as they are and
    scaled so that each picture's medians agree; and how often the nearer of two points is found."""
    rng = np.random.default_rng(0)
    found: dict[str, list[float]] = {
        key: [] for key in ("rel", "d1", "rel scaled", "d1 scaled", "nearer")
    }
    for g, d in zip(guess.astype(np.float64), depth.astype(np.float64), strict=True):
        known = d > 0
        g, d = g[known], d[known]
        for end, scale in (("", 1.0), (" scaled", np.median(d) / np.median(g))):
            found["rel" + end].append(float(np.mean(np.abs(g * scale - d) / d)))
            ratio = np.maximum(g * scale / d, d / (g * scale))
            found["d1" + end].append(float(np.mean(ratio < 1.25)))
        a, b = rng.integers(len(d), size=(2, 500))
        apart = np.maximum(d[a] / d[b], d[b] / d[a]) > 1.1
        right = np.where(g[a] == g[b], 0.5, (g[a] < g[b]) == (d[a] < d[b]))
        found["nearer"].append(float(right[apart].mean()) if apart.any() else np.nan)
    return {key: round(float(np.nanmean(values)), 4) for key, values in found.items()}


def sheet(pictures: NDArray[np.uint8], maps: list[NDArray[Any]], path: Path) -> None:
    from matplotlib import colormaps

    rows = []
    for i, picture in enumerate(pictures):
        row = [np.asarray(Image.fromarray(picture).resize((SIZE, SIZE)))]
        for one in maps:
            near = 1 / np.maximum(one[i].astype(np.float32), 1e-3) * (one[i] > 0)
            near = near / max(float(np.quantile(near, 0.99)), 1e-6)
            colours = colormaps["magma"](near.clip(0, 1))[..., :3] * 255
            row.append(np.asarray(Image.fromarray(colours.astype(np.uint8)).resize((SIZE, SIZE))))
        rows.append(np.concatenate(row, 1))
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small depth network on drawn rooms.")
    parser.add_argument("checkpoint", type=Path, help="whose stem it reads, and where it goes")
    parser.add_argument("--work", type=Path, default=Path("runs/depth"))
    parser.add_argument("--rooms", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.manual_seed(0)
    net = DepthNet()
    load_stem(net, asked.checkpoint)
    data = rooms(asked.work, "train", asked.rooms, asked.processes)
    held_out = rooms(asked.work, "validation", 400, asked.processes)
    train(net, data, asked.epochs, asked.work)
    output = asked.checkpoint / WEIGHTS
    output.parent.mkdir(exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in net.decoder.state_dict().items()}
    save_file(weights, output)
    depths = data[1].astype(np.float64)
    known = depths > 0
    plane = np.full(held_out[1].shape, np.median(depths[known]))
    mean = np.where(known, depths, 0).sum(0) / known.sum(0)
    guess = guesses(net, held_out[0])
    table = {
        "network": measures(guess, held_out[1]),
        "network, pictures swapped": measures(np.roll(guess, 1, 0), held_out[1]),
        "constant plane": measures(plane, held_out[1]),
        "mean of the training rooms": measures(np.broadcast_to(mean, plane.shape), held_out[1]),
    }
    print(json.dumps(table, indent=1))
    (asked.work / "measures.json").write_text(json.dumps(table, indent=1))
    sheet(held_out[0][:12], [held_out[1][:12], guess[:12]], asked.work / "sheet.png")


if __name__ == "__main__":
    main()
