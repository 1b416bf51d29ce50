"""Answers of a tiny model: caches, batches and sharing change no answer."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mico_chat.adapters.mico import MicoAdapter, mico_of
from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant, decode_media
from mico_chat.checkpoints.lora import Lora
from mico_chat.checkpoints.marks import Marks
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Delta, Engine, GenerationOptions, Prompt
from mico_chat.engines.transformers_models import torch_engine
from mico_chat.errors import ContextLengthError, MediaError, MicoError, ModelError, RequestError
from mico_chat.load import EngineOptions
from mico_chat.media import MediaFile
from mico_chat.media.kinds import KINDS
from mico_chat.media.medium import Audio, Depth, MediaReport
from mico_chat.messages import Message
from mico_chat.model.config import MicoConfig
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.model.splice import splice
from mico_chat.similarity import Similarity
from mico_chat.wire import Usage
from tests.support.fakes import FakeDecoder, FakeEngine, medium
from tests.support.tiny import chat_model, clip, letters, one_of_each, picture, run, shown

OPTIONS = GenerationOptions(max_tokens=8)
TEXT = [Message.user("hi")]
SHOWN = [shown(picture(), "a longer question")]
TURNS = [
    Message.system("Be brief."),
    shown("This", picture(1), "and", clip(2, track=True), "?"),
    Message.assistant("Two things."),
    shown(*one_of_each(), "And these?"),
]


def sharp_chat() -> MicoChatForConditionalGeneration:
    """A tiny model whose weights are so large that greedy choices are no near ties."""
    model = chat_model()
    with torch.no_grad():
        for name, weight in model.llm.named_parameters():
            if "norm" not in name:
                weight.mul_(15)
    return model


def tiny_assistant(
    chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor, **parts: Any
) -> Assistant:
    engine = torch_engine(chat.llm, processor.tokenizer, EngineOptions(max_running=4))
    decoder = parts.pop("decoder", FakeDecoder())
    encoder = MediaEncoder(MicoAdapter(chat, processor), decoder, **parts)
    return Assistant(engine, encoder, name="tiny")


@pytest.fixture(scope="module")
def chat() -> MicoChatForConditionalGeneration:
    return sharp_chat()


@pytest.fixture
def assistant(
    chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> Iterator[Assistant]:
    with closing(tiny_assistant(chat, processor)) as assistant:
        yield assistant


class StubEngine(FakeEngine):
    """Yields its deltas, then waits without end and sets ``waiting``; ``stopped`` is set when it is
    closed."""

    def __init__(self, *deltas: Delta) -> None:
        self.deltas = deltas
        self.waiting, self.stopped = threading.Event(), threading.Event()

    async def generate(
        self, prompt: Prompt, options: GenerationOptions
    ) -> AsyncGenerator[Delta, None]:
        try:
            for delta in self.deltas:
                yield delta
            self.waiting.set()
            await asyncio.Event().wait()
        finally:
            self.stopped.set()


def with_engine(assistant: Assistant, engine: Engine) -> Assistant:
    return Assistant(engine, assistant.encoder, name="stub")


def seen(reports: Sequence[MediaReport]) -> list[MediaReport]:
    undone = {"cached": None, "encode_ms": None}
    return [report.model_copy(update=undone) for report in reports]


def answer(
    assistant: Assistant, messages: Sequence[Message], options: GenerationOptions = OPTIONS
) -> Answer:
    return run(assistant.answer(Ask(messages, options)))


@pytest.mark.parametrize("messages", [TEXT, SHOWN, TURNS])
def test_a_prompt_is_what_the_model_embeds(
    assistant: Assistant,
    chat: MicoChatForConditionalGeneration,
    processor: MicoChatProcessor,
    messages: list[Message],
) -> None:
    prompt, reports = run(assistant.prepare(Ask(messages)))
    inputs = dict(processor([messages]))
    ids = inputs.pop("input_ids")
    del inputs["attention_mask"]
    with torch.inference_mode():
        expected = chat.embed_prompt(ids, inputs)[0]
        tokens, context = prompt.tokens(0, len(prompt))
        found = splice(chat.get_input_embeddings(), torch.tensor(tokens), context)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    placeholders = int((ids == processor.context_token_id).sum())
    assert (len(prompt), prompt.media_tokens) == (ids.shape[1], placeholders)
    kinds = [part.kind for message in messages for part in message.media]
    assert [report.kind for report in reports] == kinds


def test_a_system_prompt_of_the_models_own(assistant: Assistant) -> None:
    def tokens(*system: str) -> tuple[Any, ...]:
        messages = [*map(Message.system, system), *TEXT]
        return run(assistant.prepare(Ask(messages)))[0].identities

    without, briefly, empty = tokens(), tokens("Be brief."), tokens("")
    assistant.system_prompt = "Be brief."
    assert tokens() == briefly != without
    assert run(assistant.estimate(Ask(TEXT, OPTIONS))).prompt_tokens == len(briefly)
    assert tokens("") == empty, "the user's own replaces it"


def test_options_that_a_request_lacks_come_from_the_checkpoint(assistant: Assistant) -> None:
    assistant.defaults = GenerationOptions(max_tokens=3, repetition_penalty=5.0)
    bare = answer(assistant, TEXT, GenerationOptions())
    assert bare.usage.completion_tokens <= 3
    assert run(assistant.estimate(Ask(TEXT, GenerationOptions()))).max_tokens == 3
    asked = GenerationOptions(max_tokens=8, repetition_penalty=1.0)
    assert (
        answer(assistant, TEXT, asked).choices
        == answer(with_engine(assistant, assistant.engine), TEXT, OPTIONS).choices
    )


def test_answers_about_media_have_a_confidence_and_a_folder_without_a_mark_marks_none(
    assistant: Assistant,
) -> None:
    asked = OPTIONS.model_copy(update={"logprobs": 0, "n": 2, "temperature": 1.0, "seed": 1})
    for choice in answer(assistant, SHOWN, asked).choices:
        counted = choice.logprobs[1:]  # the first is how the answer begins
        mean = sum(token.logprob for token in counted) / len(counted)
        assert choice.confidence == pytest.approx(math.exp(mean))
        assert choice.unsure is None
    assistant.marks = Marks.read(1.0)
    (text,) = answer(assistant, TEXT).choices
    assert (text.confidence, text.unsure) == (None, None), "a chat without media is never marked"
    assert answer(assistant, SHOWN).choices[0].unsure is True


@pytest.mark.parametrize(
    ("mark", "unsure"),
    [
        *((0.3, False), (0.5, False), (0.51, True)),
        # Of a mark for each kind of answer, the first whose pattern the answer has.
        *(({"^yes": 0.9, "": 0.3}, False), ({"^a CAT": 0.9, "": 0.3}, True), ({"^yes": 1}, False)),
    ],
)
def test_an_answer_below_the_mark_is_unsure(
    assistant: Assistant, mark: float | dict[str, float], unsure: bool
) -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1, media_tokens=1)
    begun = Delta(text="A c")
    end = Delta(text="at.", avg_logprob=math.log(0.5), finish_reason="stop", usage=usage)
    stub = with_engine(assistant, StubEngine(begun, end))
    stub.marks = Marks.read(mark)

    async def last() -> Delta:
        async with aclosing(stub.stream(Ask(SHOWN, OPTIONS))) as items:
            await anext(items)  # the reports
            await anext(items)  # the first words
            delta = await anext(items)
        assert isinstance(delta, Delta)
        return delta

    assert run(last()).unsure is unsure


def test_requests_take_turns_at_the_tokenizer(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request switches the tokenizer between text and markup: threads would interfere."""
    tokenize = mico_of(assistant.adapter).processor.tokenize
    inside: list[int] = []
    most: list[int] = []

    def watched(messages: Sequence[Message], *more: Any, **named: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)  # time for another to come in, if it could
        inside.pop()
        return tokenize(messages, *more, **named)

    monkeypatch.setattr(mico_of(assistant.adapter).processor, "tokenize", watched)

    async def test() -> None:
        await asyncio.gather(*(assistant.prepare(Ask(TEXT)) for _ in range(4)))

    run(test())
    assert set(most) == {1}


