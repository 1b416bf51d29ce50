"""The real vLLM with the mini: the answers of transformers, many at once, and how it ends."""

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import pytest

from mico_chat.ask import Ask
from mico_chat.assistant import Answer, Assistant
from mico_chat.checkpoints.folders import MODELS
from mico_chat.checkpoints.pretrained import plain_llm
from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.errors import ConfigError, ModelError, RequestError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.messages import Message
from mico_chat.wire import TokenLogprob
from tests.server.support import sent
from tests.support.vllm_here import ARGUMENTS, BLOCK, needs_vllm

pytestmark = [*needs_vllm, pytest.mark.base_llm]

NEAR_TIE = 0.01
"""Equal log-probabilities may differ by this in float32, when sums have another order."""

IN_VLLM = EngineOptions("vllm", dtype="float32", arguments=ARGUMENTS)

RED, BLUE = (MediaFile("image", sent.png(sent.square(c))) for c in (sent.RED, sent.BLUE))
SOUND = MediaFile("audio", sent.wav())
CLIP = MediaFile("video", sent.mp4())
PARIS = [Message.user("What is the capital of France?")]
STORY = [Message.user("Tell me a long story about a dog.")]
MIXED = [
    PARIS,
    [Message.user(RED, "What colour is it?")],
    STORY,
    [Message.user(SOUND, "What do you hear?")],
    [Message.user(CLIP, RED, "What moves? And what is in the picture?")],
    [Message.user(BLUE, "What is it?"), Message.assistant("A square."), Message.user("Of what?")],
]


@pytest.fixture(scope="module")
def decoder() -> Iterator[MediaDecoder]:
    with MediaDecoder() as one:
        yield one


