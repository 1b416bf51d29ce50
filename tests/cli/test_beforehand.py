"""What is known of a model before it is loaded."""

import json
from pathlib import Path

import pytest

from mico_chat.checkpoints.folders import model_name
from mico_chat.engine.cpu import memory
from mico_chat.errors import ModelError
from mico_chat.load import EngineOptions, input_modalities, needed_bytes, usable_bytes
from mico_chat.media.kinds import KINDS, Kind
from tests.support.tiny import saved

TRANSFORMERS = EngineOptions("transformers")


def folder_of(folder: Path, *architectures: str, weights: int = 0) -> Path:
    config = {"model_type": "other", "architectures": architectures}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"0" * weights)
    (folder / "pytorch_model.bin").write_bytes(b"0" * weights)  # the same ones again
    return folder


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("Qwen2AudioForConditionalGeneration", ("audio", "document")),
        ("SmolVLMForConditionalGeneration", ("image", "depth", "normal", "document")),
        ("Qwen2_5OmniThinkerForConditionalGeneration", KINDS),
        ("LlamaForCausalLM", ("document",)),
        ("NobodyKnowsThis", ()),
    ],
)
def test_what_a_model_reads_is_known_from_its_config(
    tmp_path: Path, architecture: str, kinds: tuple[Kind, ...]
) -> None:
    assert input_modalities(folder_of(tmp_path, architecture)) == kinds


def test_our_own_read_everything() -> None:
    assert input_modalities("mini") == KINDS


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: this is no JSON"):
        input_modalities(tmp_path)


def test_an_unknown_name_is_reported() -> None:
    with pytest.raises(ModelError, match="no model 'minni'"):
        needed_bytes("minni", TRANSFORMERS)


def test_the_memory_of_other_models_is_that_of_one_set_of_weights(tmp_path: Path) -> None:
    assert needed_bytes(folder_of(tmp_path, "LlamaForCausalLM", weights=1000), TRANSFORMERS) == 1000


def test_the_memory_of_ours_is_the_doctors_estimate(tmp_path: Path) -> None:
    folder = saved(tmp_path / "tiny")
    weights = (folder / "model.safetensors").stat().st_size
    plain = needed_bytes(folder, EngineOptions("transformers", dtype="float32"))
    assert weights < plain < weights + 20_000_000
    assert needed_bytes(folder, EngineOptions("transformers", quantization="nf4")) < plain


def test_models_take_most_of_the_memory_together() -> None:
    assert 0 < usable_bytes(EngineOptions("transformers", device="cpu")) < memory()[1]


def test_names(tmp_path: Path) -> None:
    assert model_name(tmp_path) == tmp_path.name
    assert model_name("mini") == "mini"
    assert model_name("org/model") == "org/model"
