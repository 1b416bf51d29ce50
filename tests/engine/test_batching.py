"""The engine's thread: each caller gets its answer or error, and no request is left behind."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
import torch

from mico_chat.engine.base import Delta, GenerationOptions, Prompt
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.scheduler import Chunk
from mico_chat.errors import ContextLengthError, MicoError, ModelError, RequestError
from mico_chat.media.medium import ContextBlock
from mico_chat.model.splice import Segment
from mico_chat.wire import Usage
from tests.engine.fake_model import (
    END,
    NO_TOP_K,
    FakeModel,
    Held,
    Rule,
    block,
    expected,
    ids,
    joined_letters,
    says,
)
from tests.support.tiny import run
from tests.support.waiting import PATIENCE_S

TEN = GenerationOptions(max_tokens=10)
HELLO = Prompt((ids("hello"),))


@contextmanager
def engine_of(
    model: FakeModel, tokenizer: Any = None, max_running: int = 16
) -> Iterator[BatchingEngine]:
    engine = BatchingEngine(
        model, tokenizer or joined_letters(), (END,), name="fake", max_running=max_running
    )
    try:
        yield engine
    finally:
        engine.close()
        assert model.closed
        assert not model.samplers


async def deltas_of(
    engine: BatchingEngine, prompt: Prompt = HELLO, options: GenerationOptions = TEN
) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt, options)]


async def tokens_of(
    engine: BatchingEngine, prompt: Prompt = HELLO, options: GenerationOptions = TEN
) -> list[int]:
    deltas = await deltas_of(engine, prompt, options)
    return [token for delta in deltas for token in delta.token_ids]


def written(tokens: Many[int]) -> str:
    return "".join(chr(token - 4 + 32) for token in tokens)


def letters_of(prompt: Prompt, text: str, **options: Any) -> FakeModel:
    return FakeModel(rule=says(prompt, (*ids(text), END)), **options)


def test_deltas_join_to_the_answer() -> None:
    prompt = Prompt((ids("look "), block(6), ids("?")))
    with engine_of(FakeModel()) as engine:
        assert engine.name == "fake"
        deltas = run(deltas_of(engine, prompt))
    tokens = expected(prompt, TEN)
    assert [delta.token_ids for delta in deltas] == [(token,) for token in tokens]
    assert "".join(delta.text for delta in deltas) == written(tokens)
    assert [delta.finish_reason for delta in deltas] == [None] * 9 + ["length"]
    assert [delta.usage for delta in deltas[:-1]] == [None] * 9
    assert deltas[-1].usage == Usage(prompt_tokens=12, completion_tokens=10, media_tokens=6)
    assert all(delta.logprobs == () for delta in deltas)


def test_usage_counts_cached_tokens() -> None:
    with engine_of(FakeModel()) as engine:
        run(deltas_of(engine))
        usage = run(deltas_of(engine))[-1].usage
        assert usage is not None
        assert usage.cached_tokens == 4
        stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (10, 4, 20)
    assert (stats.running, stats.waiting, stats.slots, stats.cells) == (0, 0, 4, 400)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "n_tokens"),
    [
        ("one. Two", (". ",), ["o", "n", "e", "", ""], 5),
        ("one.two", (". ",), ["o", "n", "e", "", ".t", "w", "o", ""], 8),
        ("one.", (". ",), ["o", "n", "e", "", "."], 5),
        ("abXYcd", ("Yc", "XYZ"), ["a", "b", "", "", "X"], 5),
    ],
)
def test_stop_texts(text: str, stop: tuple[str, ...], shown: list[str], n_tokens: int) -> None:
    model = letters_of(HELLO, text)
    with engine_of(model) as engine:
        deltas = run(deltas_of(engine, options=GenerationOptions(max_tokens=10, stop=stop)))
        assert engine.stats().running == 0
    assert [delta.text for delta in deltas] == shown
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage == Usage(prompt_tokens=5, completion_tokens=n_tokens, media_tokens=0)
    assert len(model.batches) == n_tokens, "no step after the stop text"


def test_several_answers() -> None:
    options = GenerationOptions(max_tokens=6, n=3, temperature=1.0, seed=4)
    with engine_of(FakeModel(max_batch=4)) as engine:
        deltas = run(deltas_of(engine, options=options))
    for index in range(3):
        own = [delta for delta in deltas if delta.index == index]
        tokens = expected(HELLO, options, index)
        assert [token for delta in own for token in delta.token_ids] == tokens
        assert "".join(delta.text for delta in own) == written(tokens)
        assert [d.finish_reason for d in own] == [None] * 5 + ["length"]
    assert sum(delta.usage is not None for delta in deltas) == 1
    assert deltas[-1].usage == Usage(prompt_tokens=5, completion_tokens=18, media_tokens=0)


def test_logprobs_and_the_end_token_which_has_none() -> None:
    options = GenerationOptions(max_tokens=9, logprobs=2)
    with engine_of(letters_of(HELLO, "you")) as engine:
        deltas = run(deltas_of(engine, options=options))
    texts = [(delta.text, delta.finish_reason) for delta in deltas]
    assert texts == [("y", None), ("o", None), ("u", None), ("", "stop")]
    assert deltas[-1].usage == Usage(prompt_tokens=5, completion_tokens=4, media_tokens=0)
    (first,) = deltas[0].logprobs
    assert (first.token, first.token_id, first.logprob) == ("y", *ids("y"), -0.5)
    assert [(top.token, top.logprob) for top in first.top] == [("y", -0.5), ("z", -1.5)]
    assert [len(delta.logprobs) for delta in deltas] == [1, 1, 1, 0], "not of the end"
    assert deltas[-1].token_ids == (END,)
    assert "".join(p.token for delta in deltas for p in delta.logprobs) == "you"
    with engine_of(letters_of(HELLO, "you")) as engine:
        deltas = run(deltas_of(engine, options=GenerationOptions(max_tokens=1, logprobs=0)))
    assert [logprob.top for logprob in deltas[0].logprobs] == [()]


@pytest.mark.parametrize(
    ("text", "media", "mean"),
    [("you", True, -0.5), ("you", False, None), ("", True, None)],
)
def test_the_mean_log_probability_of_an_answer_about_media(
    text: str, media: bool, mean: float | None
) -> None:
    """The mean leaves out the end, as the log-probabilities do."""
    prompt = Prompt((ids("look "), block(6), ids("?"))) if media else HELLO
    with engine_of(letters_of(prompt, text)) as engine:
        *before, last = run(deltas_of(engine, prompt))
    assert last.finish_reason == "stop"
    assert last.avg_logprob == mean
    assert last.confidence == (None if mean is None else pytest.approx(0.60653, abs=1e-5))
    assert all(delta.avg_logprob is None for delta in before)


def test_many_at_once_from_several_event_loops() -> None:
    prompts = [Prompt((ids(f"number {n}" * (n % 4 + 1)),)) for n in range(24)]

    async def answers(some: list[Prompt]) -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine, prompt) for prompt in some))

    with (
        engine_of(FakeModel(n_slots=8, n_cells=600, max_batch=16)) as engine,
        ThreadPoolExecutor(3) as pool,
    ):
        parts = pool.map(lambda k: run(answers(prompts[k::3])), range(3))
        for k, found in enumerate(parts):
            assert found == [expected(prompt, TEN) for prompt in prompts[k::3]]


class Gate:
    """A model's steps wait here; ``release`` lets some of them begin."""

    def __init__(self) -> None:
        self._steps = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def release(self, steps: int) -> None:
        self._steps.release(steps)

    def __call__(self, batch: Many[Chunk]) -> None:
        self.begun.release()
        assert self._steps.acquire(timeout=PATIENCE_S)


