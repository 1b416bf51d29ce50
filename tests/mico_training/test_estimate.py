"""What a run is said to need: parts, peak, time; without weights, data or a step."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mico_chat.errors import ConfigError
from mico_training import estimate as estimates
from mico_training.estimate import (
    Estimate,
    StepCost,
    estimate,
    inputs,
    large_media,
    of_file,
    pretraining,
    rehearse,
)
from mico_training.recipe import Stage1Run, Stage2Run, Stage3Recipe, Stage3Run, load_recipe
from mico_training.trained import parameter_groups
from mico_training.trainer import training_arguments
from tests.mico_training.test_qlora import batch, grown
from tests.mico_training.test_runs import write_recipe

RECIPES = Path(__file__).parents[2] / "training/recipes"


def stage3(model: dict[str, Any], **train: Any) -> Stage3Run:
    return Stage3Run.model_validate(
        {
            "model": model,
            "output": "none",
            "data": [{"path": "none"}],
            "train": {"lr": 1e-4, "steps": 10, "batch_size": 2, "max_length": 64} | train,
            "expect": {"units": 1},
        }
    )


def sizes(found: Estimate) -> dict[str, float]:
    return {name: size for name, (size, _) in found.memory.items()}


def test_parts_are_counted_as_they_train(llama: Path) -> None:
    """Quantized weights in their bytes, an adapter as a part of its own."""
    model = {"name": "tiny", "llm": str(llama), "llm_dtype": "bfloat16"}
    plain = rehearse(stage3(model)).weights
    packed = rehearse(stage3(model | {"llm_quantization": "nf4"})).weights
    assert list(packed) == ["encoder", "context", "concepts", "bridge", "llm", "lora"]
    assert packed["llm"][0] == plain["llm"][0]
    assert packed["llm"][1] < plain["llm"][1]
    adapter = sum(p.numel() for name, p in grown(None, llama).named_parameters() if "lora_" in name)
    assert packed["lora"] == (adapter, 4 * adapter, adapter)
    assert [packed[name][2] for name in ("encoder", "llm")] == [0, 0]


def test_what_is_kept_is_what_autograd_saves(llama: Path) -> None:
    """The rehearsed activations against those of the real step on the same model."""
    model = {"name": "tiny", "llm": str(llama), "llm_dtype": "bfloat16"}
    recipe = stage3(model, max_length=24)
    said = rehearse(recipe).kept
    real = grown(None, llama)
    kept: dict[int, int] = {}
    owned = {t.untyped_storage().data_ptr() for t in [*real.parameters(), *real.buffers()]}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    real.train()
    given = batch(real, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = real(**given).loss
    assert loss.requires_grad
    assert said == pytest.approx(sum(kept.values()), rel=0.15)


def test_running_again_keeps_less_and_computes_more(llama: Path) -> None:
    model = {"name": "tiny", "llm": str(llama), "llm_dtype": "bfloat16"}
    plain, again = (
        rehearse(stage3(model, gradient_checkpointing=on, max_length=256)) for on in (False, True)
    )
    assert again.kept < 0.7 * plain.kept
    assert again.flops > 1.1 * plain.flops


def test_what_processes_share_is_divided(llama: Path) -> None:
    model = {"name": "tiny", "llm": str(llama)}
    alone = sizes(estimate(stage3(model), gpu="rtx-4090"))
    fsdp = sizes(estimate(stage3(model, parallel="fsdp"), processes=4, gpu="rtx-4090"))
    zero = sizes(estimate(stage3(model, parallel="zero2"), processes=4, gpu="rtx-4090"))
    assert fsdp["llm"] == alone["llm"] / 4
    assert zero["llm"] == alone["llm"]
    assert fsdp["optimizer states"] == zero["optimizer states"] == alone["optimizer states"] / 4
    twice = estimate(stage3(model, accumulation=2), processes=2, gpu="rtx-4090")
    assert twice.tokens == 4 * 2 * 64
    assert twice.seconds == 2 * estimate(stage3(model), gpu="rtx-4090").seconds


def test_a_pair_is_two_rows_beside_a_copy_of_what_trains(llama: Path) -> None:
    recipe = stage3({"name": "tiny", "llm": str(llama)})
    pairs = recipe.model_copy(update={"stage3": Stage3Recipe.model_validate({"dpo": {}})})
    one, two = (estimate(each, gpu="rtx-4090") for each in (recipe, pairs))
    trained = sum(n for _, _, n in one.step.weights.values())
    assert sizes(two)["reference"] == 4 * trained
    assert two.step.flops == pytest.approx(2 * one.step.flops, rel=0.01)


def test_chunks_keep_less_and_many_of_them_cost_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = stage3({"name": "tiny"}, freeze=["encoder.vit.patch_embed", "encoder.stem"])
    content: dict[str, Any] = tiny.model_dump(exclude={"stage3"})

    def cost(chunk: int | None, batch_size: int = 8) -> StepCost:
        train = content["train"] | {"batch_size": batch_size}
        weights = dict.fromkeys(("tagging", "region", "concept"), 0.0)
        stage1 = {"chunk": chunk, "weights": weights, "mask_probability": 1.0}  # no chance
        return rehearse(Stage1Run.model_validate(content | {"train": train, "stage1": stage1}))

    whole, many = cost(None), cost(1)
    assert many.kept < 0.6 * whole.kept
    assert sum(many.peak.values()) < 0.9 * sum(whole.peak.values())
    assert 1.2 * whole.flops < many.flops < 2 * whole.flops
    monkeypatch.setattr(estimates, "REHEARSED", 100)
    exact = cost(1)
    assert (many.tokens, many.units) == (exact.tokens, exact.units)
    assert many.flops == pytest.approx(exact.flops, rel=1e-3)
    most, needed = (sum(one.peak.values()) for one in (many, exact))
    assert 0.98 * needed < most < 1.25 * needed


def test_copies_are_split_over_their_own_processes(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"name": "tiny", "llm": str(llama)}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    alone = sizes(estimate(stage3(model), gpu="rtx-4090"))
    found = sizes(estimate(stage3(model, parallel="hsdp", shard_over=2), 8, gpu="rtx-4090"))
    assert found["llm"] == alone["llm"] / 2
    assert found["optimizer states"] == alone["optimizer states"] / 2
    shared = rehearse(stage3(model, packing=True))
    assert shared.flops == pytest.approx(rehearse(stage3(model)).flops, rel=0.01)


def test_a_gpu_that_nobody_listed(llama: Path) -> None:
    with pytest.raises(ConfigError, match="unknown GPU 'rtx-9090'; the GPUs are rtx-3090"):
        estimate(stage3({"name": "tiny", "llm": str(llama)}), gpu="rtx-9090")


def test_stage_2(llama: Path) -> None:
    content = stage3({"name": "tiny", "llm": str(llama)}).model_dump(exclude={"stage3"})
    two = Stage2Run.model_validate(content)
    assert estimate(two, gpu="l4").peak > 0


def test_stage_1() -> None:
    content = stage3({"name": "tiny"}).model_dump(exclude={"stage3"})
    one = Stage1Run.model_validate(content)
    found = estimate(one, gpu="l4")
    assert {"encoder", "context", "text", "gradients"} <= set(sizes(found))


def test_a_large_sample_is_a_clip_with_its_sound() -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {f"text_config.{key}": n for key, n in (text | {"intermediate_size": 64}).items()}
    model = {"name": "tiny", "options": options}
    content = stage3(model).model_dump(exclude={"stage3", "expect"})

    def units(stage1: dict[str, int], **expect: int) -> list[int]:
        recipe = Stage1Run.model_validate(content | {"stage1": stage1, "expect": expect})
        return [n for _, n in large_media(recipe)]

    assert units({}) == [8, 8]
    assert units({"most_units": 4, "most_slices": 2}) == [4, 2]
    assert units({"most_slices": 0}) == [8]
    assert units({}, units=1) == [1]
    assert units({}, units=0, slices=3) == [3]
    with pytest.raises(ConfigError, match="0 units and None slices are no medium"):
        units({}, units=0)
    both, frames = (
        rehearse(Stage1Run.model_validate(content | {"stage1": {"most_units": 4} | slices}))
        for slices in ({}, {"most_slices": 0})
    )
    assert both.units == 2 * frames.units == 2 * 8  # 4 frames and 4 slices of 2 samples
    assert both.kept > 1.5 * frames.kept
    assert both.flops > 1.5 * frames.flops


def test_a_conversation_may_show_a_clip_with_its_sound(llama: Path) -> None:
    content = stage3({"name": "tiny", "llm": str(llama)}).model_dump()
    content["expect"] |= {"units": 3, "slices": 2}
    assert rehearse(Stage3Run.model_validate(content)).units == 2 * 5
    content["expect"]["length"] = 10  # 3 frames, a sound's 5 tokens, its name's 2
    with pytest.raises(ConfigError, match=r"5 units take 10 tokens, but a sample has 10"):
        rehearse(Stage3Run.model_validate(content))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("finetune-*.yaml")), ids=lambda p: p.stem[9:])
def test_fine_tuning_has_an_estimate_before_its_model_is_there(path: Path) -> None:
    """Its large sample is what it trains on: a picture, slices of a sound, frames with slices."""
    recipe = load_recipe(Stage1Run, path)
    kinds = dict(large_media(recipe))
    stage1 = recipe.stage1
    if "coco" in path.stem or "flickr" in path.stem or "vqav2" in path.stem:
        assert kinds == {"image": 1}
    elif "audiocaps" in path.stem or "clotho" in path.stem:
        assert kinds == {"audio": stage1.most_slices}
    else:
        sound = {"audio": stage1.most_slices} if stage1.most_slices else {}
        assert kinds == {"video": stage1.most_units} | sound
    assert recipe.expect.model == "mico-g-vicuna-7b"
    size = "476" if "coco-captioning" in path.stem else recipe.model.name[len("mico-g-") :]
    assert recipe.expect.options.get("encoder_config.image_size", 224) == int(size or 224)


def test_long_runs_are_in_hours_and_days_and_say_why(llama: Path) -> None:
    recipe = stage3({"name": "tiny", "llm": str(llama)}, steps=10**12)
    text = "\n".join(estimate(recipe, 8, "h100-80gb").lines())
    assert re.search(r"the run .*: [\d,]+ h \([\d.]+ days\) if all samples are large ones", text)
    assert "16 pictures, frames or slices, 1 a sample" in text
    assert "40% of the 989 that h100-80gb's data sheet states" in text


@pytest.mark.slow
def test_the_7b_recipe_names_its_parts_without_a_weight() -> None:
    lines, _ = of_file(
        "train-stage3",
        RECIPES / "vicuna7b-stage3.yaml",
        ["model={name: mico-g-vicuna-7b, llm_dtype: bfloat16, llm_quantization: nf4,"
         " encoder_dtype: bfloat16}", "stage3.lora.r=16", "train.accumulation=1"],
        1,
        "rtx-4090",
    )  # fmt: skip
    text = "\n".join(lines)
    for word in ("1.01 B parameters, bfloat16", "6.74 B parameters, nf4", "lora", "fits into 24"):
        assert word in text


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("mico-b-stage1", Stage1Run, (1e-4, None, 200_000)),
        ("mico-l-stage1", Stage1Run, (1e-4, None, 300_000)),
        ("mico-g-stage1", Stage1Run, (1e-4, None, 300_000)),
        ("vicuna7b-stage2", Stage2Run, (1e-4, 1e-5, 200_000)),
        ("vicuna7b-stage3", Stage3Run, (1e-4, 8e-6, 10_000)),
    ],
)
def test_recipes_of_the_7b_path_have_the_papers_values(name: str, kind: Any, expected: Any) -> None:
    recipe = load_recipe(kind, RECIPES / f"{name}.yaml")
    train = recipe.train
    assert (train.lr, train.end_lr, train.steps) == expected
    if isinstance(recipe, Stage3Run):  # the bridge's own rate is the paper's
        for part in recipe.stage3.trainable:
            assert train.lr * train.lr_multipliers[part] == pytest.approx(1e-5)
    if isinstance(recipe, Stage1Run):
        stage1, arguments = recipe.stage1, dict(train.arguments, use_cpu=True)
        train = train.model_copy(update={"parallel": "ddp", "arguments": arguments, "bf16": False})
        given = training_arguments(recipe.model_copy(update={"train": train}))
        assert given.get_warmup_steps(train.steps) == train.steps // 10
        assert (given.max_grad_norm, stage1.weights.matching, stage1.label_smoothing) == (
            2,
            0.1,
            0.1,
        )
        model, rates = pretraining(recipe), dict[int, float]()
        for group in parameter_groups(model, train):
            rates |= dict.fromkeys(map(id, group["params"]), group["lr"])
        for own, parameter in model.named_parameters():
            slow = name == "mico-g-stage1" and own.startswith("encoder.")
            expected = 5e-7 if slow else 1e-4  # B and L learn to do without RoPE
            assert rates[id(parameter)] == pytest.approx(expected), own
        assert (recipe.stage1.most_units, recipe.stage1.mask_probability) == (8, 0.6)
        assert sum(source.ratio for source in recipe.data) == pytest.approx(1)


def test_a_dry_run_says_what_is_missing(
    tmp_path: Path, shards: Path, tiny_chat: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [{"path": f"{shards}/train-*.tar"}, {"path": f"{tmp_path}/none.tar"}]
    said = inputs("train-stage2", write_recipe(tmp_path, shards, tiny_chat, data=data), [])
    assert said[:2] == ["downloads", "  none"]
    assert f"  {shards}/train-*.tar: 12 samples with a caption" in said
    assert said[-1].startswith(f"  error: {tmp_path}/none.tar: ")
    names = {"encoder_weights": "somebody/vit", "text_weights": str(tmp_path)}
    words = {"tokenizer": "somebody/words"}
    recipe = write_recipe(tmp_path, shards, {"name": "tiny"} | names, stage1=words)
    assert inputs("train-stage1", recipe, [])[1:3] == [
        "  model.encoder_weights: somebody/vit, size unknown",
        "  stage1.tokenizer: somebody/words, size unknown",
    ]
    found = estimate(stage3({"name": "tiny", "llm": str(llama)}), gpu="l4")
    found.check_disk()
    little = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    with pytest.raises(ConfigError, match=r"need [\d,]+ bytes, but 10 are free.*keep_checkpoints"):
        found.check_disk()
