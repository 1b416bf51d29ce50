"""Fit the concept heads on the frozen stem's cached features, before stage 1.

A head sees one pooled vector for each medium, so a hundred passes over all named media take a
minute or two; stage 1 could afford one pass. The pretrained rows of the classifier do not change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mico_chat.errors import ConfigError
from mico_chat.media.kinds import Kind
from mico_chat.model.concepts import ConceptAttention
from mico_training.build_model import build_pretraining, concept_labels
from mico_training.data.media import MediaLoader, media_loader
from mico_training.data.mixture import Mixture, open_mixture
from mico_training.recipe import Stage1Run, load_recipe
from mico_training.trainer import training_arguments

SMOOTHING = 0.05
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadSettings:
    """How a head is fitted. ``noise`` is added to each feature, in units of its deviation."""

    passes: int = 20
    batch_size: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    noise: float = 0.5


SEEN = HeadSettings()
HEARD = HeadSettings(dropout=0.0)  # the sound head has dropout of its own


def main(config: Path, output: Path | None = None) -> None:
    """Fit the heads of a stage 1 recipe's model, and save it to ``output`` (default: its folder).

    Raises:
        ConfigError: the model has no concepts, or the recipe no cached features.
    """
    recipe = load_recipe(Stage1Run, config, ())
    if recipe.features is None:
        raise ConfigError(
            f"{config}: the heads are fitted on cached features; add the key 'features'"
        )
    arguments = training_arguments(recipe)
    mixture = open_mixture(recipe.data, "caption", recipe.train.seed)
    parts = build_pretraining(recipe.model, None)
    concepts = parts.model.concepts
    if concepts is None:
        raise ConfigError(f"model {recipe.model.name}: it has no concepts to fit")
    loader = media_loader(recipe, arguments, parts.model, parts.preprocessing, mixture)
    torch.manual_seed(recipe.train.seed)
    seen, heard = named_features(mixture, loader, concepts, concept_labels(parts.model.config))
    concepts.requires_grad_(False)
    for what, head, logits, named, settings in (
        ("visual names", concepts.learned, concepts.visual, seen, SEEN),
        ("sound names", concepts.sound, concepts.sound, heard, HEARD),
    ):
        if named is not None:
            head.requires_grad_(True)
            fit(what, head, logits, *named, settings)
    parts.save(Path(recipe.model.name) if output is None else output)


Named = tuple[Tensor, Tensor]
"""Float16 features (N, width) of named media, and their classes (N,)."""


@torch.inference_mode()
def named_features(
    mixture: Mixture,
    loader: MediaLoader,
    concepts: ConceptAttention,
    labels: Mapping[Kind, Mapping[str, int]],
) -> tuple[Named | None, Named | None]:
    """The heads' inputs for every named medium: first those of pictures, then those of sounds."""
    found: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]] = ([], [])
    samples = [(source, i) for source in mixture.sources for i in range(len(source))]
    for source, i in tqdm(samples, desc="named media", unit="sample"):
        sample = source[i]
        for key, name in sample.concepts.items():
            medium = sample.media[key]
            number = labels[medium.kind].get(name)
            if number is None or medium.kind == "video":
                continue
            features = loader.load(medium).inputs
            if medium.kind == "audio":
                pooled = concepts.sound_features(features, torch.tensor([len(features)]))[0]
                found[1].append((pooled.half(), number - concepts.n_visual))
            else:
                found[0].append((concepts.cell_features(features).mean((0, 1)).half(), number))
    seen, heard = (
        (torch.stack([row for row, _ in named]), torch.tensor([number for _, number in named]))
        if named
        else None
        for named in found
    )
    return seen, heard


def fit(
    what: str,
    head: nn.Module,
    logits: Callable[[Tensor], Tensor],
    features: Tensor,
    classes: Tensor,
    settings: HeadSettings,
) -> float:
    """Train ``head`` by the cross-entropy of ``logits`` on features (N, width); the last loss."""
    was_training = head.training
    head.train()
    spread = features.float().std(0) * settings.noise
    optimizer = torch.optim.AdamW(
        [p for p in head.parameters() if p.requires_grad],
        settings.lr,
        weight_decay=settings.weight_decay,
    )
    steps = max(1, settings.passes * len(features) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=steps, pct_start=0.1
    )
    last = 0.0
    for _ in tqdm(range(steps), desc=what, unit="step"):
        chosen = torch.randint(len(features), (settings.batch_size,))
        x = features[chosen].float()
        x = F.dropout(x + torch.randn_like(x) * spread, settings.dropout)
        loss = F.cross_entropy(logits(x), classes[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        last = loss.item()
    head.train(was_training)
    logger.info("%s: %d media, loss %.2f", what, len(features), last)
    return last
