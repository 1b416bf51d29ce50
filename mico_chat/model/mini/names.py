"""ConceptNames: what the stem recognises, in the words of the text branch.

The contrastive space of paper 3.4 learns from the training data's media. The stem of a hybrid
encoder recognises more than these show. So each unit of a medium gets a *name token*: the words of
all concept names, mixed under the stem's posterior. A text has the mix of its own words. Both go
through one projection into the contrastive space, and so a photograph lies near the name of what
the stem sees in it, and near texts with similar words. Word vectors that come from a language model
know what is similar; training should freeze them.

Legend: B texts, S text length, U units, M media, N names, d text width, D encoder width,
P contrastive width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from mico_chat.errors import ModelError
from mico_chat.model.config import MicoTextConfig
from mico_chat.model.context import AlikeMedia, KindRows
from mico_chat.model.mini.concepts import ChangeCells, ConceptAttention


class ConceptNames(nn.Module):
    """The projection ``words`` and what is learned about mixing.

    ``score`` says how much each token counts in its text. For each kind of medium, ``log_scale`` is
    the inverse temperature of its posteriors, and ``gate`` weighs its names against its grid.
    """

    name_ids: Tensor

    def __init__(
        self, config: MicoTextConfig, rows: KindRows, n_names: int, embed_dim: int
    ) -> None:
        super().__init__()
        d = config.hidden_size
        if n_names == 0:
            raise ModelError("text_config.name_tokens: concept_config has no names; set it to 0")
        if d > embed_dim:
            raise ModelError(
                f"text_config.name_tokens: a name token is as wide as the text branch ({d}), which "
                f"is more than the encoder's width of {embed_dim}; set name_tokens to 0"
            )
        self.embed_dim, self.rows = embed_dim, rows
        self.score = nn.Embedding(config.vocab_size, 1)
        self.words = nn.Linear(d, config.projection_dim)
        nn.init.zeros_(self.score.weight)
        nn.init.orthogonal_(self.words.weight)
        nn.init.zeros_(self.words.bias)
        self.log_scale = nn.Parameter(torch.zeros(rows.n))
        self.gate = nn.Parameter(torch.ones(rows.n))
        self.register_buffer("name_ids", torch.full((n_names, config.name_tokens), -1))

    def start(
        self, names: Sequence[str], tokenizer: PreTrainedTokenizerBase, table: nn.Embedding
    ) -> None:
        """Set the tokens of the names, visual ones first, and their mean as the origin of P."""
        self.name_ids.fill_(-1)
        for row, ids in zip(self.name_ids, tokenizer(list(names))["input_ids"], strict=True):
            row[: len(ids)] = torch.tensor(ids[: len(row)])
        with torch.no_grad():
            self.words.bias.copy_(-self.words.weight @ self.vectors(table).mean(0))

    def pooled(self, ids: Tensor, mask: Tensor, table: nn.Embedding) -> Tensor:
        """Texts (B, S), true in ``mask``, to their mixed words (B, d); ``table`` embeds ids."""
        words = F.normalize(table.weight, dim=-1) * self.words.in_features**0.5
        weights = self.score(ids).squeeze(-1).masked_fill(~mask.bool(), float("-inf")).softmax(-1)
        weights = weights.to(words.dtype)
        return F.embedding_bag(ids, words, mode="sum", per_sample_weights=weights)

    def vectors(self, table: nn.Embedding) -> Tensor:
        """The mixed words (N, d) of each name."""
        return self.pooled(self.name_ids.clamp(min=0), self.name_ids >= 0, table)

    def tokens(
        self,
        concepts: ConceptAttention,
        features: Tensor,
        media_kind: Tensor,
        media_units: Tensor,
        table: nn.Embedding,
        change: ChangeCells | None = None,
    ) -> Tensor:
        """The name token (U, 1, D) of each unit, from stem features (U, C, G, G).

        Media have kinds (M,) and unit counts (M,). Frames have posteriors of their own, the slices
        of a sound have the sound's. The token's values after the first d are zero. ``change`` makes
        other cells' logits.
        """
        features = features.to(concepts.log_scale.dtype)  # that of the encoder may differ
        posterior = features.new_zeros(len(features), len(self.name_ids), dtype=torch.float32)
        for media in AlikeMedia.groups(media_kind, media_units):
            own = media.of(features)
            if media.layout == "slices":
                units = media_units[media.media]
                logits = torch.repeat_interleave(concepts.sound_logits(own, units), units, dim=0)
                names = slice(concepts.n_visual, None)
            else:
                cells = concepts.cell_logits(own)
                cells = cells if change is None else change(cells, media)
                logits, names = cells.mean(1), slice(concepts.n_visual)
            scale = self.log_scale.exp()[self.rows(media.kind)].repeat_interleave(media.units)
            found = posterior.new_zeros(len(own), posterior.shape[1])
            found[:, names] = (logits.float() * scale.unsqueeze(1)).softmax(-1)
            posterior = posterior.index_put((media.rows,), found)
        mixed = posterior @ self.vectors(table)
        return F.pad(mixed, (0, self.embed_dim - mixed.shape[1])).unsqueeze(1)

    def point(self, tokens: Tensor, kind: Tensor, row: Tensor, n: int) -> Tensor:
        """Name tokens (U, D) of units with kinds and samples (U,) -> (n, P), averaged by sample."""
        words: Tensor = self.words(tokens[:, : self.words.in_features])
        words = words * self.gate[self.rows(kind)].unsqueeze(1)
        sums = words.new_zeros(n, words.shape[1]).index_add(0, row, words)
        return sums / torch.bincount(row, minlength=n).clamp(min=1).unsqueeze(1)
