"""Self-critical sequence training: captions learn the figure that they are measured by.

As in Rennie et al. (arXiv 1612.00563): the model writes a caption of each sample at random and its
most likely one. The random caption's words become more likely as far as it scores more than the
other one, and less likely where it scores less. The score is CIDEr-D against all captions of the
sample, with the document frequencies of the training captions.

Legend: B samples, R references of a sample, S text length.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mico_chat.errors import MissingExtraError
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.released import Subtitles
from mico_chat.model.text_branch import written
from mico_training.trainer import MicoTrainer

Reward = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
"""The scores of B captions, each with its references."""

END = "."
"""Stands behind each caption, so that the n-grams tell a finished one from one that breaks off."""


class Cider:
    """CIDEr-D of ``pycocoevalcap``, for captions of any samples.

    ``documents`` are the captions of all training samples, one document a sample. Words are runs of
    letters and digits: the tokenizer of the COCO evaluation would start Java in every step.
    """

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        try:
            from pycocoevalcap.cider.cider_scorer import CiderScorer, precook
        except ImportError as error:
            raise MissingExtraError("stage1.scst (CIDEr)", "eval") from error
        seen: Counter[tuple[str, ...]] = Counter()
        n = 0
        for captions in documents:
            seen.update({ngram for text in captions for ngram in precook(_words(text))})
            n += 1
        # An n-gram of one document weighs as much as an unknown one, and most are of one.
        frequency = Counter({ngram: count for ngram, count in seen.items() if count > 1})
        log_n = float(torch.tensor(max(n, 2)).log())

        class Scorer(CiderScorer):  # type: ignore[misc]
            """With the training captions' frequencies instead of the references' own."""

            ref_len = property(lambda self: log_n, lambda self, value: None)

        self._scorer, self._frequency = Scorer, frequency

    def __call__(self, said: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        scorer = self._scorer()
        scorer.document_frequency = self._frequency
        for text, right in zip(said, references, strict=True):
            scorer += (_words(text), [_words(one) for one in right])
        return [float(score) for score in scorer.compute_cider()]


def _words(text: str) -> str:
    return " ".join([*re.findall(r"\w+", text.lower()), END])


class ScstTrainer(MicoTrainer):
    """Stage 1's trainer, whose batches have the model's own captions in place of given ones.

    Logs the mean rewards: ``reward`` of random captions, ``greedy_reward`` of the likely ones.
    """

    def __init__(
        self, *, tokenizer: PreTrainedTokenizerBase, length: int, reward: Reward, **options: Any
    ) -> None:
        super().__init__(**options)
        self.tokenizer, self.length, self.reward = tokenizer, length, reward

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The policy gradient's loss of a batch with ``reference_ids`` (B, R, S)."""
        self.modes.set()
        own = cast(MicoForPretraining, self.accelerator.unwrap_model(model))
        inputs = self.sampled(own, dict(inputs))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def sampled(self, model: MicoForPretraining, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with sampled captions as its text, and with their advantages (B,)."""
        references = [self._texts(rows) for rows in inputs.pop("reference_ids")]
        random, likely = self.write(model, inputs)
        rewards = torch.tensor(
            [self.reward(self._texts(ids), references) for ids in (random, likely)]
        )
        rewards = rewards.to(random.device)
        for name, each in zip(("reward", "greedy_reward"), rewards, strict=True):
            self.sums[name] = self.sums.get(name, torch.zeros_like(each.mean())) + each.mean()
        ended = (random == self.tokenizer.sep_token_id).cumsum(1)
        spoken = (ended == 0) | ((ended == 1) & (random == self.tokenizer.sep_token_id))
        first = torch.full_like(random[:, :1], self.tokenizer.cls_token_id)
        return inputs | {
            "input_ids": torch.cat([first, random], 1),
            "attention_mask": torch.cat([torch.ones_like(first), spoken.long()], 1),
            "caption_corpus": torch.zeros(len(first), random.shape[1] + 1).to(first),
            "advantage": rewards[0] - rewards[1],
        }

    @torch.no_grad()
    def write(self, model: MicoForPretraining, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A random and the most likely caption (B, S) of each sample, without [CLS]."""
        kind, counts, row = (inputs[name] for name in ("media_kind", "media_units", "media_row"))
        pixels, features = (inputs.get(name) for name in ("pixel_values", "stem_features"))
        said = Subtitles.given(inputs)
        n = len(inputs["input_ids"])
        shown = model.encode(kind, counts, row, n, pixels, features, said)
        over = (model, shown.context, shown.mask, self.tokenizer)
        random, likely = (
            written(*over, max_new_tokens=self.length - 1, num_beams=1, sample=sample).clone()
            for sample in (True, False)
        )
        return random, likely

    def _texts(self, ids: Tensor) -> list[str]:
        """Texts of rows of ids up to their first [SEP]; a row of padding is none."""
        end, padding = self.tokenizer.sep_token_id, self.tokenizer.pad_token_id
        rows = [row for row in ids.tolist() if any(one != padding for one in row)]
        said = [row[: row.index(end)] if end in row else row for row in rows]
        return self.tokenizer.batch_decode(said, skip_special_tokens=True)
