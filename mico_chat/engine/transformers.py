"""The reference engine: Hugging Face's ``generate``, batched.

It runs wherever torch does, takes bitsandbytes and PEFT models as they are, and is what the
other engines are compared with.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from mico_chat.engine.base import (
    Answer,
    Decoder,
    GenerationOptions,
    Usage,
    decode_media,
    media_reports,
)
from mico_chat.engine.detokenize import Detokenizer
from mico_chat.errors import ContextLengthError, RequestError
from mico_chat.messages import Message

logger = logging.getLogger(__name__)


class TransformersEngine:
    """A chat model, its processor and a media decoder.

    ``model`` is a :class:`mico_chat.modeling.MicoChatForConditionalGeneration` (or anything with
    its ``generate``, ``config``, ``device`` and ``dtype``); ``generate`` gets the processor's
    tensors and returns new tokens alone, (B, at most ``max_tokens``). One batch runs at a time.
    """

    def __init__(self, model: Any, processor: Any, decoder: Decoder, *, name: str = "mini") -> None:
        self.name = name
        self.max_position = int(model.config.llm_config.max_position_embeddings)
        self._model = model
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._decoder = decoder
        self._context_token = int(model.config.context_token_id)
        self._eos = _eos_ids(model, self._tokenizer)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        name_or_dir: str | Path,
        decoder: Decoder,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
    ) -> TransformersEngine:
        """Load a checkpoint: ``mini``, a folder, or a hub name."""
        from mico_chat.checkpoint import load_chat

        model, processor = load_chat(name_or_dir, dtype=dtype, device=device)
        folder = Path(name_or_dir)
        name = folder.resolve().name if folder.is_dir() else str(name_or_dir)
        return cls(model, processor, decoder, name=name)

    def decode(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with every medium decoded; see :meth:`Engine.decode`."""
        return decode_media(messages, self._decoder)

    def answer(
        self, batch: Sequence[Sequence[Message]], options: GenerationOptions
    ) -> list[Answer]:
        """Answer several conversations at once; see :meth:`Engine.answer`."""
        if not batch:
            return []
        conversations = [self.decode(messages) for messages in batch]
        inputs, usages = self._prepare(conversations, options)
        stop = _Stop([Detokenizer(self._tokenizer, options.stop) for _ in conversations])
        with self._lock:
            output = self._generate(inputs, options, [stop] if options.stop else [])
        return [
            self._finish(ids, Detokenizer(self._tokenizer, options.stop), usage, messages)
            for ids, usage, messages in zip(output.tolist(), usages, conversations, strict=True)
        ]

    def stream(
        self, messages: Sequence[Message], options: GenerationOptions
    ) -> Generator[str, None, Answer]:
        """Answer one conversation piece by piece; see :meth:`Engine.stream`."""
        conversation = self.decode(messages)
        inputs, (usage,) = self._prepare([conversation], options)
        detokenizer = Detokenizer(self._tokenizer, options.stop)
        steps = _Steps()
        worker = threading.Thread(
            target=self._run, args=(inputs, options, steps), name="mico-generate", daemon=True
        )
        worker.start()
        try:
            ids: list[int] = []
            for ids in steps:
                if piece := detokenizer.update(self._until_eos(ids)):
                    yield piece
                if detokenizer.stopped:
                    break
        finally:
            steps.cancelled.set()
            worker.join()
        given = len(detokenizer.text)
        answer = self._finish(ids, detokenizer, usage, conversation)
        if rest := answer.text[given:]:
            yield rest
        return answer

    def close(self) -> None:
        """Nothing to give back: model and decoder belong to whoever made them."""

    def _run(self, inputs: dict[str, Any], options: GenerationOptions, steps: _Steps) -> None:
        """Body of the generating thread: whatever it raises is raised by the consumer."""
        try:
            with self._lock:
                if not steps.cancelled.is_set():
                    self._generate(inputs, options, [steps])
        except BaseException as error:
            steps.fail(error)
        else:
            steps.end()

    def _prepare(
        self, conversations: list[list[Message]], options: GenerationOptions
    ) -> tuple[dict[str, Any], list[Usage]]:
        """The model's input tensors, and what each prompt costs.

        Raises:
            RequestError: for a conversation without a word or medium of the user's.
            ContextLengthError: naming both numbers.
        """
        for messages in conversations:
            if not messages or messages[-1].role != "user" or not messages[-1].content:
                raise RequestError("the last message must be the user's, and not be empty")
        inputs = self._processor(conversations, add_generation_prompt=True)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        media = (inputs["input_ids"] == self._context_token).sum(dim=1).tolist()
        for length, media_length in zip(lengths, media, strict=True):
            if length + options.max_tokens > self.max_position:
                raise ContextLengthError(
                    f"the prompt has {length} tokens ({media_length} of them for media) and the "
                    f"answer may take {options.max_tokens}, more than the model's "
                    f"{self.max_position}: shorten the conversation or lower max_tokens"
                )
        usages = [
            Usage(prompt_tokens=int(length), completion_tokens=0, media_tokens=int(media_length))
            for length, media_length in zip(lengths, media, strict=True)
        ]
        return {key: self._to_model(value) for key, value in inputs.items()}, usages

    def _to_model(self, value: Any) -> Any:
        """Tensors go to the model's device, floating point ones to its dtype too."""
        if not isinstance(value, torch.Tensor):
            return value
        dtype = self._model.dtype if value.is_floating_point() else None
        return value.to(self._model.device, dtype)

    def _generate(
        self, inputs: dict[str, Any], options: GenerationOptions, criteria: list[StoppingCriteria]
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "max_new_tokens": options.max_tokens,
            "do_sample": options.temperature > 0,
            "eos_token_id": sorted(self._eos),
            "pad_token_id": self._pad,
            "stopping_criteria": StoppingCriteriaList(criteria),
        }
        if options.temperature > 0:
            arguments |= {
                "temperature": options.temperature,
                "top_p": options.top_p,
                "top_k": options.top_k,
            }
        if options.repetition_penalty != 1.0:
            arguments["repetition_penalty"] = options.repetition_penalty
        with torch.inference_mode(), _seeded(options.seed, self._model.device):
            output = self._model.generate(**inputs, **arguments)
        assert isinstance(output, torch.Tensor)
        return output

    @property
    def _pad(self) -> int:
        """The padding token; a model without one pads with its end token."""
        pad = self._tokenizer.pad_token_id
        return min(self._eos) if pad is None else int(pad)

    def _until_eos(self, ids: list[int]) -> list[int]:
        """A row's own tokens: up to the end token, or to the padding after a stop text."""
        ends = self._eos | {self._pad}
        return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]

    def _finish(
        self, ids: list[int], detokenizer: Detokenizer, usage: Usage, messages: list[Message]
    ) -> Answer:
        own = self._until_eos(ids)
        detokenizer.update(own, final=True)
        ended = len(own) < len(ids) or detokenizer.stopped
        return Answer(
            text=detokenizer.text,
            finish_reason="stop" if ended else "length",
            usage=usage.model_copy(update={"completion_tokens": len(own)}),
            media=media_reports(messages),
        )


class _Stop(StoppingCriteria):
    """Ends each row of a batch at its own stop text."""

    def __init__(self, detokenizers: list[Detokenizer]) -> None:
        self._detokenizers = detokenizers

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        rows = zip(input_ids.tolist(), self._detokenizers, strict=True)
        for ids, detokenizer in rows:
            detokenizer.update(ids)
        stopped = [detokenizer.stopped for detokenizer in self._detokenizers]
        return torch.tensor(stopped, device=input_ids.device)


class _Steps(StoppingCriteria):
    """Hands every step of a generating thread to an iterator, which can cancel it."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._queue: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._queue.put(input_ids[0].tolist())
        return torch.full((len(input_ids),), self.cancelled.is_set(), device=input_ids.device)

    def end(self) -> None:
        self._queue.put(None)

    def fail(self, error: BaseException) -> None:
        self._queue.put(error)

    def __iter__(self) -> Iterator[list[int]]:
        """All ids so far, step by step; raises what the generating thread raised."""
        while (step := self._queue.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those the language model names."""
    configured = model.config.llm_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Sample from ``seed`` inside, and leave the process's random state as it was."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
