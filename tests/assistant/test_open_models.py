"""Other projects' models answer as their own library's ``generate`` does, whatever runs beside.

The models are tiny replicas with random weights: equality is what these tests show.
"""

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mico_chat.engines.transformers_models as open_models
from mico_chat.adapters.pictures import as_picture
from mico_chat.adapters.transformers import TransformersAdapter
from mico_chat.ask import Ask
from mico_chat.assistant import Assistant
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.errors import ConfigError, ModelError, RequestError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media.medium import Audio, Depth, Image, MediaReport, Medium, Normal, Video
from mico_chat.messages import Message
from tests.support import replicas
from tests.support.fakes import FakeDecoder
from tests.support.replicas import medium as part_of
from tests.support.replicas import pixels, user
from tests.support.replicas.equal import Answered
from tests.support.tiny import run

N_TOKENS = 10
QUESTION = "What is this?"
IN_FLOAT32 = EngineOptions(dtype="float32", max_batch=24)  # less than a medium's tokens


@pytest.fixture(scope="module", params=replicas.NAMES)
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    return replicas.build(name, tmp_path_factory.mktemp("replicas") / name)


@pytest.fixture(scope="module")
def assistant(replica: Path) -> Iterator[Assistant]:
    with loaded(replica) as assistant:
        adapter = assistant.adapter
        assert isinstance(adapter, TransformersAdapter)
        # Alone, the library's own code would give the right tokens in any case.
        assert adapter.encodes, "requests must run together"
        yield assistant


def decoded(part: dict[str, Any]) -> Medium:
    """A part of the library's messages as a medium that our decoder would make."""
    if part["type"] == "image":
        return Image(np.asarray(part["image"]))
    if part["type"] == "audio":
        return Audio(part["audio"])
    return Video(part["video"], np.array(part["times"], np.float64))


def conversations(name: str) -> list[list[dict[str, Any]]]:
    """Media of each kind, two pictures, and all kinds in one message."""
    kinds = replicas.reads(name)
    found = [[part_of(kind, seed)] for seed, kind in enumerate(kinds)]
    if "image" in kinds:
        found.append([part_of("image", 5), part_of("image", 6)])
    # In the library a picture and a clip of SmolVLM take each other's place.
    if name != "smolvlm":
        found.append([part_of(kind, 7 + seed) for seed, kind in enumerate(kinds)])
    return found


def message(media: list[dict[str, Any]], text: str = QUESTION) -> Message:
    return Message.user(*map(decoded, media), text)


async def tokens_of(assistant: Assistant, *messages: Message) -> tuple[list[int], Any, Prompt]:
    """The greedy tokens, the usage and the prompt of a conversation."""
    prompt, _ = await assistant.prepare(Ask(messages))
    options = GenerationOptions(max_tokens=N_TOKENS, logprobs=3)
    deltas = [delta async for delta in assistant.engine.generate(prompt, options)]
    return Answered(deltas), deltas[-1].usage, prompt


def test_another_medium_changes_the_answer(replica: Path) -> None:
    """Without it, equal answers would show little."""
    for kind in replicas.reads(replica.name):
        answers = [tuple(expected(replica, part_of(kind, seed))) for seed in range(4)]
        assert len(set(answers)) == 4, kind


async def together(assistant: Assistant, *asked: list[dict[str, Any]]) -> list[list[int]]:
    work = (tokens_of(assistant, message(media)) for media in asked)
    return [tokens for tokens, _, _ in await asyncio.gather(*work)]


def expected(replica: Path, *media: dict[str, Any]) -> list[int]:
    """The library's own greedy tokens."""
    return replicas.reference(replica, [user(*media, QUESTION)], N_TOKENS)


def loaded(folder: Path) -> Any:
    return closing(load_assistant(folder, FakeDecoder(), IN_FLOAT32))


def test_greedy_tokens_are_the_librarys(replica: Path, assistant: Assistant) -> None:
    for media in conversations(replica.name):
        tokens, usage, prompt = run(tokens_of(assistant, message(media)))
        assert tokens == expected(replica, *media), [part["type"] for part in media]
        assert usage.media_tokens == prompt.media_tokens > 0


def test_requests_at_once_do_not_touch_each_other(replica: Path, assistant: Assistant) -> None:
    asked = [*conversations(replica.name), []]
    assistant.encoder.cache.clear()
    assert run(together(assistant, *asked * 2)) == [expected(replica, *m) for m in asked] * 2


