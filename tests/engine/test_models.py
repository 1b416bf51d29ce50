"""llama.cpp and the transformers engine compute the tokens of Hugging Face's own ``generate``.

Greedy tokens are the same whether a prompt runs alone or among others, whole or in chunks, computed
or taken over from another slot.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mico_chat.engine.base import Delta, GenerationOptions, Prompt
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.scheduler import Model, Scheduler, Sequence
from mico_chat.engine.transformers import TransformersModel
from mico_chat.errors import RequestError
from tests.engine.tiny_llm import answer, block, embed, exported, feed, generated, prompts, text
from tests.support.tiny import byte_level, run

SAMPLED = GenerationOptions(max_tokens=12, temperature=1.5, seed=3)

Open = Callable[..., Any]


@pytest.fixture(scope="module", params=["llamacpp", "transformers"])
def opened(
    request: pytest.FixtureRequest, llm: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Open:
    if request.param == "transformers":
        return lambda n_slots=20, **options: TransformersModel(llm, n_slots=n_slots, **options)
    llamacpp = pytest.importorskip("mico_chat.engine.llamacpp")
    file: Path = exported(llm, tmp_path_factory.mktemp("checkpoint"))
    return lambda n_slots=20, **options: llamacpp.LlamaCppModel(
        file, n_slots=n_slots, n_cells=4096, threads=1, **options
    )


@pytest.fixture
def model(opened: Open) -> Iterator[Model]:
    model: Model = opened()
    yield model
    model.close()


@pytest.mark.parametrize(("n_slots", "max_batch"), [(20, 512), (20, 16), (3, 32)])
def test_a_ragged_batch(opened: Open, said: list[list[int]], n_slots: int, max_batch: int) -> None:
    model = opened(n_slots, max_batch=max_batch)
    assert answer(model, prompts()) == said
    model.close()


def test_a_prefix_that_is_taken_over(model: Model, llm: LlamaForCausalLM) -> None:
    scheduler = Scheduler(model, (), max_running=4)
    start = (text(20), block(9), text(30, seed=1))
    first = Prompt((*start, text(60, seed=2)))
    others = [Prompt((*start, text(4, seed=seed))) for seed in (3, 4)]
    expected = [generated(llm, prompt) for prompt in (first, *others)]
    assert answer(model, [first], scheduler=scheduler) == expected[:1]
    assert answer(model, others, scheduler=scheduler) == expected[1:]
    # Copied into two slots: the first prompt's own is worth keeping.
    assert scheduler.stats().cached_tokens >= 2 * 59
    assert answer(model, [first], scheduler=scheduler) == expected[:1]


@pytest.mark.parametrize("max_batch", [512, 8])
def test_a_given_answer_is_scored(opened: Open, llm: LlamaForCausalLM, max_batch: int) -> None:
    """In steps of any size, beside answers that grow, and after a start that is there already."""
    model = opened(n_slots=8, max_batch=max_batch)
    scheduler = Scheduler(model, (), max_running=8)
    said = text(7, seed=50)
    asked = [prompt.with_answer(said) for prompt in prompts()[:6]]
    for _ in range(2):  # the second time, slots hold the prompts and the answer
        beside = Sequence(Prompt((text(30, seed=60),)), GenerationOptions(max_tokens=20))
        scored = [Sequence(prompt, GenerationOptions(max_tokens=1, logprobs=1)) for prompt in asked]
        found: dict[Sequence, list[Any]] = {sequence: [] for sequence in (*scored, beside)}
        for sequence in found:
            scheduler.add(sequence)
        while not scheduler.idle:
            for step in scheduler.step():
                found[step.sequence].append(step.result)
        assert [one.token for one in found[beside]] == generated(llm, beside.prompt, 20)
        for sequence in scored:
            with torch.inference_mode():
                logits = llm(inputs_embeds=embed(llm, sequence.prompt)).logits[0]
            expected = logits[-8:-1].log_softmax(-1)
            results = found[sequence]
            assert [one.token for one in results] == list(said)
            values = torch.tensor([one.logprob for one in results])
            # llama.cpp holds keys and values in half precision.
            torch.testing.assert_close(values, expected[range(7), list(said)], atol=0.05, rtol=0)
            assert [one.top[0][0] for one in results] == expected.argmax(-1).tolist()
    model.close()


def check_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_wanted_and_unwanted_tokens(model: Model, llm: LlamaForCausalLM) -> None:
    """``logit_bias``, ``min_tokens``, ``stop_token_ids`` and ``ignore_eos``, greedy and sampled."""
    prompt = prompts()[0]
    said = generated(llm, prompt, 12)
    end, other = said[3], next(token for token in range(9, 99) if token not in said)
    first = said.index(end)
    scheduler = Scheduler(model, (end,), max_running=4)

    def got(temperature: float = 0.0, **options: Any) -> list[int]:
        wanted = GenerationOptions(max_tokens=12, temperature=temperature, seed=1, **options)
        sequence = Sequence(prompt, wanted)
        scheduler.add(sequence)
        while not scheduler.idle:
            for step in scheduler.step():
                if isinstance(step.result, Exception):
                    raise step.result
        return sequence.tokens

    assert got() == said[: first + 1]
    assert got(ignore_eos=True) == said
    assert got(ignore_eos=True, stop_token_ids=(said[0],)) == said[:1]
    assert got(stop_token_ids=(other,)) == said[: first + 1]
    for temperature in (0.0, 1.5):
        assert set(got(temperature, logit_bias={other: 100})) == {other}
        assert other not in got(temperature, logit_bias={other: -100})
        assert end not in got(temperature, min_tokens=12)[:-1]
        assert len(got(temperature, min_tokens=12)) == 12
    assert end not in got(min_tokens=12, presence_penalty=0.1)[:-1]
    assert got(ignore_eos=True) == said, "nothing of a bias is left"
    with pytest.raises(RequestError, match="logit_bias: 99999999 is none of the model's"):
        got(logit_bias={99999999: 1})


def test_a_copy_leaves_its_source(model: Model) -> None:
    ids, ours, theirs = text(30), text(5, seed=1), text(6, seed=2)
    feed(model, 0, 0, ids)
    model.copy(0, 2, 20)
    copied = feed(model, 2, 20, theirs)
    check_close(copied, feed(model, 3, 0, ids[:20] + theirs))
    check_close(feed(model, 0, 30, ours), feed(model, 4, 0, ids + ours))


def test_a_truncated_slot_is_used_again(model: Model) -> None:
    ids, other = text(30), text(25, seed=1)
    feed(model, 1, 0, ids)
    model.truncate(1, 10)
    again = feed(model, 1, 10, other)
    check_close(again, feed(model, 2, 0, ids[:10] + other))
    model.truncate(1, 0)
    check_close(feed(model, 1, 0, other), feed(model, 3, 0, other))


def test_a_seed_repeats_an_answer(model: Model) -> None:
    prompt = prompts()[3]
    (alone,) = answer(model, [prompt], SAMPLED)
    assert answer(model, prompts()[3:6], SAMPLED)[0] == alone
    seeds = [4, None]
    if not isinstance(model, TransformersModel):  # torch reads 32 bits of a seed on a CPU
        seeds.append(3 + 2**40)
    others = [SAMPLED.model_copy(update={"seed": seed}) for seed in seeds]
    assert all(answer(model, [prompt], options) != [alone] for options in others)
    for seed in (0, 2**32 - 1, 2**32, 2**63 - 1):
        options = SAMPLED.model_copy(update={"seed": seed})
        assert answer(model, [prompt], options) == answer(model, [prompt], options)


def test_the_mean_log_probability_is_the_models_own(opened: Open, llm: LlamaForCausalLM) -> None:
    """Penalties and temperature change which tokens are sampled, and not their probabilities."""
    prompt = prompts()[5]
    options = GenerationOptions(max_tokens=9, repetition_penalty=1.5, temperature=1.5, seed=3)

    async def deltas() -> list[Delta]:
        return [delta async for delta in engine.generate(prompt, options)]

    with closing(BatchingEngine(opened(), byte_level(), (), name="tiny")) as engine:
        found = run(deltas())
    tokens = [token for delta in found for token in delta.token_ids]
    assert len(tokens) == 9
    answered = Prompt((*prompt.segments, tuple(tokens)))
    with torch.inference_mode():
        logits = llm(inputs_embeds=embed(llm, answered)).logits[0, len(prompt) - 1 : -1]
    each = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])
    assert found[-1].avg_logprob == pytest.approx(float(each[1:].mean()), abs=1e-3)
    assert all(delta.logprobs == () for delta in found)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_only_the_likeliest(model: Model, said: list[list[int]], narrow: dict[str, Any]) -> None:
    assert answer(model, prompts(), SAMPLED.model_copy(update=narrow)) == said
