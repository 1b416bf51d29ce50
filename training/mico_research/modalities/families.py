"""How sequences, graphs and pictures become tokens of the encoder (tables: ``table``).

Legend: B samples, D encoder width; the other letters stand at their family.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.model.preprocessing import Preprocessing
from mico_research.modalities.samples import (
    Array,
    Graph,
    InputSpec,
    Sample,
    open_picture,
    padded,
    spread,
)

# --- time series, inertial measurements, spectra: windows along one axis become tokens -----------


class Windows(InputSpec):
    """Sequences of at most L steps, of which P make a token."""

    patch: int
    max_length: int

    @property
    def n_tokens(self) -> int:
        return -(-self.max_length // self.patch)

    def batch(self, arrays: Sequence[dict[str, Array]]) -> dict[str, Tensor]:
        """``values`` (B, L, ..), zeros behind the end, and ``mask`` (B, L)."""
        return dict(zip(("values", "mask"), padded(arrays, "values"), strict=True))


class SequenceInput(Windows):
    """Statistics of training sequences of L steps (bands of a spectrum), C channels (pixels).

    ``mean`` and ``std`` are (1, C), or (L, C) where every step has its own (a spectrum's bands).
    """

    kind: Literal["sequence"] = "sequence"
    channels: int
    mean: tuple[tuple[float, ...], ...]
    std: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, samples: Sequence[Sample], patch: int, by_step: bool = False) -> Self:
        arrays = [sample.array("a sequence", sample.values, 2) for sample in samples]
        for sample, array in zip(samples, arrays, strict=True):
            differ = array.shape != arrays[0].shape
            if differ if by_step else array.shape[1] != arrays[0].shape[1]:
                raise sample.error(
                    f"the shape is {array.shape}, but that of the first sample is {arrays[0].shape}"
                )
        if by_step:
            mean, std = spread(np.stack(arrays))
        else:
            mean, std = (x[None] for x in spread(np.concatenate(arrays)))
        return cls(
            channels=arrays[0].shape[1],
            patch=patch,
            max_length=max(len(array) for array in arrays),
            mean=tuple(map(tuple, mean.tolist())),
            std=tuple(map(tuple, std.tolist())),
        )

    def arrays(self, sample: Sample) -> dict[str, Array]:
        """Standardised ``values`` (L, C), of the training data's channels and length."""
        values = sample.array("a sequence", sample.values, 2)
        has = None
        if values.shape[1] != self.channels:
            has = f"{values.shape[1]} channels, but the model has {self.channels}"
        elif not 0 < len(values) <= self.max_length:
            has = f"{len(values)} steps, but the model takes 1 to {self.max_length}"
        elif len(self.mean) not in (1, len(values)):
            has = f"{len(values)} bands, but the model has {len(self.mean)}"
        if has is not None:
            raise sample.error(f"the sequence has {has}")
        return {"values": self.standardise(values)}

    def standardise(self, values: Array) -> Array:
        """Values (L, C) on the training scale."""
        scaled: Array = ((values - np.array(self.mean)) / np.array(self.std)).astype(np.float32)
        return scaled


class SequenceTokenizer(nn.Module):
    """A linear projection of each window of P steps, plus a learned position.

    Windows do not overlap, as in PatchTST; those of a spectrum are SpectralFormer's groups of
    neighbouring bands.
    """

    def __init__(self, spec: Windows, embed_dim: int, channels: int) -> None:
        super().__init__()
        self.patch = spec.patch
        self.project = nn.Linear(spec.patch * channels, embed_dim)
        self.position_embed = nn.Parameter(torch.empty(spec.n_tokens, embed_dim))
        nn.init.trunc_normal_(self.position_embed, std=0.02)

    def forward(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, C), (B, L) -> tokens (B, N, D), mask (B, N), N = ceil(L / P)."""
        rest = -values.shape[1] % self.patch
        values = F.pad(values * mask[..., None], (0, 0, 0, rest))
        windows = values.unflatten(1, (-1, self.patch)).flatten(2)  # (B, N, P * C)
        tokens = self.project(windows) + self.position_embed[: windows.shape[1]]
        return tokens, F.pad(mask, (0, rest)).unflatten(1, (-1, self.patch)).any(-1)


# --- texts: windows of bytes become tokens --------------------------------------------------------

BYTE_WIDTH, MOST_BYTES = 64, 4096


class TextInput(Windows):
    """Texts of at most L bytes of UTF-8; a longer one loses its beginning."""

    kind: Literal["text"] = "text"

    @classmethod
    def fit(cls, samples: Sequence[Sample], patch: int) -> Self:
        longest = max(len(_bytes(sample)) for sample in samples)
        return cls(patch=patch, max_length=min(longest, MOST_BYTES))

    def arrays(self, sample: Sample) -> dict[str, Array]:
        """``values`` (L,) of the bytes."""
        return {"values": _bytes(sample)[-self.max_length :].astype(np.int64)}


def _bytes(sample: Sample) -> Array:
    if not isinstance(sample.values, str) or not sample.values:
        raise sample.error("expected a text that is not empty")
    return np.frombuffer(sample.values.encode(), np.uint8)


class TextTokenizer(SequenceTokenizer):
    """A vector for each byte, and windows of them as of a sequence."""

    def __init__(self, spec: TextInput, embed_dim: int) -> None:
        super().__init__(spec, embed_dim, BYTE_WIDTH)
        self.bytes = nn.Embedding(256, BYTE_WIDTH)

    def forward(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L), (B, L) -> tokens (B, N, D), mask (B, N), N = ceil(L / P)."""
        return super().forward(self.bytes(values), mask)


# --- graphs: every node and every edge is a token, as in TokenGT ---------------------------------

WALK_STEPS = 8


class GraphInput(InputSpec):
    """Statistics of training graphs: n nodes of F features, e edges of G features.

    Graphs without edge features have one, always zero.
    """

    kind: Literal["graph"] = "graph"
    node_mean: tuple[float, ...]
    node_std: tuple[float, ...]
    edge_mean: tuple[float, ...]
    edge_std: tuple[float, ...]

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> Self:
        graphs = [_graph(sample) for sample in samples]
        widths = (graphs[0].nodes.shape[1], graphs[0].edge_features.shape[1])
        for sample, graph in zip(samples, graphs, strict=True):
            _compare_widths(sample, graph, widths, "first graph")
        node = spread(np.concatenate([graph.nodes for graph in graphs]))
        edge = spread(np.concatenate([graph.edge_features for graph in graphs]))
        return cls(
            node_mean=tuple(node[0].tolist()),
            node_std=tuple(node[1].tolist()),
            edge_mean=tuple(edge[0].tolist()),
            edge_std=tuple(edge[1].tolist()),
        )

    def arrays(self, sample: Sample) -> dict[str, Array]:
        """Standardised ``nodes`` (n, F), ``edges`` (e, 2), ``edge_features`` (e, G)."""
        graph = _graph(sample)
        _compare_widths(sample, graph, (len(self.node_mean), len(self.edge_mean)), "model")
        nodes = (graph.nodes - np.array(self.node_mean)) / np.array(self.node_std)
        features = (graph.edge_features - np.array(self.edge_mean)) / np.array(self.edge_std)
        return {
            "nodes": nodes.astype(np.float32),
            "edges": graph.edges,
            "edge_features": features.astype(np.float32),
        }

    def batch(self, arrays: Sequence[dict[str, Array]]) -> dict[str, Tensor]:
        """``nodes`` (B, n, F), ``edges`` (B, e, 2), ``edge_features`` (B, e, G) and two masks."""
        batch = {"edge_features": padded(arrays, "edge_features")[0]}
        for name in ("nodes", "edges"):
            batch[name], batch[f"{name}_mask"] = padded(arrays, name)
        return batch


def _compare_widths(sample: Sample, graph: Graph, widths: tuple[int, int], whose: str) -> None:
    """Raise a DataError if nodes or edges have another number of features than ``widths``."""
    for what, width in zip(("nodes", "edge_features"), widths, strict=True):
        own = getattr(graph, what).shape[1]
        if own != width:
            raise sample.error(f"{what} have {own} features, but those of the {whose} have {width}")


def _graph(sample: Sample) -> Graph:
    """The graph as float32 features and int64 edges (e, 2); edges without features get a zero."""
    graph = sample.values
    if not isinstance(graph, Graph):
        raise sample.error("expected a graph of nodes and edges")
    nodes = sample.array("nodes", graph.nodes, 2)
    if 0 in nodes.shape:
        raise sample.error("a graph needs at least one node, and a node at least one feature")
    edges = np.ascontiguousarray(graph.edges, dtype=np.int64).reshape(-1, 2)
    beyond = edges[(edges < 0) | (edges >= len(nodes))]
    if len(beyond):
        last = len(nodes) - 1
        raise sample.error(f"an edge names the node {beyond[0]}, but the nodes are 0 to {last}")
    features: Array = np.asarray(graph.edge_features, dtype=np.float32)
    if features.size == 0:
        features = np.zeros((len(edges), max(1, features.shape[1] if features.ndim == 2 else 1)))
    features = sample.array("edge features", features, 2)
    if len(features) != len(edges):
        given = len(features)
        raise sample.error(f"the graph has {len(edges)} edges, but features for {given} edges")
    return Graph(nodes, edges, features)


def walk_returns(edges: Tensor, edges_mask: Tensor, n: int, steps: int) -> Tensor:
    """The probability that a walk from a node is back after 1 .. ``steps`` steps (B, n, steps)."""
    adjacency = torch.zeros(len(edges), n, n, device=edges.device)
    batch = torch.arange(len(edges), device=edges.device)[:, None].expand(edges.shape[:2])
    there, back = edges[..., 0], edges[..., 1]
    ones = edges_mask.float()
    adjacency.index_put_((batch, there, back), ones, accumulate=True)
    adjacency.index_put_((batch, back, there), ones * (there != back), accumulate=True)
    step = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1.0)
    walk, returns = step, []
    for _ in range(steps):
        returns.append(walk.diagonal(dim1=1, dim2=2))
        walk = walk @ step
    return torch.stack(returns, dim=-1)


