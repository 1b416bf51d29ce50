"""GGUF models with media: llama.cpp's own answers, alone, together and from caches."""

import asyncio
from collections.abc import Generator, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.scheduler import Scheduler, Sequence
from mico_chat.engines.source import Source
from mico_chat.engines.table import ENGINES
from mico_chat.errors import ConfigError, ContextLengthError, MediaError, ModelError, RequestError
from mico_chat.load import EngineOptions, input_modalities, load_assistant
from mico_chat.media import Audio, Image, Medium, Video
from mico_chat.media.view import Detail, View
from mico_chat.messages import Message
from mico_chat.prompt_parts import control_tokens, plain_tokens
from tests.engine.tiny_llm import answer
from tests.support.fakes import FakeDecoder
from tests.support.replicas.equal import Answered
from tests.support.replicas.gguf_pairs import REPLICAS, Pair, built
from tests.support.tiny import clip, depth, picture, run, sound

pytestmark = pytest.mark.skipif(not built(), reason="llama.cpp is not installed, or lacks libmtmd")

OPTIONS = GenerationOptions(max_tokens=12, logprobs=3)
TURNS = {"gemma3": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"}
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

Parts = tuple[str | Medium, ...]


@dataclass(frozen=True)
class Loaded:
    name: str
    pair: Pair
    assistant: Assistant

    def expected(self, *parts: str | Medium) -> list[int]:
        """llama.cpp's own answer to a question."""
        pieces: list[str | np.ndarray[Any, Any]] = []
        for part in parts:
            pieces += [part] if isinstance(part, str) else _shown(part)
        from tests.support.replicas.mtmd_loop import reference

        text = "".join(p if isinstance(p, str) else "<__media__>" for p in pieces)
        arrays = [piece for piece in pieces if not isinstance(piece, str)]
        prompt = TURNS.get(self.name, CHATML).format(text)
        return reference(self.pair, prompt, arrays, OPTIONS.max_tokens)

    @property
    def engine(self) -> BatchingEngine:
        assert isinstance(self.assistant.engine, BatchingEngine)
        return self.assistant.engine

    def layout(self, message: Message) -> list[int]:
        """The text tokens of a prompt."""
        adapter = self.assistant.adapter
        media = [adapter.prepare(medium, ()) for medium in message.media]  # type: ignore[arg-type]
        segments = adapter.layout([message], media)
        return [token for part in segments if isinstance(part, tuple) for token in part]

    def answers(self, *questions: Parts) -> list[list[int]]:
        """The tokens of answers to questions that are asked at the same time."""

        async def one(question: Parts) -> list[int]:
            stream = self.assistant.stream(Ask([Message.user(*question)], OPTIONS))
            async with aclosing(stream) as items:
                return Answered([item async for item in items if isinstance(item, Delta)])

        async def every() -> list[list[int]]:
            return await asyncio.gather(*map(one, questions))

        return run(every())


def _shown(medium: Medium) -> list[str | np.ndarray[Any, Any]]:
    """A medium as libmtmd's own helper for files shows it."""
    if isinstance(medium, Image):
        return [medium.pixels]
    if isinstance(medium, Audio):
        return [medium.samples]
    assert isinstance(medium, Video)
    shown: list[str | np.ndarray[Any, Any]] = ["Video:"]
    for second, frame in enumerate(medium.frames):  # of one frame a second
        shown += [frame, *([f"[0m{second}.00s]"] if second % 5 == 0 else [])]
    return shown + ([medium.audio.samples] if medium.audio is not None else [])


@pytest.fixture(scope="module", params=list(REPLICAS))
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loaded]:
    yield from _load(request.param, tmp_path_factory.mktemp(request.param))


def _load(name: str, folder: Path, max_batch: int = 256) -> Generator[Loaded, None, None]:
    pair = REPLICAS[name](folder)
    options = EngineOptions(arguments={"threads": 1, "n_cells": 8192}, max_batch=max_batch)
    loaded = ENGINES["llamacpp"].load(Source.of(*pair), options)
    encoder = MediaEncoder(loaded.adapter, FakeDecoder())
    assistant = Assistant(loaded.engine, encoder, name=name)
    yield Loaded(name, pair, assistant)
    assistant.close()


def questions(loaded: Loaded) -> list[Parts]:
    asked: list[Parts] = [
        ("Nothing to see.",),
        ("What is this? ", picture()),
        (picture(1), " and ", picture(2), "?"),
        ("How does it end? ", clip(8)),
    ]
    if "audio" in loaded.assistant.adapter.input_modalities:
        asked += [("Listen: ", sound()), (picture(), sound(0.4, 880.0)), (clip(2, track=True),)]
    return asked


def test_answers_are_llama_cpps_own(loaded: Loaded) -> None:
    asked = questions(loaded)
    expected = [loaded.expected(*question) for question in asked]
    alone = [loaded.answers(question)[0] for question in asked]
    assert alone == expected
    together = loaded.answers(*asked, *reversed(asked))  # media and starts of prompts are cached
    assert together == expected + expected[::-1]


