"""A quantized language model trains its adapter and the bridge; layers may run again."""

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.engine.llamacpp_export import export_gguf, gguf_path
from mico_chat.errors import ConfigError
from mico_training.build_model import USUAL_TARGETS, add_lora, build_chat
from mico_training.parts.rounded import round_layers
from mico_training.recipe import LoraRecipe, ModelRecipe
from mico_training.stages import train_stage2, train_stage3
from mico_training.trained import Modes, checkpoint_activations, train_only
from tests.engine.llama.test_gguf_export import add_lora as add_random_lora
from tests.engine.llama.test_gguf_export import checkpoint
from tests.mico_training.test_runs import logged, losses, write_recipe
from tests.support.tiny import chat_model


def write(folder: Path, shards: Path, llm: Path, **sections: Any) -> Path:
    """A recipe of the tiny configuration on a language model of its own."""
    model = {"name": "tiny", "llm": str(llm), "llm_dtype": "bfloat16"} | sections.pop("model", {})
    return write_recipe(folder, shards, model, **sections)


def test_qlora_leaves_an_adapter_for_the_whole_model(
    tmp_path: Path, shards: Path, llama: Path
) -> None:
    train_stage3(write(tmp_path, shards, llama, model={"llm_quantization": "int8"}))
    saved = load_file(tmp_path / "out/checkpoint-4/model.safetensors")
    assert all(name.startswith("bridge.") or "lora_" in name for name in saved)
    assert any("lora_" in name for name in saved)
    assert not any(n.startswith("llm.") for n in load_file(tmp_path / "out/model.safetensors"))
    whole = MicoChatForConditionalGeneration.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    moved = {n for n, value in whole.llm.state_dict().items() if not torch.equal(value, plain[n])}
    assert {name.split(".")[-2] for name in moved} == set(USUAL_TARGETS)


