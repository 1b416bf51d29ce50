"""Taught names: said at once, of what they were taught by, to whom taught them and nobody else."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mico_chat.adapters.mico import LEAST, MicoAdapter
from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import MediaError, RequestError
from mico_chat.media import MediaFile, Medium
from mico_chat.media.taught import TaughtName
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.mini.taught import Taught, root_mean, taught_ids
from mico_chat.model.processing import MicoChatProcessor
from tests.assistant.test_assistant import tiny_assistant
from tests.support.tiny import chat_model, clip, in_loop, picture, processor_for, shown, sound


@pytest.fixture
def assistant(
    chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> Iterator[Assistant]:
    with closing(tiny_assistant(chat, processor)) as assistant:
        yield assistant


def say(assistant: Assistant, **names: Sequence[TaughtName]) -> None:
    """Each tenant, an argument, has these names."""

    async def of(tenant: str, space: str) -> Sequence[TaughtName]:
        assert space == assistant.space
        return names.get(tenant, ())

    assistant.say(of)


async def named(assistant: Assistant, medium: Medium, tenant: str = "") -> torch.Tensor:
    """The vectors (2, L) of the medium's name: its last context tokens."""
    (found,) = await assistant.encoder.encode([medium], tenant=tenant)
    return found.encoded.tokens[-2:]


def words(chat: MicoChatForConditionalGeneration, one: TaughtName) -> torch.Tensor:
    assert chat.concepts is not None
    vectors = chat.get_input_embeddings()(torch.tensor(one.ids)) * chat.concepts.gain[0]
    found: torch.Tensor = vectors.detach().float()
    return found


@pytest.mark.parametrize("medium", [picture(), sound()], ids=["picture", "sound"])
def test_a_name_is_said_of_what_it_was_taught_by_and_forgotten(
    assistant: Assistant, chat: MicoChatForConditionalGeneration, medium: Medium
) -> None:
    async def works() -> None:
        learned = await named(assistant, medium)
        taught = await assistant.taught("Z", [medium, medium])
        assert len(taught.examples) == 2
        say(assistant, anna=[taught])
        torch.testing.assert_close(await named(assistant, medium, "anna"), words(chat, taught))
        torch.testing.assert_close(await named(assistant, medium, "ben"), learned)
        say(assistant)
        torch.testing.assert_close(await named(assistant, medium, "anna"), learned)

    asyncio.run(works())


