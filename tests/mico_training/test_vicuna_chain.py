"""From an encoder and a Vicuna to a served model, on a replica: every step of the way.

assemble -> train-stage2 -> train-stage3 in 4 bit (QLoRA) -> merge -> GGUF; the engines then say
the same.
"""

import importlib.util
import json
import shutil
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mico_chat.checkpoints.assemble import assemble
from mico_chat.checkpoints.configs import chat_config
from mico_chat.checkpoints.folders import LLM, LORA
from mico_chat.checkpoints.load import has_text_branch, load_chat, load_encoder
from mico_chat.checkpoints.pretrained import merge
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.base import GenerationOptions
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media.kinds import KINDS
from mico_chat.messages import Message
from mico_chat.model.config import MicoChatConfig
from mico_chat.wire import Choice
from mico_training.recipe import Stage2Run, Stage3Run, load_recipe
from mico_training.stages import train_stage2, train_stage3
from tests.mico_training.test_estimate import RECIPES
from tests.mico_training.test_runs import logged, write_recipe
from tests.support.fakes import FakeDecoder
from tests.support.made import write_clip
from tests.support.tiny import clip, depth, picture, shown, sound
from tests.support.vicuna import pickle_weights, vicuna_folder
from tests.support.vllm_here import ARGUMENTS, needs_vllm

NEAR_TIE = 0.02
"""Logarithms of probabilities that are so near may change places between engines."""

# PEFT asks transformers for the old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@dataclass(frozen=True)
class Chain:
    """Folders in the order they were made."""

    llm: Path
    assembled: Path
    aligned: Path
    tuned: Path
    merged: Path


def as_converted(pretraining: Path, folder: Path) -> Path:
    """A stage 1 folder without E_M and E_C, as ``convert mico`` leaves it."""
    shutil.copytree(pretraining, folder)
    state = load_file(folder / "model.safetensors")
    zeros = {name: torch.zeros_like(x) for name, x in state.items() if name.startswith("context.")}
    assert zeros
    save_file(state | zeros, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_clips(folder: Path, shards: Path) -> list[dict[str, Any]]:
    """Data of the shards and, as often, of a clip that grows lighter."""
    folder.mkdir()
    write_clip(str(folder / "clip.mp4"), "mpeg4", n=20)
    asked = {"role": "user", "content": "<video>\nHow does it change?"}
    answer = {"role": "assistant", "content": "It grows lighter."}
    records: list[dict[str, Any]] = [{"caption": "it grows lighter"}, {"messages": [asked, answer]}]
    lines = [json.dumps({"video": "clip.mp4"} | record) + "\n" for record in records]
    (folder / "clips.jsonl").write_text("".join(lines))
    return [{"path": f"{shards}/train-*.tar"}, {"path": f"{folder}/clips.jsonl", "kind": "jsonl"}]


@pytest.fixture(scope="module")
def chain(shards: Path, tiny_pretraining: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    llm = vicuna_folder(root / "vicuna-7b-v1.5")
    pickle_weights(llm)
    assembled = assemble(as_converted(tiny_pretraining, root / "encoder"), str(llm), root / "made")
    data = with_clips(root / "clips", shards)
    # What trains and in which precision is the 7B recipes'.
    two = load_recipe(Stage2Run, RECIPES / "vicuna7b-stage2.yaml")
    three = load_recipe(Stage3Run, RECIPES / "vicuna7b-stage3.yaml")
    encoder = [f"model.encoder_dtype={two.model.encoder_dtype}"]
    recipe = write_recipe(root / "two", shards, assembled, data=data)
    train_stage2(recipe, [*encoder, f"stage2.trainable={list(two.stage2.trainable)}"])
    recipe = write_recipe(root / "three", shards, root / "two" / "out", data=data)
    trained = f"stage3.trainable={list(three.stage3.trainable)}"
    train_stage3(recipe, [*encoder, "model.llm_quantization=nf4", trained])
    tuned = root / "three" / "out"
    return Chain(llm, assembled, root / "two" / "out", tuned, merge(tuned, root / "merged"))


def test_each_stage_leaves_what_it_trained(chain: Chain) -> None:
    for folder in (chain.assembled, chain.aligned, chain.tuned):
        assert chat_config(folder).base_llm == str(chain.llm.resolve())
        assert not any(n.startswith("llm.") for n in load_file(folder / "model.safetensors"))
    assert has_text_branch(chain.assembled)
    for folder in (chain.aligned, chain.tuned, chain.merged):
        assert not has_text_branch(folder), "it was trained on tokens without E_M and E_C"
    states = [load_file(f / "model.safetensors") for f in (chain.assembled, chain.aligned)]
    moved = {
        name
        for name, value in states[1].items()  # the encoder's are bfloat16
        if not torch.equal(states[0][name].to(value.dtype), value)
    }
    assert {name.split(".")[0] for name in moved} == {"bridge", "context"}
    assert (chain.tuned / LORA / "adapter_model.safetensors").is_file()
    assert not (chain.merged / LORA).exists()
    base, merged = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (chain.llm, chain.merged / LLM)
    )
    assert base.keys() == merged.keys()
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], merged[name])}
    assert moved == {"q_proj", "v_proj", "o_proj", "down_proj"}


def frame_tokens(folder: Path) -> torch.Tensor:
    """The bridge's input (2, T, D) for a clip of two equal frames."""
    model, _ = load_chat(folder, dtype="float32")
    side, video = model.config.encoder_config.image_size, torch.tensor([KINDS.index("video")])
    pixels = torch.ones(2, 3, side, side) / 2
    with torch.inference_mode():
        return model.encoded(video, torch.tensor([2]), pixel_values=pixels)[0]


