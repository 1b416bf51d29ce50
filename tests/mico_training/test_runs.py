"""Recipes: what is unknown is refused. Each stage from its recipe, end to end, also after a kill.

The models are tiny and random.
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch._inductor import config as inductor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from mico_chat.checkpoints.assemble import assemble
from mico_chat.checkpoints.configs import chat_config
from mico_chat.checkpoints.load import load_pretraining, text_tokenizer
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, merge
from mico_chat.errors import ConfigError
from mico_chat.evaluation.datasets import datasets_in
from mico_chat.evaluation.pretrained import MediumUnits, PretrainedModel
from mico_chat.evaluation.task import TASKS
from mico_chat.media import MediaFile, decode
from mico_chat.model.config import MicoConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.pretraining import MicoForPretraining
from mico_training.build_model import Pretraining, build_chat, check_packing, learn_vocabulary
from mico_training.data.batches import ChatCollator
from mico_training.data.media import MediaLoader
from mico_training.data.mixture import open_mixture
from mico_training.data.sources.written import Sample, write_shard
from mico_training.data.talk.conversations import ConversationDataset
from mico_training.recipe import (
    DataRecipe,
    ModelRecipe,
    Stage1Run,
    Stage2Run,
    Stage3Run,
    load_recipe,
)
from mico_training.stages import train_stage1, train_stage2, train_stage3
from tests.mico_training.scenes import picture
from tests.support.waiting import until

RECIPE = """
model: mini
output: runs/one
data:
  - {path: "shards/train-*.tar", ratio: 2}
