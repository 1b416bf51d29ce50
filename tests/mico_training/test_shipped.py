"""A packaged model's name means its weights in all stages, and what cannot run says so at once.

The packaged model is a tiny replica of the mini: a LoRA beside its base language model, things in
pictures, and a text branch.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mico_chat.checkpoints import folders
from mico_chat.checkpoints.assemble import build, save_text_branch
from mico_chat.checkpoints.load import load_pretraining, text_tokenizer
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, load_llm
from mico_chat.engine import cpu
from mico_chat.errors import ConfigError, ModelError
from mico_chat.model.config import MicoChatConfig, MicoConfig
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor
from mico_training.estimate import check_memory, estimate, rehearse
from mico_training.recipe import Stage2Run, load_recipe
from mico_training.stages import train_stage1, train_stage2, train_stage3
from mico_world.mini.init import start_chat
from tests.mico_training.scenes import set_pretrained
from tests.mico_training.test_runs import losses, moved, write_recipe
from tests.support.tiny import command

STAGES = {"train-stage1": train_stage1, "train-stage2": train_stage2, "train-stage3": train_stage3}
ADAPTER = "lora/adapter_model.safetensors"


@pytest.fixture(scope="module")
def packaged(llama: Path, tiny_pretraining: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "mini"
    config = MicoChatConfig.tiny()
    set_pretrained(config)
    assert config.concept_config is not None
    config.concept_config.colours, config.bridge_config.things = True, 2
    config.base_llm = str(llama)
    llm: Any = AutoModelForCausalLM.from_pretrained(llama)
    config.llm_config = llm.config
    model, processor = build(config, llm)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(llm, settings).save_pretrained(str(folder / "lora"))
    stage1 = MicoConfig.from_pretrained(tiny_pretraining)
    for part in ("encoder_config", "context_config", "concept_config"):
        setattr(stage1, part, vars(config)[part])
    words = text_tokenizer(tiny_pretraining)
    save_text_branch(MicoForPretraining(stage1), words, folder)
    return folder


@pytest.fixture(autouse=True)
def mini(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MODELS", packaged.parent)


LONG: dict[str, Any] = {"lr": 2e-2, "steps": 24, "save_steps": 24}


def test_stage_2_aligns_the_packaged_model_further(
    tmp_path: Path, shards: Path, packaged: Path
) -> None:
    pictures = [{"path": f"{shards}/*.tar", "modalities": ["image"]}]
    recipe = write_recipe(tmp_path, shards, {"name": "mini"}, data=pictures, train=LONG)
    train_stage2(recipe)
    history = losses(tmp_path)
    assert sum(history[-4:]) < 0.95 * sum(history[:4])
    out = tmp_path / "out"
    assert all(name.startswith("bridge.") for name in moved_parts(packaged, out))
    spoken, before = (load_llm(folder).state_dict() for folder in (out, packaged))
    assert all(torch.equal(spoken[name], before[name]) for name in before), "the adapter is lost"
    assert (out / "pretraining").is_dir()


def moved_parts(before: Path, after: Path) -> set[str]:
    return moved(MicoChatForConditionalGeneration, before, after)


def test_stage_3_goes_on_with_the_packaged_adapter(
    tmp_path: Path, shards: Path, packaged: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, {"name": "mini"}, train={"lr": 1e-2})
    train_stage3(recipe)
    old, new = (load_file(folder / ADAPTER) for folder in (packaged, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(old[name].shape == new[name].shape for name in old)
    assert not all(torch.equal(old[name], new[name]) for name in old)
    again = write_recipe(tmp_path / "again", shards, tmp_path / "out")
    with pytest.raises(
        ConfigError, match=r"stage3\.lora\.r 5: the LoRA in .*/out, which goes on, has 2;"
    ):
        train_stage3(again, ["stage3.lora.r=5"])
    train_stage3(again, ["stage3.lora={r: 2, targets: [q_proj]}", "train.steps=2"])
    whole = write_recipe(tmp_path / "whole", shards, {"name": "mini"}, train={"lr": 1e-2})
    prompt = "model.system_prompt=You are small."
    train_stage3(whole, ["stage3.full=true", "train.steps=2", prompt])
    assert MicoChatProcessor.from_pretrained(tmp_path / "whole/out").system_prompt == prompt[20:]
    assert not (tmp_path / "whole/out/lora").exists(), "it is in llm/"


def test_stage_1_goes_on_with_the_packaged_text_branch(
    tmp_path: Path, shards: Path, packaged: Path, tiny_chat: Path, tiny_pretraining: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, {"name": "mini"})
    freeze = "train.freeze=[encoder, context, concepts]"
    with pytest.raises(ConfigError, match=r"model\.system_prompt: stage 1 trains no chat"):
        train_stage1(recipe, ["model.system_prompt=You are small."])
    train_stage1(recipe, [freeze])
    trained, _ = load_pretraining(tmp_path / "out")
    before, _ = load_pretraining(packaged)
    changed = {
        n for n, x in before.state_dict().items() if not torch.equal(x, trained.state_dict()[n])
    }
    assert changed
    assert not any(name.startswith(("encoder.", "context.", "concepts.")) for name in changed)
    # The mini takes over the encoder that stage 1 leaves, or says what differs.
    two = {"name": "mini", "encoder": str(tmp_path / "out")}
    train_stage2(write_recipe(tmp_path / "two", shards, two))
    train_stage2(write_recipe(tmp_path / "own", shards, {"name": "mini", "encoder": "mini"}))
    other = write_recipe(tmp_path / "three", shards, two | {"encoder": str(tiny_pretraining)})
    said = r"\(\[80, 32\]\) from .*Size\(\[40, 32\]\)\.; a model that fits: mico-chat assemble"
    with pytest.raises(ConfigError, match=said):
        train_stage2(other)
    with pytest.raises(ConfigError, match=r"no text branch; .*\{name: mini-scratch, encoder:"):
        train_stage1(write_recipe(tmp_path / "four", shards, tiny_chat))
    # A new text branch beside the encoder of another model: its weights, not new ones.
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {f"text_config.{key}": n for key, n in (text | {"intermediate_size": 64}).items()}
    five = write_recipe(
        tmp_path / "five", shards, {"name": "tiny", "encoder": "mini", "options": options}
    )
    train_stage1(five, [freeze])
    beside, _ = load_pretraining(tmp_path / "five/out")
    for name, value in before.encoder.state_dict().items():
        assert torch.equal(beside.encoder.state_dict()[name], value), name


def test_stage_2_of_a_new_version_goes_on_from_the_former_ones_queries(
    tmp_path: Path, packaged: Path, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MicoChatConfig.from_pretrained(packaged)
    monkeypatch.setattr(MicoChatConfig, "named", lambda _: config)
    start_chat(packaged, packaged, tmp_path / "start")
    new, old = (
        MicoChatForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "start", packaged)
    )
    ours = [name for name in old if name.startswith(("bridge.", "things.", "ways."))]
    assert {name.split(".")[0] for name in ours} == {"bridge", "things", "ways"}
    assert all(torch.equal(new[name], old[name]) for name in ours)
    assert not (tmp_path / "start/lora").exists()
    # The language model was not trained: the folder names it, as the former one does.
    assert config.base_llm is not None
    assert MicoChatConfig.from_pretrained(tmp_path / "start").base_llm == config.base_llm
    assert not (tmp_path / "start/llm").exists()
    config.bridge_config.still_grid += 1
    with pytest.raises(ModelError, match=r"chat: bridge has another shape: .*queries"):
        start_chat(packaged, tiny_chat, tmp_path / "other")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_an_estimate(
    tmp_path: Path, shards: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, shards, {"name": "mini"})
    command(stage, "--config", str(recipe), "--dry-run")
    said = capsys.readouterr().out
    assert "llm" in said or stage == "train-stage1"
    assert "fits into the memory that is free here" in said
    assert not (tmp_path / "out").exists()


def test_what_finds_things_runs_no_language_model(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards, {"name": "mini"}, stage2={"objective": "things"})
    things, words = (
        rehearse(load_recipe(Stage2Run, recipe, ["stage2.trainable=[context]", objective]))
        for objective in ("stage2.objective=things", "stage2.objective=caption")
    )
    assert 0 < things.kept < 0.5 * words.kept


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_stage_1_folder_is_no_chat_model(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, tiny_llm: Path, dry: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for folder, said in (
        (tiny_pretraining, f"has no language model; make a chat model of it: mico-chat assemble "
         f"--encoder {tiny_pretraining} --llm NAME --output DIR"),
        (tiny_llm, f"is not a chat model; .* --encoder DIR --llm {tiny_llm}"),
    ):  # fmt: skip
        recipe = write_recipe(tmp_path, shards, folder)
        command("train-stage2", "--config", str(recipe), *dry, code=2)
        assert said.partition(" .* ")[0] in capsys.readouterr().err
        for train in (train_stage2, train_stage3):
            with pytest.raises(ConfigError, match=f"model.name {folder} {said}"):
                train(recipe)


# --- memory -------------------------------------------------------------------------------------


def test_a_run_that_cannot_fit_does_not_start(
    tmp_path: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tmp_path, shards, {"name": "mini"})
    found = estimate(load_recipe(Stage2Run, recipe), gpu="l4")
    room = int(found.peak * 0.9)
    monkeypatch.setattr(cpu, "memory", lambda: (room, 2**40))
    check_memory(found)  # samples may be smaller than those of the estimate
    said = load_recipe(Stage2Run, recipe, ["expect={units: 8}"])
    with pytest.raises(ConfigError, match=r"does not fit: it needs .* GB of memory \(a process: "):
        check_memory(replace(found, recipe=said))
    monkeypatch.setattr(cpu, "memory", lambda: (1000, 2**40))
    words = ("train-stage2", "--config", str(recipe), "--set", "train.steps=2")
    command(*words, code=2)
    assert "--ignore-memory starts the run anyway" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    command(*words, "--ignore-memory")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.slow
def test_all_processes_end_where_the_first_refuses(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_pretraining)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m"]
    stage = ["mico_chat.cli", "train-stage2", "--config", str(recipe)]
    ended = subprocess.run([*ranks, *stage], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.count("has no language model; make a chat model of it") == 1
    assert not (tmp_path / "out").exists()
