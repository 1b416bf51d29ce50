"""A multimodal model of Hugging Face that runs alone: one request after the other.

It is for models whose prompts cannot be put together with others here, such as those in which a
picture's tokens attend to each other, or whose layers keep no keys and values. The library's own
``generate`` computes each token, and keeps what it wants between them.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mico_chat.engine.base import Prompt
from mico_chat.engine.cpu import free_cores
from mico_chat.engine.decoder import cache_argument
from mico_chat.engine.scheduler import Chunk, Sequence
from mico_chat.engine.transformers import TorchSampler


class AloneModel:
    """See :class:`mico_chat.engine.scheduler.Model`; there is one slot, and a prompt is one chunk.

    ``inputs`` gives the arguments of the model's ``generate`` for a prompt.
    """

    n_slots = 1
    max_idle_cells = 0
    reuses_starts = False
    decodes_apart = False
    scores = False

    def __init__(self, model: Any, inputs: Callable[[Prompt], dict[str, Tensor]]) -> None:
        self._model, self._inputs = model, inputs
        self._config: Any = model.config.get_text_config()
        most = int(self._config.max_position_embeddings)
        self.max_position = self.n_cells = self.max_batch = most
        self._threads = torch.get_num_threads()
        self._ids: Tensor | None = None
        self._cache: Any = None
        self._cache_name = cache_argument(model.forward)

    def run(self, batch: Many[Chunk]) -> list[Tensor]:
        (chunk,) = batch
        media: dict[str, Tensor] = {}
        if chunk.prompt is not None:
            media = self._inputs(chunk.prompt)
            del media["attention_mask"]  # of the prompt alone
            self._ids = media.pop("input_ids")
            self._cache = DynamicCache(config=self._config)
        else:
            assert self._ids is not None
            more = torch.tensor([list(chunk.ids)], device=self._ids.device)
            self._ids = torch.cat([self._ids, more], 1)
        if self._ids.device.type == "cpu":
            torch.set_num_threads(min(free_cores()(), self._threads))
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=1,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **{self._cache_name: self._cache},
                **media,
            )
        return [output.logits[0][0].float()]

    def copy(self, source: int, target: int, length: int) -> None:
        raise NotImplementedError("there is one slot")

    def truncate(self, slot: int, length: int) -> None:
        if length == 0:
            self._ids = self._cache = None

    def sampler(self, sequence: Sequence) -> TorchSampler:
        return TorchSampler(sequence, self._model.get_output_embeddings().weight.device)

    def close(self) -> None:
        self.truncate(0, 0)