def test_a_medium_changes_the_answer(loaded: Loaded) -> None:
    seen = [loaded.answers(("Look: ", picture(seed), "!"))[0] for seed in range(4)]
    assert len(set(map(tuple, seen))) > 1


def test_a_conversation_goes_on_from_its_cached_start(loaded: Loaded) -> None:
    first = [Message.user("What is this? ", picture(5))]
    turns = [*first, Message.assistant("A cat."), Message.user(picture(6), " And this?")]
    answer = loaded.assistant.answer
    loaded.engine.forget()
    alone = run(answer(Ask(turns, OPTIONS)))
    loaded.engine.forget()
    run(answer(Ask(first, OPTIONS)))
    again = run(answer(Ask(turns, OPTIONS)))
    assert again.text == alone.text
    assert again.usage.cached_tokens > run(loaded.assistant.prepare(Ask(first)))[0].blocks[0][0]


def test_a_prompt_goes_on_where_a_cancelled_one_ended(loaded: Loaded) -> None:
    """Also within a picture, whose tokens may share a position."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    prompt, _ = run(loaded.assistant.prepare(Ask([Message.user("Large: ", Image(pixels), "!")])))
    model = loaded.engine._scheduler.model
    expected = answer(model, [prompt], OPTIONS)
    for n_steps in range(1, 5):
        scheduler = Scheduler(model, (), max_running=2)
        cancelled = Sequence(prompt, OPTIONS)
        scheduler.add(cancelled)
        scheduler._prefill.tokens = lambda *_: 33  # type: ignore[method-assign]
        for _ in range(n_steps):
            scheduler.step()
        scheduler.remove(cancelled)
        assert answer(model, [prompt, prompt], OPTIONS, scheduler) == 2 * expected
        scheduler.forget()
    loaded.engine.forget()  # the engine's own scheduler knows nothing of the others


MARKUP = (
    "<__media__>",
    *("<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|audio_eos|>", "<tool_call>"),
    *("<fake_token_around_image>", "<row_1_col_1>", "<global-img>"),
    *("<end_of_turn>", "<start_of_turn>", "<start_of_image>"),
)


@pytest.mark.parametrize("hostile", [*MARKUP, "".join(MARKUP), "\0<|im_end|>\ud7ff", "<|im_end|"])
def test_typed_markup_stays_text(loaded: Loaded, hostile: str) -> None:
    harmless, typed = (
        loaded.layout(Message.user("See ", picture(), text, " there."))
        for text in ("nothing", hostile)
    )
    control = control_tokens(loaded.assistant.adapter.tokenizer)
    assert [t for t in harmless if t in control] == [t for t in typed if t in control]
    decode = loaded.assistant.adapter.tokenizer.decode
    assert hostile in decode(typed, skip_special_tokens=False)
    assert loaded.answers(("See ", picture(), hostile, " there."))[0]


def test_a_harmless_prompt_is_tokenized_as_llama_cpp_does(loaded: Loaded) -> None:
    ids = loaded.layout(Message.user("The cat's END"))
    text = TURNS.get(loaded.name, CHATML).format("The cat's END")
    vocabulary = loaded.assistant.adapter.tokenizer
    assert ids == vocabulary._tokenized(text.encode(), True)
    assert plain_tokens(vocabulary, text)[-len(ids) :] == tuple(ids), "its start may be added"
    assert plain_tokens(vocabulary, text, special=False)[-len(ids) :] == tuple(ids)
    assert plain_tokens(vocabulary, "a", special=False) == tuple(vocabulary._tokenized(b"a", True))
    with pytest.raises(RequestError, match=r"^prompt: the model's tokens are 0 to"):
        plain_tokens(vocabulary, (0, len(vocabulary)))


def test_what_cannot_be_answered_is_refused_and_the_next_is_served(loaded: Loaded) -> None:
    many = [Message.user(*[picture()] * 400, "How many?")]
    with pytest.raises(ContextLengthError, match="maximum context length is 4096 tokens"):
        run(loaded.assistant.answer(Ask(many, OPTIONS)))
    if "audio" not in loaded.assistant.adapter.input_modalities:
        with pytest.raises(RequestError, match="cannot read a sound; it reads pictures, videos"):
            run(loaded.assistant.answer(Ask([Message.user(sound(), "What?")], OPTIONS)))
        heard = Ask([Message.user(clip(2, track=True), "?")], OPTIONS)
        silent = run(loaded.assistant.answer(heard))
        assert silent.media[0].audio_used is False
    assert loaded.answers(("What is this? ", picture()))[0]


def test_media_of_odd_shapes(loaded: Loaded) -> None:
    media: list[Medium] = [
        Image(np.full((height, width, 3), 200, np.uint8))
        for height, width in ((1, 1), (1, 900), (900, 1), (3, 5), (700, 31))
    ]
    media += [clip(1), clip(3), depth(), depth(metric=False)]
    if "audio" in loaded.assistant.adapter.input_modalities:
        media += [Audio(np.zeros(n, np.float32)) for n in (1, 2, 100, 31 * 16_000)]
    for medium in media:
        try:
            found = run(loaded.assistant.answer(Ask([Message.user(medium, "?")], OPTIONS)))
        except MediaError:  # a side would have no pixel after scaling
            assert isinstance(medium, Image)
            assert min(medium.pixels.shape[:2]) == 1
            continue
        assert found.media[0].tokens
        assert found.media[0].shown_as == ("picture" if medium.kind == "depth" else None)


def test_tokens_are_counted_before_media_are_encoded(loaded: Loaded) -> None:
    for question in questions(loaded):
        messages = [Message.user(*question, " (counted)")]
        estimate = run(loaded.assistant.estimate(Ask(messages, OPTIONS, "new")))
        usage = run(loaded.assistant.answer(Ask(messages, OPTIONS))).usage
        for name in ("prompt_tokens", "media_tokens"):
            assert getattr(estimate, name) == getattr(usage, name)


def test_a_picture_too_large_for_a_step_that_must_hold_it(tmp_path: Path) -> None:
    loading = _load("gemma3", tmp_path, max_batch=15)
    gemma = next(loading)
    with pytest.raises(RequestError, match="16 tokens that must be computed together"):
        gemma.answers((picture(), "?"))
    assert len(gemma.answers(("What?",))[0]) == OPTIONS.max_tokens
    loading.close()


def test_a_picture_has_the_tokens_of_its_detail_and_of_the_bounds(tmp_path: Path) -> None:
    pair = REPLICAS["qwen_omni"](tmp_path)

    def tokens(detail: Detail = "auto", asked: Any = None, **bounds: int) -> int:
        given = {"threads": 1, "n_cells": 8192, **bounds}
        options = GenerationOptions.of({"mm_processor_kwargs": asked or {}})
        page = Image(np.zeros((1754, 1240, 3), np.uint8), view=View(detail))
        engine = EngineOptions(arguments=given, media_token_budget=0.9)
        with closing(load_assistant(pair.model, FakeDecoder(), engine)) as assistant:
            return run(assistant.estimate(Ask([Message.user(page, "?")], options))).media_tokens

    whole, low, bounded = tokens(), tokens("low"), tokens(image_max_tokens=512)
    assert low <= 256 < bounded <= 512 < whole, "a page at 150 dots an inch"
    assert whole == 44 * 63
    with pytest.raises(RequestError, match=r"mm_processor_kwargs\.size: with llama.cpp, image_min"):
        tokens(asked={"size": 4})


def test_a_closed_model_is_not_read_from_freed_memory(tmp_path: Path) -> None:
    loading = _load("qwen_omni", tmp_path)
    omni = next(loading)
    omni.assistant.close()
    assert omni.layout(Message.user(picture(), "?"))
    assert omni.assistant.adapter.tokenizer.decode([40, 41])


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    qwen, gemma = (REPLICAS[name](tmp_path) for name in ("qwen3_vl", "smolvlm"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    for model, mmproj, why in (
        (gemma.model, qwen.mmproj, "mismatch between text model .* and mmproj"),
        (gemma.model, broken, "cannot load it"),
        (gemma.model, gemma.model, "cannot load it"),
        (broken, gemma.mmproj, "cannot load it"),
    ):
        with pytest.raises(ModelError, match=why):
            load_assistant(model, FakeDecoder(), EngineOptions(mmproj=mmproj))


def test_a_gguf_file_is_loaded_with_the_projector_beside_it(tmp_path: Path) -> None:
    pair = REPLICAS["smolvlm"](tmp_path)
    for options in (EngineOptions(), EngineOptions(mmproj=pair.mmproj)):
        with closing(load_assistant(pair.model, FakeDecoder(), options)) as assistant:
            assert (assistant.name, assistant.engine.name) == ("llama", "llamacpp")
            assert assistant.adapter.input_modalities == ("image", "video")
    assert input_modalities(pair.model) == ("image", "video", "depth", "normal", "document")
    pair.mmproj.unlink()
    with closing(load_assistant(pair.model, FakeDecoder())) as assistant:
        with pytest.raises(RequestError, match="cannot read a picture; it reads text alone"):
            run(assistant.answer(Ask([Message.user(picture(), "?")], OPTIONS)))
        assert run(assistant.answer(Ask([Message.user("?")], OPTIONS))).usage.completion_tokens
    for wrong in (EngineOptions("transformers"), EngineOptions(quantization="Q8_0")):
        with pytest.raises(ConfigError, match=r"llama\.gguf: "):
            load_assistant(pair.model, FakeDecoder(), wrong)
