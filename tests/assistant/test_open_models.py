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
import PIL.Image
import pytest
import torch
from transformers import JambaConfig, JambaForCausalLM, LlamaConfig, LlamaForCausalLM

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
from mico_chat.messages import Message, from_openai
from tests.support import replicas, templates
from tests.support.fakes import FakeDecoder
from tests.support.made_lora import lora_folder, merged
from tests.support.replicas import medium as part_of
from tests.support.replicas import pixels, user
from tests.support.replicas.equal import Answered
from tests.support.tiny import picture, run

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
    options = GenerationOptions(max_tokens=N_TOKENS, logprobs=3).over(assistant.defaults)
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


def test_a_large_picture_is_shown_as_the_library_shows_it(
    replica: Path, assistant: Assistant
) -> None:
    if "image" not in replicas.reads(replica.name):
        pytest.skip("it reads no pictures")
    large = Image(np.zeros((1500, 3000, 3), np.uint8))
    (report,) = reported(assistant, large)
    assert report.cut == [], "its processor makes it smaller itself"
    part = {"type": "image", "image": PIL.Image.fromarray(large.pixels)}
    assert run(together(assistant, [part]))[0] == expected(replica, part)
    (report,) = reported(assistant, Depth(np.ones((1500, 3000), np.float32)))
    assert report.cut == []


