"""The doctor: probes that die, machines of every kind, model folders that are broken."""

import io
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mico_chat.checkpoints.assemble import save_text_branch
from mico_chat.checkpoints.footprint import Serving, meta_chat
from mico_chat.cli import doctor, model_check, probes
from mico_chat.cli import main as cli
from mico_chat.cli.findings import Finding, gigabytes
from mico_chat.cli.main import main
from mico_chat.cli.model_check import fit, read_weights
from mico_chat.cli.probes import run_probe
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.cpu import ControlGroups, memory
from mico_chat.engine.llamacpp_export import gguf_path
from mico_chat.engines.table import ENGINES
from mico_chat.errors import ModelError
from mico_chat.load import EngineOptions
from mico_chat.model.config import MicoChatConfig
from tests.support import replicas
from tests.support.tiny import chat_model, letters, llm_folder, pretraining_model, processor_for

GB = 10**9
BROKEN = {"error": "ImportError: libgomp.so.1: cannot open shared object file"}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MICO_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        ("subprocess.Popen(['sleep', '60']); time.sleep(60)", "no answer within 2 s"),
        ("sys.exit('no such module')", "no such module"),
        ("os._exit(3)", "ended with status 3"),
    ],
)
def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch, script: str, error: str) -> None:
    code = f"import os, signal, subprocess, sys, time; {script}"
    monkeypatch.setattr(probes, "_COMMAND", ("-c", code))
    started = time.monotonic()
    assert run_probe("a", seconds=1.5 if "sleep" in script else 60) == {"error": error}
    assert time.monotonic() - started < 59


def test_real_probes_report_facts_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No module named 'nowhere'" in run_probe("nowhere")["error"]
    assert "decodes a picture" in run_probe("decoder")["text"]
    assert probes.PROBES["torch"]()["gpus"] == [] or torch.cuda.is_available()
    monkeypatch.setenv("MICO_MEDIA_MAX_BYTES", "10")
    assert run_probe("decoder")["error"].startswith("LimitError: made.png")