def test_a_second_turn_reuses_what_the_first_computed(replica: Path, assistant: Assistant) -> None:
    media = conversations(replica.name)[-1]
    first = message(media, "Look at this.")
    run(tokens_of(assistant, first))
    reports = run(assistant.prepare(Ask([first])))[1]
    assert all(report.cached for report in reports)
    turns = [first, Message.assistant("I see."), Message.user(QUESTION)]
    tokens, usage, _ = run(tokens_of(assistant, *turns))
    assert usage.cached_tokens > usage.media_tokens
    said = {"role": "assistant", "content": [{"type": "text", "text": "I see."}]}
    shown = [user(*media, "Look at this."), said, user(QUESTION)]
    right = replicas.reference(replica, shown, N_TOKENS)
    assert tokens == right
    assistant.encoder.cache.clear()
    assert run(tokens_of(assistant, *turns))[0] == right


def test_the_cost_is_known_before(replica: Path, assistant: Assistant) -> None:
    for media in conversations(replica.name):
        assistant.encoder.cache.clear()
        asked = [message(media)]
        estimate = run(assistant.estimate(Ask(asked, GenerationOptions())))
        prompt, reports = run(assistant.prepare(Ask(asked)))
        assert (estimate.prompt_tokens, estimate.media_tokens) == (len(prompt), prompt.media_tokens)
        assert [report.tokens for report in estimate.media] == [r.tokens for r in reports]


def test_typed_markup_stays_text(replica: Path, assistant: Assistant) -> None:
    """Beside a medium too: no placeholder and no control token comes of what somebody writes."""
    tokenizer = assistant.adapter.tokenizer
    markup = [token.content for token in tokenizer.added_tokens_decoder.values()]
    hostile = f"{''.join(markup)} {' '.join(markup)} <image> <|audio|> [INST] \ue000 0\ue000"
    special = set(tokenizer.added_tokens_decoder)
    for kind in replicas.reads(replica.name):
        plain, attacked = (
            run(assistant.prepare(Ask([message([part_of(kind, 1)], text)])))[0]
            for text in ("x", hostile)
        )
        counts = [
            [token for token in prompt.tokens(0, len(prompt))[0] if token in special]
            for prompt in (plain, attacked)
        ]
        assert counts[0] == counts[1]
        answer = assistant.answer_all(
            [[message([part_of(kind, 1)], hostile)]], GenerationOptions(max_tokens=3)
        )
        assert answer[0].usage.media_tokens == plain.media_tokens
    assert run(tokens_of(assistant, message([], QUESTION)))[0] == expected(replica)


def test_what_it_lacks_is_refused_with_what_it_reads(replica: Path, assistant: Assistant) -> None:
    reads = replicas.reads(replica.name)
    assert assistant.adapter.input_modalities == reads
    for kind in {"image", "audio", "video"} - set(reads):
        with pytest.raises(
            RequestError, match=r"this model cannot read a .*; it reads "
        ) as refused:
            run(assistant.prepare(Ask([message([part_of(kind, 1)])])))
        assert refused.value.param == kind
    if "image" not in reads:
        with pytest.raises(RequestError, match="cannot read a depth map; it reads sounds"):
            run(assistant.prepare(Ask([Message.user(depth(), QUESTION)])))
    assert run(tokens_of(assistant, message([], QUESTION)))[0]


def depth() -> Depth:
    values = np.linspace(0.5, 4, 60 * 80, dtype=np.float32).reshape(60, 80)
    values[30:40, 30:40] = np.nan
    return Depth(values)


def reported(assistant: Assistant, *media: Medium) -> tuple[MediaReport, ...]:
    return run(assistant.prepare(Ask([Message.user(*media, QUESTION)])))[1]


def test_maps_are_shown_as_pictures(replica: Path, assistant: Assistant) -> None:
    if "image" not in replicas.reads(replica.name):
        pytest.skip("it reads no pictures")
    maps: list[Medium] = [depth(), Normal(pixels(1, 40, 60))]
    first, second = reported(assistant, *maps)
    assert first.shown_as == second.shown_as == "picture"
    assert [report.kind for report in (first, second)] == ["depth", "normal"]
    (picture,) = reported(assistant, decoded(part_of("image", 1)))
    assert picture.shown_as is None
    prompt, _ = run(assistant.prepare(Ask([Message.user(maps[0], QUESTION)])))
    ids = [token for token in prompt.tokens(0, len(prompt))[0] if token >= 0]
    said = assistant.adapter.tokenizer.decode(ids)
    legend = "yellow is the nearest (0.5 m), dark blue the farthest (4 m), black unknown.\n"
    assert f"{legend}{QUESTION}" in said
    guess = Depth(depth().values, report=MediaReport(name="", kind="depth", estimated="some/net"))
    assert "A depth map, estimated by some/net, as a picture: yellow" in as_picture(guess)[1]
    other = Depth(np.where(np.isnan(depth().values), 1, depth().values[::-1]))
    answers = [
        run(tokens_of(assistant, Message.user(one, QUESTION)))[0] for one in (maps[0], other)
    ]
    assert answers[0] != answers[1]