@pytest.mark.parametrize(("quantization", "again"), [("nf4", True), ("int8", False)])
def test_qlora_learns_a_batch_by_heart(llama: Path, quantization: str, again: bool) -> None:
    torch.manual_seed(0)
    model = grown(quantization, llama)
    if again:
        checkpoint_activations(model)
    modes, given = Modes(model), batch(model, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(40):
        model.train()
        modes.set()
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


NAMES = {
    **{"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"},
    **{"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
}


def test_training_computes_with_the_numbers_of_the_served_file(tmp_path: Path) -> None:
    """Both of layers with an adapter and of layers without one."""
    folder = checkpoint(tmp_path)
    add_random_lora(folder)
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    adapted = PeftModel.from_pretrained(llm, str(folder / "lora"), is_trainable=True)
    layers = [
        (f"blk.{n}.{theirs}.weight", layer.get_submodule(ours))
        for n, layer in enumerate(llm.model.layers)
        for ours, theirs in NAMES.items()
    ]
    plain = [weights_of(layer) for _, layer in layers]
    assert round_layers(adapted, "Q4_0", "key") == 7 * len(llm.model.layers)
    file = export_gguf(folder, tmp_path / "tiny.gguf", "Q4_0")
    served = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    for (name, layer), before in zip(layers, plain, strict=True):
        torch.testing.assert_close(weights_of(layer), torch.from_numpy(served[name]))
        assert (weights_of(layer) - before).abs().max() > 0.01 * before.abs().max()


def weights_of(layer: torch.nn.Module) -> torch.Tensor:
    columns = layer.get_parameter("weight").shape[1]
    found: torch.Tensor = layer(torch.eye(columns))
    return found.T.detach()


def test_rounded_layers_learn_and_are_saved_as_they_are(
    tmp_path: Path, shards: Path, llama: Path
) -> None:
    def run(name: str, **stage3: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
        train_stage3(write(tmp_path / name, shards, llama, stage3=stage3, train={"lr": 0.01}))
        return losses(tmp_path / name), load_file(tmp_path / name / "out/model.safetensors")

    rounded, saved = run("rounded", quantization="Q4_0")
    plain, usual = run("plain")
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.1)
    assert saved.keys() == usual.keys()
    names = [gguf_path(tmp_path / name / "out").stem[-4:] for name in ("rounded", "plain")]
    assert names == ["Q4_0", "Q8_0"]  # it is served as it was trained
    lora = load_file(tmp_path / "rounded/out/lora/adapter_model.safetensors")
    assert all(value.any() for name, value in lora.items() if "lora_B" in name)


def test_layers_that_cannot_be_rounded(tmp_path: Path, shards: Path, llama: Path) -> None:
    both = write(tmp_path, shards, llama, model={"llm_quantization": "int8"})
    with pytest.raises(ConfigError, match=r"stage3\.quantization Q4_0 .*llm_quantization int8"):
        train_stage3(both, ["stage3.quantization=Q4_0"])
    llm = torch.nn.Sequential(torch.nn.Linear(48, 64))
    with pytest.raises(ConfigError, match="0 has 48 columns, no multiple of 32"):
        round_layers(llm, "Q4_0", "stage3.quantization")


@pytest.mark.parametrize("stage", [train_stage2, train_stage3])
def test_layers_that_run_again_give_the_same_losses(
    tmp_path: Path, shards: Path, llama: Path, stage: Any
) -> None:
    for again in ("false", "true"):
        recipe = write(tmp_path / again, shards, llama, model={"llm_quantization": "nf4"})
        stage(recipe, [f"train.gradient_checkpointing={again}"])
    assert losses(tmp_path / "false") == losses(tmp_path / "true")
    saved = load_file(tmp_path / "true/out/checkpoint-4/model.safetensors")
    assert any("lora_" in name for name in saved) == (stage is train_stage3)


def grown(quantization: str | None, llm: Path) -> MicoChatForConditionalGeneration:
    options = {"llm_dtype": "bfloat16", "llm_quantization": quantization}
    recipe = ModelRecipe.model_validate({"name": "tiny", "llm": str(llm)} | options)
    model = build_chat(recipe).model
    train_only(model, ["bridge"])
    add_lora(model, LoraRecipe())
    return model


def batch(model: MicoChatForConditionalGeneration, pictures: int) -> dict[str, torch.Tensor]:
    length = model.config.context_length("image", 1)
    ids = torch.randint(5, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, -6:] = ids[:, -6:]
    given = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if pictures:
        ids[:, 2 : 2 + length] = model.config.context_token_id
        given |= {
            "pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)),
            "media_kind": torch.zeros(2, dtype=torch.long),
            "media_units": torch.ones(2, dtype=torch.long),
            "media_row": torch.arange(2),
        }
    return given


def test_a_batch_of_text_alone_takes_no_gradient_away(llama: Path) -> None:
    """In evaluation mode bitsandbytes would repack the first layer's weights for inference."""
    model = grown("nf4", llama)
    modes = Modes(model)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()
        modes.set()
        model(**batch(model, 1)).loss.backward()
        gradients.append(model.bridge.proj_out.weight.grad.clone())  # type: ignore[union-attr]
        model(**batch(model, 0)).loss.backward()
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_only_what_is_frozen_stands_still(llama: Path) -> None:
    model = grown("nf4", llama)
    checkpoint_activations(model)
    modes = Modes(model)
    model.train()
    modes.set()
    training = {name for name, module in model.named_modules() if module.training}
    assert "bridge.layers.0" in training
    assert not any(name.startswith("encoder") for name in training)
    layers = model.llm.get_decoder().layers
    assert all(layer.training and layer.gradient_checkpointing for layer in layers)
    assert not any(layer.input_layernorm.training for layer in layers)
    lora = [p for name, p in model.llm.named_parameters() if "lora_" in name]
    assert lora
    assert all(parameter.dtype == torch.float32 for parameter in lora)


def test_no_graph_is_kept_through_a_frozen_encoder() -> None:
    model = chat_model()
    train_only(model, ["bridge"])
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model.encoder.features(torch.randn(2, 3, 64, 64))
        tokens = model.encoder(features)
        assert not kept
        assert not tokens.requires_grad
        model(**batch(model, 1))
    assert kept


def test_an_encoder_that_trains_runs_again() -> None:
    gradients: list[list[torch.Tensor | None]] = []
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[-1] += tensor.numel()
        return tensor

    for again in (False, True):
        model = chat_model()
        train_only(model, ["encoder.vit", "bridge"])
        if again:
            checkpoint_activations(model)
        model.train()
        saved.append(0)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch(model, 1)).loss
        loss.backward()
        gradients.append([p.grad for p in model.encoder.vit.parameters()])
    assert any(gradient is not None for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert saved[1] < saved[0]


def test_a_frozen_encoder_may_be_held_in_half(tmp_path: Path, shards: Path, llama: Path) -> None:
    recipe = write(tmp_path, shards, llama, model={"encoder_dtype": "bfloat16"})
    train_stage3(recipe)
    half = losses(tmp_path)
    train_stage3(write(tmp_path / "whole", shards, llama))
    assert half == pytest.approx(losses(tmp_path / "whole"), rel=0.02)
    with pytest.raises(ConfigError, match="the encoder is trained, so it needs float32"):
        train_stage2(recipe, [f"output={tmp_path / 'no'}", "stage2.trainable=[encoder]"])


def test_what_cannot_be_quantized_is_refused(
    tmp_path: Path, shards: Path, llama: Path, tiny_chat: Path
) -> None:
    recipe = write(tmp_path, shards, llama, model={"llm_quantization": "nf4"})
    with pytest.raises(ConfigError, match="freezes them"):
        train_stage3(recipe, ["stage3.full=true"])
    with pytest.raises(ConfigError, match="holds its language model itself"):
        train_stage2(recipe, [f"model={{name: {tiny_chat}, llm_quantization: nf4}}"])
    with pytest.raises(ConfigError, match=r"set train\.gradient_checkpointing instead"):
        train_stage2(recipe, ["train.arguments.gradient_checkpointing=true"])


@pytest.mark.parametrize(
    ("schedule", "last"), [("linear", 1 / 6), ("cosine", (1 + math.cos(math.pi * 5 / 6)) / 2)]
)
def test_a_schedule_ends_at_its_rate(
    tmp_path: Path, shards: Path, llama: Path, schedule: str, last: float
) -> None:
    recipe = write(tmp_path, shards, llama, train={"schedule": schedule, "end_lr": 1e-5})
    train_stage2(recipe, ["train.steps=8", "train.warmup_steps=2"])
    rates = [entry["learning_rate"] for entry in logged(tmp_path)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5 + (1e-3 - 1e-5) * last)  # one step before the end
