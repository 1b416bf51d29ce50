"""What a run is measured by while it trains: the loss, and R@1 or accuracy, of held-out samples."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.retrieval import recall_at_k
from mico_chat.model.losses import caption_key
from mico_chat.model.processing import IGNORED
from mico_training.data.bad import BAD, GoodExamples
from mico_training.recipe import EvalRecipe
from mico_training.trainer import MicoTrainer


@dataclass(frozen=True)
class HeldOut:
    """Measures a trainer's model on ``examples``, as its ``eval_dataset``.

    Beside the ``loss`` there is ``R@1`` where the run compares media with captions, and
    ``accuracy`` where it learns answers: the per cent of them that the model gives word for word,
    greedy; of pairs, those whose chosen answer has the higher reward. ``bad_samples`` counts those
    that could not be read, for which others stand in.
    """

    recipe: EvalRecipe
    examples: GoodExamples

    def __call__(self, trainer: MicoTrainer) -> dict[str, float]:
        model: Any = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
        workers = trainer.args.dataloader_num_workers
        size, collate = self.recipe.batch_size, self.examples.batch
        total, n, right, bad = 0.0, 0, list[float](), set[tuple[int, int]]()
        vectors: list[tuple[Tensor, Tensor, Tensor]] = []
        rows: Any = self.examples
        for batch in DataLoader(rows, size, collate_fn=collate, num_workers=workers):
            lost = batch.pop(BAD, [])
            bad |= {(one.data, one.number) for one in lost}
            if not batch:
                raise DataError("eval.data", None, f"{lost[0].sample}: {lost[0].cause}")
            batch = trainer._prepare_inputs(batch)
            loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
            text = batch["input_ids"], batch["attention_mask"]
            total, n = total + len(text[0]) * float(loss), n + len(text[0])
            if outputs.get("text") is not None:
                vectors += zip(outputs["media"], outputs["text"], caption_key(*text), strict=True)
            if outputs.get("logits") is not None:
                right += answered(outputs["logits"], batch["labels"])
            if (chosen := outputs.get("rewards_accuracy")) is not None:
                right += [float(chosen)] * (len(text[0]) // 2)
        figures = {"loss": total / n, **({"bad_samples": len(bad)} if bad else {})}
        if vectors:
            media, captions, key = map(torch.stack, zip(*vectors, strict=True))
            same = [set(row.nonzero()[:, 0].tolist()) for row in key == key[:, None]]
            figures["R@1"] = 100 * recall_at_k(captions @ media.T, same, (1,))[1]
        if right:
            figures["accuracy"] = 100 * sum(right) / len(right)
        if self.recipe.metric not in figures:
            known = " and ".join(figures)
            raise ConfigError(f"eval.metric {self.recipe.metric}: this run measures {known} alone")
        return figures


def answered(logits: Tensor, labels: Tensor) -> list[bool]:
    """Whether each answer of ``labels`` (B, S) has the likeliest token at each place; ``logits``
    (N, V) are those of all labelled places."""
    learnt = labels[:, 1:] != IGNORED
    number = (learnt & ~F.pad(learnt, (1, 0))[:, :-1]).flatten().cumsum(0)[learnt.flatten()] - 1
    wrong = logits.argmax(-1) != labels[:, 1:][learnt]
    return (torch.bincount(number, wrong.float()) == 0).tolist()
