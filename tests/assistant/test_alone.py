"""Models whose requests do not batch answer as their own library's ``generate`` does.

Their own processor puts text and media together, and their own ``generate`` computes the answer.
"""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.batching import BatchingEngine
from mico_chat.errors import RequestError
from mico_chat.messages import Message
from tests.assistant.test_open_models import N_TOKENS, QUESTION, loaded, message, tokens_of
from tests.support import replicas
from tests.support.replicas import medium as part_of
from tests.support.replicas import user
from tests.support.replicas.equal import Answered
from tests.support.tiny import run

SEEN = {"role": "assistant", "content": [{"type": "text", "text": "I see."}]}
ONE_AT_A_TIME = ("instructblip",)  # the library itself fails with two pictures, and without one
Part = dict[str, Any]
# Processors of MiniCPM-V and PaliGemma call NumPy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(scope="module", params=replicas.ALONE)
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    return replicas.build(name, tmp_path_factory.mktemp("alone") / name)


@pytest.fixture(scope="module")
def assistant(replica: Path) -> Iterator[Assistant]:
    with loaded(replica) as assistant:
        yield assistant


def of_sizes(kind: str) -> list[Part]:
    """Two media of a kind, of different sizes."""
    return [part_of(kind, 1), part_of(kind, 2, other=True)]


def expected(replica: Path, *conversation: Part) -> list[int]:
    return replicas.reference(replica, list(conversation), N_TOKENS)


def test_media_of_different_sizes_together(replica: Path, assistant: Assistant) -> None:
    kinds = replicas.reads(replica.name)
    assert assistant.adapter.input_modalities == kinds
    for kind in kinds:
        media = of_sizes(kind)
        for shown in (media[:1], media[1:], media):
            if len(shown) > 1 and replica.name in ONE_AT_A_TIME:
                with pytest.raises(RequestError, match=r"cannot answer about these media together"):
                    run(tokens_of(assistant, message(shown)))
                continue
            found = run(tokens_of(assistant, message(shown)))[0]
            assert found == expected(replica, user(*shown, QUESTION)), (kind, len(shown))


def test_a_second_turn_with_another_picture(replica: Path, assistant: Assistant) -> None:
    first, second = of_sizes("image")
    turns = [message([first], "Look."), Message.assistant("I see."), message([second])]
    if replica.name in ONE_AT_A_TIME:
        with pytest.raises(RequestError, match=r"cannot answer about these media together"):
            run(tokens_of(assistant, *turns))
        return
    right = expected(replica, user(first, "Look."), SEEN, user(second, QUESTION))
    assert run(tokens_of(assistant, *turns))[0] == right
    estimate = run(assistant.estimate(Ask(turns, GenerationOptions())))
    assert estimate.prompt_tokens == len(run(assistant.prepare(Ask(turns)))[0])


def test_typed_markup_stays_text(replica: Path, assistant: Assistant) -> None:
    tokenizer = assistant.adapter.tokenizer
    special = {t.content: n for n, t in tokenizer.added_tokens_decoder.items()}
    text = "".join(special) + "<image>"
    prompts = [
        run(assistant.prepare(Ask([message([part_of("image", 1)], t)])))[0] for t in ("x", text)
    ]
    counts = [[t for t in p.tokens(0, len(p))[0] if t in special.values()] for p in prompts]
    assert counts[0] == counts[1]
    assert prompts[0].media_tokens == prompts[1].media_tokens


def test_answers_of_several_grow_in_turns(replica: Path, assistant: Assistant) -> None:
    """The fourth client's first word comes before the first client's last one."""
    shown = [[part_of("image", seed, other=seed > 1)] for seed in range(4)]
    order: list[int] = []

    async def ask(number: int, prompt: Prompt) -> list[int]:
        deltas, options = [], GenerationOptions(max_tokens=N_TOKENS, logprobs=3)
        async for delta in assistant.engine.generate(prompt, options):
            order.append(number)
            deltas.append(delta)
        return Answered(deltas)

    async def all_four() -> list[list[int]]:
        asked = [Ask([message(shown[n], QUESTION * 8)], tenant=f"tenant {n % 2}") for n in range(4)]
        prompts = [(await assistant.prepare(one))[0] for one in asked]
        all_asked = threading.Event()

        def first_action() -> None:
            all_asked.wait()

        assert isinstance(assistant.engine, BatchingEngine)
        assistant.engine._post(first_action)
        answers = [asyncio.ensure_future(ask(n, prompts[n])) for n in range(4)]
        await asyncio.sleep(0)
        all_asked.set()
        return await asyncio.gather(*answers)

    found = run(all_four())
    assert found == [expected(replica, user(*media, QUESTION * 8)) for media in shown]
    last = {number: len(order) - 1 - order[::-1].index(number) for number in range(4)}
    assert max(order.index(number) for number in range(4)) < min(last.values())


def test_what_it_says_of_itself(replica: Path, assistant: Assistant) -> None:
    assert any("run alone, without batching: " in note for note in assistant.notes)
    assert max(map(len, assistant.notes)) < 400
    audio = [note for note in assistant.notes if "cannot be shown the kind audio here" in note]
    assert bool(audio) == (replica.name == "gemma4"), "its template shows no sounds"