def test_control_groups_bound_the_memory(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.max").write_text(str(2 * GB))
    (tmp_path / "memory.current").write_text(str(GB // 2))
    assert memory(ControlGroups(tmp_path, tmp_path / "own")) == (3 * GB // 2, 2 * GB)


def test_little_disk_few_cores_and_no_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE_DISK", 10**18)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "processor", lambda: ("A processor", frozenset()))
    found = {finding.name: finding for finding in doctor.machine_findings()}
    assert found["processor"].text.startswith("A processor: 1 of ")
    assert "without AVX2" in found["processor"].text
    assert (found["processor"].mark, found["cache"].mark) == ("warning", "warning")
    assert "MICO_CACHE_DIR" in (found["cache"].fix or "")


@pytest.mark.parametrize(("flags", "ready"), [("avx512f", True), ("avx512f", False), ("", True)])
def test_where_compiling_pays(monkeypatch: pytest.MonkeyPatch, flags: str, ready: bool) -> None:
    monkeypatch.setattr(doctor, "processor", lambda: ("", frozenset({"avx2", flags})))
    monkeypatch.setattr(llama_cpp, "READY_MADE", ready)
    (found,) = (finding for finding in doctor.machine_findings() if finding.name == "processor")
    pays = bool(flags) and ready
    assert (found.mark, found.fix) == (("note", llama_cpp.COMPILE) if pays else ("ok", None))


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    marks = {tmp_path / "a" / "b": "ok", Path("/proc/mico"): "problem"}
    for folder, mark in (marks | {tmp_path / "file" / "cache": "problem"}).items():
        monkeypatch.setenv("MICO_CACHE_DIR", str(folder))
        *_, found = doctor.machine_findings()
        assert (found.mark, "MICO_CACHE_DIR" in (found.fix or "")) == (mark, mark == "problem")
    assert not (tmp_path / "a").exists()


def test_bytes_in_words() -> None:
    said = {0: "0 bytes", 23_040: "23 KB", 999_700_000: "1.0 GB", 640 * GB: "640 GB"}
    assert {n: gigabytes(n) for n in said} == said


def test_cards_by_nvidias_own_program(tmp_path: Path) -> None:
    file = tmp_path / "nvidia-smi"
    assert doctor.nvidia_gpus(str(file)) == ""
    cards = "echo NVIDIA H100; echo NVIDIA L4"
    for script, names in ((cards, "NVIDIA H100, NVIDIA L4"), ("exit 9", "")):
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        assert doctor.nvidia_gpus(str(file)) == names


CARD = {"name": "A card", "total": 24 * GB, "free": 23 * GB, "error": None}


@pytest.mark.parametrize(
    ("facts", "cards", "mark", "said"),
    [
        ({"gpus": [CARD]}, "A", "ok", "23.0 GB free of 24.0 GB"),
        ({"gpus": [{**CARD, "error": "no kernel image"}]}, "A", "problem", "no kernel image"),
        ({}, "A", "warning", "A is there, but torch (a CPU build) cannot use it"),
        ({"build": "CUDA 13"}, "A", "warning", "torch (CUDA 13) cannot use it"),
        ({"mps": True}, "", "ok", "Metal"),
        ({}, "", "note", "none"),
    ],
)
def test_graphics_cards(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], cards: str, mark: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: cards)
    (found,) = doctor.gpu_findings({"gpus": [], "build": None, "mps": False, **facts})
    assert (found.mark, said in found.text) == (mark, True), found.text
    assert (found.fix is not None) == (mark in ("warning", "problem"))


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("torch", ["problem"] * 4),
        ("llamacpp", ["note", "problem", "problem", "problem"]),  # auto would take it
        ("vllm", ["note", "problem", "warning", "problem"]),
        ("bitsandbytes", ["note", "problem", "warning", "problem"]),
    ],
)
def test_engines_that_are_missing_or_broken(name: str, marks: list[str]) -> None:
    cases = product((None, BROKEN), (False, True))
    found = [doctor.engine_finding(name, outcome, wanted) for outcome, wanted in cases]
    assert [finding.mark for finding in found] == marks
    assert all(finding.fix for finding in found)
    assert "libgomp.so.1" in found[2].text
    assert ("--no-binary llama-cpp-python" in (found[2].fix or "")) == (name == "llamacpp")


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    (none,) = doctor.variable_findings()
    assert (none.mark, none.text) == ("ok", "none is set")
    monkeypatch.setenv("MICO_API", "x")
    monkeypatch.setenv("MICO_SERVER_MAX_RUNNING", "3")
    (known,) = doctor.variable_findings()
    assert known.facts["names"] == ["MICO_API", "MICO_SERVER_MAX_RUNNING"]
    monkeypatch.setenv("MICO_SERVER_CONFIG", "/nowhere.toml")
    monkeypatch.setenv("MICO_SERVER_PROT", "1")
    monkeypatch.setenv("MICO_MEDIA_MAX_FRAMES", "many")
    frames, config, unknown = doctor.variable_findings()
    assert [found.mark for found in (frames, config, unknown)] == ["problem", "problem", "warning"]
    assert "got 'many'" in frames.text
    assert "nowhere.toml: no TOML file to read" in config.text
    assert unknown.text == "nothing reads MICO_SERVER_PROT; did you mean MICO_SERVER_PORT?"
    assert unknown.fix == 'export MICO_SERVER_PORT="$MICO_SERVER_PROT"; unset MICO_SERVER_PROT'


def test_the_report() -> None:
    out = io.StringIO()
    broken = Finding("fit", "problem", "words", "serve --model long/name " * 5)
    report = {"One": [Finding("short", "ok", "é")], "Two": [broken, Finding("x", "warning", "c")]}
    doctor.print_report(report, "mini", "llamacpp", out)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["One", "  ok       short  é"]
    assert f"           -> {broken.fix}" in lines  # in one line, to be copied
    assert lines[-2:] == ["1 problem: fit.", "1 warning: x."]


@pytest.mark.parametrize("mark", ["ok", "problem"])
def test_the_exit_code(monkeypatch: pytest.MonkeyPatch, mark: Any) -> None:
    def answer(name: str, model: str, options: dict[str, Any]) -> dict[str, Any]:
        json.dumps(options)  # which go to another process
        assert model == "another"
        engine = Finding("engine", "ok", "-", None, {"engine": "llamacpp"})
        checked = {"findings": [asdict(engine), asdict(Finding("fit", mark, "-"))]}
        facts = {"text": "works", "gpus": [], "mps": False, "build": None}
        return checked if name == "model" else facts

    monkeypatch.setattr(doctor, "run_probe", answer)
    monkeypatch.setenv("MICO_MODEL", "another")
    out = io.StringIO()
    code = doctor.run(None, EngineOptions(), as_json=True, out=out)
    record = json.loads(out.getvalue())
    assert (record["ok"], code) == (mark == "ok", int(mark == "problem"))
    assert (record["model"], record["engine"]) == ("another", "llamacpp")
    assert set(record["findings"]) == {"machine", "engines", "model"}


@pytest.mark.slow
@pytest.mark.base_llm
def test_for_real(
    base_llm_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--engine", "transformers", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert (end.value.code, record["ok"], record["engine"]) == (0, True, "transformers")
    found = {finding["name"]: finding for finding in record["findings"]["model"]}
    assert found["language model"]["facts"]["folder"] == str(base_llm_folder)
    assert 0.5 * GB < found["fit"]["facts"]["needed"] < 2 * GB


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
    """Findings of a model by name, on a machine without a card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def look(model: str | Path, *options: Any, disk: int = 100, free: int = 30) -> dict[str, Any]:
        monkeypatch.setattr(model_check, "memory", lambda: (free * GB, 32 * GB))
        monkeypatch.setattr(model_check, "disk_free", lambda _: disk * GB)
        facts = probes.PROBES["model"](str(model), asdict(EngineOptions(*options)))
        findings = [Finding(**record) for record in json.loads(json.dumps(facts["findings"]))]
        return {finding.name: finding for finding in findings}

    return look


def problems(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if finding.mark == "problem"]


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_whole_model(folder: Path, tmp_path: Path, examine: Examine) -> None:
    found = examine(folder, "transformers")
    assert problems(found) == []
    assert found["engine"].facts["engine"] == "transformers"
    assert "as the config has them" in found["checkpoint"].text
    assert found["fit"].text.startswith("fits: ")
    whole = tmp_path / "whole"  # with its language model inside
    chat_model().save_pretrained(whole)
    processor_for(MicoChatConfig.from_pretrained(whole)).save_pretrained(whole)
    assert problems(examine(whole, "transformers")) == []


def test_another_projects_model_is_tried(tmp_path: Path, examine: Examine) -> None:
    folder = replicas.build("gemma3", tmp_path / "gemma3")
    found = examine(folder, "transformers")
    assert found["engine"].facts["engine"] == "transformers"
    assert "run alone, without batching: tokens of a medium attend" in found["trial"].text
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert problems(examine(folder, "transformers")) == ["trial"]
    assert examine(folder, "transformers", free=0)["trial"].mark == "note", "it is not loaded"


def test_models_that_are_not_here(
    tmp_path: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "no model 'maxi'" in examine("maxi")["folder"].text
    assert examine(llm_folder(tmp_path / "llm"))["folder"].mark == "ok"  # it reads text alone
    there = examine("someone/something")["folder"]
    assert (there.mark, there.fix) == ("warning", "hf download someone/something")
    mini = examine("mini", "transformers")
    assert problems(mini) == ["language model"]
    assert mini["language model"].fix == "mico-chat setup"
    assert mini["fit"].mark == "ok"  # its weights are known all the same


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("lost", "is missing in the file"),
        ("more", "but nothing by the config"),
        ("shape", "(1, 2, 3) in the file but"),
        ("no llm", "the files hold none"),
        ("text branch", "model.safetensors is not whole"),
    ],
)
def test_a_broken_checkpoint(folder: Path, examine: Examine, damage: str, said: str) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    name = sorted(state)[0]
    if damage == "no llm":
        change_config(folder, base_llm=None)
    elif damage == "text branch":
        beside = save_text_branch(pretraining_model(), letters(), folder)
        (beside / "model.safetensors").write_bytes(b"")
    else:
        state |= {"bridge.unknown": torch.zeros(1)} if damage == "more" else {}
        state |= {name: torch.zeros(1, 2, 3)} if damage == "shape" else {}
        if damage == "lost":
            del state[name]
        save_file(state, file, {"format": "pt"})
    found = examine(folder, "transformers")["checkpoint"]
    assert (found.mark, said in found.text) == ("problem", True), found.text


def test_the_language_model_and_the_adapter(folder: Path, tmp_path: Path, examine: Examine) -> None:
    weights = tmp_path / "llm" / "model.safetensors"
    (folder / "lora").mkdir()
    assert "adapter_model.safetensors is missing" in examine(folder)["adapter"].text
    save_file({"a": torch.zeros(1)}, folder / "lora" / "adapter_model.safetensors")
    assert examine(folder)["adapter"].mark == "ok"
    weights.rename(tmp_path / "llm" / "pytorch_model.bin")
    assert examine(folder)["language model"].mark == "warning"
    weights.write_bytes(b"cut")
    assert examine(folder)["language model"].mark == "problem"
    shutil.move(tmp_path / "llm", folder / "llm")
    change_config(folder, base_llm="llm")
    assert str(folder / "llm") in examine(folder)["language model"].text
    (folder / "tokenizer.json").unlink()
    assert examine(folder)["processor"].mark == "problem"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("transformers", "Q4_0"), "known are"),
        (("auto", "Q3"), "known are"),
        (("transformers", None, None, "tpu9"), "no device 'tpu9' here"),
    ],
)
def test_options_that_there_are_not(
    folder: Path, examine: Examine, options: tuple[Any, ...], said: str
) -> None:
    found = examine(folder, *options)
    assert (problems(found), said in found["engine"].text) == (["engine"], True)


def test_llama_cpp_and_its_file(folder: Path, cache: Path, examine: Examine) -> None:
    pytest.importorskip(llama_cpp.PACKAGE)
    assert examine(folder, "llamacpp")["GGUF"].mark == "note"
    assert examine(folder, "llamacpp", disk=0)["GGUF"].mark == "problem"
    assert examine(folder, "llamacpp", free=0)["GGUF"].mark == "problem"
    file = gguf_path(folder, "Q8_0")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"12345")
    assert examine(folder, "llamacpp")["GGUF"].mark == "ok"
    change_config(folder, gguf_quantization="Q4_0")  # trained for another
    assert examine(folder, "llamacpp")["GGUF"].mark == "note"
    file.rename(gguf_path(folder, "Q4_0"))
    assert examine(folder, "llamacpp")["GGUF"].mark == "ok"
    config = json.loads((folder / "config.json").read_text())["llm_config"]
    change_config(folder, llm_config=config | {"hidden_act": "gelu"})
    engine = examine(folder)["engine"]
    assert engine.facts["engine"] == "transformers"
    assert "supports the activation 'silu', not 'gelu'" in engine.text
    assert examine(folder, "llamacpp")["engine"].mark == "problem"


def test_weight_files(tmp_path: Path) -> None:
    file, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"

    def refused(said: str) -> None:
        with pytest.raises(ModelError, match=said):
            read_weights(tmp_path)

    refused("model.safetensors is missing")
    save_file({"a.weight": torch.zeros(3, 4), "b": torch.zeros(5)}, file)
    whole = file.read_bytes()
    assert read_weights(tmp_path) == (len(whole), {"a.weight": (3, 4), "b": (5,)})
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for content in (b"", whole[:5], whole[:-1], whole + b"more", pointer):
        file.write_bytes(content)
        refused("is not whole, or a Git LFS pointer")
    for broken in ("{", '{"weight_map": 3}', "{}"):
        index.write_text(broken)
        refused("is no index of weight files")
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    refused("2.safetensors is missing")
    save_file({"c": torch.zeros(2)}, tmp_path / "2.safetensors")
    refused("names b, which is in no file")


@pytest.fixture(scope="module")
def vicuna() -> Serving:
    return Serving.of(meta_chat(MicoChatConfig.named("mico-g-vicuna-7b")), torch.bfloat16)


@pytest.mark.parametrize(
    ("free", "said", "fix"),
    [
        (24, "need 18.5 GB with transformers; memory has 24.0 GB free of 64.0 GB", None),
        (16, "fits in int8", "mico-chat serve --model 7b --quantization int8"),
        (10, "fits in nf4", "mico-chat serve --model 7b --quantization nf4"),
        (2, "needs at least 9.1 GB", "a machine with more memory, or a smaller model"),
    ],
)
def test_does_it_fit(vicuna: Serving, free: int, said: str, fix: str | None) -> None:
    found = fit(vicuna, "7b", ENGINES["transformers"], "bfloat16", "memory", free * GB, 64 * GB)
    assert said in found.text
    assert found.fix == fix
