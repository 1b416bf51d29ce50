"""PerceiverBridge: learned queries turn a medium's tokens into context tokens (paper 4.4).

Each modality has its queries. A query is *anchored*: its attention starts around one place (of a
picture, of a frame, of a sound's time-frequency plane) and learns where else to look. The global
queries start without a place. A medium's number of queries depends only on its kind and its number
of units.

Legend: B media of one shape, U units a medium, Q queries a medium, T tokens a unit, D width,
L LLM width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.media.kinds import Layout
from mico_chat.model.config import MicoBridgeConfig
from mico_chat.model.context import KindRows
from mico_chat.model.encoder import cell_centres


class AnchoredAttention(nn.Module):
    """Cross-attention whose logits fall with the squared distance of query and key places."""

    def __init__(self, dim: int, n_heads: int, value_dim: int | None = None) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        # Half the heads look closely at their place, half around it.
        self.sharpness = nn.Parameter(torch.linspace(2.0, 0.0, n_heads))
        self.v = nn.Linear(dim, dim) if value_dim is None else None
        self.out = nn.Linear(dim, dim) if value_dim is None else None

    def forward(self, query: Tensor, key: Tensor, distance: Tensor, value: Tensor) -> Tensor:
        """(B, Q, D), (B, T, D), (Q, T) or (B, Q, T), value (B, T, V) -> (B, Q, V)."""
        v = value if self.v is None else self.v(value)
        q, k, v = (
            x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for x in (self.q(query), self.k(key), v)
        )
        bias = -F.softplus(self.sharpness).view(-1, 1, 1) * distance.unsqueeze(-3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        y = y.transpose(1, 2).flatten(2)
        return y if self.out is None else self.out(y)


class BridgeLayer(nn.Module):
    """Self-attention over a medium's queries, cross-attention to its units, MLP; pre-norm."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = nn.MultiheadAttention(dim, n_heads, batch_first=True)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = AnchoredAttention(dim, n_heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, x: Tensor, tokens: Tensor, distance: Tensor, place: Tensor | float = 0.0
    ) -> Tensor:
        """Queries (B, F·Q, D); tokens (B·F, T, D): each of the F groups of Q looks at its own.

        ``place`` (B, F·Q, D) says where a query looks; attention sees it beside the query.
        """
        h = self.norm_self(x) + place
        x = x + self.self_attention(h, h, h, need_weights=False)[0]
        h = (self.norm_cross(x) + place).view(tokens.shape[0], -1, x.shape[-1])
        x = x + self.cross_attention(h, tokens, distance, tokens).view_as(x)
        changed: Tensor = self.mlp(self.norm_mlp(x))
        return x + changed


class PerceiverBridge(nn.Module):
    """Tokens of media -> context tokens in the LLM's width."""

    def __init__(
        self,
        config: MicoBridgeConfig,
        rows: KindRows,
        encoder_dim: int,
        grid: int,
        n_prefix: int,
        llm_dim: int,
    ) -> None:
        super().__init__()
        dim = config.hidden_size
        self.config, self.rows, self.grid, self.n_prefix = config, rows, grid, n_prefix
        self.norm_in = nn.LayerNorm(encoder_dim)
        self.proj_in = nn.Linear(encoder_dim, dim)
        # How each token of a clip differs from its mean over time shows motion. Attention across
        # frames could learn that by itself, but many times slower.
        self.change = nn.Linear(encoder_dim, dim, bias=False)
        # As large as the output of attention that is added to them. At the usual 0.02 the first
        # layer drowns them, all queries become one, and a probe for colours stays at chance (7 %
        # against 33 %).
        self.queries = nn.Parameter(torch.randn(rows.n, config.n_still, dim))
        self.frame_queries = nn.Parameter(torch.randn(config.frame_grid**2, dim))
        self.time = nn.Linear(16, dim)  # when a frame is seen, as Fourier features
        self.layers = nn.ModuleList(BridgeLayer(dim, config.num_heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(dim)
        self.proj_out = nn.Linear(dim, llm_dim)
        self.scale = nn.Parameter(torch.tensor(0.1))  # set to the size of the LLM's embeddings
        self.look = AnchoredAttention(dim, 1, value_dim=llm_dim)

    def _distance(self, layout: Layout, units: int) -> Tensor:
        """Squared distance (Q, T) between query and token places, in anchor spacings."""
        n = self.config.frame_grid if layout == "frames" else self.config.still_grid
        query, key = cell_centres(n), cell_centres(self.grid)
        if layout == "slices":  # rows (time) run on through the slices of a sound
            y = (torch.arange(units).view(-1, 1) + key[:, 0]) / units
            key = torch.stack([y, key[:, 1].expand(units, -1)], -1)  # (units, G², 2)
        key = key.reshape(-1, self.grid**2, 2)
        distance = (query[:, None, None] - key).pow(2).sum(-1) * n * n  # (n², units, G²)
        distance = F.pad(distance, (self.n_prefix, 0)).flatten(1)  # the prefix has no place
        free = 0 if layout == "frames" else self.config.still_global
        return F.pad(distance, (0, 0, 0, free))

    def forward(
        self, tokens: Tensor, kind: Tensor, layout: Layout, values: Tensor | None = None
    ) -> Tensor:
        """Media of one layout and unit count: tokens (B, U, T, D), kinds (B,) -> (B, N, L).

        ``values`` (B, U, T, L), zero at prefix tokens, are vectors of the LLM's space, one for each
        token. The same queries look at them, and the result is added.
        """
        b, units = tokens.shape[:2]
        frames = layout == "frames"
        tokens = self.norm_in(tokens)
        x = self.proj_in(tokens)  # (B, U, T, D)
        if frames:
            x = x + self.change(tokens - tokens.mean(1, keepdim=True))
        x = x.flatten(0, 1) if frames else x.flatten(1, 2)
        distance = self._distance(layout, units).to(x)
        if frames:
            when = (torch.arange(units, device=x.device) + 0.5) / units
            wave = when.view(-1, 1) * 2.0 ** torch.arange(8, device=x.device) * torch.pi / 2
            when = self.time(torch.cat([wave.sin(), wave.cos()], -1).to(x.dtype))  # (U, D)
            q = (self.frame_queries + when.unsqueeze(1)).flatten(0, 1).expand(b, -1, -1)
        else:
            q = self.queries[self.rows(kind)]
        for layer in self.layers:
            q = layer(q, x, distance)
        q = self.norm_out(q)
        out: Tensor = self.proj_out(q) * self.scale
        if values is not None:
            values = values.flatten(0, 1) if frames else values.flatten(1, 2)
            looked = self.look(q.reshape(x.shape[0], -1, q.shape[-1]), x, distance, values)
            out = out + looked.view_as(out)
        return out