@in_loop
async def test_two_owners_in_one_batch_and_the_cache_have_each_their_own(
    assistant: Assistant, chat: MicoChatForConditionalGeneration
) -> None:
    before = await named(assistant, picture(), "anna")  # is in the cache when the name is taught
    ones = [await assistant.taught(name, [picture()]) for name in "ZQ"]
    say(assistant, anna=ones[:1], ben=ones[1:])
    adapter = assistant.adapter
    prepared = adapter.prepare(picture(), ())
    batch = [replace(prepared, taught=taught) for taught in ((ones[0],), (ones[1],), ())]
    tokens = [block.tokens[-2:] for block in adapter.encode(batch)]
    for found, right in zip(tokens, (*(words(chat, one) for one in ones), before), strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    both = asyncio.gather(*(named(assistant, picture(), tenant) for tenant in ("anna", "ben")))
    for found, one in zip(await both, ones, strict=True):
        torch.testing.assert_close(found, words(chat, one))
    # A second turn shows the same picture again, from the cache, and still by its taught name.
    (again,) = await assistant.encoder.encode([picture()], tenant="anna")
    assert again.report.cached
    torch.testing.assert_close(again.encoded.tokens[-2:], words(chat, ones[0]))
    estimate = await assistant.encoder.measure([picture()], tenant="anna")
    assert estimate[0].report.cached


@in_loop
async def test_what_cannot_be_taught_is_refused_in_words(assistant: Assistant) -> None:
    wrong: list[tuple[str, list[Any], str]] = [
        ("Bella", [picture()], "name: 'Bella' has 6 tokens, and 2 fit"),
        ("Z", [], "0 examples, but a request takes 1 to 5"),
        ("Z", [picture(seed) for seed in range(6)], "6 examples"),
        ("Z", [picture(), sound()], "sounds and pictures, but a name is taught by pictures alone"),
        ("Z", [clip()], "videos, but a name"),
        ("Z", [MediaFile("image", b"broken", "bad.png")], "bad.png: not a image"),
    ]
    for name, media, reason in wrong:
        with pytest.raises((RequestError, MediaError)) as refused:
            await assistant.taught(name, media)
        assert reason in str(refused.value)
    with pytest.raises(RequestError, match=r"expected \d+ numbers from -1 to 1"):
        await assistant.retaught("Z", "image", np.full((1, 7), 0.1, np.float32))
    with pytest.raises(RequestError, match="got"):
        await assistant.retaught("Z", "video", np.full((1, 7), 0.1, np.float32))


def test_a_model_without_names_cannot_be_taught() -> None:
    config = MicoChatConfig.tiny(concepts=False)
    with closing(tiny_assistant(chat_model(config), processor_for(config))) as assistant:
        assert assistant.space is None
        with pytest.raises(RequestError, match="model: this model cannot be taught"):
            asyncio.run(assistant.taught("Z", [picture()]))
        say(assistant, anna=())
        asyncio.run(assistant.encoder.encode([picture()], tenant="anna"))


def test_text_in_a_name_is_never_markup_and_a_space_is_that_of_the_weights(
    processor: MicoChatProcessor,
) -> None:
    other = MicoChatConfig.tiny()
    assert other.concept_config is not None
    other.concept_config.sound_hidden += 1
    ids = processor.words("<|im_end|>")
    assert len(ids) == len("<|im_end|>")
    assert processor.tokenizer.eos_token_id not in ids
    spaces = []
    for dtype in (torch.bfloat16, torch.float32):  # as the same file is loaded in either
        torch.nn.Module.to(model := chat_model(), torch.bfloat16)
        torch.nn.Module.to(model, dtype)
        spaces.append(MicoAdapter(model, processor).space)
    assert spaces[0] == spaces[1] != MicoAdapter(chat_model(other), processor).space


def test_the_nearest_name_is_said_and_none_beyond_the_distance() -> None:
    cells = torch.rand(3, 4, 16, generator=torch.Generator().manual_seed(0))
    features = root_mean(cells)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    other = torch.nn.functional.normalize(torch.eye(16)[:1], dim=-1)
    names = Taught(torch.cat([features[:1], other]), torch.tensor([0.99, 0.0]), torch.eye(2).long())
    only = Taught(other, torch.tensor([0.999]), torch.tensor([[5, 6]]))
    found = taught_ids(features, [names, only, None], 2)
    assert found.tolist() == [[0, 1], [-1, -1], [-1, -1]]
    assert LEAST.keys() == {"image", "audio"}


def test_a_long_name_goes_on_in_the_exact_names_places() -> None:
    config = MicoChatConfig.tiny()
    assert config.concept_config is not None
    config.concept_config.plain_names = ["a"] * 5
    concepts = chat_model(config).concepts
    assert concepts is not None
    assert concepts.places == 4
    feature, table = torch.eye(8)[:1], torch.nn.Embedding(10, 6)
    for ids, said in (([3, 4, -1, -1], [3, 4, 3, 4]), ([3, 4, 5, -1], [3, 4, 5, None])):
        own = Taught(feature, torch.tensor([0.5]), torch.tensor([ids]))
        tokens = concepts.with_taught(torch.ones(1, 4, 6), feature, [own], table)
        for row, token in zip(tokens[0], said, strict=True):
            right = 0 if token is None else table.weight[token] * concepts.gain[0]
            torch.testing.assert_close(row, right + torch.zeros(6))
        concepts.sure_above = [0.5, 0.5]
        with_second = concepts.with_taught(torch.ones(1, 6, 6), feature, [own], table)[0]
        torch.testing.assert_close(with_second, torch.cat([tokens[0], torch.zeros(2, 6)]))
        concepts.sure_above = None
    kept = concepts.with_taught(torch.ones(1, 4, 6), feature, [None], table)
    assert (kept == 1).all()


def test_the_question_of_a_conversation_brings_the_name(assistant: Assistant) -> None:
    """Explaining an answer encodes its media as the answer did."""

    async def works() -> None:
        ask = Ask([shown(picture(), "?")], tenant="anna")
        before, _ = await assistant.prepare(ask)
        say(assistant, anna=[await assistant.taught("Z", [picture()])])
        after, _ = await assistant.prepare(ask)
        assert before.identities != after.identities  # no computed token of before is used again

    asyncio.run(works())