def test_two_equal_frames_are_told_apart_by_their_places(chain: Chain) -> None:
    """E_M and E_C start at zero, and alignment teaches them; tuning and merging keep them."""
    first, second = frame_tokens(chain.assembled)
    assert torch.equal(first, second)
    for folder in (chain.aligned, chain.tuned, chain.merged):
        first, second = frame_tokens(folder)
        assert not torch.allclose(first, second, rtol=1e-4), folder
    states = [load_file(f / "model.safetensors") for f in (chain.aligned, chain.tuned)]
    merged = load_file(chain.merged / "model.safetensors")
    rows = MicoChatConfig.from_pretrained(chain.aligned).context_config.max_units
    video = KINDS.index("video") * rows
    for name in ("context.context.weight", "context.modality.weight"):
        assert states[0][name].dtype == torch.float32
        assert not torch.equal(states[0][name], states[1][name]), "stage 3 goes on"
        assert torch.equal(states[1][name], merged[name])
    assert states[0]["context.context.weight"][video : video + 2].abs().min() > 0
    checkpoint = load_file(chain.aligned / "checkpoint-4" / "model.safetensors")
    assert torch.equal(checkpoint["context.context.weight"], states[0]["context.context.weight"])


def test_merged_it_says_what_it_said_with_its_adapter(chain: Chain) -> None:
    talk = [shown(picture(), "What colour is it?")]
    logits = []
    for folder in (chain.tuned, chain.merged):
        model, processor = load_chat(folder, dtype="float32")
        with torch.inference_mode():
            logits.append(model(**processor([talk])).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0.02, atol=0.05)


def first_difference(one: Choice, other: Choice) -> float:
    """How much likelier the first token that is another is to ``one`` than the other's; 0: none."""
    for ours, theirs in zip(one.logprobs, other.logprobs, strict=False):
        if ours.token_id != theirs.token_id:
            known = {top.token_id: top.logprob for top in ours.top}
            return ours.logprob - known[theirs.token_id]
    assert len(one.logprobs) == len(other.logprobs)
    return 0.0


def answers(folder: Path, options: EngineOptions, talks: list[list[Message]]) -> list[Choice]:
    """The first 20 tokens."""
    with closing(load_assistant(folder, FakeDecoder(), options)) as assistant:
        generation = GenerationOptions(max_tokens=20, logprobs=5)
        return [answer.choices[0] for answer in assistant.answer_all(talks, generation)]


TALKS = [
    [Message.user("What is two and two?")],
    [Message.system("Be short."), Message.user("  What colour?\n")],
    [shown(picture(), "What colour is it?")],
    [
        shown(picture(1), sound(), "Do they belong together?"),
        Message.assistant("A red square."),
        shown(clip(2, track=True), depth(), "猫?"),
    ],
]


@pytest.fixture(scope="module")
def reference(chain: Chain) -> list[Choice]:
    """What the transformers engine says."""
    return answers(chain.merged, EngineOptions("transformers", None, "float32", "cpu"), TALKS)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            EngineOptions("llamacpp", "F32", "float32", "cpu"),
            marks=pytest.mark.skipif(
                importlib.util.find_spec(llama_cpp.PACKAGE) is None,
                reason="llama.cpp is not installed",
            ),
            id="llamacpp",
        ),
        pytest.param(
            EngineOptions("vllm", dtype="float32", arguments=ARGUMENTS), marks=needs_vllm, id="vllm"
        ),
    ],
)
def test_the_engines_say_the_same(
    chain: Chain, reference: list[Choice], options: EngineOptions, cache: Path
) -> None:
    found = answers(chain.merged, options, TALKS)
    for ours, theirs in zip(reference, found, strict=True):
        assert len(ours.logprobs) > 1
        assert ours.logprobs[0].logprob == pytest.approx(theirs.logprobs[0].logprob, abs=NEAR_TIE)
        assert first_difference(ours, theirs) < NEAR_TIE
    if options.engine == "llamacpp":
        assert list((cache / "gguf").glob("merged-*-F32.gguf"))


def test_trained_as_a_whole_it_says_what_it_was_taught(chain: Chain, tmp_path: Path) -> None:
    """Labels, prompt and end of turn fit together: it stops by itself, with the taught words."""
    said = {"What is two and two?": "Four, or 4.", "And three?": "Nine: 9"}
    talk = tmp_path / "talk.jsonl"
    records: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in said.items()
    ]
    talk.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = write_recipe(tmp_path, tmp_path, chain.aligned)
    train_stage3(
        recipe,
        [
            f"data=[{{path: {talk}, kind: jsonl}}]",
            "stage3.full=true",
            "train.steps=80",
            "train.save_steps=80",
            "train.lr=3e-3",
        ],
    )
    losses = [entry["loss"] for entry in logged(tmp_path)]
    assert losses[-1] < 0.05 < losses[0]
    folder = tmp_path / "out"
    assert chat_config(folder).base_llm == LLM
    assert AutoModelForCausalLM.from_pretrained(folder / LLM).dtype == torch.float32
    assert load_encoder(folder)[0].bridge is not None
    found = answers(
        folder, EngineOptions("transformers", device="cpu"), [[Message.user(q)] for q in said]
    )
    assert [choice.text for choice in found] == list(said.values())
    for choice in found:
        assert "".join(token.token for token in choice.logprobs) == choice.text
    assert {choice.finish_reason for choice in found} == {"stop"}