def test_closing_the_iterator_frees_the_slot_before_the_next_step() -> None:
    gate = Gate()
    model = FakeModel(n_slots=1, before=gate)
    other = Prompt((ids("other"),))

    async def close_early() -> list[int]:
        async with aclosing(engine.generate(HELLO, TEN)) as deltas:
            gate.release(3)
            for _ in range(3):
                await anext(deltas)
        # Its fourth step may run already; there is no fifth.
        following = asyncio.create_task(tokens_of(engine, other))
        await asyncio.sleep(0)
        gate.release(100)
        return await following

    with engine_of(model) as engine:
        assert run(close_early()) == expected(other, TEN)
    lengths = [[chunk.length for chunk in batch] for batch in model.batches]
    assert lengths in ([[5]] + [[1]] * 3 + [[5]] + [[1]] * 9, [[5]] + [[1]] * 2 + [[5]] + [[1]] * 9)


def test_a_loop_that_is_gone_ends_its_requests() -> None:
    gate = Gate()
    model = FakeModel(before=gate)
    with engine_of(model) as engine:
        loop = asyncio.new_event_loop()
        deltas = engine.generate(HELLO, GenerationOptions(max_tokens=100))
        gate.release(1)
        loop.run_until_complete(anext(deltas))
        loop.close()
        gate.release(1000)
        assert len(run(deltas_of(engine, Prompt((ids("next"),))))) == 10
        assert engine.stats().running == 0
        del deltas
    assert len(model.batches) < 20


