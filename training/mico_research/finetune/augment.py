"""Pictures, clips and sounds of training samples are changed at random, by timm (paper, table 8).

The randomness of a draw comes from the seed and the draw's number alone, so that any number of
processes, and a run that goes on, see the same changes.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from pydantic import Field
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import Compose, Resize

from mico_chat.media import Video
from mico_research.modalities.families import PictureInput
from mico_research.modalities.media import MediaInput
from mico_research.modalities.samples import Array, Sample, Target
from mico_training.recipe import Probability, Section


class Augment(Section):
    """``crop``: the least share of a picture that a random crop keeps; null: the whole picture.

    ``flip``: the probability of a left-right flip. ``auto``: timm's name of a policy, such as
    ``rand-m9-mstd0.5-inc1`` (RandAugment), or null. ``jitter``: colours change by at most this
    share; beside a policy timm leaves it out, because policies change colours too.
    ``erasing``: the probability that a rectangle is erased. ``mixup``, ``cutmix``: alphas; two
    samples of a batch are mixed, and so are their labels. All frames of a clip change alike. A
    sound is erased and mixed alone: a crop or flip would change its times.
    """

    crop: float | None = Field(default=0.08, gt=0.0, lt=1.0)
    flip: Probability = 0.5
    jitter: Probability = 0.4
    auto: str | None = "rand-m9-mstd0.5-inc1"
    erasing: Probability = 0.25
    mixup: float = Field(default=0.0, ge=0.0)
    cutmix: float = Field(default=0.0, ge=0.0)


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's randomness from a seed; it is as before behind the block."""
    before, of_numpy = random.getstate(), np.random.get_state()
    (number,) = np.random.SeedSequence(seed).generate_state(1)
    with torch.random.fork_rng([]):
        random.seed(int(number))
        np.random.seed(number)
        torch.manual_seed(int(number))
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(of_numpy)


class Augmenter:
    """Makes a training sample's arrays, and a batch's mixture."""

    def __init__(self, recipe: Augment, spec: PictureInput | MediaInput, target: Target) -> None:
        self.spec, self.target = spec, target
        self.erase = RandomErasing(recipe.erasing, mode="pixel", device="cpu")
        pixels = spec.preprocessing
        parts: Any = create_transform(
            pixels.image_size,
            is_training=True,
            separate=True,
            scale=(recipe.crop or 1.0, 1.0),
            hflip=recipe.flip,
            color_jitter=recipe.jitter,
            auto_augment=recipe.auto,
            interpolation="bilinear",
            mean=pixels.image_mean,
            std=pixels.image_std,
            re_prob=recipe.erasing,
            re_mode="pixel",
        )
        if recipe.crop is None:
            parts[0].transforms[0] = Resize((pixels.image_size, pixels.image_size))
        self.transform = Compose(parts)
        n, several = len(target.classes), target.task == "multi-label"
        alphas = (recipe.mixup, recipe.cutmix)
        mixup = partial(Mixup, *alphas, label_smoothing=0.0, num_classes=n, multi_label=several)
        self.mixup: Any = mixup() if any(alphas) else None

    def arrays(self, sample: Sample, *seed: int) -> dict[str, Array]:
        """A sample's ``pixel_values`` and ``labels``, and the number of its draw."""
        if isinstance(self.spec, PictureInput):
            picture = (self.spec.pixels(sample) * 255).round().byte().permute(1, 2, 0)
            units = self._changed(picture.numpy()[None], seed)[0]
        elif isinstance(medium := self.spec.medium(sample), Video):
            units = self._changed(medium.frames, seed)
        else:
            units = self.spec.preprocessing.units(medium)
            with seeded(*seed):
                units = self.erase(units)
        labels = self.target.label(sample, self.spec)
        return {"pixel_values": units.numpy(), "labels": labels, "draw": np.array(seed)}

    def _changed(self, pictures: Array, seed: Sequence[int]) -> Tensor:
        """Pictures (n, H, W, 3), all in the same way -> (n, 3, S, S)."""
        made = torch.empty(len(pictures), 3, *[self.spec.preprocessing.image_size] * 2)
        for place, picture in enumerate(pictures):
            with seeded(*seed):
                made[place] = self.transform(Pillow.fromarray(picture))
        return made

    def mixed(self, batch: dict[str, Tensor], draws: Sequence[Array]) -> dict[str, Tensor]:
        """The batch with every sample mixed with another one; clips of unlike lengths stay."""
        pixels, units = batch["pixel_values"], batch.get("units")
        if self.mixup is None or (units is not None and bool((units != units[0]).any())):
            return batch
        shape = pixels.shape
        each = pixels.reshape(len(batch["labels"]), -1, *shape[-2:])
        with seeded(*draws[0].tolist()):
            each, labels = self.mixup(each.clone(), batch["labels"])
        return {**batch, "pixel_values": each.reshape(shape), "labels": labels}
