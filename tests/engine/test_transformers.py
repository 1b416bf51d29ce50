"""The reference engine on a tiny random model: batches, streams, stop texts, refusals."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from mico_chat.engine import Answer, GenerationOptions
from mico_chat.engine.transformers import TransformersEngine
from mico_chat.errors import ContextLengthError, MissingFileError, RequestError
from mico_chat.messages import MediaPart, Message
from tests.fakes import CharacterProcessor, FakeDecoder, TinyChatModel, medium

SHORT = [Message.user("hi")]
SHOWN = [Message.user(MediaPart("image", b"pixels", name="cat.jpg"), "a longer question, padded")]
TURNS = [Message.user("one"), Message.assistant("two"), Message.user("three")]


@pytest.fixture
def model() -> TinyChatModel:
    return TinyChatModel()


@pytest.fixture
def engine(model: TinyChatModel) -> TransformersEngine:
    return TransformersEngine(model, CharacterProcessor(), FakeDecoder())


def drain(stream: Generator[str, None, Answer]) -> tuple[list[str], Answer]:
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_batch_equals_single(engine: TransformersEngine) -> None:
    options = GenerationOptions(max_tokens=12)
    batch = [SHORT, SHOWN, TURNS]
    assert engine.answer(batch, options) == [engine.answer([m], options)[0] for m in batch]


def test_medium_changes_answer(engine: TransformersEngine) -> None:
    options = GenerationOptions(max_tokens=12)
    text_only = [Message.user(SHOWN[0].text)]
    seen, unseen = engine.answer([SHOWN, text_only], options)
    assert seen.text != unseen.text


@pytest.mark.parametrize("messages", [SHORT, SHOWN, TURNS])
def test_stream_equals_answer(engine: TransformersEngine, messages: list[Message]) -> None:
    options = GenerationOptions(max_tokens=12)
    (answer,) = engine.answer([messages], options)
    pieces, streamed = drain(engine.stream(messages, options))
    assert streamed == answer
    assert "".join(pieces) == answer.text


def test_usage_and_reports(engine: TransformersEngine) -> None:
    (answer,) = engine.answer([SHOWN], GenerationOptions(max_tokens=5))
    assert answer.usage.media_tokens == 4
    assert answer.usage.prompt_tokens == 4 + len(SHOWN[0].text)
    assert answer.usage.completion_tokens <= 5
    assert [(report.kind, report.name) for report in answer.media] == [("image", "cat.jpg")]


def test_length_is_said(engine: TransformersEngine) -> None:
    (answer,) = engine.answer([SHORT], GenerationOptions(max_tokens=1))
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 1)


@pytest.mark.parametrize("width", [1, 2])
def test_stop_text_ends_each_row_where_it_stands(engine: TransformersEngine, width: int) -> None:
    whole = engine.answer([SHORT, TURNS], GenerationOptions(max_tokens=16))
    stop = whole[0].text[4 : 4 + width]
    options = GenerationOptions(max_tokens=16, stop=(stop,))
    stopped = engine.answer([SHORT, TURNS], options)
    assert stopped[0].text == whole[0].text.split(stop)[0]
    assert stopped[0].finish_reason == "stop"
    assert stopped[1].text == whole[1].text.split(stop)[0]
    pieces, streamed = drain(engine.stream(SHORT, options))
    assert "".join(pieces) == streamed.text == stopped[0].text


def test_seed_repeats_a_sampled_answer_and_leaves_the_random_state(
    engine: TransformersEngine,
) -> None:
    import torch

    options = GenerationOptions(max_tokens=12, temperature=2.0, seed=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (engine.answer([SHORT], options)[0].text for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    other = engine.answer([SHORT], options.model_copy(update={"seed": 2}))[0].text
    assert first == second != other


def test_context_limit_names_both_numbers(engine: TransformersEngine) -> None:
    options = GenerationOptions(max_tokens=200)
    long = [Message.user("x" * 57)]
    with pytest.raises(ContextLengthError, match=r"57 tokens.*200.*256"):
        engine.answer([SHORT, long], options)
    with pytest.raises(ContextLengthError, match="57"):
        next(engine.stream(long, options))
    engine.answer([[Message.user("x" * 56)]], GenerationOptions(max_tokens=200))


@pytest.mark.parametrize("messages", [[], [Message.user("a"), Message.assistant("b")]])
def test_last_word_is_the_users(engine: TransformersEngine, messages: list[Message]) -> None:
    with pytest.raises(RequestError, match="last message"):
        engine.answer([messages], GenerationOptions())


def test_missing_file_is_named(engine: TransformersEngine) -> None:
    with pytest.raises(MissingFileError, match=r"^nowhere\.png: no such file$"):
        engine.answer([[Message.user(MediaPart("image", "nowhere.png"))]], GenerationOptions())


def test_decoded_media_are_kept(engine: TransformersEngine) -> None:
    given = medium("audio", "purr.ogg")
    (message,) = engine.decode([Message.user(MediaPart("audio", given))])
    assert message.media[0].source is given


def test_closing_the_stream_stops_the_model(
    engine: TransformersEngine, model: TinyChatModel
) -> None:
    options = GenerationOptions(max_tokens=200)
    stream = engine.stream(SHORT, options)
    next(stream)
    stream.close()
    assert model.steps < 200
    assert engine.answer([SHORT], GenerationOptions(max_tokens=1))


def test_error_in_the_generating_thread_reaches_the_caller(
    engine: TransformersEngine, model: TinyChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(ZeroDivisionError):
        next(engine.stream(SHORT, GenerationOptions()))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_token": 3}, "max_token"),
    ],
)
def test_bad_options_are_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        GenerationOptions.of(values)