class GraphTokenizer(nn.Module):
    """Nodes and edges as one sequence of tokens without positions: they are a set.

    The token of an edge holds the vectors of its two nodes, so attention can find neighbours. The
    position of a node is its probability that a random walk is back after 1, 2, .. steps. TokenGT
    takes Laplacian eigenvectors: their sign is free, and they are not unique where a graph is
    symmetric. With walks, a graph with other node numbers gives the same tokens in another order.
    """

    def __init__(self, spec: GraphInput, embed_dim: int) -> None:
        super().__init__()
        self.node = nn.Linear(len(spec.node_mean) + WALK_STEPS, embed_dim)
        self.end = nn.Linear(embed_dim, embed_dim, bias=False)
        self.edge = nn.Linear(len(spec.edge_mean), embed_dim)

    def forward(
        self,
        nodes: Tensor,
        nodes_mask: Tensor,
        edges: Tensor,
        edges_mask: Tensor,
        edge_features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A batch -> tokens (B, n + e, D), nodes first, mask (B, n + e)."""
        returns = walk_returns(edges, edges_mask, nodes.shape[1], WALK_STEPS)
        node_tokens = self.node(torch.cat([nodes, returns], dim=-1))
        ends = self.end(node_tokens)
        row = torch.arange(len(edges), device=edges.device)[:, None]
        edge_tokens = self.edge(edge_features) + ends[row, edges[..., 0]] + ends[row, edges[..., 1]]
        tokens = torch.cat([node_tokens, edge_tokens], dim=1)
        return tokens, torch.cat([nodes_mask, edges_mask], dim=1)


# --- pictures of other sensors (thermal, X-ray), and pictures, depth and normal maps as they are --


class PictureInput(InputSpec):
    """How a picture's values become pixels of the encoder, which has its own patch embedding.

    A channel of any range (a 16-bit sensor's counts, degrees) is stretched between the 1st and 99th
    percentile of the training pictures and shown three times: pretrained filters find edges in heat
    as in light. 8-bit colour is taken as it is.
    """

    MOST: ClassVar[int] = 2000
    """So many training pictures are looked at for the percentiles."""

    kind: Literal["picture"] = "picture"
    preprocessing: Preprocessing
    low: float
    high: float

    @classmethod
    def fit(cls, samples: Sequence[Sample], preprocessing: Preprocessing) -> Self:
        step = -(-len(samples) // cls.MOST)
        arrays = [_picture(sample) for sample in samples[::step]]
        low, high = 0.0, 255.0
        if any(array.ndim == 2 for array in arrays):
            # Evenly spread values are enough for a percentile, and fit memory.
            few = np.concatenate([a.ravel()[:: max(1, a.size // 4096)] for a in arrays])
            low, high = (float(v) for v in np.percentile(few, (1, 99)))
        return cls(preprocessing=preprocessing, low=low, high=high if high > low else low + 1.0)

    def pixels(self, sample: Sample) -> Tensor:
        """(3, H, W) in [0, 1], of the file's size."""
        picture = torch.from_numpy(_picture(sample))
        if picture.ndim == 2:
            scaled = ((picture - self.low) / (self.high - self.low)).clamp(0, 1)
            return scaled.expand(3, -1, -1)
        return (picture / 255).clamp(0, 1).permute(2, 0, 1)

    def arrays(self, sample: Sample) -> dict[str, Array]:
        x = self.pixels(sample)
        size = [self.preprocessing.image_size] * 2
        x = F.interpolate(x[None], size, mode="bilinear", antialias=True)[0]
        mean, std = (
            torch.tensor(v).view(3, 1, 1)
            for v in (self.preprocessing.image_mean, self.preprocessing.image_std)
        )
        return {"pixel_values": ((x - mean) / std).numpy()}


def _picture(sample: Sample) -> Array:
    """A picture (H, W) or (H, W, 3) as float32; (H, W, 1) loses its last axis."""
    values = sample.values
    raw = open_picture(values) if isinstance(values, Path) else np.asarray(values)
    if raw.ndim == 3 and raw.shape[-1] == 1:
        raw = raw[..., 0]
    array = sample.array("a picture", raw, 3 if raw.ndim == 3 else 2)
    if 0 in array.shape or (array.ndim == 3 and array.shape[-1] != 3):
        raise sample.error(f"the picture has the shape {array.shape}, expected (H, W) or (H, W, 3)")
    return array
