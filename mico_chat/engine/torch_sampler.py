"""Picks tokens from logits in torch, with Hugging Face's own processors."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mico_chat.engine.base import GenerationOptions
from mico_chat.engine.scheduler import Sampled
from mico_chat.errors import RequestError

LEAST_TEMPERATURE = 1e-5
"""Below it sampling is greedy: the quotient would leave float32's range."""


class TorchSampler:
    """Samples from logits (V,) on ``device``; the process's random state stays as it is."""

    def __init__(self, options: GenerationOptions, index: int, device: torch.device) -> None:
        if options.json_schema is not None:
            raise RequestError(
                "json_schema: the transformers engine cannot constrain answers; "
                "use --engine llamacpp"
            )
        self._logprobs = options.logprobs
        self._greedy = options.temperature < LEAST_TEMPERATURE
        self._processors = LogitsProcessorList(_penalties(options))
        if not self._greedy:
            self._processors += _warpers(options)
        self._generator = torch.Generator(device)
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed + index)
        self._ids = torch.zeros(1, 0, dtype=torch.long, device=device)

    def sample(self, logits: Tensor) -> Sampled:
        """The next token, which later ones are penalized for repeating."""
        with torch.inference_mode():
            scores: Tensor = self._processors(cast(Any, self._ids), cast(Any, logits[None]))
            if self._greedy:
                token = scores.argmax(dim=-1, keepdim=True)
            else:
                token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
            self._ids = torch.cat([self._ids, token], dim=1)
            return self._sampled(int(token), logits)

    def close(self) -> None:
        """Nothing to give back."""

    def _sampled(self, token: int, logits: Tensor) -> Sampled:
        if self._logprobs is None:
            return Sampled(token)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(self._logprobs, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Sampled(token, float(logprobs[token]), top)


class _CountPenalty(LogitsProcessor):
    """Takes ``presence`` from a token that was there, and ``frequency`` for each time."""

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = presence, frequency

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        times = torch.zeros_like(scores).scatter_add_(
            1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype)
        )
        return scores - self._presence * (times > 0) - self._frequency * times


def _penalties(options: GenerationOptions) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if options.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.presence_penalty or options.frequency_penalty:
        found.append(_CountPenalty(options.presence_penalty, options.frequency_penalty))
    return found


def _warpers(options: GenerationOptions) -> list[LogitsProcessor]:
    """In the order of Hugging Face's ``generate``."""
    # A low temperature after a strong penalty may leave float32's range.
    found = [TemperatureLogitsWarper(options.temperature), InfNanRemoveLogitsProcessor()]
    if options.top_k > 0:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1.0:
        found.append(TopPLogitsWarper(options.top_p))
    if options.min_p > 0.0:
        found.append(MinPLogitsWarper(options.min_p))
    return found