@pytest.fixture(scope="module")
def model(base_llm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mini"
    shutil.copytree(MODELS / "mini", folder, ignore=shutil.ignore_patterns("lora", "pretraining"))
    config = json.loads((folder / "config.json").read_text())
    config["base_llm"] = str(plain_llm("mini"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def assistant(model: Path, decoder: MediaDecoder) -> Iterator[Assistant]:
    with closing(load_assistant(model, decoder, IN_VLLM)) as a:
        assert multiprocessing.active_children()
        yield a
    deadline = time.monotonic() + 10
    while (left := _cores()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert a.engine.failure is None
    with pytest.raises(ModelError, match="closed"):
        ask(a, PARIS)


@pytest.fixture(scope="module")
def reference(model: Path, decoder: MediaDecoder) -> Iterator[Assistant]:
    with closing(
        load_assistant(model, decoder, EngineOptions("transformers", dtype="float32"))
    ) as one:
        yield one


def _cores() -> list[Any]:
    return [p for p in multiprocessing.active_children() if "EngineCore" in p.name]


def ask(assistant: Assistant, messages: Sequence[Message], **options: Any) -> Answer:
    (answer,) = assistant.answer_all([messages], GenerationOptions(**{"max_tokens": 24, **options}))
    return answer


def said(answer: Answer) -> tuple[TokenLogprob, ...]:
    return answer.choices[0].logprobs


def check_agree(one: Sequence[TokenLogprob], other: Sequence[TokenLogprob]) -> None:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        assert abs(a.logprob - b.logprob) < NEAR_TIE or a.token_id != b.token_id, (place, a, b)
        if a.token_id != b.token_id:
            for asked, wanted in ((a, b), (b, a)):
                likely = {top.token_id: top.logprob for top in asked.top}
                assert asked.logprob - likely[wanted.token_id] < NEAR_TIE, (place, a, b)
            return


def test_a_mixed_batch_is_answered_as_by_transformers(
    assistant: Assistant, reference: Assistant
) -> None:
    options = GenerationOptions(max_tokens=40, logprobs=5)
    ours, theirs = (one.answer_all(MIXED, options) for one in (assistant, reference))
    for a, b in zip(ours, theirs, strict=True):
        check_agree(said(a), said(b))
        assert (a.usage.prompt_tokens, a.usage.media_tokens) == (
            *(b.usage.prompt_tokens, b.usage.media_tokens),
        )
    assert "Paris" in ours[0].text
    assert "red" in ours[1].text.lower()
    assert ours[0].choices[0].finish_reason == "stop"
    # The end token counts, but has no log-probability.
    assert ours[0].usage.completion_tokens == len(said(ours[0])) + 1


def test_many_at_once_are_answered_as_alone(assistant: Assistant) -> None:
    batch = [[Message.user(f"What is {n} and {n}?")] for n in range(8)]
    batch += [
        [Message.user(part, f"What is this, number {n}?")] for n in range(4) for part in (RED, BLUE)
    ]
    options = GenerationOptions(max_tokens=16, logprobs=5)
    together = assistant.answer_all(batch, options)
    for messages, answer in zip(batch, together, strict=True):
        check_agree(said(ask(assistant, messages, max_tokens=16, logprobs=5)), said(answer))


def test_the_next_question_reuses_the_start(assistant: Assistant) -> None:
    def cached(messages: Sequence[Message], tenant: str) -> tuple[int, int]:
        async def run() -> Answer:
            return await assistant.answer(Ask(messages, GenerationOptions(max_tokens=4), tenant))

        usage = asyncio.run(run()).usage
        return usage.cached_tokens, usage.prompt_tokens

    first = [Message.user(RED, BLUE, "What are these two?")]
    assert cached(first, "one")[0] == 0
    again, length = cached(first, "one")
    assert length - BLOCK <= again < length
    assert cached(first, "other")[0] == 0
    longer = [*first, Message.assistant("Squares."), Message.user("Which colours?")]
    assert cached(longer, "one")[0] >= length - 2 * BLOCK
    # With another picture in that place, only the tokens before it are reused.
    _, before = cached([Message.user("?")], "none")
    assert cached([Message.user(BLUE, BLUE, "What are these two?")], "one")[0] <= before


def test_logprobs(assistant: Assistant) -> None:
    tokens = said(ask(assistant, PARIS, logprobs=3))
    assert "".join(token.token for token in tokens) == ask(assistant, PARIS).text
    for token in tokens:
        assert len(token.top) == 3
        assert token.logprob == token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob
    assert all(token.top == () for token in said(ask(assistant, PARIS, logprobs=0)))
    sampled = said(ask(assistant, STORY, logprobs=2, temperature=2.0, seed=3))
    assert any(token.token_id not in {top.token_id for top in token.top} for token in sampled)
    assert {len(token.top) for token in sampled} == {2}


def test_confidence_is_that_of_transformers(assistant: Assistant, reference: Assistant) -> None:
    for messages in MIXED[:2]:
        ours, theirs = (ask(a, messages).choices[0].confidence for a in (assistant, reference))
        assert ours == (None if messages is PARIS else pytest.approx(theirs, rel=NEAR_TIE))


def test_n_answers_by_seed(assistant: Assistant) -> None:
    options = {"temperature": 1.0, "max_tokens": 12}
    texts = [choice.text for choice in ask(assistant, STORY, n=3, seed=5, **options).choices]
    assert len(set(texts)) > 1
    alone = [ask(assistant, STORY, seed=seed, **options).text for seed in (5, 6, 7)]
    assert texts == alone
    last = 2**63 - 1
    assert len(ask(assistant, STORY, n=2, seed=last, **options).choices) == 2


def test_stop_texts(assistant: Assistant) -> None:
    whole = ask(assistant, PARIS).text
    answer = ask(assistant, PARIS, stop=(" is", "never"))
    assert answer.text == whole.split(" is")[0]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < ask(assistant, PARIS).usage.completion_tokens
    both = ask(assistant, STORY, n=4, temperature=1.0, seed=1, stop=(" the",), max_tokens=30)
    assert all(" the" not in choice.text for choice in both.choices)


def test_penalties_look_at_the_answer_alone(assistant: Assistant, reference: Assistant) -> None:
    for messages in (PARIS, MIXED[1]):
        one, other = (ask(a, messages, repetition_penalty=5.0) for a in (assistant, reference))
        assert one.text == other.text == ask(assistant, messages).text
    story = ask(assistant, STORY, repetition_penalty=10.0, logprobs=0, max_tokens=40)
    ids = [token.token_id for token in said(story)]
    assert len(set(ids)) == len(ids)
    present = ask(assistant, STORY, presence_penalty=2.0, frequency_penalty=2.0, max_tokens=40)
    assert present.text != ask(assistant, STORY, max_tokens=40).text


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}


def test_a_json_schema(assistant: Assistant) -> None:
    answer = ask(assistant, PARIS, json_schema=SCHEMA, max_tokens=60)
    found = json.loads(answer.text)
    assert found["city"].startswith("Paris")  # the words are the mini's own
    assert isinstance(found["large"], bool)
    assert answer.choices[0].finish_reason == "stop"
    # Without a word on other properties there are none, as with llama.cpp.
    free = {name: value for name, value in SCHEMA.items() if name != "additionalProperties"}
    assert ask(assistant, PARIS, json_schema=free, max_tokens=60).text == answer.text
    shown = ask(assistant, MIXED[1], json_schema={"enum": ["red", "blue"]})
    assert shown.text == '"red"'


@pytest.mark.parametrize(
    "schema", [{"type": "strin"}, {"type": "string", "pattern": "("}, {"$ref": "#/nowhere"}]
)
def test_an_invalid_schema(assistant: Assistant, schema: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^json_schema: "):
        ask(assistant, PARIS, json_schema=schema)
    assert "Paris" in ask(assistant, PARIS).text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a?){200}"},
        {"type": "string", "pattern": "((a{100}){100}){100}"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
        {"type": "string", "maxLength": 1_000_000},
    ],
)
def test_a_large_schema_delays_nobody(assistant: Assistant, schema: dict[str, Any]) -> None:
    started = time.monotonic()
    options = GenerationOptions(json_schema=schema, max_tokens=4)
    (answer,) = assistant.try_all([PARIS], options)
    assert isinstance(answer, Answer) or str(answer).startswith("json_schema: ")
    assert time.monotonic() - started < 10


def test_the_longest_request(assistant: Assistant) -> None:
    assert assistant.engine.max_position == ARGUMENTS["max_model_len"]


@pytest.mark.parametrize(
    ("given", "quantization", "said"),
    [
        ({"max_model_length": 5}, None, "'max_model_length'; did you mean 'max_model_len'"),
        ({"model": "other"}, None, "'model' of the vllm engine cannot be set: --model sets it"),
        ({}, "Q8_0", "quantization 'Q8_0': the vllm engine lacks it; choose one of .*awq"),
    ],
)
def test_arguments_that_are_refused(
    given: dict[str, Any], quantization: str | None, said: str
) -> None:
    from mico_chat.engine.vllm_start import engine_arguments

    with pytest.raises(ConfigError, match=said):
        engine_arguments("anywhere", given, quantization=quantization)


def test_arguments_that_do_not_go_together(model: Path, decoder: MediaDecoder) -> None:
    arguments = {**ARGUMENTS, "max_model_len": "long"}
    with pytest.raises(ConfigError, match="vLLM refuses its options: "):
        load_assistant(model, decoder, EngineOptions("vllm", arguments=arguments))


def test_a_closed_stream_leaves_nothing_behind(assistant: Assistant) -> None:
    engine: Any = assistant.engine

    async def begun(number: int) -> AsyncGenerator[Delta, None]:
        part = (RED, BLUE, SOUND)[number % 3]
        messages = [Message.user(part, f"Tell me a story, number {number}.")]
        prompt, _ = await assistant.prepare(
            Ask(messages if number % 2 else STORY, tenant=str(number))
        )
        options = GenerationOptions(max_tokens=1500, temperature=1.0, seed=number, n=1 + number % 2)
        deltas = assistant.engine.generate(prompt, options)
        await anext(deltas)
        return deltas

    async def run() -> None:
        streams = await asyncio.gather(*(begun(number) for number in range(16)))
        # Some answers have ended already.
        assert 16 <= engine.stats().running <= 24
        assert engine.stats().cells_used >= 16 * BLOCK
        for stream in streams:
            await stream.aclose()
        async with asyncio.timeout(10):
            while engine.stats().running or engine.stats().waiting:
                await asyncio.sleep(0.01)
        assert engine._llm.get_num_unfinished_requests() == 0
        # The next steps report the cells that are still held.
        held: list[float] = []
        prompt, _ = await assistant.prepare(Ask(PARIS))
        async with aclosing(engine.generate(prompt, GenerationOptions(max_tokens=8))) as deltas:
            async for _ in deltas:
                stats = engine.stats()
                assert stats.running <= 1
                held.append(max(gauge.usage for gauge in engine._gauges.values()) * stats.cells)
        assert 0 < max(held) < 4 * BLOCK

    before = engine.stats().completion_tokens
    assert engine.stats().running == 0
    asyncio.run(run())
    assert before < engine.stats().completion_tokens < before + 24 * 200


def test_a_loop_that_is_closed_is_no_harm(assistant: Assistant) -> None:
    async def leave() -> AsyncGenerator[Delta, None]:
        prompt, _ = await assistant.prepare(Ask(STORY))
        deltas = assistant.engine.generate(prompt, GenerationOptions(max_tokens=1500))
        await anext(deltas)
        return deltas

    loop = asyncio.new_event_loop()
    left = loop.run_until_complete(leave())
    loop.close()
    deadline = time.monotonic() + 10
    while assistant.engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert assistant.engine.stats().running == 0
    del left
    assert "Paris" in ask(assistant, PARIS).text


def test_a_killed_engine_fails_all_and_hangs_nobody(model: Path, decoder: MediaDecoder) -> None:
    others = set(multiprocessing.active_children())
    with closing(load_assistant(model, decoder, IN_VLLM)) as assistant:

        async def run() -> list[Any]:
            tasks = [
                asyncio.create_task(
                    assistant.answer(Ask(STORY, GenerationOptions(max_tokens=1900)))
                )
                for _ in range(4)
            ]
            async with asyncio.timeout(60):
                while assistant.engine.stats().completion_tokens < 8:
                    await asyncio.sleep(0.01)
            assert assistant.engine.failure is None
            (core,) = set(multiprocessing.active_children()) - others
            assert core.pid is not None
            os.kill(core.pid, signal.SIGKILL)
            async with asyncio.timeout(30):
                return await asyncio.gather(*tasks, return_exceptions=True)

        for error in asyncio.run(run()):
            assert isinstance(error, ModelError)
            assert "vLLM has ended" in str(error)
        assert assistant.engine.failure == "vLLM has ended; its log has the reason"
        with pytest.raises(ModelError, match="vLLM has ended"):
            ask(assistant, PARIS)
        assert assistant.engine.stats().running == 0