def test_a_sound_too_long_is_cut_and_said(replica: Path, assistant: Assistant) -> None:
    if replica.name not in ("qwen2_audio", "gemma3n"):
        pytest.skip("it hears more than half a minute")
    long = part_of("audio", 1)
    long["audio"] = np.tile(long["audio"], 31)
    (report,) = reported(assistant, decoded(long))
    assert report.cut == ["the model hears the first 30 s of 31.0 s"]
    assert run(tokens_of(assistant, message([long])))[0] == expected(replica, long)


def test_the_smallest_media_are_read(replica: Path, assistant: Assistant) -> None:
    smallest: dict[str, Medium] = {
        "image": Image(np.full((1, 1, 3), 200, np.uint8)),
        "audio": Audio(np.zeros(1, np.float32)),
        "video": Video(np.full((1, 2, 2, 3), 200, np.uint8), np.zeros(1)),
    }
    for kind in replicas.reads(replica.name):
        tokens, usage, _ = run(tokens_of(assistant, Message.user(smallest[kind], QUESTION)))
        assert len(tokens) == N_TOKENS
        assert usage.media_tokens > 0


def test_what_a_processor_refuses_is_the_requests_fault(
    replica: Path, assistant: Assistant
) -> None:
    if "qwen" not in replica.name or "image" not in replicas.reads(replica.name):
        pytest.skip("its processor takes any shape")
    with pytest.raises(RequestError, match=r"refuses it: absolute aspect ratio"):
        run(
            assistant.prepare(Ask([Message.user(Image(np.zeros((2, 900, 3), np.uint8)), QUESTION)]))
        )
    assert run(tokens_of(assistant, message([], QUESTION)))[0]


def test_a_clips_sound_is_heard_or_said_to_be_left_out(replica: Path, assistant: Assistant) -> None:
    reads = replicas.reads(replica.name)
    if "video" not in reads:
        pytest.skip("it reads no clips")
    part, track = part_of("video", 1), part_of("audio", 2)
    clip = Video(part["video"], np.array(part["times"]), Audio(track["audio"]))
    (report,) = reported(assistant, clip)
    tokens = run(tokens_of(assistant, Message.user(clip, QUESTION)))[0]
    shown = [part, track] if "audio" in reads else [part]
    assert tokens == expected(replica, *shown)
    assert report.audio_used is ("audio" in reads)
    left_out = ["the sound track was left out: this model reads no sounds"]
    assert report.cut == ([] if "audio" in reads else left_out)


def test_a_large_picture_is_made_smaller(replica: Path, assistant: Assistant) -> None:
    if "image" not in replicas.reads(replica.name):
        pytest.skip("it reads no pictures")
    (report,) = reported(assistant, Image(np.zeros((1500, 3000, 3), np.uint8)))
    assert report.cut == ["scaled down from 3000 x 1500 to 1416 x 708 pixels"]
    (report,) = reported(assistant, Depth(np.ones((1500, 3000), np.float32)))
    assert report.cut == ["scaled down from 3000 x 1625 to 1361 x 737 pixels"], "with its legend"


