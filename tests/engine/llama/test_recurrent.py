"""GGUF models with a recurrent state: llama.cpp's own tokens, also from a copy of a state."""

from collections.abc import Iterator
from collections.abc import Sequence as Many
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.scheduler import Chunk, Sampled, Scheduler, Sequence
from mico_chat.errors import ModelError
from tests.engine.tiny_llm import feed, text
from tests.support.replicas import gguf_pairs
from tests.support.replicas.equal import NEAR

llamacpp = pytest.importorskip("mico_chat.engine.llamacpp")
pytestmark = pytest.mark.skipif(not gguf_pairs.built(), reason="llama.cpp is not installed")

N = 10


@pytest.fixture(scope="module", params=["qwen35", "lfm2_vl", "granite_hybrid", "mamba"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = getattr(gguf_pairs, request.param)(tmp_path_factory.mktemp(request.param))
    return made.model if isinstance(made, gguf_pairs.Pair) else made


def opened(file: Path, n_slots: int | None = 12) -> Any:
    return llamacpp.LlamaCppModel(file, n_slots=n_slots, n_cells=4096, threads=1, mixed=False)


@pytest.fixture
def model(file: Path) -> Iterator[Any]:
    with closing(opened(file)) as model:
        yield model


def greedy(file: Path, ids: Many[int]) -> list[int]:
    """llama.cpp's own loop, of one sequence in a context of its own."""
    from tests.support.replicas.mtmd_loop import decode

    own, said = opened(file, 1), []
    decode(own._context, ids, 0)
    for place in range(len(ids), len(ids) + N):
        logits = llama_cpp.llama_get_logits_ith(own._context, -1)
        said.append(int(np.ctypeslib.as_array(logits, (own.n_vocab,)).argmax()))
        decode(own._context, said[-1:], place)
    own.close()
    return said


def check(file: Path, scheduler: Scheduler, *prompts: Prompt) -> tuple[list[list[int]], list[int]]:
    """All are answered as llama.cpp's own loop answers each; the answers, and how many tokens of
    each prompt were there."""
    options = GenerationOptions(max_tokens=N, logprobs=4, ignore_eos=True)
    sequences = [Sequence(prompt, options) for prompt in prompts]
    found: dict[Sequence, list[Sampled]] = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        scheduler.add(sequence)
    while not scheduler.idle:
        for step in scheduler.step():
            assert isinstance(step.result, Sampled)
            found[step.sequence].append(step.result)
    for sequence, results in found.items():
        right = greedy(file, sequence.prompt.tokens(0, sequence.length)[0])
        for ours, theirs in zip(results, right, strict=True):
            if ours.token != theirs:  # behind a tie answers go apart
                assert abs(dict(ours.top)[ours.token] - dict(ours.top)[theirs]) < NEAR
                break
    return [one.tokens for one in sequences], [one.cached for one in sequences]


def counted(model: Any) -> list[int]:
    """The tokens of each step from now on."""
    found: list[int] = []
    computes = model.run

    def run(batch: Many[Chunk]) -> Any:
        found.append(sum(chunk.length for chunk in batch))
        return computes(batch)

    model.run = run
    return found


def test_tokens_are_llama_cpps_own(file: Path, model: Any) -> None:
    """Alone, together, prompts in parts beside answers that grow, and again from copies."""
    scheduler = Scheduler(model, model.ends, max_running=8)
    prompts = [Prompt((text(n, seed=n),)) for n in (1, 40, 7, 90, 300)]
    check(file, scheduler, prompts[1])
    scheduler.forget()
    assert check(file, scheduler, *prompts)[1] == [0] * 5
    assert scheduler.stats().state_bytes > model.state_bytes > 0
    scheduler._prefill.tokens = lambda *_: 13  # type: ignore[method-assign]
    assert sum(check(file, scheduler, *prompts, *prompts)[1]) > 400


def test_a_second_turn_computes_what_is_new(file: Path, model: Any) -> None:
    scheduler = Scheduler(model, model.ends, max_running=4)
    (end,) = model.ends
    system, question, bot = (*text(30), end), (*text(20, seed=1), end), text(4, seed=2)
    first = Prompt((system, question, bot))
    (said,), _ = check(file, scheduler, first)
    turn, shorter = (end, *text(9, seed=3), end, *bot), (*bot[:1], *text(5, seed=4))
    asked = [  # with the answer, whose last token was not computed; with another answer; anew
        (Prompt((*first.segments, tuple(said), turn)), len(first) + N - 1),
        (Prompt((system, question, shorter, turn)), len(system) + len(question)),
        (Prompt((system, text(20, seed=5), bot)), len(system)),
    ]
    for prompt, there in asked:
        steps = counted(model)
        assert check(file, scheduler, prompt)[1] == [there]
        assert sum(steps) == len(prompt) - there + N - 1


def test_what_a_state_cannot_do(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes back to nothing alone, no step is given up, and slots are as many as memory holds."""
    model = opened(file)
    limits = Mock(return_value=nullcontext())
    monkeypatch.setattr(model._threads, "limit", lambda *_: -1.0)
    monkeypatch.setattr(model._alarm, "after", limits)
    right = feed(model, 1, 0, text(20))
    limits.assert_called_once_with(None)
    with pytest.raises(ModelError, match="slot 1 cannot go back to 19 tokens"):
        model.truncate(1, 19)
    model.truncate(1, 0)
    assert abs(feed(model, 1, 0, text(20)) - right).max() < 1e-3
    model.close()
    for bound, slots in ((20, 20), (1, llamacpp.LEAST_SLOTS)):
        monkeypatch.setattr(llamacpp, "DEFAULT_CACHE_BYTES", bound * model.state_bytes)
        small = opened(file, None)
        assert small.n_slots == slots
        small.close()