def test_random_cancellations_leave_nothing_behind() -> None:
    rng = random.Random(0)
    model = FakeModel(n_slots=8, n_cells=500, max_batch=24)

    async def one(number: int, patience: int) -> None:
        prompt = Prompt((ids("common "), ids(f"{number % 20}" * (number % 7 + 1))))
        tokens: list[int] = []
        options = GenerationOptions(max_tokens=12, n=1 + number % 5 // 4)
        async with aclosing(engine.generate(prompt, options)) as deltas:
            async for delta in deltas:
                if delta.index == 0:
                    tokens += delta.token_ids
                if len(tokens) >= patience:
                    break
        right = expected(prompt, options)
        assert tokens[:patience] == right[: len(tokens)]
        assert len(tokens) >= min(patience, len(right))

    async def crowd() -> None:
        tasks = [asyncio.create_task(one(n, rng.randrange(1, 14))) for n in range(200)]
        for task in rng.sample(tasks, 60):
            await asyncio.sleep(0)
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        failed = [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)]
        assert not failed
        assert sum(result is None for result in results) >= 140

    with engine_of(model) as engine:
        run(crowd())
        # Actions are done in order: when this is answered, all others are gone.
        assert run(tokens_of(engine)) == expected(HELLO, TEN)
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.cells_used == sum(map(len, model.slots)) <= 500
        assert not model.samplers
        assert not engine._requests


def broken(number: float) -> ContextBlock:
    return ContextBlock(torch.tensor([[0.0], [number]]), key=b"broken")


def test_a_context_too_long_names_both_numbers() -> None:
    prompt = Prompt((ids("x" * 150), block(40)))
    model = FakeModel()
    with engine_of(model) as engine:
        assert engine.max_position == 200
        with pytest.raises(ContextLengthError, match=r"200 tokens, .*190 \(40 .* 11:"):
            run(deltas_of(engine, prompt, GenerationOptions(max_tokens=11)))
        assert not model.batches
        assert len(run(deltas_of(engine, prompt, TEN))) == 10
    with engine_of(FakeModel(n_cells=100)) as engine:
        assert engine.max_position == 100


@pytest.mark.parametrize(
    ("segments", "error", "said"),
    [
        ((), RequestError, "no tokens"),
        ((ids("look "), broken(float("nan"))), ModelError, "values that are not numbers"),
        ((block(2), broken(float("inf"))), ModelError, "values that are not numbers"),
    ],
)
def test_prompts_that_are_refused(
    segments: tuple[Segment, ...], error: type[MicoError], said: str
) -> None:
    model = FakeModel()
    with engine_of(model) as engine:
        with pytest.raises(error, match=said):
            run(deltas_of(engine, Prompt(segments)))
        assert not model.batches


def test_an_option_that_the_model_lacks() -> None:
    model = FakeModel()
    with engine_of(model) as engine:
        with pytest.raises(RequestError, match=r"^top_k: not here$"):
            run(deltas_of(engine, options=GenerationOptions(max_tokens=10, top_k=NO_TOP_K, n=3)))
        assert engine.stats().waiting == 0
        assert not model.samplers
        assert not model.batches


def failing(model: FakeModel, when: int) -> Callable[[Many[Chunk]], None]:
    def before(batch: Many[Chunk]) -> None:
        if len(model.batches) == when:
            model.slots[batch[0].slot].append("half a step")
            raise ValueError("out of order")

    return before