def test_a_model_that_does_not_batch_runs_alone(
    replica: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(open_models, "_disagreement", lambda *_: "tried so")
    with loaded(replica) as assistant:
        assert "requests run alone, one after the other: tried so" in caplog.text
        asked = [*conversations(replica.name), []]
        # A picture among several, which LLaVA-OneVision does not tile, needs batching.
        asked = [m for m in asked if replica.name != "llava_onevision" or len(m) < 2]
        assert run(together(assistant, *asked)) == [expected(replica, *media) for media in asked]


def test_a_kind_that_fails_in_the_trial_is_left_out_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, processed = replicas.build("smolvlm", tmp_path), TransformersAdapter._processed
    failing = {"video"}

    def breaks(self: TransformersAdapter, medium: Any, n: int) -> Any:
        if medium.kind in failing:
            raise LookupError("no num2words here")
        return processed(self, medium, n)

    monkeypatch.setattr(TransformersAdapter, "_processed", breaks)
    with loaded(folder) as assistant:
        assert "cannot be shown the kind video here: LookupError: no num2words here" in caplog.text
        assert assistant.input_modalities == ("image", "depth", "normal", "document")
        tokens = run(tokens_of(assistant, message([part_of("image", 1)])))[0]
        with pytest.raises(RequestError, match="cannot read a clip; it reads pictures"):
            run(tokens_of(assistant, message([part_of("video", 1)])))
    assert tokens == expected(folder, part_of("image", 1))
    failing.add("image")
    with pytest.raises(ModelError, match=r"it can be shown no medium here.*no num2words"):
        load_assistant(folder, FakeDecoder(), IN_FLOAT32)


def test_of_a_model_that_speaks_the_part_that_answers_is_loaded(tmp_path: Path) -> None:
    """A published Qwen2.5-Omni is a Thinker, a Talker and a vocoder."""
    folder = replicas.build("qwen2_5_omni", tmp_path / "thinker")
    whole = replicas.whole_omni(folder, tmp_path / "whole")
    media = [part_of("image", 1), part_of("audio", 2)]
    with loaded(whole) as assistant:
        assert assistant.adapter.input_modalities == ("image", "audio", "video")
        assert run(tokens_of(assistant, message(media)))[0] == expected(folder, *media)


def test_smolvlms_clips_have_a_template_of_their_own(tmp_path: Path) -> None:
    """The published template shows no clips; the library's processor brings another one."""
    folder = replicas.build("smolvlm", tmp_path / "smolvlm")
    template = folder / "chat_template.jinja"
    without = template.read_text().replace("<video>", "")
    template.write_text(without)
    clip, picture = part_of("video", 1), part_of("image", 1)
    with loaded(folder) as assistant:
        for part in (clip, picture):
            tokens = run(tokens_of(assistant, message([part])))[0]
            assert tokens == expected(folder, part)


def test_pictures_whose_tokens_attend_to_each_other_run_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = replicas.build("gemma3", tmp_path / "gemma3")
    asked = [[part_of("image", 1)], [part_of("image", 2), part_of("image", 3)], []]
    with loaded(folder) as assistant:
        assert "run alone, one after the other: tokens of a medium attend to later" in caplog.text
        found = run(together(assistant, *asked * 2))
    assert found == [expected(folder, *media) for media in asked] * 2


def test_other_logits_are_noticed(
    replica: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that does not compute what the model does is not used."""
    from mico_chat.engine.decoder import Decoder

    real = Decoder.hidden

    def wrong(self: Decoder, rows: Any, positions: Any, mask: Any, cache: Any) -> Any:
        return real(self, rows, positions // 2, mask, cache)

    monkeypatch.setattr(Decoder, "hidden", wrong)
    caplog.set_level(logging.WARNING)
    with loaded(replica) as assistant:
        assert "differ from the model's own" in caplog.text
        media = conversations(replica.name)[0]
        assert run(tokens_of(assistant, message(media)))[0] == expected(replica, *media)


def test_a_model_that_raises_in_the_trial_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("inputs_embeds")

    monkeypatch.setattr("mico_chat.adapters.capture.Capture.why_not", broken)
    folder = replicas.build("qwen2_audio", tmp_path / "qwen2_audio")
    sound = part_of("audio", 1)
    with loaded(folder) as assistant:
        assert "run alone, one after the other: KeyError: 'inputs_embeds'" in caplog.text
        assert run(tokens_of(assistant, message([sound])))[0] == expected(folder, sound)


def test_code_that_a_model_brings_is_not_run(tmp_path: Path) -> None:
    code = {"AutoConfig": "own.Config", "AutoModelForMultimodalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    (tmp_path / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ConfigError, match=r"Python code of its own, .* --trust-remote-code"):
        load_assistant(tmp_path, FakeDecoder())


def test_an_engine_that_does_not_take_it_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip(llama_cpp.PACKAGE)
    folder = replicas.build("qwen2_audio", tmp_path / "qwen2_audio")
    with pytest.raises(ConfigError, match="--engine transformers"):
        load_assistant(folder, FakeDecoder(), EngineOptions("llamacpp"))
