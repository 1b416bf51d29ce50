"""/v1/realtime with a model that hears and speaks itself: a replica of a whole Qwen2.5-Omni."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniForConditionalGeneration

from mico_chat.adapters.talker import CODES
from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.cli.main import main
from mico_chat.engine.base import Delta
from mico_chat.errors import ModelError, RequestError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import Audio, MediaDecoder
from mico_chat.messages import Message
from mico_chat.options import GREEDY
from mico_chat.reading import MediaReader
from tests.server.conftest import Start
from tests.server.support.talking import ASKED, PICTURE, sound_of, speech, talking
from tests.support import replicas
from tests.support.fakes import FakeListener
from tests.support.tiny import run
from tests.support.waiting import until_it

pytest.importorskip("hibari", reason="pip install 'mico-chat[speech]'")
pytest.importorskip("faster_whisper", reason="pip install 'mico-chat[reads]'")

# OpenAI's client connects as older websockets did.
pytestmark = pytest.mark.filterwarnings(
    "ignore:connect.. must be used as a context:DeprecationWarning"
)

IN_FLOAT32 = EngineOptions(dtype="float32")
SHORT = GREEDY.model_copy(update={"max_tokens": 3})
QUESTION = "What is this?"


class Quiet(FakeListener):
    """Says nothing of media in a prompt."""

    def listen(self, samples: object) -> Iterator[Any]:
        return iter(())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replicas.speaking_omni(tmp_path_factory.mktemp("omni"))


@pytest.fixture
def assistant(whole: Path) -> Iterator[Assistant]:
    with MediaDecoder() as decoder:
        loaded = load_assistant(whole, decoder, IN_FLOAT32)
        yield loaded
        loaded.close()


async def tokens_of(assistant: Assistant, ask: Ask) -> list[int]:
    events = [event async for event in assistant.stream(ask)]
    return [token for one in events if isinstance(one, Delta) for token in one.token_ids]


def test_it_sounds_as_its_library_makes_it(assistant: Assistant, whole: Path) -> None:
    assert assistant.talker is not None
    talker: Any = assistant.talker[0]
    part = replicas.medium("audio", 1)
    ask = Ask([Message.user(Audio(part["audio"]), QUESTION)], SHORT)
    tokens = run(tokens_of(assistant, ask))
    ends = tokens[-1:]  # as if it ended the answer
    model: Any = Qwen2_5OmniForConditionalGeneration.from_pretrained(whole, dtype=torch.float32)
    processor = replicas.load(whole.parent / "thinker")[1]
    given = replicas.inputs(processor, [replicas.user(part, QUESTION)])
    torch.manual_seed(1)
    said, sound = model.generate(
        **given,
        speaker="Lee",
        thinker_max_new_tokens=3,
        thinker_do_sample=False,
        thinker_eos_token_id=ends,
        talker_max_new_tokens=3 * CODES,
        talker_eos_token_id=[40, 42],
    )
    assert said[0, -3:].tolist() == tokens
    talker._thinker.generation_config.eos_token_id = ends
    torch.manual_seed(1)
    spoken = run(assistant.spoken(ask, tokens, "Lee"))
    assert np.abs(spoken).max() > 0.01
    np.testing.assert_allclose(spoken, sound.clamp(-1, 1).numpy(), atol=1e-4)
    torch.manual_seed(1)
    other = run(assistant.spoken(ask, tokens, "Kim"))
    assert other.shape != spoken.shape or not np.allclose(other, spoken, atol=1e-3)


def test_who_leaves_is_not_spoken_to(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assistant.talker is not None
    talker: Any = assistant.talker[0]
    voiced: list[object] = []
    vocoder = talker._loaded().token2wav
    monkeypatch.setattr(vocoder, "forward", lambda codes, **_: voiced.append(codes))

    async def cancelled() -> None:
        ask = Ask([Message.user(QUESTION)], SHORT)
        speaking = asyncio.create_task(assistant.spoken(ask, [9] * 40, "Kim"))
        await until_it(talker._lock.locked)
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)
        await until_it(lambda: not talker._lock.locked())

    run(cancelled())
    assert not voiced


def test_it_hears_and_speaks(
    start: Start, assistant: Assistant, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[Ask] = []
    spoken = assistant.spoken

    async def noted(ask: Ask, *more: Any) -> Any:
        asked.append(ask)
        return await spoken(ask, *more)

    monkeypatch.setattr(assistant, "spoken", noted)
    http = start(assistant)
    (model,) = http.get("/v1/models").json()["data"]
    assert model["architecture"]["output_modalities"] == ["text", "audio"]
    with pytest.raises(SystemExit):
        main(["ps", "--url", str(http.base_url)])
    assert "video, depth, normal, document; speaks" in capsys.readouterr().out
    with talking(http) as talk:
        talk.update(audio={"input": {"turn_detection": None}}, max_output_tokens=3)
        talk.write({"type": "input_image", "image_url": PICTURE})
        talk.speak(speech())
        talk.connection.input_audio_buffer.commit()
        talk.until("conversation.item.done")
        talk.connection.response.create()
        events = talk.until("response.done")
        (item,) = events[-1].response.output
        assert np.abs(sound_of(events)).max() > 0.01
        (ask,) = asked
        assert [one.kind for one in ask.messages[-1].files] == ["image", "audio"]
        assert not ask.messages[-1].text.strip()
        cut: Any = {"item_id": item.id, "content_index": 0, "audio_end_ms": 0}
        talk.connection.conversation.item.truncate(**cut)
        talk.until("conversation.item.truncated")
        for voice, why in (({"voice": "Bob"}, "Kim, Lee"), ({"speed": 1.5}, "speed of 1")):
            given: Any = {"type": "realtime", "audio": {"output": voice}}
            talk.connection.session.update(session=given)
            assert why in talk.error().message
        talk.update(audio={"output": {"voice": "Lee"}}, output_modalities=["text"])
        talk.ask("And now?")
    assert len(asked) == 1


def test_an_ear_writes_the_captions(start: Start, assistant: Assistant) -> None:
    listener: Any = Quiet(ASKED)
    assistant.encoder.reader = MediaReader(listener=listener)
    with talking(start(assistant)) as talk:
        talk.update(audio={"input": {"transcription": {}}}, max_output_tokens=3)
        talk.speak(speech())
        kind = "conversation.item.input_audio_transcription.completed"
        events = talk.until(kind, "response.done")
        done = next(one for one in events if one.type == kind)
        assert (done.transcript, events[-1].response.status) == (ASKED, "incomplete")
        assert events[-1].response.usage.input_tokens > 50  # those of a sound


def test_what_keeps_it_from_speaking(whole: Path, tmp_path: Path) -> None:
    ask = Ask([Message.user(QUESTION)], SHORT)

    def loaded(name: str, *without: str) -> Assistant:
        left_out = shutil.ignore_patterns("*.safetensors", *without)
        shutil.copytree(whole, tmp_path / name, ignore=left_out)
        weights = load_file(whole / "model.safetensors")
        kept = {name: one for name, one in weights.items() if not name.startswith(without)}
        save_file(kept, tmp_path / name / "model.safetensors", {"format": "pt"})
        return load_assistant(tmp_path / name, decoder, IN_FLOAT32)

    with MediaDecoder() as decoder:
        with closing(loaded("mute", "spk_dict.pt")) as mute:
            assert mute.talker is None
            note = "it answers in text alone: the folder lacks its voices (spk_dict.pt)"
            assert note in mute.notes
            with pytest.raises(RequestError, match="this model does not speak itself"):
                run(mute.spoken(ask, [9], "Kim"))
        with (
            closing(loaded("half", "talker.codec_head")) as half,
            pytest.raises(ModelError, match="the files lack 1 weights of its talker, such as"),
        ):
            run(half.spoken(ask, [9], "Kim"))


@pytest.mark.parametrize("store_media", ["true", "false"])
def test_what_it_hears_stands_in_a_chat(
    start: Start, assistant: Assistant, store_media: str
) -> None:
    http = start(assistant)
    query = {"conversation": "new", "store_media": store_media}
    with talking(http, extra_query=query) as talk:
        id_ = talk.until("conversation.created")[-1].conversation.id
        hearing = {"turn_detection": None}
        talk.update(output_modalities=["text"], audio={"input": hearing}, max_output_tokens=3)
        talk.speak(speech())
        talk.connection.input_audio_buffer.commit()
        talk.until("conversation.item.done")
        talk.connection.response.create()
        answer = talk.until("response.done")[-1].response.output[0].content[0].text
    (turn,) = http.get(f"/v1/conversations/{id_}").json()["turns"]
    assert (turn["message"], turn["answer"]) == ("", answer)
    heard = [(one["kind"], one["heard"]) for one in turn["media"]]
    assert heard == ([("audio", False)] if store_media == "true" else [])