train: {lr: 1e-4, steps: 100}
"""

SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32},
    **{"num_hidden_layers": 1, "num_attention_heads": 2},
}
"""The sizes of a language model."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_overrides_reach_every_depth(recipe: Path) -> None:
    run = load_recipe(
        Stage1Run,
        recipe,
        [
            "train.lr=3e-5",
            "train.bf16=true",
            "data.0.skills=[name, count]",
            "stage1.weights.matching=0",
            "model.options.temperature=0.1",
        ],
    )
    assert run.train.lr == 3e-5
    assert run.train.bf16 is True
    assert run.data[0].skills == ("name", "count")
    assert run.stage1.weights.matching == 0
    assert run.model.name == "mini"
    assert run.model.options == {"temperature": 0.1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "unknown key 'train.learning_rat'"),
        ("train.stepz=1", "unknown key 'train.stepz'; did you mean 'steps'?"),
        ("stage1.weights.matchin=1", "did you mean 'matching'?"),
        ("data.0.ration=1", "unknown key 'data.0.ration'; did you mean 'ratio'?"),
        ("stage3.full=true", "unknown key 'stage3'; did you mean 'stage1'?"),
        ("train.learning_rate=1", "unknown key 'train.learning_rate'; did you mean 'lr'?"),
        ("train.epochs=1", "did you mean 'steps'?"),
        ("train.per_device_train_batch_size=1", "did you mean 'batch_size'?"),
        ("train.gradient_accumulation_steps=1", "did you mean 'accumulation'?"),
        ("train.num_workers=1", "did you mean 'workers'?"),
        ("train.report_to=[wandb, none]", "none beside others"),
        ("train.warmup_steps=1.5", "warmup_steps"),
        ("train.lr=-1", "train.lr: Input should be greater than 0 (got -1)"),
        ("data.1.ratio=1", "the list has only the items 0 to 0"),
        ("train.lr", "write it as key=value"),
        ("train.save_steps=7", "save_steps 7 is not a multiple of log_steps 10"),
        ("train.end_lr=0.1", "end_lr 0.1 is not below lr"),
        ("train={lr: 1, steps: 1, end_lr: 0.1, schedule: constant}", "not with 'constant'"),
    ],
)
def test_a_wrong_key_or_value_is_named(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(Stage1Run, recipe, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_warm_up_longer_than_the_run_is_said(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_recipe(Stage1Run, recipe, ["train.warmup_steps=100"])
    assert not caplog.records
    load_recipe(Stage1Run, recipe, ["train.warmup_steps=101"])
    assert "warmup_steps 101 is more than train.steps 100" in caplog.text


def test_lora_and_full_exclude_each_other(recipe: Path) -> None:
    assert load_recipe(Stage3Run, recipe, ["stage3.full=true"]).stage3.full
    with pytest.raises(ConfigError, match="lora or full, not both"):
        load_recipe(Stage3Run, recipe, ["stage3.full=true", "stage3.lora.r=4"])


def test_a_missing_file_and_broken_yaml_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_recipe(Stage1Run, tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(Stage1Run, broken)


def write_recipe(folder: Path, shards: Path, model: Path | dict[str, Any], **sections: Any) -> Path:
    """A recipe of a few steps whose output is ``folder/out``."""
    content: dict[str, Any] = {
        "model": str(model) if isinstance(model, Path) else model,
        "output": str(folder / "out"),
        "data": [{"path": str(shards / "train-*.tar")}],
        "train": {
            "lr": 1e-3,
            "steps": 4,
            "batch_size": 4,
            "save_steps": 2,
            "log_steps": 1,
            "arguments": {"use_cpu": True, "disable_tqdm": True},
        },
    }
    for name, section in sections.items():
        content[name] = section if isinstance(section, list) else content.get(name, {}) | section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def logged(folder: Path, name: str = "log.jsonl") -> list[dict[str, float]]:
    """Every logged step of a finished run."""
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


def losses(folder: Path, name: str = "log.jsonl") -> list[float]:
    return [entry["loss"] for entry in logged(folder, name)]


def moved(kind: type[PreTrainedModel], before: Path, after: Path) -> set[str]:
    """The names of the weights in which two folders' models differ."""
    one, other = (kind.from_pretrained(folder).state_dict() for folder in (before, after))
    return {name for name in one if not torch.equal(one[name], other[name])}


def test_stage_1_logs_every_objective_and_leaves_a_model(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        shards,
        tiny_pretraining,
        features={"cache": str(tmp_path / "features")},
        stage1={"cross_corpus": 0.3, "caption_length": 20, "weights": {"matching": 0.5}},
    )
    train_stage1(recipe)
    history = logged(tmp_path)
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    for entry in history:
        figures = ("tokens_per_second", "samples_per_second", "data_seconds", "grad_norm")
        assert all(entry[name] > 0 for name in figures)
        assert entry["skipped_steps"] == 0
        objectives = ("contrastive", "matching", "caption", "tagging", "region", "concept")
        parts = [entry[f"{name}_loss"] for name in objectives]
        assert all(math.isfinite(part) for part in parts)
        total = parts[0] + 0.5 * parts[1] + sum(parts[2:])
        assert entry["loss"] == pytest.approx(total, rel=1e-4)
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    changed = moved(MicoForPretraining, tiny_pretraining, tmp_path / "out")
    assert any(name.startswith("encoder.vit") for name in changed)
    assert not any(name.startswith("encoder.stem") for name in changed)


@pytest.mark.parametrize("bf16", [False, True])
def test_chunks_change_no_loss_of_a_run(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, bf16: bool
) -> None:
    """All six objectives, with the same negatives and masks, and two batches to an update."""
    cases: dict[str, dict[str, Any]] = {"whole": {}, "chunks": {"chunk": 3}}
    for name, chunk in cases.items():
        settings: dict[str, Any] = {
            "accumulation": 2,
            "bf16": bf16,
            "gradient_checkpointing": not bf16,
        }
        settings |= {"freeze": ["encoder.vit.patch_embed", "encoder.stem"], "warmup_steps": 0.5}
        stage1 = {"cross_corpus": 0.3, "caption_length": 20, "fused_length": 20} | chunk
        train_stage1(
            write_recipe(tmp_path / name, shards, tiny_pretraining, train=settings, stage1=stage1)
        )
    whole, chunks = (logged(tmp_path / name) for name in cases)
    keys = {key for key in whole[0] if key.endswith("_loss") or key == "grad_norm"}
    assert len(keys) == 7
    if bf16:  # which may draw another negative
        keys -= {"matching_loss", "grad_norm"}
    for one, other in zip(whole, chunks, strict=True):
        for key in keys:
            assert other[key] == pytest.approx(one[key], rel=2e-2 if bf16 else 1e-4), key
    # A warm-up of half the steps, and then a fall to zero.
    assert [entry["learning_rate"] for entry in whole] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_chunks_need_frozen_batch_norms(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_pretraining, stage1={"chunk": 2})
    with pytest.raises(
        ConfigError, match=r"stage1.chunk: encoder\.\S+ takes its mean from a batch"
    ):
        train_stage1(recipe)
    with pytest.raises(ConfigError, match="chunk works without simulate"):
        train_stage1(recipe, ["stage1.simulate=0.5"])


@pytest.mark.parametrize("stage", [2, 3])
def test_conversations_that_share_rows_learn_the_same(
    tmp_path: Path, shards: Path, tiny_chat: Path, stage: int
) -> None:
    cases: dict[str, dict[str, Any]] = {"padded": {}, "packed": {"packing": True}}
    for name, packing in cases.items():
        settings = {"batch_size": 6, "accumulation": 2} | packing
        recipe = write_recipe(
            tmp_path / name,
            shards,
            tiny_chat,
            train=settings,
            eval={"data": [{"path": f"{shards}/train-*.tar"}], "every": 2, "samples": 6},
        )
        (train_stage2 if stage == 2 else train_stage3)(recipe)
    padded, packed = (
        [entry for entry in logged(tmp_path / name) if "loss" in entry] for name in cases
    )
    for one, other in zip(padded, packed, strict=True):
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key
        tokens = [e["tokens_per_second"] / e["samples_per_second"] for e in (one, other)]
        assert tokens[0] == pytest.approx(tokens[1]), "both count conversations and their tokens"
    held = [[e["eval_loss"] for e in logged(tmp_path / n) if "eval_loss" in e] for n in cases]
    assert held[0] == pytest.approx(held[1], rel=1e-4)


def test_no_conversation_sees_another_one_of_its_row(shards: Path, tiny_chat: Path) -> None:
    mixture = open_mixture([DataRecipe(path=f"{shards}/train-*.tar")], "conversation", 0)
    chat = build_chat(ModelRecipe(name=str(tiny_chat)))
    loader = MediaLoader(chat.processor.preprocessing)
    examples = [ConversationDataset(mixture, 12, 3)[number] for number in range(12)]
    both = [ChatCollator(chat.processor, loader, 512, packing=on)(examples) for on in (False, True)]
    padded, packed = both
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    assert packed["attention_mask"].sum() == padded["attention_mask"].sum()
    model = chat.model.train(False)
    with torch.no_grad():
        before = model(**{k: v for k, v in packed.items() if k != "labels"}).logits
        starts = (packed["position_ids"] == 0) & packed["attention_mask"].bool()
        number = starts.flatten().cumsum(0).view(starts.shape)
        for own in range(1, 13):
            place = (number == own) & packed["attention_mask"].bool()
            text = place & (packed["input_ids"] != model.config.context_token_id)
            ids = packed["input_ids"].where(~text, packed["input_ids"] + 1)
            after = model(**{k: v for k, v in packed.items() if k != "labels"} | {"input_ids": ids})
            changed = (after.logits - before).abs().amax(-1)
            others = packed["attention_mask"].bool() & ~place
            assert changed[place].max() > 1e-3
            assert changed[others].max() < 1e-6


@pytest.mark.parametrize(
    ("config", "keeps"),
    [
        (LlamaConfig(**SMALL, num_key_value_heads=1), True),
        (
            Qwen3Config(
                **SMALL,
                num_key_value_heads=1,
                head_dim=8,
                sliding_window=4,
                use_sliding_window=True,
            ),
            True,
        ),
        (GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2), True),
        (MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1), False),
        (BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2), False),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_a_language_model_that_mixes_conversations_is_refused(config: Any, keeps: bool) -> None:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config)
    if keeps:
        check_packing(llm)
    else:
        with pytest.raises(ConfigError, match=f"train.packing: .*{config.model_type}.* apart"):
            check_packing(llm)


@pytest.mark.parametrize(
    ("kind", "section", "message"),
    [
        (Stage1Run, {}, "not in stage 1"),
        (Stage2Run, {"stage2": {"objective": "things"}}, "without objective things"),
        (Stage3Run, {"stage3": {"dpo": {}}}, "without dpo"),
    ],
)
def test_packing_is_for_text_that_is_learnt(
    tmp_path: Path, kind: Any, section: dict[str, Any], message: str
) -> None:
    path = write_recipe(tmp_path, tmp_path, tmp_path, train={"packing": True}, **section)
    with pytest.raises(ConfigError, match=message):
        load_recipe(kind, path)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_machine_without_a_compiler_says_so(
    tmp_path: Path, shards: Path, tiny_pretraining: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    recipe = write_recipe(tmp_path, shards, {"name": str(tiny_pretraining), "compile": True})
    with pytest.raises(ConfigError, match=r"model\.compile: torch\.compile does not work here"):
        train_stage1(recipe)


def test_stage_1_learns_the_names_of_the_concepts(
    tmp_path: Path, shards: Path, tiny_pretraining: Path
) -> None:
    config = MicoConfig.from_pretrained(tiny_pretraining)
    config.text_config.name_tokens = 16
    model, words = MicoForPretraining(config), text_tokenizer(tiny_pretraining)
    assert model.names is not None
    visual, sound = config.concept_names
    model.names.start([*visual, *sound], words, model.text.table)
    Pretraining(model, words, Preprocessing(image_size=64)).save(tmp_path / "start")
    recipe = write_recipe(tmp_path, shards, tmp_path / "start", stage1={"simulate": 1.0})
    table = "text.bert.embeddings.word_embeddings"
    train_stage1(recipe, [f"train.freeze=[{table}]"])
    assert all(map(math.isfinite, losses(tmp_path)))
    changed = moved(MicoForPretraining, tmp_path / "start", tmp_path / "out")
    trained = {f"names.{name}" for name in ("gate", "log_scale", "score.weight", "words.weight")}
    assert trained <= changed
    assert not {f"{table}.weight", "names.name_ids"} & changed
    recipe = write_recipe(tmp_path / "none", shards, tiny_pretraining, stage1={"simulate": 0.1})
    with pytest.raises(ConfigError, match="needs a model with text_config"):
        train_stage1(recipe)


def test_features_change_no_loss(tmp_path: Path, shards: Path, tiny_pretraining: Path) -> None:
    options = ["train.freeze=[encoder.stem]", "train.steps=2"]
    cache = {"features": {"cache": str(tmp_path / "features")}}
    for name, sections in (("pixels", {}), ("cached", cache)):
        recipe = write_recipe(tmp_path / name, shards, tiny_pretraining, **sections)
        train_stage1(recipe, options)
    assert losses(tmp_path / "pixels") == pytest.approx(losses(tmp_path / "cached"), rel=2e-3)


def test_stage_2_trains_the_bridge_alone_and_a_finished_run_stays_as_it_is(
    tmp_path: Path, shards: Path, tiny_chat: Path, tiny_pretraining: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, tiny_chat)
    train_stage2(recipe)
    unknown, known = json.loads((tmp_path / "out/config.json").read_text())["trained_on"]
    assert unknown == {"stage": str(tiny_chat), "data": None}
    assert known == {"stage": "stage 2", "data": [f"{shards}/train-*.tar"]}
    changed = moved(MicoChatForConditionalGeneration, tiny_chat, tmp_path / "out")
    assert changed
    saved = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    assert all(name.startswith("bridge.") for name in (*changed, *saved))
    before = logged(tmp_path)
    train_stage2(recipe)
    assert logged(tmp_path) == before
    with pytest.raises(ConfigError, match="made by another recipe"):
        train_stage2(recipe, ["stage2.trainable=[bridge, context]"])
    with pytest.raises(ConfigError, match=r"model\.encoder: context has different shapes"):
        train_stage2(recipe, [f"model.encoder={tiny_pretraining}"])


# PEFT asks transformers for the old name of a property.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_stage_3_tunes_bridge_and_lora(tmp_path: Path, shards: Path, tiny_chat: Path) -> None:
    talk = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    talk.write_text(json.dumps({"messages": turns}))
    data = [{"path": str(shards / "train-*.tar")}, {"path": str(talk), "kind": "jsonl"}]
    lora = {"lora": {"r": 2, "targets": ["q_proj", "v_proj"]}}
    train_stage3(write_recipe(tmp_path, shards, tiny_chat, data=data, stage3=lora))
    saved = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    assert any("lora_" in name for name in saved)
    assert all(name.startswith("bridge.") or "lora_" in name for name in saved)
    changed = moved(MicoChatForConditionalGeneration, tiny_chat, tmp_path / "out")
    tuned = {name.split(".")[-2] for name in changed if name.startswith("llm.")}
    assert tuned == {"q_proj", "v_proj"}


COMMAND = (
    "import sys; from pathlib import Path; from mico_training.stages import train_stage2 as main;"
    "main(Path(sys.argv[1]))"
)


def test_a_killed_run_goes_on_at_the_exact_sample(
    tmp_path: Path, shards: Path, tiny_chat: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train: dict[str, Any] = {"steps": 20, "batch_size": 2, "accumulation": 2, "warmup_steps": 3}
    # To drop paths draws from torch's generator, whose state must be restored.
    train |= {"save_steps": 4, "log_steps": 2, "drop": {"path": 0.3}}
    train_stage2(write_recipe(whole, shards, tiny_chat, train=train))

    path = write_recipe(killed, shards, tiny_chat, train=train)
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoint = killed / "out/checkpoint-8/trainer_state.json"
    try:
        until(checkpoint.is_file, lambda: process.poll() is None)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.is_file()
    assert [entry["step"] for entry in logged(killed)][:4] == [2, 4, 6, 8]
    with (killed / "out/log.jsonl").open("a") as file:
        file.write('{"step": 98, "loss": 9.0}\n')  # of a step after the checkpoint
    # A kill while a checkpoint is written leaves one without its last file.
    (killed / "out/checkpoint-16").mkdir()
    # The recipe was kept by a version without this key, whose default changes nothing.
    kept = json.loads((killed / "out/recipe.json").read_text())
    del kept["train"]["report_to"]
    (killed / "out/recipe.json").write_text(json.dumps(kept | {"stage2": {"join": 0.2}}))

    train_stage2(path)
    assert "have changed since this run began: stage2.join" in caplog.text
    assert "report_to" not in caplog.text
    assert [entry["step"] for entry in logged(killed)] == list(range(2, 21, 2))
    assert losses(killed) == pytest.approx(losses(whole), abs=1e-6)


RECIPES = Path(__file__).parents[2] / "training/recipes"


def test_what_table_5_reports_zero_shot_is_not_trained_on() -> None:
    zero_shot = {t.dataset for t in TASKS.values() if t.paper and "Table 5" in t.paper.place}
    assert {"clotho-aqa", "clothov2"} <= zero_shot
    for kind, name in ((Stage2Run, "vicuna7b-stage2"), (Stage3Run, "vicuna7b-stage3")):
        recipe = load_recipe(kind, RECIPES / f"{name}.yaml")
        assert not zero_shot & {one for source in recipe.data for one in datasets_in(source.path)}


# PEFT asks transformers for the old name of a property.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_the_recipes_follow_each_other(tmp_path: Path, shards: Path, llama: Path) -> None:
    words = tmp_path / "words"
    learn_vocabulary(["a red square", "a tone"], size=128).save_pretrained(words)
    data = f"data=[{{path: '{shards}/train-*.tar'}}]"
    small = [data, "train.steps=2", "train.batch_size=2", "train.warmup_steps=1"]
    small += ["train.accumulation=1", "train.save_steps=2", "train.log_steps=1"]
    small += ["train.workers=0", "train.parallel=ddp", "train.max_length=512"]
    small += ["train.arguments={use_cpu: true, disable_tqdm: true}"]
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))

    options = "{text_config.hidden_size: 32,"
    options += " text_config.num_hidden_layers: 1,"
    options += " text_config.num_attention_heads: 2, text_config.intermediate_size: 64,"
    options += " text_config.max_position_embeddings: 320, text_config.subtitles: true}"
    train_stage1(
        RECIPES / "mico-g-stage1.yaml",
        [
            *small,
            f"output={one}",
            f"model={{name: tiny, options: {options}}}",
            f"stage1.tokenizer={words}",
        ],
    )
    pretrained, _ = load_pretraining(one)
    train_stage2(
        RECIPES / "vicuna7b-stage2.yaml",
        [*small, f"output={two}", "model.name=tiny", f"model.encoder={one}", f"model.llm={llama}"],
    )
    chat = MicoChatForConditionalGeneration.from_pretrained(two)
    encoder = pretrained.encoder.state_dict()
    for name, value in chat.encoder.state_dict().items():
        assert torch.equal(value.bfloat16(), encoder[name].bfloat16()), name
    assert chat.concepts is not None
    assert (chat.concepts.name_ids[0] >= 0).any()
    train_stage3(RECIPES / "vicuna7b-stage3.yaml", [*small, f"output={three}", f"model.name={two}"])
    names = {name.split(".")[-3] for name in load_file(three / "lora/adapter_model.safetensors")}
    assert names == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    path = f"{shards}/train-*.tar"
    record = [{"stage": f"stage {n}", "data": [path]} for n in (1, 2, 3)]
    for folder, n in ((one, 1), (two, 2), (three, 3)):
        assert json.loads((folder / "config.json").read_text())["trained_on"] == record[:n]
    merge(three, tmp_path / "merged")
    assemble(one, str(llama), tmp_path / "assembled")
    assert chat_config(tmp_path / "merged").trained_on == record
    assert chat_config(tmp_path / "assembled").trained_on == record[:1]
    for folder in (two, three):
        assert not any(n.startswith("llm.") for n in load_file(folder / "model.safetensors"))


# --- depth by the picture's caption ------------------------------------------------------------

ROOMS = [f"{near} {side}" for near in ("near", "far") for side in ("left", "right", "top", "low")]


def depth_of(room: str) -> bytes:
    """A depth map in millimetres of a thing on one side of a wall."""
    near, side = room.split()
    millimetres = np.full((32, 32), 9000, dtype=np.uint16)
    place: dict[str, Any] = {
        "left": np.s_[:, :12],
        "right": np.s_[:, 20:],
        "top": np.s_[:12],
        "low": np.s_[20:],
    }
    millimetres[place[side]] = 1000 if near == "near" else 5000
    file = io.BytesIO()
    Image.fromarray(millimetres).save(file, "PNG")
    return file.getvalue()


def test_texts_find_depth_maps_whose_pictures_have_the_captions(tmp_path: Path) -> None:
    """R@1 of eight texts is 12.5 % by chance; of maps in another order the model finds no more."""
    samples = [
        Sample(
            room.replace(" ", "-"),
            "train",
            {"image.png": picture("red"), "depth.png": depth_of(room)},
            {"image.png": (room,)},
            (),
        )
        for room in ROOMS
    ]
    write_shard(tmp_path / "rooms.tar", samples)
    words = learn_vocabulary(ROOMS * 9, size=64)
    torch.manual_seed(0)
    model = MicoForPretraining(MicoConfig.tiny(concepts=False))
    start = tmp_path / "start"
    Pretraining(model, words, Preprocessing(image_size=64)).save(start)
    weights = {"weights": dict.fromkeys(("matching", "caption", "tagging", "region"), 0.0)}
    train = {"lr": 3e-3, "steps": 160, "batch_size": 8, "drop": {"modality": 1.0}, "log_steps": 40}
    data = [{"path": str(tmp_path / "rooms.tar"), "modalities": ["depth"]}]
    train_stage1(
        write_recipe(tmp_path, tmp_path, start, data=data, train=train | {"save_steps": 160},
                     stage1=weights)
    )  # fmt: skip
    trained = PretrainedModel(str(tmp_path / "out"))
    found = []
    for room in ROOMS:
        (tmp_path / "depth.png").write_bytes(depth_of(room))
        units = trained.preprocessing.units(decode(MediaFile("depth", tmp_path / "depth.png")))
        found.append(trained.encode([MediumUnits(("depth",), (units,))])[0].vector)
    texts = trained.space.of_texts(trained.space.truncated(ROOMS, 40))
    best = (texts @ torch.stack(found).T).argmax(1)
    rows = torch.arange(len(ROOMS))
    assert (best == rows).float().mean() >= 0.75
    assert (best == rows.roll(3)).float().mean() <= 1 / 8, "the control"
