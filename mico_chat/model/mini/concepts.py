"""ConceptAttention: the stem's posterior over named classes, in the LLM's vocabulary space.

The query is the stem's grid, the keys are classifier rows, the values are the LLM's embeddings of
the class names: the result is a mix of word embeddings, which the LLM can put into words for
classes that no training picture showed.

Legend: U units, G grid side, N names, K tokens a name, L LLM width.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mico_chat.errors import ModelError
from mico_chat.model.config import MicoConceptConfig
from mico_chat.model.context import AlikeMedia
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.mini.stem import Stem
from mico_chat.model.mini.taught import Taught, root_mean, taught_ids

ChangeCells = Callable[[Tensor, AlikeMedia], Tensor]
"""Makes other logits (B·U, C, n_visual) out of those of the cells of B alike media."""
FREQUENCY_BANDS = 7
LIKELY = 0.5
"""A token stands where the names that have one are together this likely: language models normalize
what they read, so a faint one would count as much as a name."""
COLOURS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
    "grey",
)


class ColourHead(nn.Module):
    """The colour of the thing in a picture: cells vote, and how much each counts is learned."""

    def __init__(self, stem: Stem, hidden: int = 96) -> None:
        super().__init__()
        self.scale = nn.BatchNorm2d(stem.seen_dim, affine=False)  # all channels to one scale
        self.hidden = nn.Linear(stem.seen_dim, hidden)
        self.place = nn.Parameter(torch.zeros((stem.image_size // 32) ** 2, hidden))
        self.counts = nn.Linear(hidden, 1)
        self.colour = nn.Linear(hidden, len(COLOURS))

    def forward(self, features: Tensor) -> Tensor:
        """Stem features (U, C, G, G) -> logits (U, 11) of :data:`COLOURS`."""
        seen = self.scale(features[:, : self.scale.num_features])
        cells = F.gelu(self.hidden(seen.flatten(2).transpose(1, 2)) + self.place)
        logits: Tensor = (self.counts(cells).softmax(1) * self.colour(cells)).sum(1)
        return logits


class ConceptAttention(nn.Module):
    """Keys for visual names (per grid cell) and for sound names (per sound).

    The values are the plain names, and of a whole picture or clip also the exact ones: finer names
    of one thing then add up ("duck"), and the finest is there to be asked for.
    """

    name_ids: Tensor
    exact_ids: Tensor | None

    def __init__(self, config: MicoConceptConfig, stem: Stem) -> None:
        super().__init__()
        visual, sound = config.visual_names or [], config.sound_names or []
        self.n_visual, self.n_sound = len(visual), len(sound)
        self.n_pretrained = min(config.n_pretrained, self.n_visual)
        self.last_dim, self.mid_dim = stem.last_dim, stem.mid_dim
        self.feature_map = nn.Linear(stem.last_dim, stem.last_dim * 4)
        self.classifier = nn.Linear(stem.last_dim * 4, self.n_pretrained)
        self.learned = nn.Linear(stem.last_dim * 4, self.n_visual - self.n_pretrained)
        self.seen_dim, self.heard_dim = stem.seen_dim, stem.heard_dim
        width = stem.heard_dim or 2 * (stem.mid_dim // 4) * FREQUENCY_BANDS
        self.sound = nn.Sequential(
            nn.BatchNorm1d(width, affine=False),
            nn.Dropout(0.3),
            nn.Linear(width, config.sound_hidden),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Linear(config.sound_hidden, self.n_sound),
        )
        self.name_clips = config.colours
        self.sure_above = config.sure_above
        self.colour = ColourHead(stem) if config.colours else None
        self.log_scale = nn.Parameter(torch.zeros(3))  # inverse temperature: whole, cell, sound
        self.gain = nn.Parameter(torch.ones(2))  # of the concept tokens, of the cells' values
        ids = torch.full((self.n_visual + self.n_sound, config.tokens_per_name), -1)
        self.register_buffer("name_ids", ids)
        exact = None if config.plain_names is None else ids[: self.n_visual].clone()
        self.register_buffer("exact_ids", exact)

    def forward(
        self,
        features: Tensor,
        media: AlikeMedia,
        embedding: nn.Embedding,
        looks: Tensor | None = None,
        change: ChangeCells | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The posteriors of B alike media in the LLM's space, from stem features (B·U, C, G, G).

        ``looks`` (B·U·V, C, G, G) are those of V closer looks at each unit, which count for the
        medium's name as the unit itself does. ``change`` makes other logits of all cells, and of
        sounds. Returns the tokens of each medium's names (B, n K, L), which a video may lack, and
        the value of each cell (B·U, G², L), which a sound lacks.
        """
        if media.layout == "slices":
            units = torch.full((len(media.media),), media.units, device=features.device)
            heard = self.sound_logits(features, units)
            if change is not None:
                heard = change(heard.unsqueeze(1), media).squeeze(1)
            return self.sound_names(heard, embedding), None
        cells = self.cell_logits(features)
        own = cells.shape[1]
        if looks is not None:
            closer = self.cell_logits(looks).unflatten(0, (len(cells), -1))
            cells = torch.cat([cells, closer.flatten(1, 2)], 1)
        if change is not None:
            cells = change(cells, media)
        named = None
        if media.layout == "still" or self.name_clips:
            whole = cells.unflatten(0, (-1, media.units)).flatten(1, 2)
            named = self.still_names(whole, embedding)
        return named, self.cell_values(cells[:, :own], embedding)

    def cell_logits(self, features: Tensor) -> Tensor:
        """Stem features (U, C, G, G) -> logits of the visual names (U, G², n_visual)."""
        return self.visual(self.cell_features(features))

    def cell_features(self, features: Tensor) -> Tensor:
        """Stem features (U, C, G, G) -> features that the visual names read (U, G², 4 · last)."""
        cells = features[:, : self.last_dim].flatten(2).transpose(1, 2)
        return F.relu6(self.feature_map(cells))

    def examples(self, features: Tensor, media: AlikeMedia, looks: Tensor | None = None) -> Tensor:
        """What names are taught by: (B, D) of unit length, from stem features (B·U, C, G, G).

        A sound has what its head hears. A still has the mean of the cells of its V closer looks
        (B·U·V, C, G, G), a medium without looks that of its own cells.
        """
        if media.layout == "slices":
            units = torch.full((len(media.media),), media.units, device=features.device)
            return self.heard(self.sound_features(features, units))
        cells = self.cell_features(features if looks is None else looks)
        return root_mean(cells.unflatten(0, (len(media.media), -1)).flatten(1, 2))

    def heard(self, x: Tensor) -> Tensor:
        """Features of sounds (M, width) -> the middle of their head beside its logits (M, D).

        At 3 % of false names these found 85 % of sounds, the ear's own features 62 %.
        """
        middle = self.sound[:3](x)
        logits = self.sound[3:](middle)
        centred = logits - logits.mean(-1, keepdim=True)
        return torch.cat([F.normalize(one, dim=-1) for one in (middle, centred)], -1) / 2**0.5

    def visual(self, x: Tensor) -> Tensor:
        """Cell features (.., 4 · last), or their mean, -> logits (.., n_visual)."""
        return torch.cat([self.classifier(x), self.learned(x)], dim=-1)

    def sound_logits(self, features: Tensor, units: Tensor) -> Tensor:
        """Features of mel slices (U, C, G, G), slices a sound (M,) -> (M, n_sound)."""
        return cast(Tensor, self.sound(self.sound_features(features, units)))

    def sound_features(self, features: Tensor, units: Tensor) -> Tensor:
        """Features (U, C, G, G) and units (M,) -> features that the sound names read (M, width).

        What the ear heard, as the mean of the slices. Without an ear they are the CNN's middle
        blocks: frequency is kept, time is pooled (mean and max) over all slices of the sound.
        """
        sound = torch.repeat_interleave(torch.arange(len(units), device=units.device), units)

        def mean_of(x: Tensor) -> Tensor:  # of the slices of each sound
            total = x.new_zeros(len(units), *x.shape[1:]).index_add(0, sound, x)
            return total / units.view(-1, *[1] * (x.dim() - 1))

        if self.heard_dim:
            return mean_of(features[:, self.seen_dim :].flatten(1)[:, : self.heard_dim])
        mid = features[:, self.last_dim : self.last_dim + self.mid_dim]
        mid = mid.unflatten(1, (-1, 4)).mean(2)  # (U, mid, G rows = time, G columns = frequency)
        mean = mean_of(F.adaptive_avg_pool1d(mid.mean(2), FREQUENCY_BANDS))  # (M, mid, bands)
        peak = F.adaptive_avg_pool1d(mid.amax(2), FREQUENCY_BANDS)
        index = sound.view(-1, 1, 1).expand(peak.shape)
        peak = torch.zeros_like(mean).scatter_reduce(0, index, peak, "amax", include_self=False)
        return torch.cat([mean, peak], 1).flatten(1)

    @property
    def space(self) -> str:
        """A digest of what :meth:`examples` depends on, whatever type the weights have."""
        digest = hashlib.sha256(f"{self.n_sound} {self.heard_dim}".encode())
        for weight in (self.feature_map.weight, cast(nn.Linear, self.sound[2]).weight):
            digest.update((weight.detach().float() * 256).round().short().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def widths(self) -> dict[str, int]:
        """The width D of :meth:`examples`, by the kind of medium."""
        middle = cast(nn.Linear, self.sound[2]).out_features
        return {"image": self.feature_map.out_features, "audio": middle + self.n_sound}

    @property
    def places(self) -> int:
        """The most tokens of a taught name: the plain name's places and the exact one's."""
        return self.name_ids.shape[1] * (1 if self.exact_ids is None else 2)

    def with_taught(
        self,
        tokens: Tensor,
        examples: Tensor,
        taught: Sequence[Taught | None],
        embedding: nn.Embedding,
    ) -> Tensor:
        """Tokens (R, n·K, L) of n learned names each; a taught name takes their place where the
        features (R, D) are near its own.

        A name of K tokens is said n times. A longer one goes on in the next name's places. What a
        person taught is sure: a second best name's places stay empty.
        """
        ids = taught_ids(examples, taught, self.places)
        once, width = self.name_ids.shape[1], tokens.shape[1]
        empty = once if self.sure_above is not None and width > once else 0
        ids = F.pad(ids, (0, max(0, width - empty - ids.shape[1])), value=-1)[:, : width - empty]
        again = ids[:, :once].repeat(1, ids.shape[1] // once)
        longer = (ids[:, once:] >= 0).any(1, keepdim=True)
        ids = F.pad(torch.where(longer, ids, again), (0, empty), value=-1)
        words = embedding(ids.clamp(min=0)) * (ids >= 0).unsqueeze(-1) * self.gain[0]
        return torch.where((ids >= 0).any(1)[:, None, None], words.to(tokens.dtype), tokens)

    def _mix(self, posterior: Tensor, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        """Posterior (B, N) over names with tokens (N, K) -> (B, K, L): token k is the mix over the
        names that have one, and zero where the likely names have none."""
        mask = ids >= 0
        values = embedding(ids.clamp(min=0)) * mask.unsqueeze(-1)
        mixed = torch.einsum("bn,nkl->bkl", posterior.to(values.dtype), values)
        # (B, K): how likely together the names are that have a token k
        share = (posterior @ mask.to(posterior.dtype)).unsqueeze(-1).to(mixed.dtype)
        return mixed / share.clamp(min=LIKELY) * (share >= LIKELY) * self.gain[0]

    def _posterior(self, cell_logits: Tensor) -> Tensor:
        """(U, C, n_visual) -> how likely each visual name is (U, n_visual)."""
        return (cell_logits.mean(1) * self.log_scale[0].exp()).softmax(-1)

    def visual_tokens(
        self, cell_logits: Tensor, embedding: nn.Embedding, exact: bool = False
    ) -> Tensor:
        """(U, C, n_visual) -> tokens (U, K, L) of the plain or the exact name."""
        ids = self.exact_ids if exact else None
        ids = self.name_ids[: self.n_visual] if ids is None else ids
        return self._mix(self._posterior(cell_logits), ids, embedding)

    def plain_posterior(self, cell_logits: Tensor) -> Tensor:
        """(U, C, n_visual) -> how likely each plain name is (U, P)."""
        plain, place = self.name_ids[: self.n_visual].unique(dim=0, return_inverse=True)
        posterior = self._posterior(cell_logits)
        return posterior.new_zeros(len(posterior), len(plain)).index_add(1, place, posterior)

    def sound_tokens(self, sound_logits: Tensor, embedding: nn.Embedding) -> Tensor:
        """(M, n_sound) -> concept tokens (M, K, L)."""
        posterior = (sound_logits * self.log_scale[2].exp()).softmax(-1)
        return self._mix(posterior, self.name_ids[self.n_visual :], embedding)

    def still_names(self, cell_logits: Tensor, embedding: nn.Embedding) -> Tensor:
        """(U, C, n_visual) -> tokens (U, n K, L) of each name that the config asks for: the plain
        one, the exact one, the second best plain one."""
        found = [self.visual_tokens(cell_logits, embedding)]
        if self.exact_ids is not None:
            found.append(self.visual_tokens(cell_logits, embedding, exact=True))
        if self.sure_above is not None:
            posterior, ids = self._posterior(cell_logits), self.name_ids[: self.n_visual]
            found.append(self._second(posterior, ids, self.sure_above[0], embedding))
        return torch.cat(found, 1)

    def sound_names(self, sound_logits: Tensor, embedding: nn.Embedding) -> Tensor:
        """(M, n_sound) -> tokens (M, n K, L): the name, and the second best where asked for."""
        named = self.sound_tokens(sound_logits, embedding)
        if self.sure_above is None:
            return named
        posterior = (sound_logits * self.log_scale[2].exp()).softmax(-1)
        ids = self.name_ids[self.n_visual :]
        return torch.cat([named, self._second(posterior, ids, self.sure_above[1], embedding)], 1)

    def _second(
        self, posterior: Tensor, ids: Tensor, sure: float, embedding: nn.Embedding
    ) -> Tensor:
        """Posterior (B, N) over names with tokens (N, K) -> tokens (B, K, L) of the plain name that
        is second best; zero where the best one is at least as likely as ``sure``."""
        plain, place = ids.unique(dim=0, return_inverse=True)
        shares = posterior.new_zeros(len(posterior), len(plain)).index_add(1, place, posterior)
        best, number = shares.topk(min(2, len(plain)), 1)
        words = plain[number[:, -1]]
        shown = (words >= 0) & (best[:, :1] < sure)
        second: Tensor = embedding(words.clamp(min=0)) * shown.unsqueeze(-1) * self.gain[0]
        return second

    def cell_values(self, cell_logits: Tensor, embedding: nn.Embedding) -> Tensor:
        """(U, G², n_visual) -> what stands in each cell, one vector (U, G², L)."""
        ids = self.name_ids[: self.n_visual]
        mask = (ids >= 0).unsqueeze(-1)
        values: Tensor = embedding(ids.clamp(min=0)) * mask
        mean = values.sum(1) / mask.sum(1).clamp(min=1)
        posterior = (cell_logits * self.log_scale[1].exp()).softmax(-1)
        return (posterior.to(mean.dtype) @ mean) * self.gain[1]


def build_concepts(
    config: MicoConceptConfig | None, encoder: OmniEncoder
) -> ConceptAttention | None:
    if config is None:
        return None
    if encoder.stem is None:
        raise ModelError("concept_config needs an encoder with a stem, but encoder_config has none")
    return ConceptAttention(config, encoder.stem)


def concept_loss(
    concepts: ConceptAttention, features: Tensor, is_sound: Tensor, units: Tensor, labels: Tensor
) -> Tensor:
    """Cross-entropy of the heads on M media of one named thing each, which ``labels`` (M,) number.

    Media have the unit counts ``units`` (M,); a label below 0 is none. Sounds' names come after the
    visual ones.
    """
    of_unit = torch.repeat_interleave(units)  # the medium of each unit
    total = features.new_zeros(())
    for sound in (False, True):
        chosen = (labels >= 0) & (is_sound == sound)
        own, counts = features[chosen[of_unit]], units[chosen]
        # A batch norm over one row has no variance.
        if not bool(chosen.any()) or (sound and len(counts) == 1 and concepts.sound.training):
            continue
        if sound:
            logits = concepts.sound_logits(own, counts)
        else:
            cells = concepts.cell_logits(own).mean(1).split(counts.tolist())
            logits = torch.stack([medium.mean(0) for medium in cells])
        target = labels[chosen] - (concepts.n_visual if sound else 0)
        total = total + F.cross_entropy(logits.float(), target, label_smoothing=0.05)
    return total