def test_a_failed_step_reaches_all_callers_and_the_engine_goes_on() -> None:
    all_here = threading.Event()

    def fourth(batch: Many[Chunk]) -> None:
        assert all_here.wait(timeout=PATIENCE_S)
        failing(model, 4)(batch)

    model = FakeModel(n_slots=3, before=fourth)
    prompts = [Prompt((ids(letter * 9),)) for letter in "abcde"]

    async def all_fail() -> list[Any]:
        tasks = [asyncio.create_task(tokens_of(engine, prompt)) for prompt in prompts]
        await asyncio.sleep(0)  # each has posted its request
        all_here.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with engine_of(model) as engine:
        errors = run(all_fail())
        assert {type(error) for error in errors} == {ModelError}
        assert {str(error) for error in errors} == {"a step of the engine failed: out of order"}
        assert len(set(map(id, errors))) == 5
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.cells_used) == (0, 0, 0)
        assert not any(model.slots)
        assert not model.samplers
        for prompt in prompts:
            assert run(tokens_of(engine, prompt)) == expected(prompt, TEN)


def no_words(held: Held) -> int:
    if len(held) > 8:
        raise RequestError("nothing may follow")
    return 50


def a_defect(held: Held) -> int:
    raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("rule", "error", "said"),
    [
        (no_words, RequestError, "nothing may follow"),
        (a_defect, ModelError, "the request failed: by zero"),
        (lambda held: -1, ModelError, "the request failed: "),  # a token without a text
    ],
)
def test_a_request_that_fails_fails_alone(rule: Rule, error: type[MicoError], said: str) -> None:
    other = Prompt((ids("other"),))
    model = FakeModel(rule=lambda held: rule(held) if held[0] == ids("h")[0] else 50)

    async def both() -> Many[Any]:
        options = GenerationOptions(max_tokens=10, n=2)
        answers = (tokens_of(engine, HELLO, options), tokens_of(engine, other))
        return await asyncio.gather(*answers, return_exceptions=True)

    with engine_of(model) as engine:
        failed, answered = run(both())
        assert type(failed) is error
        assert str(failed).startswith(said)
        assert answered == [50] * 10
        assert (engine.stats().running, len(model.samplers)) == (0, 0)


def test_a_model_beyond_repair_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("gone")

    model = FakeModel()
    model.before = failing(model, 2)
    with engine_of(model) as engine:
        monkeypatch.setattr(model, "truncate", fail)
        with pytest.raises(ModelError, match="a step of the engine failed"):
            run(deltas_of(engine))
        engine._thread.join(timeout=PATIENCE_S)
        assert engine.failure == "the engine ended: gone"
        with pytest.raises(ModelError, match="the engine ended: gone"):
            run(deltas_of(engine))


def test_close_fails_all_requests() -> None:
    gate = Gate()
    model = FakeModel(n_slots=2, before=gate)

    async def close() -> list[Any]:
        tasks = [asyncio.create_task(tokens_of(engine, Prompt((ids("x" * n),)))) for n in (5, 6, 7)]
        await asyncio.to_thread(gate.begun.acquire)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        while not engine._closed:
            await asyncio.sleep(0)
        gate.release(1)
        await closing
        return await asyncio.gather(*tasks, return_exceptions=True)

    with engine_of(model) as engine:
        results = run(close())
        assert {type(result) for result in results} == {ModelError}
        assert {str(result) for result in results} == {"the engine was closed"}
        assert len(model.batches) == 1
        engine.close()
        with pytest.raises(ModelError, match="closed"):
            run(deltas_of(engine))


@pytest.mark.parametrize("seed", range(20))
def test_requests_that_meet_a_closing_engine_end(seed: int) -> None:
    rng = random.Random(seed)

    async def request(turns: int) -> object:
        for _ in range(turns):
            await asyncio.sleep(0)
        try:
            return await tokens_of(engine)
        except MicoError as error:
            return str(error)

    async def crowd() -> list[object]:
        tasks = [asyncio.create_task(request(rng.randrange(8))) for _ in range(6)]
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        results = await asyncio.gather(*tasks)
        await closing
        return results

    with engine_of(FakeModel()) as engine:
        results = run(crowd())
    ended = ("the engine was closed", "the engine is closed", expected(HELLO, TEN))
    assert all(result in ended for result in results)