@pytest.mark.parametrize(
    "messages", [[], [Message.user("a"), Message.assistant("b")], [Message.user()]]
)
def test_the_last_message_must_be_the_users(assistant: Assistant, messages: list[Message]) -> None:
    with pytest.raises(RequestError, match="last message must be the user's") as caught:
        answer(assistant, messages)
    assert caught.value.param == "messages"


def test_decoded_media_are_kept() -> None:
    given = medium("audio", "purr.ogg")
    decoder = FakeDecoder()
    message = Message.user(given, MediaFile("depth", b"x", "far.png", 0.01), "?")
    (decoded,) = decode_media([message], decoder)
    assert decoded.media[0] is given
    assert decoded.media[1].name == "far.png"
    assert decoded.text == "?"
    assert (decoder.decoded, decoder.depth_scales) == ([("depth", "far.png")], [0.01])


def no_forward(*given: Any) -> None:
    raise AssertionError("a medium was encoded")


ONE_BY_ONE = [[shown(found, "What?")] for found in (*one_of_each(), clip(1), clip(5, track=True))]


@pytest.mark.parametrize("messages", [TEXT, SHOWN, TURNS, *ONE_BY_ONE])
def test_an_estimate_is_what_the_request_costs(
    assistant: Assistant,
    chat: MicoChatForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[Message],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(chat, "context_tokens", no_forward)
        estimate = run(assistant.estimate(Ask(messages, OPTIONS)))
    prompt, reports = run(assistant.prepare(Ask(messages)))
    assert (estimate.prompt_tokens, estimate.media_tokens) == (len(prompt), prompt.media_tokens)
    assert seen(estimate.media) == seen(reports)
    assert sum(report.tokens or 0 for report in estimate.media) == estimate.media_tokens
    assert all(report.cached is False for report in estimate.media)
    after = run(assistant.estimate(Ask(messages, OPTIONS)))
    assert after == estimate.model_copy(update={"media": after.media})
    assert seen(after.media) == seen(reports)
    assert all(report.cached is True for report in after.media)


def test_an_estimate_decodes_media_that_are_not_cached(assistant: Assistant) -> None:
    whole = [
        kind for kind in KINDS if kind != "document"
    ]  # how many of its pages fit is asked first
    parts = [MediaFile(kind, b"x", name=f"a {kind}") for kind in whole]
    messages = [Message.user(*parts, "What?")]
    decoder = assistant.encoder._decoder
    assert isinstance(decoder, FakeDecoder)
    estimate = run(assistant.estimate(Ask(messages, OPTIONS, "one")))
    assert [report.name for report in estimate.media] == [part.name for part in parts]
    assert len(decoder.decoded) == len(whole)
    prompt, _ = run(assistant.prepare(Ask(messages, tenant="one")))
    assert (len(prompt), prompt.media_tokens) == (estimate.prompt_tokens, estimate.media_tokens)
    for tenant, cached, times in (("one", True, 1), ("other", False, 2), ("other", False, 2)):
        assert run(assistant.estimate(Ask(messages, OPTIONS, tenant))).media[0].cached is cached
        assert len(decoder.decoded) == times * len(whole)


def test_an_estimate_fits_as_the_request_does(assistant: Assistant) -> None:
    prompt, _ = run(assistant.prepare(Ask(SHOWN)))
    room = assistant.engine.max_position - len(prompt)
    for more, fits in ((0, True), (1, False)):
        options = GenerationOptions(max_tokens=room + more)
        estimate = run(assistant.estimate(Ask(SHOWN, options)))
        assert (estimate.fits, estimate.max_tokens) == (fits, room + more)
        assert estimate.context_length == assistant.engine.max_position
    with pytest.raises(ContextLengthError):
        answer(assistant, SHOWN, GenerationOptions(max_tokens=room + 1))


def test_an_estimate_is_refused_as_the_request_is(assistant: Assistant) -> None:
    silence, hole = Audio(np.zeros(0, np.float32)), Depth(np.full((4, 4), np.nan, np.float32))
    for message in (
        Message.assistant("So?"),
        Message.user(MediaFile("image", "nowhere.png")),
        Message.user(MediaFile("image", b"broken", name="b.png")),
        shown(silence),
        shown(hole),
    ):
        with pytest.raises(MicoError) as refused:
            run(assistant.prepare(Ask([message])))
        with pytest.raises(type(refused.value)) as caught:
            run(assistant.estimate(Ask([message], OPTIONS)))
        assert str(caught.value) == str(refused.value)


def check_equal(one: Answer, other: Answer) -> None:
    """The same choices; the last bits of probabilities depend on what is computed together."""
    for ours, theirs in zip(one.choices, other.choices, strict=True):
        assert ours.confidence == pytest.approx(theirs.confidence)
        assert ours.model_copy(update={"confidence": theirs.confidence}) == theirs


def test_together_equals_alone(assistant: Assistant) -> None:
    batch = [TEXT, SHOWN, TURNS]
    together = assistant.answer_all(batch, OPTIONS)
    for messages, found in zip(batch, together, strict=True):
        alone = answer(assistant, messages)
        check_equal(found, alone)
        assert seen(found.media) == seen(alone.media)


def test_kept_equals_computed(assistant: Assistant) -> None:
    first, second = (answer(assistant, TURNS) for _ in range(2))
    check_equal(first, second)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == second.usage.prompt_tokens - 1
    assert assistant.context_cache.hits >= len(first.media)


def test_tenants_share_the_markup_before_a_message_alone(assistant: Assistant) -> None:
    found = [
        run(assistant.answer(Ask(SHOWN, OPTIONS, tenant))) for tenant in ("one", "other", "one")
    ]
    markup = run(assistant.prepare(Ask(SHOWN, tenant="one")))[0].common
    whole = found[0].usage.prompt_tokens - 1
    assert markup < whole
    assert [answer.usage.cached_tokens for answer in found] == [0, markup, whole]
    assert [answer.media[0].cached for answer in found] == [False, False, True]


def test_a_template_that_needs_a_system_message_is_served(
    assistant: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = assistant.adapter.layout

    def strict(messages: Sequence[Message], *more: Any, **named: Any) -> Any:
        if messages[0].role != "system":
            raise RequestError("the model's chat template: a system message is missing")
        return layout(messages, *more, **named)

    monkeypatch.setattr(assistant.adapter, "layout", strict)
    asked = [Message.system("Be brief."), *TEXT]
    found = [run(assistant.answer(Ask(asked, OPTIONS, tenant))).usage for tenant in "aab"]
    assert [usage.cached_tokens for usage in found] == [0, found[0].prompt_tokens - 1, 0]


def test_tenants_share_the_system_prompt_of_the_model_alone(assistant: Assistant) -> None:
    assistant.system_prompt = "Be brief, and say when you are not sure."
    own = [Message.system(assistant.system_prompt[:9] + "s" * 40), *TEXT]

    def cached(messages: list[Message], tenant: str) -> int:
        return run(assistant.answer(Ask(messages, OPTIONS, tenant))).usage.cached_tokens

    first, second = (run(assistant.prepare(Ask(TEXT, tenant=tenant)))[0] for tenant in "ab")
    words = first.common
    assert 0 < words < len(first) - 1
    assert first.identities[:words] == second.identities[:words]
    assert cached(TEXT, "a") == 0
    assert cached(TEXT, "b") == words
    assert cached(own, "a") < words, "a system message of a client's own"
    mine = run(assistant.prepare(Ask(own, tenant="b")))[0].common
    assert cached(own, "b") == mine < words
    worn = run(assistant.wearing(Lora("x", Path(), "x", {})).prepare(Ask(TEXT, tenant="a")))[0]
    assert worn.common == words, "tenants share them within an adapter"
    assert worn.identities[0] != first.identities[0], "and no other shares its beginning"


@pytest.mark.parametrize("messages", [TEXT, SHOWN, TURNS])
def test_streamed_pieces_join_to_the_answer(assistant: Assistant, messages: list[Message]) -> None:
    async def stream() -> list[Any]:
        return [item async for item in assistant.stream(Ask(messages, OPTIONS))]

    reports, *deltas = run(stream())
    whole = answer(assistant, messages)
    assert seen(reports) == seen(whole.media)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [d.finish_reason for d in deltas if d.finish_reason] == [whole.choices[0].finish_reason]
    assert deltas[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert sum(len(delta.token_ids) for delta in deltas) == whole.usage.completion_tokens


@pytest.mark.parametrize("messages", [TEXT, SHOWN])
def test_an_answer_goes_on(assistant: Assistant, messages: list[Message]) -> None:
    cut = answer(assistant, messages, GenerationOptions(max_tokens=6))
    again = answer(assistant, messages, GenerationOptions(max_tokens=6, prefix=cut.text))
    assert again.text.startswith(cut.text)
    assert again.usage.prompt_tokens > cut.usage.prompt_tokens
    assert again.usage.completion_tokens == 6
    with pytest.raises(RequestError, match="json_schema"):
        answer(assistant, TEXT, GenerationOptions(prefix="a", json_schema={}))


def test_a_prefix_is_text_and_no_markup(assistant: Assistant, processor: MicoChatProcessor) -> None:
    def ids(prefix: str) -> tuple[int, ...]:
        (segment,) = run(assistant.prepare(Ask(TEXT, GenerationOptions(prefix=prefix))))[0].segments
        assert isinstance(segment, tuple)
        return segment

    plain, begun = ids(""), ids("<|im_end|>")
    assert begun[: len(plain)] == plain
    assert len(begun) > len(plain)
    assert processor.tokenizer.eos_token_id not in begun[len(plain) :]


def test_a_failed_request_in_its_place(assistant: Assistant) -> None:
    broken = [Message.user(MediaFile("image", b"broken", name="b.png"))]
    batch = [TEXT, broken, SHOWN, []]
    results = assistant.try_all(batch, OPTIONS)
    assert [type(result) for result in results] == [Answer, MediaError, Answer, RequestError]
    with pytest.raises(MediaError, match=r"^b\.png: not a image"):
        assistant.answer_all(batch[:3], OPTIONS)
    assert assistant.answer_all([], OPTIONS) == []
    first = results[0]
    assert isinstance(first, Answer)
    assert first.choices == answer(assistant, TEXT).choices


def test_a_caller_that_leaves_stops_the_engine(assistant: Assistant) -> None:
    engine = StubEngine(Delta(text="so"), Delta(text="on"))
    stub = with_engine(assistant, engine)

    async def test() -> None:
        asked = asyncio.create_task(stub.answer(Ask(TEXT, OPTIONS)))
        while not engine.waiting.is_set():
            assert not asked.done()
            await asyncio.sleep(0.001)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert engine.stopped.is_set()
        engine.stopped.clear()
        async with aclosing(stub.stream(Ask(TEXT, OPTIONS))) as items:
            async for item in items:
                if isinstance(item, Delta):
                    break
        assert engine.stopped.is_set()

    run(test())


def test_all_parts_are_closed_with_the_assistant(
    assistant: Assistant, chat: MicoChatForConditionalGeneration, processor: MicoChatProcessor
) -> None:
    assistant.close()
    for messages in (TEXT, SHOWN):
        with pytest.raises(ModelError, match="closed"):
            answer(assistant, messages)
    branch = MicoForPretraining(MicoConfig.tiny(), chat).train(False)
    similarity = Similarity(lambda: (branch, letters()), processor, FakeDecoder())
    engine = StubEngine()
    encoder = MediaEncoder(MicoAdapter(chat, processor), FakeDecoder())
    with closing(Assistant(engine, encoder, name="tiny", similarity=similarity)):
        assert run(similarity.embed(["hi"])).tokens == (2,)
    with pytest.raises(ModelError, match="similarity is closed"):
        run(similarity.embed(["hi"]))
