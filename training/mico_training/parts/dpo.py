"""Direct preference optimisation: of two answers to one prompt, the chosen one becomes likelier.

Both are measured from a reference, the model as it was when training began (arXiv 2305.18290,
eq. 7). Names and losses are TRL's.

Legend: B pairs; a batch has N = 2 B rows, the chosen answers and then the rejected ones.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, See
from mico_training.recipe import DpoRecipe
from mico_training.trained import trainable_state
from mico_training.trainer import MicoTrainer


class PreferencePairs(nn.Module):
    """A chat model that compares answers; :class:`DpoTrainer` gives it the reference."""

    accepts_loss_kwargs = False

    def __init__(self, chat: MicoChatForConditionalGeneration, recipe: DpoRecipe) -> None:
        super().__init__()
        self.chat, self.recipe = chat, recipe

    def forward(
        self, labels: Tensor, see: See | None = None, reference: Tensor | None = None, **inputs: Any
    ) -> dict[str, Tensor]:
        """Log-likelihoods (N,) of the answers; with those of the ``reference`` the batch's loss."""
        once = see or self.chat.context_tokens

        def twice(*media: Any, **more: Any) -> list[Tensor]:
            return 2 * once(*media, **more)  # both answers are about the same media

        losses = self.chat(labels=labels, see=twice, reduction="none", **inputs).loss
        said = labels[:, 1:] != -100
        likely = losses.new_zeros(len(labels)).index_add(0, said.nonzero()[:, 0], -losses)
        if reference is None:
            return {"likely": likely}
        return preference_loss(likely, reference, said.sum(1), self.recipe)


def preference_loss(
    likely: Tensor, reference: Tensor, tokens: Tensor, recipe: DpoRecipe
) -> dict[str, Tensor]:
    """The loss of answers with log-likelihoods and numbers of ``tokens`` (N,), and its rewards."""
    beta, ratio = recipe.beta, likely - reference
    chosen, rejected = (beta * ratio).chunk(2)
    margin = chosen - rejected
    if recipe.loss_type == "hinge":
        loss = torch.relu(1 - margin)
    elif recipe.loss_type == "ipo":  # of the mean token, as its authors do
        first, second = (ratio / tokens).chunk(2)
        loss = (first - second - 1 / (2 * beta)) ** 2
    else:  # eq. 7, with a smoothed label
        loss = -F.logsigmoid(margin) + recipe.label_smoothing * margin
    learnt = -likely.chunk(2)[0].sum() / tokens.chunk(2)[0].sum()
    rewards = {"chosen": chosen, "rejected": rejected, "margin": margin, "accuracy": margin > 0}
    found = {f"rewards_{name}": each.detach().float().mean() for name, each in rewards.items()}
    return {"loss": loss.mean() + recipe.sft * learnt, **found}


class DpoTrainer(MicoTrainer):
    """Stage 3's trainer of :class:`PreferencePairs`.

    The reference is computed in each step, with a copy of the weights that train as they were at
    the start. To switch the adapter off would not do: the bridge trains too. Likelihoods that are
    computed before would be of other frames: each step draws its own. The copy is taken before a
    checkpoint is read, so that a run that goes on has the same one.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        state = trainable_state(self.accelerator.unwrap_model(self.model))
        self.other = {name: value.detach().clone() for name, value in state.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.modes.set()
        noisy, device = inputs if self.noise is None else self.noise(inputs), self.args.device
        # The reference sees the same dropout and the same dropped paths as the model.
        drawn = torch.random.fork_rng([device] * (device.type != "cpu"), device_type=device.type)
        self._swap(model)
        try:
            with torch.no_grad(), drawn:
                reference = model(**noisy)["likely"]
        finally:
            self._swap(model)
        inputs = inputs | {"reference": reference}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        """Exchange the weights that train with those of the start, and back."""
        own = self.accelerator.unwrap_model(model)
        if isinstance(own, FSDPModule):
            own.reshard()  # it keeps whole weights after a forward pass
        for name, value in trainable_state(own).items():
            held = value.detach().clone()
            value.copy_(self.other[name])
            self.other[name].copy_(held)
