"""A multimodal model of Hugging Face whose requests are not batched: each has a ``generate``.

It is for models whose prompts cannot be put together with others here, such as those in which a
picture's tokens attend to each other, or whose layers keep no keys and values. The library's own
``generate`` computes the whole answer in a thread of its own. It waits after each token, so that
several answers grow in turns, and one computation runs at a time.
"""

import threading
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial
from inspect import signature
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from mico_chat.checkpoints.lora import Lora, Wardrobe, wearing
from mico_chat.engine.base import Prompt
from mico_chat.engine.cpu import free_cores
from mico_chat.engine.scheduler import Chunk, Sequence
from mico_chat.engine.transformers import TorchSampler
from mico_chat.errors import RequestError

N_SLOTS = 8
"""Answers that grow in turns."""


class _StoppedError(Exception):
    """Nobody wants the rest of the answer."""


class _Answer(LogitsProcessor):
    """A ``generate`` in a thread. It hands logits out, and goes on with the token that is chosen.

    The thread computes only while :meth:`next` waits for it.
    """

    def __init__(
        self, generate: Callable[..., Any], threads: int | None, lora: Lora | None
    ) -> None:
        self._generate, self._threads, self._lora = generate, threads, lora
        self._tokens: SimpleQueue[int | None] = SimpleQueue()
        self._logits: SimpleQueue[Tensor | Exception] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mico-alone", daemon=True)

    def next(self, token: int) -> Tensor:
        """The logits (V,) after a token, or after the prompt for the first call."""
        if self._thread.ident is None:
            self._thread.start()
        self._tokens.put(token)
        found = self._logits.get()
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self) -> None:
        if self._thread.is_alive():
            self._tokens.put(None)
            self._thread.join()

    # --- in the thread ---

    def _run(self) -> None:
        try:
            self._wait()
            with torch.inference_mode(), wearing(self._lora):
                self._generate(logits_processor=LogitsProcessorList([self]))
            self._logits.put(RuntimeError("the model's generate ended before its answer did"))
        except _StoppedError:
            return
        except Exception as error:  # another project's code may raise anything: the caller does
            self._logits.put(error)

    def _wait(self) -> int:
        token = self._tokens.get()
        if token is None:
            raise _StoppedError
        if self._threads is not None:
            torch.set_num_threads(min(free_cores()(), self._threads))  # of this thread's work
        return token

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._logits.put(scores[0].float())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._wait()] = 0
        return forced


class AloneModel:
    """See :class:`mico_chat.engine.scheduler.Model`; a prompt is one chunk.

    ``inputs`` gives the arguments of the model's ``generate`` for a prompt. The answers that grow
    in turns have as many tokens together as one may have.
    """

    n_slots = N_SLOTS
    max_idle_cells = 0
    reuses_starts = False
    decodes_apart = False
    scores = False
    state_bytes = 0

    def __init__(self, model: Any, inputs: Callable[[Prompt], dict[str, Tensor]]) -> None:
        self._model, self._inputs = model, inputs
        self.loras = Wardrobe(model)
        most = int(model.config.get_text_config().max_position_embeddings)
        self.max_position = self.n_cells = self.max_batch = most
        self._threads = torch.get_num_threads() if model.device.type == "cpu" else None
        self._answers: dict[int, _Answer] = {}

    def run(self, batch: Many[Chunk]) -> list[Any]:
        """The logits (V,) of each chunk, or the error in their place."""
        return [self._logits(chunk) for chunk in batch]

    def _logits(self, chunk: Chunk) -> Tensor | Exception:
        prompt = chunk.prompt
        try:
            if prompt is None:
                return self._answers[chunk.slot].next(chunk.ids[-1])
            self.truncate(chunk.slot, 0)
            given = self._generating(self._inputs(prompt))
            answer = _Answer(given, self._threads, chunk.lora)
            self._answers[chunk.slot] = answer
            return answer.next(0)
        except Exception as error:  # another project's code may raise anything
            if prompt is None or isinstance(error, torch.OutOfMemoryError):
                return error
            shown = "these media together" if prompt.blocks else "a text without media"
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            refused = RequestError(f"this model cannot answer about {shown}: {reason}")
            refused.__cause__ = error
            return refused

    def _generating(self, given: dict[str, Tensor]) -> Callable[..., Any]:
        room = max(1, self.max_position - given["input_ids"].shape[1])
        # The sampler does what the request's options say, and so ``generate`` must not.
        own: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
        own["cache_implementation"] = "dynamic"
        generate = type(self._model).generate
        if "logits_processor" in signature(generate).parameters:
            generate = GenerationMixin.generate  # Janus keeps them for pictures that it draws
        return partial(generate, self._model, **given, **own, max_new_tokens=room)

    def copy(self, source: int, target: int, length: int) -> None:
        raise NotImplementedError("a prompt's start is not reused")

    def truncate(self, slot: int, length: int) -> None:
        if length == 0 and (answer := self._answers.pop(slot, None)) is not None:
            answer.stop()

    def sampler(self, sequence: Sequence) -> TorchSampler:
        device = self._model.get_output_embeddings().weight.device
        return TorchSampler(sequence, device, counts_prompt=True)

    def close(self) -> None:
        for slot in list(self._answers):
            self.truncate(slot, 0)
