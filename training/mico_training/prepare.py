"""What all stages do between the model and the Trainer: open the data, fill the feature cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.media import MediaLimits
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.build_model import run_stem, stem_of
from mico_training.data.media import MediaLoader
from mico_training.data.mixture import Mixture
from mico_training.data.sources import all_media
from mico_training.features import FeatureCache, stem_fingerprint
from mico_training.recipe import FeatureRecipe, Recipe


def media_loader(
    recipe: Recipe,
    arguments: TrainingArguments,
    model: MicoForPretraining | MicoChatForConditionalGeneration,
    preprocessing: Preprocessing,
    mixture: Mixture | None,
) -> MediaLoader:
    """Loads pixels, or where the recipe has ``features`` the stem's features, cached by now.

    The stem is frozen then. With several ranks the first fills the cache and the others wait.
    Without a ``mixture`` nothing is looked for: all its media were cached by an earlier call.
    """
    limits = MediaLimits()
    pixels = MediaLoader(preprocessing.units, limits)
    if recipe.features is None:
        return pixels
    stem = stem_of(model).requires_grad_(False).eval()
    settings = (
        preprocessing.model_dump_json(),
        limits.model_dump_json(include={"max_frames", "max_seconds", "max_side"}),
    )
    cache = FeatureCache(recipe.features.cache, stem_fingerprint(stem, *settings))
    with arguments.main_process_first(local=False, desc="features"):
        if arguments.process_index == 0 and mixture is not None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            cache.fill(
                all_media(mixture),
                pixels.pixels,
                _runner(stem.to(device), recipe.features),
                batch_size=recipe.features.batch_size,
                workers=recipe.train.workers,
            )
            stem.to("cpu")
    return MediaLoader(preprocessing.units, limits, cache)


def _runner(stem: nn.Module, recipe: FeatureRecipe) -> Callable[[Tensor], Tensor]:
    """The stem as a function of pixels (n, 3, H, W), n at most ``recipe.batch_size``."""
    if not recipe.compile:
        return partial(run_stem, stem)
    from torch._inductor import config as inductor

    half: Any = copy.deepcopy(stem).to(torch.bfloat16)
    half.to(memory_format=torch.channels_last)
    with inductor.patch(freezing=True):
        compiled = cast(nn.Module, torch.compile(half, dynamic=False))

    def run(pixels: Tensor) -> Tensor:
        n = len(pixels)  # one shape only, so that it is compiled once
        padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, recipe.batch_size - n))
        with inductor.patch(freezing=True):
            return run_stem(compiled, padded.to(torch.bfloat16))[:n]

    return run
