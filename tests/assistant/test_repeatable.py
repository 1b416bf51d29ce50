"""The same seed gives the same answer, whatever an engine computed before."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing, closing
from pathlib import Path

import numpy as np
import pytest
import torch

from mico_chat import __version__
from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant
from mico_chat.engine.base import GenerationOptions
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import Image
from mico_chat.messages import Message
from tests.support.fakes import FakeAssistant, FakeDecoder

WORDS = ["a", "fox", "runs", "over", "the", "old", "bridge", "nine", "birds", "sing", "of", "rain"]
SEEDED = GenerationOptions(max_tokens=24, temperature=1.0, seed=7, logprobs=2)


@pytest.fixture(scope="module", params=["llamacpp", "transformers"])
def assistant(request: pytest.FixtureRequest, base_llm_folder: Path) -> Iterator[Assistant]:
    # With one thread: how products and long contexts are cut depends on the number of threads.
    arguments = {"threads": 1} if request.param == "llamacpp" else {}
    options = EngineOptions(request.param, arguments=arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = load_assistant("mini", FakeDecoder(), options, similarity=False)
    torch.set_num_threads(before)
    loaded.encoder.reader = None
    with closing(loaded):
        yield loaded


def picture(rng: random.Random) -> Image:
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (60, 80, 3))
    return Image(pixels.astype(np.uint8))


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n))


def question(rng: random.Random, media: int, n: int) -> list[Message]:
    return [Message.user(*(picture(rng) for _ in range(media)), sentence(rng, n))]


async def history(assistant: Assistant, rng: random.Random, asked: list[Message]) -> None:
    """Some requests at once, of which some are given up; some begin like ``asked``."""

    async def one() -> None:
        messages = question(rng, rng.randint(0, 2), rng.randint(1, 60))
        if rng.random() < 0.5:
            messages = [*asked, Message.assistant(sentence(rng, 9)), *messages]
        options = GenerationOptions(max_tokens=rng.randint(1, 12), n=rng.choice((1, 1, 3)))
        most = rng.choice((3, 100))
        async with aclosing(assistant.stream(Ask(messages, options))) as items:
            async for _ in items:
                most -= 1
                if not most:
                    return

    assistant.encoder.cache.clear()
    for _ in range(rng.randint(1, 2)):
        await asyncio.gather(*(one() for _ in range(rng.randint(1, 3))))


def told(answer: Answer) -> list[list[tuple[str, float]]]:
    return [[(one.token, one.logprob) for one in choice.logprobs] for choice in answer.choices]


@pytest.mark.slow
@pytest.mark.parametrize(("media", "n"), [(0, 1), (2, 3)])
def test_whatever_ran_before(assistant: Assistant, media: int, n: int) -> None:
    rng = random.Random(100 * media + n)
    asked = question(rng, media, 70)
    options = SEEDED.model_copy(update={"n": n})

    async def ask() -> list[list[list[tuple[str, float]]]]:
        found = [told(await assistant.answer(Ask(asked, options)))]
        for _ in range(2):
            await history(assistant, rng, asked)
            found.append(told(await assistant.answer(Ask(asked, options))))
        return found

    first, *others = asyncio.run(ask())
    assert sum(map(len, first)) > 3
    assert all(other == first for other in others)


def test_the_fingerprint_says_where_a_seed_does_not_repeat() -> None:
    assistant = FakeAssistant()
    assert assistant.fingerprint == f"mico-{__version__}-fake"
    assistant.engine.repeats = False
    assert assistant.fingerprint == f"mico-{__version__}-fake-varies"
