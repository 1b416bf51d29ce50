"""The model ``mico_chat`` of lmms-eval: our engines answer the questions of its tasks.

``MicoChat`` has the chat interface, lmms-eval's default. ``MicoChatSimple`` (``--force_simple``) is
for tasks that compare the likelihoods of given answers, which the chat interface cannot do.
"""

import asyncio
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant
from mico_chat.chats import conversation
from mico_chat.engine.base import GenerationOptions
from mico_chat.engines.base import MAX_RUNNING, EngineOptions
from mico_chat.engines.table import ENGINES, reference
from mico_chat.errors import ConfigError, MediaError, MicoError, ModelError, RequestError
from mico_chat.evaluation.chat import ChatModel, language_model, log_likelihoods
from mico_chat.evaluation.lmms.requests import options_of, question
from mico_chat.evaluation.task import chunks
from mico_chat.messages import Message

logger = logging.getLogger(__name__)

_NEEDS = "tasks that compare likelihoods (output_type multiple_choice or loglikelihood) need"


class _Request(NamedTuple):
    """The name of a request in errors, a function that makes its messages, and its options."""

    name: str
    read: Callable[[], list[Message]]
    options: GenerationOptions


class _MicoChat(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """What both interfaces share. The arguments are those of ``mico-chat serve`` and lmms-eval."""

    def __init__(
        self,
        pretrained: str = "mini",
        engine: str = "auto",
        dtype: str | None = None,
        quantization: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_frames: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = "pretrained, engine, dtype, quantization, max_frames"
            raise ConfigError(
                f"unknown model argument {next(iter(unknown))!r}; the arguments are {known} "
                "(batch_size and device are flags of lmms-eval)"
            )
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.device = self._own_device(device)
        options = EngineOptions(
            engine,
            quantization,
            dtype,
            self.device,
            max_running=self.batch_size,
            chat_defaults=False,
        )
        workers = os.cpu_count() or 1
        self._open = partial(
            ChatModel, str(pretrained), options, frames=max_frames, workers=workers
        )
        self._undecoded: dict[tuple[str, str], tuple[Any, Any, Mapping[str, str]]] = {}
        self._loaded: ChatModel | None = None
        self._load()

    def _own_device(self, device: str | None) -> str | None:
        """The device of this process: under ``accelerate launch``, each process has its own GPU."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return device
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        return str(self.accelerator.device)

    def _load(self) -> ChatModel:
        """The model, loaded again after :meth:`clean`."""
        if self._loaded is None:
            self._loaded = self._open()
        return self._loaded

    def clean(self) -> None:
        """Free the model's memory: a judge may need it."""
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None
        super().clean()

    def _document(self, task: str, split: str, number: int) -> Any:
        """A document of a task's split; a sound in it is ``{"type": "audio", "url": file}``.

        Left alone, ``datasets`` decodes a sound with torchcodec, and lmms-eval's chat interface
        refuses the result.
        """
        whole = self.task_dict[task][split]
        known = self._undecoded.get((task, split))
        if known is None or known[0] is not whole:
            known = self._undecoded[task, split] = (whole, *_as_files(whole))
        _, files, kinds = known
        document = files[number]
        for column, kind in kinds.items():
            if (file := document[column]) is not None:
                url = file["path"] if file["bytes"] is None else file["bytes"]
                document[column] = {**file, "type": kind, "url": url}
        return document

    def _answer(self, requests: Sequence[_Request]) -> list[GenerationResult]:
        """The answers in order. An unreadable request is logged, and gets an empty answer."""
        assistant = self._load().assistant
        results: list[GenerationResult] = [GenerationResult("")] * len(requests)
        errors: dict[int, MicoError] = {}
        alike: dict[GenerationOptions, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            alike[request.options].append(place)
        batches = [
            (options, [places[n] for n in batch])
            for options, places in alike.items()
            for batch in chunks(len(places), self.batch_size)
        ]
        for options, batch in tqdm(batches, desc="mico_chat", disable=self.rank != 0):
            readable: dict[int, list[Message]] = {}
            for place in batch:
                try:
                    readable[place] = requests[place].read()
                except MicoError as error:
                    errors[place] = error
                except OSError as error:  # Pillow's, of a picture that a task opens itself
                    errors[place] = MediaError("a medium", f"cannot be read ({error})")
            answers = assistant.try_all(list(readable.values()), options)
            for place, answer in zip(readable, answers, strict=True):
                if isinstance(answer, Answer):
                    n_read, n_said = answer.usage.prompt_tokens, answer.usage.completion_tokens
                    counts = TokenCounts(input_tokens=n_read, output_tokens=n_said)
                    results[place] = GenerationResult(answer.text, counts)
                else:
                    errors[place] = answer
        for place in sorted(errors):
            logger.error("%s was not answered: %s", requests[place].name, errors[place])
        if errors:
            lost = f"{len(errors)} of {len(requests)} requests"
            logger.error("%s were not answered; they count as wrong", lost)
        if errors and len(errors) == len(requests):
            raise ModelError(f"no request could be answered: {errors[min(errors)]}")
        return results

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        return self._answer([self._request(request) for request in requests])

    def _request(self, request: Any) -> _Request:
        raise NotImplementedError

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise RequestError(f"{_NEEDS} lmms-eval's --force_simple and engine={reference('chat')}")


class MicoChat(_MicoChat):
    is_simple = False

    def _request(self, request: Any) -> _Request:
        """The arguments are context, doc_to_messages, options, document, task, split."""
        _, doc_to_messages, options, number, task, split = request.args

        def read() -> list[Message]:
            return conversation(
                doc_to_messages(self._document(task, split, number)), self._load().limits
            )

        return _Request(f"{task} {split} {number}", read, options_of(options))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request; a round of all requests is asked together."""
        answers: list[list[str]] = [[] for _ in requests]
        information: list[Any] = [None] * len(requests)
        open_: Sequence[int] = range(len(requests))
        for round_ in itertools.count():
            asked: dict[int, _Request] = {}
            for place in open_:
                _, doc_to_messages, options, number, task, split = requests[place].args
                document = self._document(task, split, number)
                if round_ == 0:
                    shown = doc_to_messages(document)
                else:
                    shown, ended, _, information[place] = doc_to_messages(
                        document,
                        round_idx=round_,
                        previous_output=list(answers[place]),
                        previous_round_info=information[place],
                    )
                    if ended:
                        continue
                asked[place] = _Request(
                    f"{task} {split} {number} round {round_}",
                    partial(conversation, shown, self._load().limits),
                    options_of(options),
                )
            if not asked:
                break
            for place, result in zip(asked, self._answer(list(asked.values())), strict=True):
                answers[place].append(result.text)
            open_ = list(asked)
        return answers


class MicoChatSimple(_MicoChat):
    is_simple = True

    def _request(self, request: Any) -> _Request:
        """The arguments are context, options, doc_to_visual, document, task, split."""
        context, options, doc_to_visual, number, task, split = request.args

        def read() -> list[Message]:
            visuals = doc_to_visual(self._document(task, split, number)) or []
            return question(visuals, context, self._load().limits)

        return _Request(f"{task} {split} {number}", read, options_of(options))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        raise RequestError(
            "tasks of several rounds need the chat interface: leave out --force_simple"
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The mean negative log-probability of each answer, and whether the answer is greedy."""
        assistant = self._load().assistant
        if not ENGINES[assistant.engine.name].in_torch:
            name = assistant.engine.name
            raise RequestError(f"{_NEEDS} engine={reference('chat')}, not {name}")
        llm, most = language_model(assistant.adapter), assistant.engine.max_position
        found: list[tuple[float, bool]] = []
        batches = chunks(len(requests), self.batch_size)
        for batch in tqdm(batches, desc="mico_chat", disable=self.rank != 0):
            shown, answers = zip(*(self._with_answer(requests[n]) for n in batch), strict=True)
            prompts = asyncio.run(_prompts(assistant, shown))
            pairs = list(zip(prompts, (_ids(assistant, text) for text in answers), strict=True))
            for logprobs, greedy in log_likelihoods(llm, pairs, most):
                found.append((-float(logprobs.mean()), greedy))
        return found

    def _with_answer(self, request: Any) -> tuple[list[Message], str]:
        if len(request.args) == 2:  # this request has no document
            context, answer = request.args
            return [Message.user(context or " ")], answer
        context, answer, doc_to_visual, number, task, split = request.args
        document = self._document(task, split, number)
        visuals = doc_to_visual(document) or []
        if callable(answer):
            answer = answer(document)
        return question(visuals, context, self._load().limits), answer


async def _prompts(assistant: Assistant, conversations: Sequence[list[Message]]) -> list[Any]:
    prepared = await asyncio.gather(*(assistant.prepare(Ask(shown)) for shown in conversations))
    return [prompt for prompt, _ in prepared]


def _ids(assistant: Assistant, answer: str) -> list[int]:
    text = answer.lstrip() or answer
    ids: list[int] = assistant.adapter.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RequestError("the answer has no tokens, so it has no likelihood")
    return ids


def _batch_size(given: int | str, most: int | None) -> int:
    if isinstance(given, str) and given.startswith("auto"):
        return min(MAX_RUNNING, most or MAX_RUNNING)
    if not str(given).isdecimal() or int(given) < 1:
        raise ConfigError(
            f"batch_size is {given!r}; it must be a whole number of at least 1, or auto"
        )
    return int(given)


def _as_files(split: Any) -> tuple[Any, Mapping[str, str]]:
    """The split with sounds and clips as undecoded files, and the kind of each column of them."""
    from datasets import Audio, Dataset, Video

    kinds: dict[str, str] = {}
    if isinstance(split, Dataset):  # some tasks make a list of their split
        for column, feature in split.features.items():
            if isinstance(feature, Audio | Video):
                kinds[column] = "audio" if isinstance(feature, Audio) else "video"
                split = split.cast_column(column, replace(feature, decode=False))
    return split, kinds
