"""A model's folder: whole or not, which engine, does it fit."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mico_chat.checkpoints.assemble import save_text_branch
from mico_chat.cli.doctor.finding import Finding
from mico_chat.cli.doctor.model import probe_model
from mico_chat.load import EngineOptions
from mico_chat.model.config import MicoChatConfig
from tests.doctor.fakes import GB
from tests.tiny import chat_model, letters, llm_folder, pretraining_model, processor_for

Examine = Callable[..., dict[str, Finding]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose language model lies beside it."""
    config = MicoChatConfig.tiny()
    config.base_llm = str(llm_folder(tmp_path / "llm"))
    chat_model(config).save_pretrained(tmp_path / "model")
    processor_for(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def examine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Findings of a model by name, on a machine without a card; the engine as ``engine_taken``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def look(model: str | Path, *options: str | None, **asked: Any) -> dict[str, Finding]:
        usual = {
            "memory": {"free": 30 * GB, "most": 32 * GB},
            "disk_free": 100 * GB,
            "offline": False,
        }
        facts = probe_model(
            {"model": str(model), "options": asdict(EngineOptions(*options)), **usual, **asked}  # type: ignore[arg-type]
        )
        findings = [Finding.of(json.loads(json.dumps(record))) for record in facts["findings"]]
        taken = Finding("engine_taken", "note", str(facts["engine"]))
        return {finding.name: finding for finding in [*findings, taken]}

    return look


def problems(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if finding.mark == "problem"]


def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "llama_cpp" else find(name, package),
    )


def test_a_whole_model(folder: Path, examine: Examine) -> None:
    found = examine(folder, "transformers")
    assert problems(found) == []
    assert found["engine_taken"].text == "transformers"
    assert "as the config has them" in found["checkpoint"].text
    assert found["fit"].text.startswith("fits: bfloat16 with transformers needs")
    assert found["weights"].facts["parameters"]["llm"] > 0


def test_a_model_that_there_is_not(examine: Examine) -> None:
    found = examine("maxi")
    assert problems(found) == ["folder"]
    assert "no model 'maxi'" in found["folder"].text
    assert found["engine_taken"].text == "None"


def test_a_folder_of_something_else(tmp_path: Path, examine: Examine) -> None:
    found = examine(llm_folder(tmp_path / "llm"))
    assert "a model of type 'llama', expected 'mico_chat'" in found["folder"].text
    assert problems(found) == ["folder"]