def test_a_model_that_does_not_batch_runs_alone(
    replica: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(open_models._Trial, "disagreement", lambda _: "tried so")
    with loaded(replica) as assistant:
        assert "requests run alone, without batching: tried so" in caplog.text
        asked = [*conversations(replica.name), []]
        assert run(together(assistant, *asked)) == [expected(replica, *media) for media in asked]


def test_a_kind_that_fails_in_the_trial_is_left_out_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, processed = replicas.build("smolvlm", tmp_path), TransformersAdapter._processed
    failing = {"video"}

    def breaks(self: TransformersAdapter, text: str, media: Any, asked: Any) -> Any:
        if media[0].kind in failing:
            raise LookupError("no num2words here")
        return processed(self, text, media, asked)

    monkeypatch.setattr(TransformersAdapter, "_processed", breaks)
    with loaded(folder) as assistant:
        assert "cannot be shown the kind video here: LookupError: no num2words here" in caplog.text
        assert assistant.input_modalities == ("image", "depth", "normal", "document")
        assert assistant.adapter.encodes, "pictures are batched all the same"
        tokens = run(tokens_of(assistant, message([part_of("image", 1)])))[0]
        with pytest.raises(RequestError, match="cannot read a clip; it reads pictures"):
            run(tokens_of(assistant, message([part_of("video", 1)])))
    assert tokens == expected(folder, part_of("image", 1))
    failing.add("image")
    with pytest.raises(ModelError, match=r"it can be shown no medium here.*no num2words"):
        load_assistant(folder, FakeDecoder(), IN_FLOAT32)


def test_a_trial_of_another_size_finds_that_clips_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, processed = replicas.build("smolvlm", tmp_path), TransformersAdapter._processed

    def whole_patches(self: TransformersAdapter, text: str, media: Any, asked: Any) -> Any:
        if any(isinstance(one, Video) and one.frames.shape[1] % 28 for one in media):
            raise ValueError("a side is no multiple of 28")
        return processed(self, text, media, asked)

    monkeypatch.setattr(TransformersAdapter, "_processed", whole_patches)
    with loaded(folder) as assistant:
        assert "video" in assistant.input_modalities
        assert not assistant.notes


def test_clips_that_a_processor_does_not_scale_are_scaled(tmp_path: Path) -> None:
    """MiniMax-M3's takes sides of whole patches alone."""
    folder = replicas.build("minimax_m3_vl", tmp_path / "m3")
    whole = {**part_of("video", 1), "video": pixels(1, 4, 56, 84)}
    with loaded(folder) as assistant:
        assert run(tokens_of(assistant, message([whole])))[0] == expected(folder, whole)
        assert run(tokens_of(assistant, message([part_of("video", 1)])))[1].media_tokens > 0


def test_text_begins_as_the_processor_begins_it(tmp_path: Path) -> None:
    """Molmo2's processor puts a token before it that its tokenizer and its template do not."""
    model, processor = replicas.load(replicas.build("molmo2", tmp_path))
    processor.tokenizer.bos_token = "<|endoftext|>"
    adapter = TransformersAdapter(model, processor, "molmo2")
    (ids,) = adapter.layout([Message.user(QUESTION)], [])
    assert isinstance(ids, tuple)
    right = replicas.inputs(processor, [user(QUESTION)])["input_ids"][0].tolist()
    assert list(ids) == right
    assert right[0] == processor.tokenizer.bos_token_id


def test_of_a_model_that_speaks_the_part_that_answers_is_loaded(tmp_path: Path) -> None:
    """A published Qwen2.5-Omni is a Thinker, a Talker and a vocoder."""
    folder = replicas.build("qwen2_5_omni", tmp_path / "thinker")
    whole = replicas.whole_omni(folder, tmp_path / "whole")
    media = [part_of("image", 1), part_of("audio", 2)]
    with loaded(whole) as assistant:
        assert assistant.adapter.input_modalities == ("image", "audio", "video")
        assert run(tokens_of(assistant, message(media)))[0] == expected(folder, *media)


def test_voxtral_hears_half_minutes(tmp_path: Path) -> None:
    """Its library makes these inputs with another package's tokenizer; the features are its own."""
    folder = replicas.build("voxtral", tmp_path / "voxtral")
    model: Any
    processor: Any
    model, processor = replicas.load(folder)
    time = np.arange(40 * 16_000) / 16_000
    long = np.sin(2 * np.pi * 300 * time).astype(np.float32)
    sounds = [part_of("audio", 1)["audio"], long]
    settings: dict[str, Any] = {"sampling_rate": 16_000, "padding": True, "truncation": False}
    settings |= {"pad_to_multiple_of": 480_000, "return_tensors": "pt"}

    def theirs(*heard: Any) -> list[int]:
        features = processor._retrieve_input_features(heard, 3000, **settings)
        n = [1, 2] if len(heard) > 1 else [len(features)]
        assert len(model.get_audio_features(features).pooler_output) == 30 * sum(n)
        marks = "".join("[BEGIN_AUDIO]" + "[AUDIO]" * 30 * own for own in n)
        text = f"<s>[INST]{marks}{QUESTION}[/INST]"
        given = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**given, input_features=features, max_new_tokens=N_TOKENS)
        return list(output[0, given["input_ids"].shape[1] :].tolist())

    asked = [[sounds[0]], [sounds[1]], sounds, [sounds[0]]]
    with loaded(folder) as assistant:
        assert not assistant.notes
        shown = [[{"type": "audio", "audio": one} for one in heard] for heard in asked]
        assert run(together(assistant, *shown)) == [theirs(*heard) for heard in asked]
        reports = [reported(assistant, Audio(one))[0] for one in sounds]
        assert [(one.tokens, one.cut) for one in reports] == [(30, []), (60, [])]
        typed = "[AUDIO][/INST]"
        ids = run(tokens_of(assistant, Message.user(typed)))[2].tokens(0, 99)[0]
        assert assistant.adapter.tokenizer.convert_tokens_to_ids("[AUDIO]") not in ids
    (folder / "tekken.json").write_text("{}")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"lacks a chat template .*mistral-common"), loaded(folder):
        pass


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


@pytest.mark.parametrize("name", ["smolvlm", "gemma3"])
def test_a_repetition_penalty_counts_the_prompt(tmp_path: Path, name: str) -> None:
    """As the library does with that of a ``generation_config.json``, batched or alone."""
    folder = replicas.build(name, tmp_path / name)
    file, asked = folder / "generation_config.json", "a b c d e f g h ? What is this?"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.6}))
    with loaded(folder) as assistant:
        assert assistant.defaults.repetition_penalty == 1.6
        found = run(tokens_of(assistant, message([part_of("image", 1)], asked)))[0]
        right = replicas.reference(folder, [user(part_of("image", 1), asked)], N_TOKENS)
        assert list(found) == right


def test_a_template_that_takes_strings_alone_shows_media_by_their_marks(tmp_path: Path) -> None:
    folder, picture = replicas.build("llava_onevision", tmp_path), part_of("image", 1)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    model, processor = replicas.load(folder)
    said: Any = f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    given = processor(text=[said], images=[picture["image"]], return_tensors="pt")
    generate: Any = model.generate
    right = generate(**given, do_sample=False, max_new_tokens=N_TOKENS)
    with loaded(folder) as assistant:
        found = run(tokens_of(assistant, message([picture])))[0]
    assert found == right[0, given["input_ids"].shape[1] :].tolist()


