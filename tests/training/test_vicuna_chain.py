"""From an encoder and a Vicuna to a served model, on a replica: every step of the way.

assemble -> train-stage2 -> train-stage3 in 4 bit (QLoRA) -> merge -> GGUF; the engines then say
the same.
"""

import importlib.util
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mico_chat.checkpoints.assemble import assemble
from mico_chat.checkpoints.folders import LLM, LORA
from mico_chat.checkpoints.load import chat_config, has_text_branch, load_chat, load_encoder
from mico_chat.checkpoints.pretrained import merge
from mico_chat.engine.base import GenerationOptions
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.messages import Message
from mico_chat.wire import Choice
from mico_training.stages import train_stage2, train_stage3
from tests.fakes import FakeDecoder
from tests.tiny import clip, depth, picture, shown, sound
from tests.training.test_runs import logged, write_recipe
from tests.vicuna import pickle_weights, vicuna_folder
from tests.vllm_here import ARGUMENTS, needs_vllm

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


@pytest.fixture(scope="module")
def chain(shards: Path, tiny_pretraining: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    root = tmp_path_factory.mktemp("chain")
    llm = vicuna_folder(root / "vicuna-7b-v1.5")
    pickle_weights(llm)
    assembled = assemble(tiny_pretraining, str(llm), root / "assembled")
    for name in ("two", "three"):
        (root / name).mkdir()
    train_stage2(write_recipe(root / "two", shards, assembled))
    recipe = write_recipe(root / "three", shards, root / "two" / "out")
    train_stage3(recipe, ["model.llm_quantization=nf4"])
    tuned = root / "three" / "out"
    return Chain(llm, assembled, root / "two" / "out", tuned, merge(tuned, root / "merged"))


def test_each_stage_leaves_what_it_trained(chain: Chain) -> None:
    for folder in (chain.assembled, chain.aligned, chain.tuned):
        assert chat_config(folder).base_llm == str(chain.llm.resolve())
        assert not any(n.startswith("llm.") for n in load_file(folder / "model.safetensors"))
        assert has_text_branch(folder)
    states = [load_file(f / "model.safetensors") for f in (chain.assembled, chain.aligned)]
    moved = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert moved
    assert all(name.startswith("bridge.") for name in moved)
    assert (chain.tuned / LORA / "adapter_model.safetensors").is_file()
    assert not (chain.merged / LORA).exists()
    assert has_text_branch(chain.merged)
    base, merged = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (chain.llm, chain.merged / LLM)
    )
    assert base.keys() == merged.keys()
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], merged[name])}
    assert moved == {"q_proj", "v_proj", "o_proj", "down_proj"}


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
                importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed"
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
