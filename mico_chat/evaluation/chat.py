"""A chat model in this process, run by any of the engines, and likelihoods of continuations.

Legend: B continuations, T tokens of the longest prompt and continuation, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mico_chat.adapters.base import ModelAdapter
from mico_chat.adapters.mico import MicoAdapter, mico_of
from mico_chat.adapters.transformers import TransformersAdapter
from mico_chat.assistant import Answer, Assistant
from mico_chat.checkpoints.configs import chat_config
from mico_chat.checkpoints.folders import LLM, base_llm_path, local_folder, model_folder
from mico_chat.checkpoints.gguf_files import gguf_files
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.decoder import Decoder, positions_of
from mico_chat.engine.scheduler import Chunk
from mico_chat.engines.base import EngineOptions
from mico_chat.engines.source import Source
from mico_chat.engines.table import ENGINES
from mico_chat.engines.transformers_models import torch_engine
from mico_chat.errors import ConfigError, ContextLengthError, MediaError, MicoError, RequestError
from mico_chat.evaluation.store import Record
from mico_chat.evaluation.task import (
    MEDIA_CONTROLS,
    Item,
    Model,
    Reply,
    Task,
    chunks,
    files_fingerprint,
    fingerprint,
)
from mico_chat.load import load_assistant
from mico_chat.media import MediaDecoder, MediaLimits

WEIGHTS_AND_SETTINGS = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")
"""The files of a model's folder on which its answers depend."""