def test_a_hub_name_that_is_not_in_the_cache(
    tmp_path: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = examine("someone/something")["folder"]
    assert (found.mark, found.mend) == ("warning", "hf download someone/something")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = examine("someone/something", offline=True)["folder"]
    assert found.mark == "problem"
    assert "(HF_HUB_OFFLINE)" in found.text


def test_the_mini_before_setup(examine: Examine) -> None:
    found = examine("mini", "transformers")
    assert problems(found) == ["language model"]
    assert found["language model"].mend == "mico-chat setup"
    assert found["fit"].mark == "ok"  # its weights are known all the same


# --- whole --------------------------------------------------------------------------------------


def test_broken_weights(folder: Path, examine: Examine) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    found = examine(folder)
    assert problems(found) == ["checkpoint"]
    assert "model.safetensors is not whole" in found["checkpoint"].text
    assert str(folder) in found["checkpoint"].text


@pytest.mark.parametrize("change", ["lost", "more", "shape"])
def test_weights_of_another_model(folder: Path, examine: Examine, change: str) -> None:
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[0]
    if change == "lost":
        del state[name]
    elif change == "more":
        state["bridge.unknown"] = torch.zeros(1)
    else:
        state[name] = torch.zeros(1, 2, 3)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    found = examine(folder)["checkpoint"]
    assert found.mark == "problem"
    said = {"lost": "in no file", "more": "not in the model", "shape": "by the config"}[change]
    assert said in found.text


def test_a_model_that_holds_its_llm(tmp_path: Path, examine: Examine) -> None:
    model = chat_model()
    model.save_pretrained(tmp_path)
    assert isinstance(model.config, MicoChatConfig)
    processor_for(model.config).save_pretrained(tmp_path)
    assert problems(examine(tmp_path, "transformers")) == []
    config = json.loads((tmp_path / "config.json").read_text())
    config["base_llm"] = "llm"  # and there is none
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert examine(tmp_path, "transformers")["language model"].mark != "ok"


def test_files_that_hold_no_llm_though_no_other_is_named(folder: Path, examine: Examine) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["base_llm"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert "the files hold none" in examine(folder, "transformers")["checkpoint"].text


def test_an_llm_in_the_checkpoints_own_folder(
    folder: Path, tmp_path: Path, examine: Examine
) -> None:
    shutil.move(tmp_path / "llm", folder / "llm")
    config = json.loads((folder / "config.json").read_text())
    config["base_llm"] = "llm"
    (folder / "config.json").write_text(json.dumps(config))
    found = examine(folder, "transformers")["language model"]
    assert found.facts["folder"] == str(folder / "llm")


def test_an_llm_that_is_cut(folder: Path, tmp_path: Path, examine: Examine) -> None:
    file = tmp_path / "llm" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    found = examine(folder, "transformers")
    assert problems(found) == ["language model"]


def test_an_llm_in_pickled_files(folder: Path, tmp_path: Path, examine: Examine) -> None:
    (tmp_path / "llm" / "model.safetensors").rename(tmp_path / "llm" / "pytorch_model.bin")
    assert examine(folder, "transformers")["language model"].mark == "warning"


def test_a_text_branch_and_an_adapter(folder: Path, examine: Examine) -> None:
    beside = save_text_branch(pretraining_model(), letters(), folder)
    assert "a text branch" in examine(folder)["checkpoint"].text
    (beside / "model.safetensors").write_bytes(b"")
    assert examine(folder)["checkpoint"].mark == "problem"
    (folder / "lora").mkdir()
    assert "no adapter_model.safetensors" in examine(folder)["adapter"].text
    save_file({"a": torch.zeros(1)}, folder / "lora" / "adapter_model.safetensors")
    assert "no adapter_config.json" in examine(folder)["adapter"].text
    (folder / "lora" / "adapter_config.json").write_text("{}")
    assert examine(folder)["adapter"].mark == "ok"


def test_no_tokenizer(folder: Path, examine: Examine) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert examine(folder)["processor"].mark == "problem"


# --- which engine, and does it fit --------------------------------------------------------------


def test_auto_without_llama_cpp(
    folder: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    found = examine(folder)
    assert found["engine_taken"].text == "transformers"
    assert "llama-cpp-python is not installed" in found["engine"].text
    asked = examine(folder, "llamacpp")["engine"]
    assert asked.mark == "problem"
    assert "pip install 'mico-chat[llamacpp]'" in asked.text


def test_an_llm_that_llama_cpp_has_not(
    folder: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    found = examine(folder)
    assert found["engine_taken"].text == "transformers"
    assert "GGUF export supports the activation 'silu', not 'gelu'" in found["engine"].text
    assert examine(folder, "llamacpp")["engine"].mark == "problem"


def test_a_gguf_file_that_the_first_start_makes(
    folder: Path, cache: Path, examine: Examine
) -> None:
    pytest.importorskip("llama_cpp")
    found = examine(folder, "llamacpp")["GGUF"]
    assert (found.mark, found.facts["there"]) == ("note", False)
    for little in ({"disk_free": 10}, {"memory": {"free": 10, "most": 10}}):
        assert examine(folder, "llamacpp", **little)["GGUF"].mark == "problem"
    file = Path(found.facts["file"])
    assert file.parent == cache / "gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"12345")
    assert examine(folder, "llamacpp")["GGUF"].mark == "ok"


@pytest.mark.parametrize(
    ("engine", "quantization"), [("transformers", "Q4_0"), ("auto", "Q3"), ("auto", "nf4 ")]
)
def test_a_quantization_that_there_is_not(
    folder: Path, examine: Examine, engine: str, quantization: str
) -> None:
    found = examine(folder, engine, quantization)
    assert problems(found) == ["engine"]
    assert "known are" in found["engine"].text


def test_a_device_that_there_is_not(folder: Path, examine: Examine) -> None:
    found = examine(folder, "transformers", None, None, "tpu9")
    assert problems(found) == ["engine"]
    assert "no device 'tpu9' here" in found["engine"].text


def test_two_gigabytes_of_memory(tmp_path: Path, examine: Examine) -> None:
    """A folder with the 7B model's config alone: its weights are known without its weights."""
    MicoChatConfig.named("mico-g-vicuna-7b").save_pretrained(tmp_path)
    little = {"memory": {"free": 2 * GB, "most": 2 * GB}}
    found = examine(tmp_path, "transformers", **little)["fit"]
    assert found.mark == "problem"
    assert "needs 18.4 GB, 2.0 GB of memory are free" in found.text
    more = {"memory": {"free": 10 * GB, "most": 16 * GB}}
    found = examine(tmp_path, "transformers", **more)["fit"]
    assert "fits in 4 bit, nf4" in found.text
    assert found.mend == f"mico-chat serve --model {tmp_path} --quantization nf4"
    assert examine(tmp_path, "transformers", "nf4", **more)["fit"].mark == "ok"
