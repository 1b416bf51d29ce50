"""Motion: which way the things of a clip go, by matching the cells of its frames.

All pairs of cells of two frames are compared, and a softmax over the later frame's cells gives the
expected place of each cell (global matching, as in GMFlow, arXiv 2111.13680). What all cells have
in common is the camera's motion; what remains is the things' own. The features are those of the
frozen stem, so that motion learned from drawn clips is seen in real ones.

Legend: B clips, T frames, P pairs of frames, C channels, G cells a side, R things. Maps
(B, P, 5, G, G) say of each cell of the earlier frame: its steps to the right and down, in cells;
how certain they are, from 0 to 1; the growth of what is around it; the change of its features.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GAPS = (1, 3)
"""Frames are compared with the next one, and with the third from there, where slow things have gone
farther."""
REACHES = (1.0, 1.6)
"""Steps are summed over a thing's box, and over one so many times as large."""
ROUNDS = 8
CAMERA, OWN = 9, 7
"""Numbers that describe a camera's motion, and a thing's."""
N_NUMBERS = len(GAPS) * (CAMERA + OWN * len(REACHES))


class Ways(nn.Module):
    """Stem features of a clip's frames, and boxes of its things -> the ways that they go."""

    def __init__(self, n_ways: int, hidden: int = 64) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(16.0)))  # of the cosines
        # Of equal cells the nearer is the better match: a plain wall stands still.
        self.log_near = nn.Parameter(torch.tensor(math.log(0.05)))
        self.norm = nn.BatchNorm1d(N_NUMBERS, affine=False)
        self.head = nn.Sequential(
            nn.Linear(N_NUMBERS, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, n_ways),
        )

    def forward(self, frames: Tensor, boxes: Tensor, clip: Tensor) -> Tensor:
        """Frames (B, T, C, G, G), boxes (R, 4) in the middle frames of clips (R,) -> logits (R, 7).

        A box is centre x, centre y, width, height as fractions.
        """
        numbers = [self._numbers(frames.float(), boxes.float(), clip, gap) for gap in GAPS]
        x = torch.cat(numbers, 1).to(self.log_scale.dtype)
        logits: Tensor = self.head(self.norm(x).clamp(-5, 5))
        return logits

    def _numbers(self, frames: Tensor, boxes: Tensor, clip: Tensor, gap: int) -> Tensor:
        """What describes the motion of each thing and of its camera, (R, n)."""
        t, g = frames.shape[1], frames.shape[-1]
        if t == 1:
            return boxes.new_zeros(len(boxes), N_NUMBERS // len(GAPS))
        places = list(range(0, t, min(gap, t - 1)))
        places += [t - 1] if places[-1] != t - 1 else []
        maps = self.matched(frames[:, places])
        camera, own = split_motion(maps)
        x, y = centred(g, maps)
        certain, plain = maps[:, :, 2], maps[:, :, :2]
        outward = ((plain[:, :, 0] * x + plain[:, :, 1] * y) / g).mean((2, 3)).sum(1, keepdim=True)
        overall = [certain, maps[:, :, 4], own.norm(dim=2)]
        means = [m.flatten(1).mean(1, keepdim=True) for m in overall]
        seen = torch.cat([camera.sum(1), plain.mean((3, 4)).sum(1), outward, *means], 1)
        middle = places.index(min(places, key=lambda p: abs(p - t // 2)))
        tracks = followed(maps, boxes, clip, middle)
        found = [seen[clip]]
        for reach in REACHES:
            weight = inside(tracks, reach, maps) * certain[clip]
            share = weight / weight.sum((2, 3), keepdim=True).clamp(min=1e-6)
            mean = partial(_mean, share)
            steps = own[clip]  # (R, P, 2, G, G)
            across, down = steps[:, :, 0], steps[:, :, 1]
            dx, dy = x - mean(x)[..., None, None], y - mean(y)[..., None, None]
            spread = mean(dx**2 + dy**2).clamp(min=1.0)
            growth = mean(dx * across + dy * down) / spread
            numbers = [mean(across).sum(1), mean(down).sum(1), growth.sum(1)]
            numbers += [mean(certain[clip]).mean(1), mean(maps[clip, :, 4]).mean(1)]
            numbers += [mean(maps[clip, :, 3]).sum(1), mean(steps.norm(dim=2)).sum(1)]
            found.append(torch.stack(numbers, 1))
        return torch.cat(found, 1)

    def matched(self, frames: Tensor) -> Tensor:
        """Frames (B, T, C, G, G) -> the maps of neighbouring pairs (B, T - 1, 5, G, G)."""
        g = frames.shape[-1]
        # What all cells of the clip have in common says nothing about where they go.
        x = frames - frames.mean((1, 3, 4), keepdim=True)
        x = F.normalize(x / frames.std((1, 3, 4), keepdim=True).clamp(min=1e-4), dim=2)
        place = torch.stack(centred(g, x), -1).flatten(0, 1)  # (G², 2)
        alike = x[:, :-1].flatten(3).transpose(2, 3) @ x[:, 1:].flatten(3)  # (B, P, G², G²)
        far = torch.cdist(place, place).pow(2)
        match = (alike * self.log_scale.exp() - far * self.log_near.exp()).softmax(-1)
        end = match @ place
        step = (end - place).transpose(2, 3).unflatten(3, (g, g))
        variance = match @ place.pow(2).sum(-1) - end.pow(2).sum(-1)
        certain = (1 + variance).reciprocal().unflatten(2, (g, g)).unsqueeze(2)
        across, down = step.unbind(2)
        grows = (torch.gradient(across, dim=-1)[0] + torch.gradient(down, dim=-2)[0]) / 2
        change = (x[:, 1:] - x[:, :-1]).norm(dim=2, keepdim=True)
        return torch.cat([step, certain, grows.unsqueeze(2), change], 2)


def centred(grid: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """How far the cells are right of and below the middle, two (G, G), in cells."""
    line = torch.arange(grid).to(like) - (grid - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    return x, y


def _mean(share: Tensor, values: Tensor, keepdim: bool = False) -> Tensor:
    """The mean of values (.., G, G), each of which counts by its share."""
    return (share * values).sum((-2, -1), keepdim=keepdim)


def split_motion(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps -> the camera's motion (B, P, 3), and the cells' own steps (B, P, 2, G, G).

    The camera's motion is a step in x and in y and a growth, as it shows in the picture: a camera
    that pans left moves all cells right. It is fitted by least squares; in each round a cell counts
    the less, the more it moves on its own (Cauchy weights).
    """
    across, down, certain = maps[:, :, 0], maps[:, :, 1], maps[:, :, 2]
    x, y = centred(maps.shape[-1], maps)
    weight = certain
    for _ in range(ROUNDS):
        share = weight / weight.sum((-2, -1), keepdim=True)
        mean = partial(_mean, share, keepdim=True)
        dx, dy = x - mean(x), y - mean(y)
        growth = mean(dx * (across - mean(across)) + dy * (down - mean(down))) / mean(dx**2 + dy**2)
        step_x, step_y = mean(across) - growth * mean(x), mean(down) - growth * mean(y)
        own = torch.stack([across - step_x - growth * x, down - step_y - growth * y], 2)
        weight = certain / (0.03 + own.pow(2).sum(2))
    return torch.cat([step_x, step_y, growth], -1).squeeze(-2), own


def inside(tracks: Tensor, reach: float, maps: Tensor) -> Tensor:
    """Boxes (R, P, 4) in the pairs' earlier frames -> 1 in the cells within, (R, P, G, G)."""
    g = maps.shape[-1]
    x, y = ((c + g / 2) / g for c in centred(g, maps))
    half = (tracks[..., 2:] * reach / 2).clamp(min=0.6 / g)
    across = (x - tracks[..., 0, None, None]).abs() < half[..., 0, None, None]
    down = (y - tracks[..., 1, None, None]).abs() < half[..., 1, None, None]
    return (across & down).to(maps)


@torch.no_grad()
def followed(maps: Tensor, boxes: Tensor, clip: Tensor, middle: int) -> Tensor:
    """Boxes (R, 4) in frame ``middle`` of clips (R,) -> where they are in each pair (R, P, 4).

    A box goes where its cells go, forwards and backwards in time.
    """
    pairs, g = maps.shape[1], maps.shape[-1]
    tracks = boxes.unsqueeze(1).repeat(1, pairs, 1)

    def step(at: Tensor, pair: int) -> Tensor:
        own = maps[clip, pair]
        weight = inside(at.unsqueeze(1), 1.0, maps)[:, 0] * own[:, 2]
        moved = (own[:, :2] * weight.unsqueeze(1)).sum((2, 3))
        return moved / weight.sum((1, 2)).clamp(min=1e-6).unsqueeze(1) / g

    at = boxes.clone()
    for pair in range(middle, pairs):
        tracks[:, pair] = at
        at[:, :2] += step(at, pair)
    at = boxes.clone()
    for pair in range(min(middle, pairs) - 1, -1, -1):
        at[:, :2] -= step(at, pair)
        tracks[:, pair] = at
    return tracks
