"""The doctor: probes that die, machines of every kind, model folders that are broken."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import shutil
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mico_chat.checkpoints.assemble import save_text_branch
from mico_chat.checkpoints.footprint import Serving, meta_chat
from mico_chat.cli import doctor, model_check, probes
from mico_chat.cli import main as cli
from mico_chat.cli.main import main
from mico_chat.cli.model_check import count, fit_finding, read_weights, weights_finding
from mico_chat.cli.probes import Finding, Outcome, gigabytes, run_probes
from mico_chat.engine.cpu import ControlGroups
from mico_chat.errors import LimitError
from mico_chat.load import EngineOptions
from mico_chat.model.config import MicoChatConfig
from mico_server.settings import ServerSettings, read_settings
from tests.tiny import chat_model, letters, llm_folder, pretraining_model, processor_for

GB = 10**9
SERVER = (ServerSettings, read_settings)
BROKEN = Outcome(None, "ImportError: libgomp.so.1: cannot open shared object file")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MICO_")]:
        monkeypatch.delenv(name)


# --- probes ---------------------------------------------------------------------------------------

PRELUDE = (
    "import json, os, signal, subprocess, sys, time\n"
    "say = lambda **line: print(json.dumps(line), flush=True)\n"
    "say(name='a'); say(name='a', facts={'n': 1}); say(name='b');"
)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("os.kill(os.getpid(), signal.SIGILL)", "killed by SIGILL"),
        ("subprocess.Popen(['sleep', '60']); time.sleep(60)", "no answer within 2 s"),
        ("sys.exit('no such module')", "ended with status 1: no such module"),
        ("os._exit(3)", "ended with status 3: it said nothing"),
    ],
)
def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch, script: str, error: str) -> None:
    monkeypatch.setattr(probes, "_MAIN", PRELUDE + script)
    started = time.monotonic()
    found = run_probes(["a", "b", "c"], {}, 1.5 if "sleep" in script else 60)
    assert found["a"].facts == {"n": 1}
    assert found["b"].error == error
    assert found["c"].error == "not tried: b ended the process"
    assert time.monotonic() - started < 30


def test_real_probes_report_facts_and_errors() -> None:
    found = run_probes(["codecs", "no such probe", "decoder"], {}, 60)
    assert found["codecs"].facts is not None
    assert found["codecs"].facts["missing"] == []
    assert found["no such probe"].error == "KeyError: 'no such probe'"
    assert found["decoder"].facts is not None


def test_engines_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probes.probe_torch({})["threads"] >= 1
    assert "computes on" in probes.probe_transformers({})["text"]
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, x: x.new_full((*x.shape[:-1], 64), torch.nan)
    )
    with pytest.raises((ArithmeticError, RuntimeError)):
        probes.probe_transformers({})


def test_optional_engines_here() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("llama_cpp")
    assert 0.01 < probes.probe_bitsandbytes({})["error"] < 0.2  # 4 bit it was, and 4 bit well
    assert probes.probe_llamacpp({})["features"]


def test_media_limits_and_missing_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probes.CODECS, "no_such_codec", "Theirs")
    found = doctor.probe_finding("codecs", Outcome(probes.probe_codecs({})), "mend it")
    assert (found.mark, found.fix) == ("warning", "mend it")
    assert "missing are Theirs" in found.text
    monkeypatch.setenv("MICO_MEDIA_MAX_BYTES", "100")
    with pytest.raises(LimitError):
        probes.probe_decoder({})


# --- the machine ----------------------------------------------------------------------------------


def test_control_groups_bound_the_memory(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.max").write_text(str(2 * GB))
    (tmp_path / "memory.current").write_text(str(GB // 2))
    assert doctor.memory(ControlGroups(tmp_path, tmp_path / "own")) == (2 * GB, 3 * GB // 2)


def test_little_disk_few_cores_and_no_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE_DISK", 10**18)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "processor", lambda: ("A processor", frozenset()))
    found = {finding.name: finding for finding in doctor.machine_findings()}
    assert "A processor: 1 core of 8; without AVX2" in found["processor"].text
    assert (found["processor"].mark, found["disk"].mark) == ("warning", "warning")
    assert "MICO_CACHE_DIR" in (found["disk"].fix or "")


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "0 bytes"), (23_040, "23 KB"), (999_700_000, "1.0 GB"), (640 * GB, "640 GB")],
)
def test_bytes_in_words(n: int, said: str) -> None:
    assert gigabytes(n) == said


@pytest.mark.parametrize(
    ("script", "names"),
    [("echo 'NVIDIA H100'; echo 'NVIDIA L4'", ["NVIDIA H100", "NVIDIA L4"]), ("exit 9", [])],
)
def test_cards_by_nvidias_own_program(tmp_path: Path, script: str, names: list[str]) -> None:
    file = tmp_path / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    assert doctor.nvidia_gpus(str(file)) == names
    assert doctor.nvidia_gpus(str(tmp_path / "nowhere")) == []


CARD = {"name": "A card", "total": 24 * GB, "free": 23 * GB, "capability": "8.9", "error": None}
TORCH = {"version": "2.13", "mps": False, "gpu_build": None, "gpu_error": None, "hidden": None}


@pytest.mark.parametrize(
    ("facts", "cards", "mark", "said"),
    [
        ({"gpus": [CARD], "gpu_build": "CUDA 12.8"}, ["A"], "ok", "23.0 GB free of 24.0 GB"),
        ({"gpus": [{**CARD, "error": "no kernel image"}]}, ["A"], "problem", "no kernel image"),
        ({}, ["A"], "warning", "A is there, but torch 2.13 is a CPU build"),
        ({"gpu_build": "CUDA 12", "hidden": ""}, ["A"], "warning", "CUDA_VISIBLE_DEVICES='' hides"),
        ({"gpu_build": "CUDA 13", "gpu_error": "driver too old"}, ["A"], "warning", "too old"),
        ({"mps": True}, [], "ok", "Metal"),
        ({}, [], "note", "none"),
    ],
)
def test_graphics_cards(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], cards: list[str], mark: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: cards)
    (found,) = doctor.gpu_findings({"gpus": [], **TORCH, **facts})
    assert (found.mark, said in found.text) == (mark, True), found.text
    assert (found.fix is not None) == (mark in ("warning", "problem"))
    assert next(iter(doctor.gpu_findings(None))).mark == "note"


# --- packages and engines -------------------------------------------------------------------------


def test_versions_against_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"av": "14.2.0", "torch": "2.13.0+cpu", "timm": "2.0.0.dev1"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    def found(*requires: str, extra: str = "") -> list[Finding]:
        return list(doctor.requirement_findings("x", requires, extra))

    monkeypatch.setattr(metadata, "version", version)
    assert found("torch>=2.8,<3", "timm>=1,<3", "nowhere ; sys_platform == 'beos'")[0].mark == "ok"
    (old,) = found("av<19,>=15", "torch>=2.8")
    assert old.text == "av 14.2.0 is installed, tested are <19,>=15"
    assert (old.mark, old.fix) == ("warning", "pip install 'av<19,>=15'")
    (missing,) = found("numpy>=2,<3")
    assert (missing.mark, missing.text) == ("problem", "numpy is not installed")
    lines = ("absent>=1 ; extra == 'train'", "torch>=2.8 ; extra == 'train'", "numpy>=2")
    (train,) = found(*lines, extra="train")
    assert (train.mark, train.fix) == ("note", "pip install 'mico-chat[train]'")
    assert found("absent ; extra == 'vllm'", extra="vllm") == []  # named among the engines


def test_python_and_an_install_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(platform, "python_version", lambda: "3.9.1")
    assert next(iter(doctor.package_findings())).mark == "problem"
    monkeypatch.setattr(metadata, "distribution", none)
    marks = [(finding.mark, finding.fix) for finding in doctor.package_findings()]
    assert marks == [("ok", None), ("warning", "pip install -e .")]


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
    found = [
        doctor.engine_finding(name, outcome, wanted)
        for outcome in (None, BROKEN)
        for wanted in (False, True)
    ]
    assert [finding.mark for finding in found] == marks
    assert all(finding.fix for finding in found)
    assert "libgomp.so.1" in found[2].text


def test_llama_cpp_of_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = doctor.engine_finding("llamacpp", Outcome(None, "killed by SIGILL"), False)
    assert "compiled for another processor" in dead.text
    assert "--no-binary llama-cpp-python" in (dead.fix or "")
    monkeypatch.setattr(doctor, "processor", lambda: ("", frozenset({"avx2", "avx512f"})))
    for built, mark in ((["AVX2"], "warning"), (["AVX2", "AVX-512"], "ok")):
        facts = {"text": "0.3 starts", "features": built}
        assert doctor.engine_finding("llamacpp", Outcome(facts), False).mark == mark


def test_more_threads_than_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    found = doctor.engine_finding("torch", Outcome({"text": "2.13", "threads": 64}), False)
    assert (found.mark, found.fix) == ("warning", "export OMP_NUM_THREADS=2")


# --- the service ----------------------------------------------------------------------------------


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    (none,) = doctor.variable_findings(SERVER, set())
    assert (none.mark, none.text) == ("ok", "none is set")
    monkeypatch.setenv("MICO_API", "x")
    monkeypatch.setenv("MICO_SERVER_MAX_RUNNING", "3")
    (known,) = doctor.variable_findings(SERVER, {"MICO_API"})
    assert known.facts["names"] == ["MICO_API", "MICO_SERVER_MAX_RUNNING"]
    monkeypatch.setenv("MICO_SERVER_PROT", "1")
    monkeypatch.setenv("MICO_MEDIA_MAX_FRAMES", "many")
    frames, unknown = doctor.variable_findings(SERVER, {"MICO_API"})
    assert (frames.mark, unknown.mark) == ("problem", "warning")
    assert "got 'many'" in frames.text
    assert unknown.text == "nothing reads MICO_SERVER_PROT; did you mean MICO_SERVER_PORT?"
    assert unknown.fix == 'export MICO_SERVER_PORT="$MICO_SERVER_PROT"; unset MICO_SERVER_PROT'


def test_where_the_server_would_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("MICO_SERVER_DATABASE_URL", "postgresql://somewhere/mico")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MICO_SERVER_PORT", str(port))
        found = {finding.name: finding for finding in doctor.service_findings(SERVER, set())}
    assert f"127.0.0.1:{port} cannot be used" in found["API port"].text
    assert f"({os.getpid()})" in found["API port"].text
    assert found["API port"].mark == "warning"
    assert found["PostgreSQL"].mark == "problem"
    monkeypatch.setenv("MICO_SERVER_CONFIG", "/nowhere.toml")
    found = {finding.name: finding for finding in doctor.service_findings(SERVER, set())}
    assert "nowhere.toml: no TOML file to read" in found["variables"].text
    assert doctor.port_finding("a port", "192.0.2.1", 8000, "").mark == "warning"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    found = doctor.folder_finding(tmp_path / "a" / "b")
    assert (found.mark, list(tmp_path.iterdir())) == ("ok", [])
    (tmp_path / "file").touch()
    for folder in (Path("/proc/mico"), tmp_path / "file" / "cache"):
        found = doctor.folder_finding(folder)
        assert (found.mark, "MICO_CACHE_DIR" in (found.fix or "")) == ("problem", True)


# --- the report -----------------------------------------------------------------------------------

FIT = Finding("fit", "problem", "word " * 30, "serve --model long/name " * 5, {}, [("a", "1")])


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_report(encoding: str) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    report = {"One": [Finding("short", "ok", "é")], "Two": [FIT, Finding("x", "warning", "c")]}
    doctor.print_report(report, "mini", "llamacpp", out)
    out.seek(0)
    lines = [line.rstrip() for line in out.read().splitlines()]
    assert lines[0] == "One"
    assert lines[1] == f"  ok       short  {'é' if encoding == 'utf-8' else '?'}"
    assert all(len(line) <= 100 for line in lines if "word" in line)
    assert f"           -> {FIT.fix}".rstrip() in lines  # in one line, to be copied
    assert lines[-2:] == ["1 problem: fit.", "1 warning: x."]


@pytest.mark.parametrize("mark", ["ok", "problem"])
def test_the_exit_code(monkeypatch: pytest.MonkeyPatch, mark: Any) -> None:
    asked: list[dict[str, Any]] = []

    def answers(names: list[str], wanted: dict[str, Any], seconds: float) -> dict[str, Outcome]:
        json.dumps(wanted)  # which goes to another process
        asked.append(wanted)
        facts: dict[str, Any] = {"text": "works", "features": [], **TORCH, "gpus": []}
        model = Outcome({"engine": "llamacpp", "findings": [asdict(Finding("fit", mark, "-"))]})
        return {name: model if name == "model" else Outcome(facts) for name in names}

    monkeypatch.setattr(doctor, "run_probes", answers)
    monkeypatch.setenv("MICO_MODEL", "another")
    out = io.StringIO()
    code = doctor.run(None, EngineOptions(), SERVER, set(), as_json=True, out=out)
    record = json.loads(out.getvalue())
    assert (record["ok"], code) == (mark == "ok", int(mark == "problem"))
    assert (record["model"], record["engine"], asked[0]["model"]) == (
        "another",
        "llamacpp",
        "another",
    )
    assert set(record["findings"]) == {"machine", "packages", "engines", "service", "model"}


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


# --- a model --------------------------------------------------------------------------------------

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
    """Findings of a model by name, on a machine without a card; the engine as ``taken``."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def look(model: str | Path, *options: Any, **asked: Any) -> dict[str, Finding]:
        memory = {"free": 30 * GB, "most": 32 * GB}
        usual = {"memory": memory, "disk_free": 100 * GB, "offline": False}
        chosen = asdict(EngineOptions(*options))
        facts = probes.probe_model({"model": str(model), "options": chosen, **usual, **asked})
        findings = [Finding(**record) for record in json.loads(json.dumps(facts["findings"]))]
        taken = Finding("taken", "note", str(facts["engine"]))
        return {finding.name: finding for finding in [*findings, taken]}

    return look


