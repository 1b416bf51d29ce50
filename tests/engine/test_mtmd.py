"""GGUF models with media: llama.cpp's own answers, alone, together and from caches."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mico_chat.assistant import Assistant
from mico_chat.encode import MediaEncoder
from mico_chat.engine.base import Delta, GenerationOptions
from mico_chat.load import EngineOptions
from mico_chat.media import Audio, Image, Medium, Video
from mico_chat.messages import Message
from tests.fakes import FakeDecoder
from tests.replicas.gguf_pairs import REPLICAS, Pair
from tests.tiny import clip, picture, run, sound


def _built() -> bool:
    try:
        from llama_cpp import mtmd_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


pytestmark = pytest.mark.skipif(
    not _built(), reason="llama-cpp-python is not installed, or was built without libmtmd"
)

OPTIONS = GenerationOptions(max_tokens=12)
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
        text = "".join(p if isinstance(p, str) else "<__media__>" for p in pieces)
        from tests.replicas.mtmd_loop import reference

        arrays = [piece for piece in pieces if not isinstance(piece, str)]
        prompt = TURNS.get(self.name, CHATML).format(text)
        return reference(self.pair, prompt, arrays, OPTIONS.max_tokens)

    def answers(self, *questions: Parts) -> list[list[int]]:
        """The tokens of answers to questions that are asked at the same time."""

        async def one(question: Parts) -> list[int]:
            tokens: list[int] = []
            stream = self.assistant.stream([Message.user(*question)], OPTIONS)
            async with aclosing(stream) as items:
                async for item in items:
                    tokens += item.token_ids if isinstance(item, Delta) else ()
            return tokens

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


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    yield from _load("qwen_omni", tmp_path_factory.mktemp("omni"))


def _load(name: str, folder: Path) -> Iterator[Loaded]:
    from mico_chat.gguf_models import load_gguf

    pair = REPLICAS[name](folder)
    options = EngineOptions(arguments={"threads": 1, "n_cells": 8192}, max_batch=256)
    adapter, engine = load_gguf(*pair, options, max_running=16)
    assistant = Assistant(engine, MediaEncoder(adapter, FakeDecoder()), name=name)
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
