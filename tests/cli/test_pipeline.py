"""transformers' pipeline "any-to-any" on our folders: it answers as an assistant does."""

import base64
import io
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, pipeline

from mico_chat.checkpoints.folders import model_folder
from mico_chat.errors import MicoError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.messages import Message
from mico_chat.options import GenerationOptions
from tests.server.support import sent
from tests.support.tiny import chat_model, saved

pytestmark = [
    pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`"),
]
OPENS = {
    "tokenize": True,
    "return_dict": True,
    "return_tensors": "pt",
    "add_generation_prompt": True,
}
SHOWN: dict[str, tuple[Any, bytes]] = {
    "image": (Image.fromarray(sent.square()), sent.png(sent.square())),
    "audio": (sent.wav(), sent.wav()),
    "video": (sent.mp4(), sent.mp4()),
    "depth": (sent.depth(), sent.depth()),
}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def told(*turns: tuple[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its greedy choices are no near ties, and its folder has a prompt and options of its own."""
    model = chat_model()
    with torch.no_grad():
        for name, weight in model.llm.named_parameters():
            if "norm" not in name:
                weight.mul_(15)
    model.generation = {"repetition_penalty": 1.3, "max_new_tokens": 12, "unsure_below": 0.5}
    folder = saved(tmp_path_factory.mktemp("tiny") / "chat", model)
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"system_prompt": "Be brief."}))
    return folder


Answer = Callable[..., str]


def both(folder: Path, most: int | None = None) -> Iterator[tuple[Any, Answer]]:
    """The pipeline of a folder, and what the assistant says, in ``most`` tokens."""
    options = EngineOptions(engine="transformers", dtype="float32", device="cpu")
    given: Any = {} if most is None else {"max_new_tokens": most}
    pipe = pipeline("any-to-any", model=str(folder), device="cpu", dtype="float32", **given)

    def says(*messages: Message, **more: Any) -> str:
        asked = more if most is None else {"max_tokens": most, **more}
        (answer,) = assistant.answer_all([messages], GenerationOptions(**asked).over(defaults))
        return answer.text

    with MediaDecoder() as decoder, closing(load_assistant(folder, decoder, options)) as assistant:
        defaults = assistant.defaults
        yield pipe, says


@pytest.fixture(scope="module")
def small(tiny: Path) -> Iterator[tuple[Any, Answer]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICO_READS", "0")
        yield from both(tiny)


@pytest.mark.parametrize("kind", [None, *SHOWN])
def test_it_answers_as_the_assistant(small: tuple[Any, Answer], kind: Any) -> None:
    pipe, says = small
    _same(pipe, says, kind)


@pytest.mark.base_llm
def test_the_mini_answers_as_in_the_assistant(
    base_llm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICO_READS", "0")
    for pipe, says in both(Path(model_folder("mini")), 16):
        for kind in (None, "image", "audio", "video"):
            _same(pipe, says, kind)


def _same(pipe: Any, says: Answer, kind: Any) -> None:
    given, file = SHOWN[kind] if kind else (None, b"")
    parts = [{"type": kind, kind: given}] if kind else []
    asked = told(("user", [*parts, text("What is it?")]))
    (found,) = pipe(text=asked)
    assert found["input_text"] == asked
    *before, answer = found["generated_text"]
    assert before == asked
    assert answer["role"] == "assistant"
    media = [MediaFile(kind, file, "a file")] if kind else []
    assert answer["content"].strip() == says(Message.user(*media, "What is it?")).strip()
    assert answer["content"]


def test_a_question_without_a_chat(small: tuple[Any, Answer]) -> None:
    """A text and its media are a chat of one question."""
    pipe, says = small
    picture, sound = SHOWN["image"][0], SHOWN["audio"][1]
    parts = [
        {"type": "image", "url": picture},
        {"type": "audio", "url": sound},
        text("What is it?"),
    ]
    (chat,) = pipe(text=told(("user", parts)), return_full_text=False)
    ((again,), (hello,)) = pipe(text=[told(("user", parts)), told(("user", [text("Hello")]))])
    assert again["generated_text"][-1]["content"] == chat["generated_text"]
    assert hello["generated_text"][-1]["content"] == says(Message.user("Hello")).strip()
    (plain,) = pipe(text="What is it?", images=picture, audio=[sound], return_full_text=False)
    assert plain["generated_text"] == chat["generated_text"]


def test_an_answer_goes_on_where_the_chat_ends(small: tuple[Any, Answer]) -> None:
    pipe, says = small
    begun = told(("user", [text("Hello")]), ("assistant", [text("It is")]))
    (found,) = pipe(text=begun)
    user, answer = found["generated_text"]
    assert user == begun[0]
    assert answer["content"][0]["text"] == says(Message.user("Hello"), prefix="It is")


def test_forms_of_a_medium(tiny: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny)
    file, samples = tmp_path / "a file.png", np.sin(np.arange(16_000) / 6, dtype=np.float32)
    file.write_bytes(SHOWN["image"][1])
    coded = base64.b64encode(SHOWN["image"][1]).decode()
    pictures: list[Any] = [
        {"path": str(file)},
        {"url": file.as_uri()},
        {"base64": coded},
        {"image": file},
    ]
    units = []
    for given in (
        *pictures,
        {"type": "audio", "audio": {"array": samples, "sampling_rate": 16000}},
    ):
        chat = told(("user", [{"type": "image", **given}, text("?")]))
        batch = processor.apply_chat_template(chat, **OPENS)
        units.append(batch["pixel_values"])
    assert all(torch.equal(one, units[0]) for one in units[:-1])
    assert units[-1].ndim == 4


def test_what_it_refuses(small: tuple[Any, Answer]) -> None:
    pipe, _ = small
    hello = told(("user", [text("Hello")]))
    truncated = io.BytesIO(SHOWN["image"][1][:80]).getvalue()

    def asks(*parts: Any, role: str = "user", **more: Any) -> Callable[[], Any]:
        return lambda: pipe(text=told((role, list(parts))), **more)

    cases: dict[str, Callable[[], Any]] = {
        "messages[0].role: 'tool' is not one of system, user, assistant": asks(role="tool"),
        "messages[0].content: expected a string or a list of parts, got nothing": lambda: pipe(
            text=[{"role": "user", "content": None}]
        ),
        "messages[0].content[0]: expected an object, got a string": asks("Hello"),
        "messages[0].content[0].text: expected a string, got a number": asks(
            {**text(""), "text": 3}
        ),
        "messages[0].content[0].type: 'smell' is none of": asks({"type": "smell", "url": "x"}),
        "messages[0].content[0]: image and url: give one": asks(
            {"type": "image", "image": "a.png", "url": "b.png"}
        ),
        "send the medium as a data URI": asks(
            {"type": "image", "url": "https://example.org/a.png"}
        ),
        "nothing.png: no such file": asks({"type": "image", "path": "nothing.png"}),
        "samples need their sampling_rate": asks({"type": "audio", "audio": {"array": [0.0]}}),
        "the audio cannot be read from a value of type ndarray": asks(
            {"type": "audio", "audio": np.zeros(9)}
        ),
        "messages[0].content[0]": asks({"type": "image", "image": truncated}),
        "tools: [{}] is not possible here: leave it out, or give None": asks(
            text("Hi"), tools=[{}]
        ),
        "return_tensors: 'np' is not possible here: leave it out, or give 'pt'": lambda: (
            pipe.processor.apply_chat_template(hello, **{**OPENS, "return_tensors": "np"})
        ),
        "text: 2 texts: give one; a pipeline takes a list of chats": lambda: pipe(text=["a", "b"]),
        "conversation: 2 chats: give one": lambda: pipe.processor.apply_chat_template(
            [hello, hello], **OPENS
        ),
        "the last message must be the assistant's": asks(
            text("Hello"), continue_final_message=True
        ),
    }
    for reason, refused in cases.items():
        with pytest.raises(MicoError) as error:
            refused()
        assert reason in str(error.value), reason
    with pytest.raises(ValueError, match="can only output the following modalities"):
        pipe(text=hello, generation_mode="audio")


def test_a_pipeline_is_saved(small: tuple[Any, Answer], tiny: Path, tmp_path: Path) -> None:
    pipe, _ = small
    pipe.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    hello = told(("user", [text("Hello")]))
    again: Any = pipeline("any-to-any", model=str(tmp_path), device="cpu", dtype="float32")
    assert again(text=hello) == pipe(text=hello)
    options = json.loads((tmp_path / "generation_config.json").read_text())
    assert json.loads((tiny / "generation_config.json").read_text()).items() <= options.items()


def test_transformers_knows_the_class(
    tiny: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipeline logs an error of 2 kB for a class that it does not know."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        pipe = pipeline("any-to-any", model=str(tiny), device="cpu")
    assert not caplog.records
    assert {"text", "image", "audio", "video"} <= set(pipe.model.input_modalities)
    assert "MicoChatProcessor" in repr(pipe.processor)