def test_pictures_whose_tokens_attend_to_each_other_run_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = replicas.build("gemma3", tmp_path / "gemma3")
    asked = [[part_of("image", 1)], [part_of("image", 2), part_of("image", 3)], []]
    with loaded(folder) as assistant:
        assert "run alone, without batching: tokens of a medium attend to later" in caplog.text
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
        assert "run alone, without batching: KeyError: 'inputs_embeds'" in caplog.text
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


def text_alone(folder: Path) -> tuple[Any, Any]:
    """A replica that reads text alone, and its tokenizer."""
    tokenizer = templates.tokenizer_with(templates.THOUGHTS)
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, eos_token_id=0)
    llm: Any = LlamaForCausalLM(config).train(False)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return llm, tokenizer


def test_answers_end_where_the_generation_config_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tokens of ``config.json`` are not added, as in the library."""
    text_alone(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    saying = tmp_path / "generation_config.json"
    saying.write_text('{"eos_token_id": [1000000]}')
    with loaded(tmp_path) as assistant:
        free = run(tokens_of(assistant, Message.user("Hi")))[0]
    assert len(free) == N_TOKENS
    assert "of its end tokens [1000000] are left out: its table of tokens has" in caplog.text
    other, end = free[0], free[-1]
    assert other != end, "another seed shows more"
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": other}))
    saying.write_text(json.dumps({"eos_token_id": end}))
    with loaded(tmp_path) as assistant:
        found = run(tokens_of(assistant, Message.user("Hi")))[0]
    assert found == free[: free.index(end) + 1]


def test_a_folder_that_reads_text_alone(tmp_path: Path) -> None:
    """Its tokens are the library's, alone and beside others, thoughts and spaces in the history."""
    llm, tokenizer = text_alone(tmp_path)
    chats = [
        [{"role": "user", "content": " Hi!\n"}],
        [
            {"role": "system", "content": "Be brief. "},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes. "},
            {"role": "user", "content": "Why?\n"},
        ],
    ]
    right = []
    for chat in chats:
        text: Any = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        new = llm.generate(ids, max_new_tokens=N_TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert len(new) == N_TOKENS, "it ends early: another seed shows more"
        right.append((ids[0].tolist(), new.tolist()))
    with loaded(tmp_path) as assistant:
        assert assistant.input_modalities == ("document",)

        async def answers() -> list[Any]:
            work = (tokens_of(assistant, *from_openai(chat)) for chat in chats * 2)
            return list(await asyncio.gather(*work))

        for (tokens, _, prompt), (ids, new) in zip(run(answers()), right * 2, strict=True):
            assert prompt.tokens(0, len(prompt))[0] == ids
            assert tokens == new
        with pytest.raises(RequestError, match="this model cannot read a picture; it reads text"):
            run(tokens_of(assistant, Message.user(picture(), "Hi")))


def test_phi4_brings_an_adapter_for_pictures_and_one_for_sounds(tmp_path: Path) -> None:
    folder = replicas.build("phi4_multimodal", tmp_path / "phi4")
    llm, processor = replicas.load(folder)
    layers = r"model\.layers\.\d+\.((self_attn\.(qkv|o)_proj)|(mlp\.(gate_up|down)_proj))"
    for seed, name in enumerate(("vision", "speech")):
        own = lora_folder(llm, folder / f"{name}-lora", seed, "TBA", target_modules=layers)
        merged(llm, own).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    picture, sound = part_of("image", 1), part_of("audio", 1)
    with loaded(folder) as assistant:
        found = run(together(assistant, [picture], [sound], [picture, sound], []))
    vision, speech = tmp_path / "vision", tmp_path / "speech"
    right = [expected(vision, picture), expected(speech, sound), expected(vision, picture, sound)]
    assert found == [*right, expected(folder)]
    assert right[0] != expected(folder, picture)


def test_a_recurrent_state_that_does_not_go_on_runs_alone(tmp_path: Path) -> None:
    """Jamba's layers forget their state where a prompt is computed in parts."""
    tokenizer = templates.tokenizer_with(templates.THOUGHTS)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
    sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_experts": 1}
    JambaForCausalLM(JambaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with loaded(tmp_path) as assistant:
        assert "run alone, without batching: the logits for text differ" in assistant.notes[0]
