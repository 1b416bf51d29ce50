"""Graphs: every node and every edge is a token, as in TokenGT.

Legend: B graphs, n nodes, e edges, F node and G edge features, W steps of a random walk, D encoder
width. An edge's token holds the vectors of its two nodes, so attention can find neighbours. A
node's position is the probability that a random walk is back after 1, 2, .. W steps. TokenGT takes
Laplacian eigenvectors: their sign is free, and they are not unique where a graph is symmetric.
With walks, a graph with other node numbers gives the same tokens in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mico_training.research.modalities.samples import (
    Array,
    Graph,
    InputSpec,
    Sample,
    padded,
    spread,
)

WALK_STEPS = 8


class GraphInput(InputSpec):
    """Feature statistics of training graphs. Graphs without edge features have one, always zero."""

    kind: Literal["graph"] = "graph"
    node_mean: tuple[float, ...]
    node_std: tuple[float, ...]
    edge_mean: tuple[float, ...]
    edge_std: tuple[float, ...]

    @classmethod
    def fit(cls, samples: Sequence[Sample]) -> GraphInput:
        """Statistics of training graphs, which must all have the features of the first."""
        graphs = [_checked(sample) for sample in samples]
        widths = (graphs[0].nodes.shape[1], graphs[0].edge_features.shape[1])
        for sample, graph in zip(samples, graphs, strict=True):
            _compare_widths(sample, graph, widths, "first graph")
        node = spread(np.concatenate([graph.nodes for graph in graphs]), 0)
        features = np.concatenate([graph.edge_features for graph in graphs])
        width = features.shape[1]
        edge = spread(features, 0) if len(features) else (np.zeros(width), np.ones(width))
        return cls(
            node_mean=tuple(node[0].tolist()),
            node_std=tuple(node[1].tolist()),
            edge_mean=tuple(edge[0].tolist()),
            edge_std=tuple(edge[1].tolist()),
        )

    def arrays(self, sample: Sample) -> dict[str, Array]:
        """Standardised ``nodes`` (n, F), ``edges`` (e, 2), ``edge_features`` (e, G)."""
        graph = _checked(sample)
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


def _checked(sample: Sample) -> Graph:
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
    """Nodes and edges as one sequence of tokens without positions: they are a set."""

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