def problems(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if finding.mark == "problem"]


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_whole_model(folder: Path, examine: Examine) -> None:
    found = examine(folder, "transformers")
    assert problems(found) == []
    assert found["taken"].text == "transformers"
    assert "as the config has them" in found["checkpoint"].text
    assert found["fit"].text.startswith("fits: bfloat16 with transformers needs")


def test_models_that_are_not_here(
    tmp_path: Path, examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "no model 'maxi'" in examine("maxi")["folder"].text
    other = examine(llm_folder(tmp_path / "llm"))
    assert "a model of type 'llama', expected 'mico_chat'" in other["folder"].text
    there = examine("someone/something")["folder"]
    assert (there.mark, there.fix) == ("warning", "hf download someone/something")
    assert examine("someone/something", offline=True)["folder"].mark == "problem"
    mini = examine("mini", "transformers")
    assert problems(mini) == ["language model"]
    assert mini["language model"].fix == "mico-chat setup"
    assert mini["fit"].mark == "ok"  # its weights are known all the same


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("cut", "model.safetensors is not whole"),
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
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "no llm":
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
    assert "no adapter_config.json" in examine(folder)["adapter"].text
    (folder / "lora" / "adapter_config.json").write_text("{}")
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


def test_a_model_that_holds_its_llm(tmp_path: Path, examine: Examine) -> None:
    model = chat_model()
    model.save_pretrained(tmp_path)
    processor_for(MicoChatConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    assert problems(examine(tmp_path, "transformers")) == []


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
    pytest.importorskip("llama_cpp")
    found = examine(folder, "llamacpp")["GGUF"]
    assert (found.mark, found.facts["there"]) == ("note", False)
    for little in ({"disk_free": 10}, {"memory": {"free": 10, "most": 10}}):
        assert examine(folder, "llamacpp", **little)["GGUF"].mark == "problem"
    file = Path(found.facts["file"])
    file.parent.mkdir(parents=True)
    file.write_bytes(b"12345")
    assert examine(folder, "llamacpp")["GGUF"].mark == "ok"
    config = json.loads((folder / "config.json").read_text())["llm_config"]
    change_config(folder, llm_config=config | {"hidden_act": "gelu"})
    found_all = examine(folder)
    assert found_all["taken"].text == "transformers"
    assert "supports the activation 'silu', not 'gelu'" in found_all["engine"].text
    assert examine(folder, "llamacpp")["engine"].mark == "problem"


# --- weight files and memory ----------------------------------------------------------------------


def test_weight_files(tmp_path: Path) -> None:
    assert read_weights(tmp_path)[2] == "model.safetensors is missing"
    file = tmp_path / "model.safetensors"
    file.symlink_to(tmp_path / "gone")
    assert read_weights(tmp_path)[2] == "model.safetensors leads to a file that is not there"
    file.unlink()
    save_file({"a.weight": torch.zeros(3, 4), "b": torch.zeros(5)}, file)
    whole = file.read_bytes()
    assert read_weights(tmp_path) == (len(whole), {"a.weight": (3, 4), "b": (5,)}, None)
    for content in (b"", whole[:5], whole[:-1], whole + b"more"):
        file.write_bytes(content)
        assert "is not whole" in str(read_weights(tmp_path)[2])
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a Git LFS pointer" in str(read_weights(tmp_path)[2])


def test_shards(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for broken in ("{", '{"weight_map": 3}', "{}"):
        index.write_text(broken)
        assert "is no index of shards" in str(read_weights(tmp_path)[2])
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert read_weights(tmp_path)[2] == "2.safetensors is missing"
    save_file({"c": torch.zeros(2)}, tmp_path / "2.safetensors")
    assert str(read_weights(tmp_path)[2]).startswith("b is in no file")


@pytest.mark.parametrize(
    ("free", "most", "said", "fix"),
    [
        (24, 24, "fits: bfloat16 with transformers needs 18.5 GB", None),
        (16, 16, "fits in 8 bit, int8", "mico-chat serve --model 7b --quantization int8"),
        (10, 10, "fits in 4 bit, nf4", "mico-chat serve --model 7b --quantization nf4"),
        (2, 64, "of 64.0 GB: other programs have the rest", "more memory"),
        (2, 2, "the least, in 4 bit, is 9.1 GB", "more memory"),
    ],
)
def test_does_it_fit(free: int, most: int, said: str, fix: str | None) -> None:
    needs = Serving.of(meta_chat(MicoChatConfig.named("mico-g-vicuna-7b")), torch.bfloat16)
    sizes = (free * GB, most * GB)
    found = fit_finding(needs, "7b", "transformers", "bfloat16", "memory", *sizes)
    assert said in found.text
    assert (fix or "") in (found.fix or "")
    assert len({len(row) for row in weights_finding(needs).rows if row[0] in ("part", "llm")}) == 1


@pytest.mark.parametrize(("n", "said"), [(12, "12"), (134_515_008, "134.5 M"), (6.74e9, "6.74 B")])
def test_counts_in_words(n: int, said: str) -> None:
    assert count(n) == said
    assert model_check.BITS["nf4"] == "4 bit, "
