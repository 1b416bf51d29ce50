"""A chat model in this process, run by any of the engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

from mico_chat.assistant import Answer, Assistant
from mico_chat.checkpoints.folders import LLM, model_folder
from mico_chat.checkpoints.load import chat_config
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import ConfigError, MediaError, MicoError, RequestError
from mico_chat.evaluation.model import CONTROLS, Reply, chunks, fingerprint
from mico_chat.evaluation.store import Record
from mico_chat.evaluation.task import Item, Task
from mico_chat.load import MAX_RUNNING, EngineOptions, load_assistant, transformers_engine
from mico_chat.media import MediaDecoder, MediaLimits


class ChatModel:
    """The model of ``mico-chat ask``, but without the system prompt and options of its folder."""

    controls: tuple[str, ...] = CONTROLS

    def __init__(
        self, name: str, options: EngineOptions, *, frames: int | None = None, workers: int = 1
    ) -> None:
        self.name = name
        self.limits = MediaLimits() if frames is None else MediaLimits(max_frames=frames)
        self._together = options.max_running or MAX_RUNNING
        self._options = options
        self._open = ExitStack()
        decoder = self._open.enter_context(MediaDecoder(self.limits, workers=workers))
        try:
            weights_alone = replace(options, chat_defaults=False)
            self.assistant = load_assistant(name, decoder, weights_alone, similarity=False)
        except BaseException:
            self._open.close()
            raise
        self._open.callback(self.assistant.close)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.assistant.encoder.model)

    def header(self) -> Record:
        """The header; call it before a control changes the weights."""
        dtype = next(self.assistant.encoder.model.parameters()).dtype
        precision = self._options.quantization or str(dtype).removeprefix("torch.")
        how = f"{self.assistant.engine.name} {precision}"
        return {
            "model": self.name,
            "weights": self._fingerprint,
            "how": f"{how}, at most {self.limits.max_frames} frames of a video",
        }

    def use(self, control: str) -> None:
        model = self.assistant.encoder.model
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
            asked = [[items[place].message()] for place in batch]
            found = self.assistant.try_all(asked, options)
            yield from zip(batch, (_reply(one, max_tokens) for one in found), strict=True)

    def close(self) -> None:
        self._open.close()


def check_base_llm(name: str) -> None:
    if chat_config(model_folder(name)).base_llm in (None, LLM):
        raise ConfigError("the control base-llm needs a checkpoint whose base_llm is not its own")


def _reply(found: Answer | MicoError, max_tokens: int) -> Reply:
    if isinstance(found, Answer):
        return Reply.of(found.text, found.choices[0].finish_reason, max_tokens)
    if isinstance(found, MediaError | RequestError):
        return Reply("broken" if isinstance(found, MediaError) else "refused", str(found))
    raise found


def _untuned(assistant: Assistant, options: EngineOptions) -> Assistant:
    """The assistant with its base LLM before tuning, in the transformers engine."""
    from transformers import AutoModelForCausalLM

    from mico_chat.checkpoints.folders import base_llm_path

    model = assistant.encoder.model
    path = base_llm_path(model.config.base_llm)
    assistant.engine.close()
    llm = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    model.attach_llm(llm.to(model.device).eval())
    engine = transformers_engine(model, assistant.processor, options)
    return Assistant(engine, assistant.encoder, assistant.processor, name=assistant.name)