class ChatModel(Model):
    """The model of ``mico-chat ask``, with the system prompt and options of its folder where
    ``options.chat_defaults`` are asked for."""

    def __init__(
        self, name: str, options: EngineOptions, *, frames: int | None = None, workers: int = 1
    ) -> None:
        self.name = name
        self.limits = MediaLimits() if frames is None else MediaLimits(max_frames=frames)
        self._together = options.running
        self._options = options
        with ExitStack() as opened:
            decoder = opened.enter_context(MediaDecoder(self.limits, workers=workers))
            self.assistant = load_assistant(name, decoder, options, similarity=False)
            opened.callback(self.assistant.close)
            self._open = opened.pop_all()

    @cached_property
    def _fingerprint(self) -> str:
        return weights_fingerprint(self.name, self.assistant.adapter, self._options.mmproj)

    @property
    def _precision(self) -> str:
        adapter = self.assistant.adapter
        if self._options.quantization is not None:
            return self._options.quantization
        if isinstance(adapter, MicoAdapter):
            engine, trained = ENGINES[self.assistant.engine.name], adapter.model.config
            if (usual := engine.usual_quantization(trained.gguf_quantization)) is not None:
                return usual
        if isinstance(adapter, MicoAdapter | TransformersAdapter):
            return str(next(adapter.model.parameters()).dtype).removeprefix("torch.")
        return self._options.dtype or "as stored"

    def header(self) -> Record:
        """The header; call it before a control changes the weights."""
        how = f"{self.assistant.engine.name} {self._precision}"
        how += ", as served" * self._options.chat_defaults
        how += ", text and speech recognised" * (self.assistant.encoder.reader is not None)
        return {
            "model": self.name,
            "weights": self._fingerprint,
            "how": f"{how}, at most {self.limits.max_frames} frames of a video",
            "trained_on": Source.of(self.name).config.get("trained_on"),
        }

    def use(self, control: str) -> None:
        adapter = self.assistant.adapter
        if control in MEDIA_CONTROLS and not isinstance(adapter, MicoAdapter):
            return
        model = mico_of(adapter).model
        model.use_concepts = control != "without-concepts"
        model.use_grid = control != "without-grid"
        self.assistant.encoder.variant = control
        if control == "base-llm":
            check_base_llm(self.name)
            self.assistant = _untuned(self.assistant, self._options)
            self._open.callback(self.assistant.close)

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        return chunks(len(items), self._together)

    def answers(
        self, task: Task, items: Sequence[Item], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        options = GenerationOptions(max_tokens=max_tokens)
        for batch in self.batches(items):
            # The last bits of a context depend on its batch. A resumed run must compute the same
            # bits, so nothing stays in the cache.
            self.assistant.encoder.cache.clear()
            asked = [items[place].messages() for place in batch]
            found = self.assistant.try_all(asked, options)
            yield from zip(batch, (reply_of(one, max_tokens) for one in found), strict=True)

    def close(self) -> None:
        self._open.close()


def check_base_llm(name: str) -> None:
    if chat_config(model_folder(name)).base_llm in (None, LLM):
        raise ConfigError("the control base-llm needs a checkpoint whose base_llm is not its own")


def weights_fingerprint(name: str, adapter: ModelAdapter, mmproj: Path | None = None) -> str:
    """A digest of the weights and settings of the model that was loaded by this name."""
    if isinstance(adapter, MicoAdapter):
        return fingerprint(adapter.model)
    if (pair := gguf_files(name, mmproj)) is not None:
        return files_fingerprint([file for file in (pair.model, pair.mmproj) if file])
    return folder_fingerprint(local_folder(model_folder(name)))


def folder_fingerprint(folder: Path) -> str:
    """A digest of the files in a model's folder on which its answers depend."""
    files = (file for file in folder.iterdir() if file.suffix in WEIGHTS_AND_SETTINGS)
    return files_fingerprint(sorted(files))


def reply_of(found: Answer | MicoError, max_tokens: int) -> Reply:
    """The reply that :meth:`Assistant.try_all` found, or the error that is no refusal."""
    if isinstance(found, Answer):
        first = found.choices[0]
        return Reply.of(first.text, first.finish_reason, max_tokens, first.confidence)
    if isinstance(found, MediaError | RequestError):
        return Reply("broken" if isinstance(found, MediaError) else "refused", str(found))
    raise found


def _untuned(assistant: Assistant, options: EngineOptions) -> Assistant:
    """The assistant with its base LLM before tuning, in torch."""
    from transformers import AutoModelForCausalLM

    model = mico_of(assistant.adapter).model
    path = base_llm_path(model.config.base_llm)
    assistant.engine.close()
    llm = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    model.attach_llm(llm.to(model.device).eval())
    engine = torch_engine(model.llm, assistant.adapter.tokenizer, options)
    return Assistant(engine, assistant.encoder, name=assistant.name)


def language_model(adapter: ModelAdapter) -> Any:
    """What :func:`log_likelihoods` takes, of a model in torch."""
    if not isinstance(adapter, TransformersAdapter):
        return mico_of(adapter).model.llm
    if not adapter.encodes:
        raise RequestError(
            "this model runs alone, one request after the other, without likelihoods of answers"
        )
    return adapter.model


@torch.inference_mode()
def log_likelihoods(
    llm: Any, pairs: Sequence[tuple[Prompt, Sequence[int]]], max_position: int
) -> list[tuple[Tensor, bool]]:
    """The log-probabilities (n,) of each continuation, and whether greedy decoding gives it.

    ``llm`` is a language model of Hugging Face, or a multimodal model with one inside.

    Raises:
        ContextLengthError: a prompt and its continuation have more than ``max_position`` tokens.
    """
    for prompt, ids in pairs:
        if len(prompt) + len(ids) > max_position:
            raise ContextLengthError(
                f"this model's maximum context length is {max_position} tokens, but the prompt "
                f"has {len(prompt)} and the continuation {len(ids)}"
            )
    decoder = Decoder(llm)
    batch = [_whole(prompt, ids) for prompt, ids in pairs]
    rows = decoder.embedded(batch)
    places = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])  # (B, T)
    # The padding is on the right: the attention is causal, so no token sees it.
    mask = places[:, :, None] >= places[:, None]  # (B, T, T)
    cache = DynamicCache(config=decoder.config)
    hidden = decoder.hidden(rows, positions_of(batch, places), mask, cache)
    found = []
    for row, (prompt, ids) in enumerate(pairs):
        # The hidden state before a token predicts that token.
        before = hidden[row, len(prompt) - 1 : len(prompt) - 1 + len(ids)]
        logits = decoder.logits(before).float()  # (n, V)
        target = torch.tensor(list(ids), device=logits.device)
        logprobs = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        found.append((logprobs.cpu(), bool((logits.argmax(-1) == target).all())))
    return found


def _whole(prompt: Prompt, ids: Sequence[int]) -> Chunk:
    """A prompt and its continuation."""
    asked, context = prompt.tokens(0, len(prompt))
    positions = prompt.positions
    if positions is not None:
        after = positions[:, -1:] + torch.arange(len(ids))
        positions = torch.cat([positions[:, :-1], after], 1)
    return Chunk(0, 0, [*asked, *ids], 1, context, positions)
