"""The language model in vLLM: one GPU, several GPUs, or several machines.

vLLM's ``AsyncLLM`` runs the language model in its own processes. It needs one event loop, which
runs in a thread here; callers in any loop get deltas. vLLM computes and samples tokens, and
:class:`mico_chat.engine.request.Request` makes text of them, as for the other engines.

A prompt without media goes to vLLM as token ids. In a prompt with media, the context tokens are
rows of ``prompt_embeds``. vLLM keeps keys and values in blocks of tokens, and identifies a block by
a hash of its ids, its rows (``vllm/v1/core/kv_cache_utils.py``,
``_gen_prompt_embeds_extra_hash_keys``), the tenant and the block before. So the next question of a
conversation reuses the full blocks of its start.

vLLM's repetition penalty also counts the prompt's token ids; the other engines count the answer's
tokens alone. For a request with this penalty, text tokens become rows of the token table too: vLLM
then counts token 0 for each. For a model that encodes media in vLLM, the penalty is vLLM's own
(:mod:`mico_chat.engine.vllm_media`).
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mico_chat.engine.base import Delta, EngineStats, GenerationOptions, Prompt
from mico_chat.engine.request import Outbox, Request, check_prompt
from mico_chat.engine.scheduler import Sampled
from mico_chat.engine.vllm_media import VllmMedium, prompt_of_media
from mico_chat.engine.vllm_start import first_line, set_environment
from mico_chat.errors import ConfigError, MicoError, ModelError, RequestError
from mico_chat.model.splice import PLACEHOLDER, splice

logger = logging.getLogger(__name__)

END_S = 10.0  # seconds that vLLM's processes may take to end before they are killed
ENDED = "vLLM has ended; its log has the reason"

T = TypeVar("T")


class VllmEngine:
    """See :class:`base.Engine`.

    ``arguments`` are vLLM's ``AsyncEngineArgs`` (:mod:`mico_chat.engine.vllm_start`). ``ends`` are
    tokens that end an answer; vLLM also reads those of the LLM's generation config. ``table`` reads
    the LLM's token vectors (V, L) in a dtype; it is called when a request first needs them. A model
    that encodes media in vLLM has none.
    """

    name = "vllm"
    repeats = False  # nobody has shown that its last bits do not depend on what ran before
    scores = False  # it gives no log-probabilities of a prompt of embeddings

    def __init__(
        self,
        arguments: Any,
        tokenizer: PreTrainedTokenizerFast,
        ends: Collection[int],
        *,
        table: Callable[[torch.dtype], Tensor] | None = None,
    ) -> None:
        set_environment()
        self._tokenizer = tokenizer
        self._ends = sorted(ends)
        self._table = None if table is None else functools.cache(table)
        self._requests: dict[Request, asyncio.Task[None]] = {}
        self._numbers = itertools.count()
        self._outbox = Outbox()
        self._flushing = False
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._sequences = 0
        self._gauges: dict[int, _Gauge] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        target = self._loop.run_forever
        self._thread = threading.Thread(target=target, name="mico-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm: Any = self._call(_start(arguments, self._gauge)).result()
        except BaseException:
            self._end_thread()
            raise
        config = self._llm.vllm_config
        self.max_position = int(config.model_config.max_model_len)
        self._dtype: torch.dtype = config.model_config.dtype
        self._width = int(config.model_config.get_hidden_size())
        self.media_limits: Mapping[str, int] = {}
        """The most media of each modality in a request, if vLLM encodes them."""
        if config.model_config.supports_multimodal_inputs:
            self.media_limits = self._llm.renderer.get_mm_processor().info.allowed_mm_limits
        self._slots = int(config.scheduler_config.max_num_seqs)
        cache = config.cache_config
        self._cells = int(cache.num_gpu_blocks * cache.block_size)

    busy_s = 0.0  # vLLM watches its own processes

    @property
    def failure(self) -> str | None:
        llm = self._llm  # None when the engine is closed
        return ENDED if llm is not None and llm.errored else None

    def prepare(self) -> None:
        """vLLM compiles grammars in its own process."""

    def give_up(self, reason: str) -> None:
        """Nothing: it is the media encoder that stands still, and the process that ends."""

    async def generate(
        self, prompt: Prompt, options: GenerationOptions
    ) -> AsyncGenerator[Delta, None]:
        check_prompt(prompt, options, self.max_position)
        request = Request(prompt, options, self._tokenizer)
        serving = self._post(lambda: self._serve(request))
        try:
            while (delta := await request.next()).usage is None:
                yield delta
            yield delta
        finally:
            serving.cancel()

    def medium(
        self, tokens: Collection[int], modality: str, data: Any, settings: Mapping[str, Any]
    ) -> VllmMedium:
        """The inputs that vLLM's processor makes of a medium.

        ``tokens`` are the template's own for it, ``data`` is an item of vLLM's
        ``multi_modal_data``, ``settings`` are those of the processor.
        """
        alone = {
            "prompt_token_ids": list(tokens),
            "multi_modal_data": {modality: [data]},
            "multi_modal_uuids": {modality: [""]},  # a hash of the data would be of no use
            "mm_processor_kwargs": settings,
        }
        given = self._post(lambda: self._llm.renderer.process_for_engine_async(alone, time.time()))
        try:
            return VllmMedium(given.result())
        except CancelledError as error:
            raise ModelError("the engine was closed") from error

    def stats(self) -> EngineStats:
        """Counts of requests and cells. vLLM counts only the cells of running requests."""
        sequences = self._sequences
        gauges = list(self._gauges.values())
        waiting = min(sequences, sum(gauge.waiting for gauge in gauges))
        # vLLM reports after each step: after the last request, its report is out of date.
        usage = sum(gauge.usage for gauge in gauges) / max(1, len(gauges)) if sequences else 0.0
        return EngineStats(
            running=sequences - waiting,
            waiting=waiting,
            slots=self._slots,
            cells_used=round(usage * self._cells),
            cells=self._cells,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
        )

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._call(self._end()).result()
        self._end_thread()

    def _post(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        with self._lock:
            if self._closed:
                raise ModelError("the engine is closed")
            return self._call(work())

    def _call(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- in the thread ----------------------------------------------------------------------------

    async def _serve(self, request: Request) -> None:
        if (task := asyncio.current_task()) is not None:
            self._requests[request] = task
        try:
            inputs = self._inputs(request)
            async with asyncio.TaskGroup() as group:
                answers = [
                    group.create_task(self._answer(request, index, inputs))
                    for index in range(request.options.n)
                ]
            # vLLM has ended all answers of the request before its last delta is sent.
            for answer in answers:
                if (last := answer.result()) is not None:
                    self._give(request, last)
        except* Exception as errors:
            self._give(request, _explained(errors.exceptions[0], request.options))
        finally:
            self._requests.pop(request, None)

    async def _answer(self, request: Request, index: int, inputs: Any) -> Delta | None:
        """Send the deltas of one answer; the delta that ends the whole request is returned."""
        options = request.options
        if options.logprobs is None and request.prompt.media_tokens:  # for the mean of the answer
            options = options.model_copy(update={"logprobs": 0})
        params = sampling_params(options, index, self._ends)
        outputs = self._llm.generate(inputs, params, f"mico-{next(self._numbers)}")
        self._sequences += 1
        try:
            async with aclosing(outputs):
                output = await anext(outputs)
                if index == 0:  # the other answers may reuse the prompt of this one
                    request.cached_tokens = output.num_cached_tokens
                self._prompt_tokens += len(request.prompt)
                self._cached_tokens += output.num_cached_tokens
                while True:
                    for delta in self._deltas(request, index, output.outputs[0]):
                        if delta.usage is not None:
                            return delta
                        self._give(request, delta)
                        if delta.finish_reason is not None:
                            return None
                    output = await anext(outputs)
        finally:
            self._sequences -= 1

    def _deltas(self, request: Request, index: int, output: Any) -> Iterator[Delta]:
        reason: Any = output.finish_reason
        if reason == "error" and (form := request.options.form) is not None:
            reason = "vLLM cannot turn it into a grammar; the log of vLLM gives the reason"
            raise RequestError(f"{form[0]}: {reason}")
        if reason not in (None, "stop", "length") or (reason and not output.token_ids):
            raise ModelError(f"vLLM ended an answer early: {reason}")
        last = len(output.token_ids) - 1
        for place, token in enumerate(output.token_ids):
            values = None if output.logprobs is None else output.logprobs[place]
            sampled = _sampled(token, values, request.options.logprobs or 0)
            self._completion_tokens += 1
            yield request.advance(index, sampled, reason if place == last else None)

    def _give(self, request: Request, item: Delta | MicoError) -> None:
        """Send a delta or an error to its caller, with all others of this turn of the loop."""
        self._outbox.add(request, item)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        for loop in self._outbox.hand_over():
            for request, task in list(self._requests.items()):
                if request.loop is loop:
                    task.cancel()

    def _inputs(self, request: Request) -> Any:
        prompt = request.prompt
        salt = {"cache_salt": prompt.tenant} if prompt.tenant else {}
        rows = None if request.options.repetition_penalty == 1.0 else self._table
        ids, context = prompt.tokens(0, len(prompt))
        if context and self.media_limits:
            return prompt_of_media(prompt, self.media_limits)
        if not context and rows is None:
            return {"type": "token", "prompt_token_ids": ids, **salt}

        def table(ids: Tensor) -> Tensor:
            """Vectors (n, L) of text tokens; zeros if vLLM gets their ids."""
            if rows is not None:
                return rows(self._dtype)[ids]
            return torch.zeros(len(ids), self._width, dtype=self._dtype)

        is_id = [token != PLACEHOLDER and rows is None for token in ids]
        return {
            "type": "embeds",
            "prompt_embeds": splice(table, torch.tensor(ids), context),
            "prompt_token_ids": [t if own else 0 for t, own in zip(ids, is_id, strict=True)],
            "is_token_ids": is_id,
            **salt,
        }

    def _gauge(self, config: Any, index: int) -> _Gauge:
        return self._gauges.setdefault(index, _Gauge())

    async def _end(self) -> None:
        for request, task in list(self._requests.items()):
            self._give(request, ModelError("the engine was closed"))
            task.cancel()
        self._flush()
        # Wait until vLLM has received the aborts.
        await asyncio.gather(*self._requests.values(), return_exceptions=True)
        # In a thread, because vLLM's processes end only after this loop has read their messages.
        await asyncio.to_thread(self._llm.shutdown, END_S)
        self._llm = None
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


async def _start(arguments: Any, gauge: Callable[[Any, int], Any]) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        config = arguments.create_engine_config()
    except (ValueError, ImportError) as error:
        raise ConfigError(f"vLLM refuses its options: {first_line(error)}") from error
    try:
        return AsyncLLM.from_vllm_config(config, stat_loggers=[gauge], disable_log_stats=True)
    except Exception as error:  # any error of vLLM's processes
        raise ModelError(f"vLLM could not start: {first_line(error)}") from error


@dataclass
class _Gauge:
    """Keeps the last report of one of vLLM's schedulers; has vLLM's ``StatLoggerBase`` methods."""

    waiting: int = 0
    usage: float = 0.0

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs
            self.usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *_: Any) -> None: ...


def sampling_params(options: GenerationOptions, index: int, ends: Collection[int]) -> Any:
    """vLLM's ``SamplingParams`` of an answer. :class:`Request` ends the answer at stop texts."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    form = options.form
    named_alike = {"max_tokens", "temperature", "top_p", "top_k", "min_p", "logprobs"}
    named_alike |= {"repetition_penalty", "presence_penalty", "frequency_penalty"}
    endless = options.ignore_eos and form is None  # a form says itself where answers end
    ends = [*([] if endless else ends), *options.stop_token_ids]
    return SamplingParams(
        **options.model_dump(include=named_alike),
        seed=None if options.seed is None else (options.seed + index) % (2**63 - 1),
        min_tokens=options.min_tokens if form is None else 0,
        stop_token_ids=ends,
        ignore_eos=endless or not ends,
        logit_bias=options.logit_bias or None,
        structured_outputs=None if form is None else StructuredOutputsParams(**_form(*form)),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _form(name: str, value: Any) -> dict[str, Any]:
    """What limits an answer, as vLLM takes it."""
    made: dict[str, Any] = {"choice": list, "structural_tag": json.dumps}
    return {name.removesuffix("_schema"): made[name](value) if name in made else value}


def _sampled(token: int, values: Any, n: int) -> Sampled:
    if values is None:
        return Sampled(token)
    likeliest = sorted(values.items(), key=lambda item: item[1].rank)[:n]
    top = tuple((int(other), float(value.logprob)) for other, value in likeliest)
    return Sampled(token, float(values[token].logprob), top)


def _explained(error: Exception, options: GenerationOptions) -> MicoError:
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    if isinstance(error, MicoError):
        return error
    if isinstance(error, EngineDeadError):
        return ModelError(ENDED)
    if isinstance(error, EngineGenerateError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, VLLMClientError | ValueError):
        reason = " ".join(str(error).split())
        return RequestError(reason if options.form is None else f"{options.form[0]}: {reason}")
    logger.error("a request failed", exc_info=error)
    return ModelError(f"the request failed: {first_line(error)}")
