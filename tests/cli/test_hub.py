"""Models of the hub: pulled, listed, removed and loaded offline, from a hub on this machine."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi, constants, file_download

from mico_chat import speech as voices
from mico_chat.checkpoints.hub import HubName, needed_files, quantization_of
from mico_chat.cli import hub as hub_commands
from mico_chat.cli.main import main
from mico_chat.errors import ConfigError, ModelError, RequestError
from tests.support.fake_hub import TOKEN, FakeHub, fake_hub
from tests.support.tiny import chat_model, saved, stage1_folder

# The hub's library uploads a large file in a way that its HTTP library is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

Run = Callable[..., str]

CONFIG = json.dumps(
    {"model_type": "qwen2_audio", "architectures": ["Qwen2AudioForConditionalGeneration"]}
).encode()
WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as started:
        cache = tmp_path / "hub"
        monkeypatch.setattr(constants, "ENDPOINT", started.url)
        template = started.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        huggingface_hub.close_session()
        yield started
        huggingface_hub.close_session()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command; gives what it printed, or its error."""
    monkeypatch.setattr("mico_chat.cli.main._quiet_libraries", lambda: None)

    def run_one(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said
        return said.err if code else said.out

    return run_one


def listed(run: Run) -> dict[str, Any]:
    return {one["name"]: one for one in json.loads(run("list", "--json"))["models"]}


def test_which_files_a_model_needs() -> None:
    own = ["README.md", "config.json", "tokenizer.json", "generation_config.json"]
    foreign = ["onnx/model.onnx", "original/a.pth", "tf_model.h5", "model.fp16.safetensors"]
    pickled = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    name = HubName("org/m")
    again = ["consolidated.safetensors", "training_args.bin", "m-Q4_K_M.gguf"]
    both = [*own, *foreign, *pickled, *again, "model.safetensors"]
    assert needed_files(name, both) == [*own, "model.safetensors"]
    assert needed_files(name, [*own, *pickled]) == [*own, *pickled]
    assert needed_files(name, [*own, "consolidated.safetensors"])[-1] == "consolidated.safetensors"
    with pytest.raises(ModelError, match="org/m: the hub has no weights"):
        needed_files(name, [*own, "onnx/model.onnx"])


GGUFS = [
    *("README.md", "m-Q4_K_M.gguf", "m-q8_0.gguf", "mmproj-m-f16.gguf", "mmproj-m-bf16.gguf"),
    *("m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf", "m-IQ2_XS.gguf"),
]


@pytest.mark.parametrize(
    ("quantization", "files"),
    [
        (None, ["m-Q4_K_M.gguf"]),
        ("Q8_0", ["m-q8_0.gguf"]),
        ("q4_k_m", ["m-Q4_K_M.gguf"]),
        ("IQ2_XS", ["m-IQ2_XS.gguf"]),
        ("F16", ["m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf"]),
    ],
)
def test_a_quantization_and_its_media_encoder(quantization: str | None, files: list[str]) -> None:
    found = needed_files(HubName("org/m", quantization), GGUFS)
    assert found == [*files, "mmproj-m-bf16.gguf"]


def test_quantizations_that_are_not_there() -> None:
    with pytest.raises(ModelError, match="no quantization 'Q5_0' there; it has F16, IQ2_XS, Q4_K"):
        needed_files(HubName("org/m", "Q5_0"), GGUFS)
    with pytest.raises(ModelError, match="several quantizations there; it has F16, Q8_0: mico"):
        needed_files(HubName("org/m"), ["a-F16.gguf", "a-Q8_0.gguf"])
    assert needed_files(HubName("org/m"), ["only.gguf"]) == ["only.gguf"]
    assert quantization_of("gemma-3n-E2B-it-Q4_K_M.gguf") == "Q4_K_M"
    assert quantization_of("Qwen2.5-Omni-3B.gguf") is None


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "org/m:", "org/m name"])
def test_names_that_are_none(name: str) -> None:
    if name == "../x":
        assert HubName.of(name).repo == name  # the hub's library refuses it
        return
    with pytest.raises(ConfigError, match="no name of a model on the hub"):
        HubName.of(name)


def test_a_pull_goes_on_where_it_broke(hub: FakeHub, run: Run) -> None:
    weights = dict.fromkeys(("model.safetensors", "pytorch_model.bin"), WEIGHTS)
    hub.repos["org/ear"] = {"config.json": CONFIG, **weights}
    hub.broken.add("model.safetensors")
    said = run("pull", "org/ear")
    lines = said.splitlines()
    assert lines[0] == "org/ear: 1 MB in 2 files"
    assert lines[1].startswith("fits: running it takes about 1 MB, and memory has ")
    assert lines[2].startswith("org/ear is here: mico-chat serve --model org/ear")
    starts = [start for file, start in hub.sent if file == "model.safetensors"]
    assert starts[0] == 0
    assert 0 < starts[1] < len(WEIGHTS)  # the rest alone
    assert hub.names() == ["config.json", "model.safetensors"]
    one = listed(run)["org/ear"]
    assert one["reads"] == ["audio", "document"]
    assert not one["partial"]
    assert one["bytes"] == len(WEIGHTS) + len(CONFIG)
    hub.sent.clear()
    assert run("pull", "org/ear") == "org/ear is here already: 1 MB\n"
    assert not hub.sent


def test_a_pull_that_failed_goes_on_later(hub: FakeHub, run: Run) -> None:
    one, two = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    hub.repos["org/ear"] = {"config.json": CONFIG, one: WEIGHTS, two: WEIGHTS[::-1]}
    index = json.dumps({"weight_map": {"1": one, "2": two}}).encode()
    hub.repos["org/ear"]["model.safetensors.index.json"] = index
    hub.lost.add(two)
    error = run("pull", "org/ear", code=2)
    assert "org/ear: the hub (Hugging Face) cannot be reached" in error
    assert error.endswith("the files that are whole are kept: pull again to go on\n")
    assert listed(run)["org/ear"]["partial"]
    assert "partial; mico-chat pull org/ear" in run("list")
    hub.lost.clear()
    hub.sent.clear()
    assert "1 MB of it are still to come" in run("pull", "org/ear")
    assert hub.names() == [two]
    assert not listed(run)["org/ear"]["partial"]


def test_one_quantization_is_pulled(hub: FakeHub, run: Run) -> None:
    hub.repos["org/m-GGUF"] = {file: file.encode() + WEIGHTS for file in GGUFS}
    assert "m-q8_0.gguf, mmproj-m-bf16.gguf" in run("pull", "org/m-GGUF:Q8_0")
    assert hub.names() == ["m-q8_0.gguf", "mmproj-m-bf16.gguf"]


def test_what_the_hub_refuses(hub: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/ear"] = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    hub.gated.add("org/ear")
    error = run("pull", "org/ear", code=2)
    assert "org/ear: the hub gives this model only to those who accepted its terms" in error
    assert "hf auth login" in error
    said = "the hub has no such model, or a private one (hf auth login)"
    assert run("pull", "org/nobody", code=2) == f"error: org/nobody: {said}\n"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    error = run("pull", "org/ear", code=2)
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE keeps the hub from being asked" in error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = "the hub (Hugging Face) cannot be reached: is there a network?"
    assert run("pull", "org/ear", code=2) == f"error: org/ear: {said}\n"


def test_a_disk_that_is_full(hub: FakeHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/ear"] = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    with monkeypatch.context() as before:
        before.setattr(hub_commands, "disk_free", lambda folder: 500_000)
        error = run("pull", "org/ear", code=2)
    assert "1 MB are to be downloaded, but the disk of" in error
    assert "has 500 KB free" in error
    assert not hub.sent

    def full(*args: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    assert "is full: make room, or set HF_HOME" in run("pull", "org/ear", code=2)


def test_models_are_removed(
    hub: FakeHub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/ear"] = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
    run("pull", "org/ear")
    error = run("rm", "org/eer", code=2)
    assert error == "error: org/eer: it is not in the hub's cache, which has org/ear\n"
    assert "comes with mico-chat and stays" in run("rm", "mini", code=2)
    assert "a folder outside the hub's cache" in run("rm", str(tmp_path), code=2)
    with monkeypatch.context() as terminal:  # where somebody sits, it asks
        terminal.setattr("typer.confirm", lambda question: False)
        for stream in (sys.stdin, sys.stdout):
            terminal.setattr(stream, "isatty", lambda: True)
        with pytest.raises(SystemExit, match="1"):
            main(["rm", "org/ear"])
        assert "org/ear" in listed(run)
        assert run("rm", "org/ear", "--yes") == "org/ear is deleted: 1 MB\n"
    assert list(listed(run)) == ["mini"]
    assert not (tmp_path / "hub" / "models--org--ear").exists()
    blobs = tmp_path / "hub" / "models--org--begun" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.123.incomplete").write_bytes(WEIGHTS)
    assert listed(run)["org/begun"] | {"last_used": 0} == {
        **{"name": "org/begun", "bytes": len(WEIGHTS), "reads": [], "last_used": 0},
        **{"partial": True, "note": "partial; mico-chat pull org/begun"},
    }
    run("rm", "org/begun")
    assert list(listed(run)) == ["mini"]


def test_what_is_here_is_not_pulled(run: Run, tmp_path: Path) -> None:
    assert "mini comes with mico-chat" in run("pull", "mini", code=2)
    assert "a folder on this machine already" in run("pull", str(tmp_path), code=2)


# --- pushing --------------------------------------------------------------------------------------


@pytest.fixture
def member(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, for somebody who has a token of it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint=hub.url))
    return hub


def test_a_push_with_a_card(member: FakeHub, run: Run, tmp_path: Path) -> None:
    model, recipe = chat_model(), tmp_path / "recipe.yaml"
    model.config.trained_on = [{"stage": "a", "data": ["b"]}, {"stage": "c", "data": None}]
    folder = saved(tmp_path / "tiny", model)
    (folder / "more.safetensors").write_bytes(WEIGHTS)
    own = {file.name: file.read_bytes() for file in folder.glob("*")}
    for left in ("checkpoint-2/model.safetensors", "log.jsonl", ".secret", "optimizer.pt"):
        (folder / left).parent.mkdir(exist_ok=True)
        (folder / left).write_bytes(b"x")
    recipe.write_text("stage: 3\n")
    words = ["push", str(folder), "org/m", "--private", "--license", "mit", "--card", str(recipe)]
    member.room = 1  # it breaks off behind the first of two large files
    error = run(*words, code=2)
    assert error.endswith("large files that arrived are kept: push again to go on\n")
    assert (len(member.large), member.repos["org/m"]) == (1, {})  # nothing half
    member.room = 1
    assert run(*words).endswith(f"org/m is at {member.url}/org/m\n")
    assert (member.room, member.created["org/m"]["visibility"]) == (0, "private")
    files = member.repos["org/m"]
    about, card = files["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    names = {"library_name": "mico-chat", "license": "mit", "pipeline_tag": "any-to-any"}
    assert yaml.safe_load(about) == names
    assert "| a | b |\n| c | unknown |\n\n## recipe\n\n```yaml\nstage: 3\n```" in card
    pushed = json.loads(files["config.json"])
    assert pushed.pop("auto_map")["AutoConfig"] == "mico_chat_code.MicoChatConfig"
    assert pushed == json.loads(own["config.json"])
    assert files.keys() == own.keys() | {"README.md", "mico_chat_code.py"}
    assert files["more.safetensors"] == WEIGHTS
    (folder / "README.md").write_text("mine")
    member.room = 9
    for name, source in {"org/m": str(folder), "org/small": "mini"}.items():  # m is there already
        run("push", source, name)
    assert files["README.md"] == b"mine"
    assert b"base_model: HuggingFaceTB/SmolLM2-135M-I" in member.repos["org/small"]["README.md"]


def test_what_is_not_pushed(
    member: FakeHub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, half, model = saved(tmp_path / "other"), saved(tmp_path / "half"), chat_model()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (half / "model.safetensors").unlink()
    for name in (str(other), str(half), "org/nobody"):
        reason = f"{name}: this is no folder with a MiCo or MiCo-Chat model's weights"
        assert reason in run("push", name, "org/m", code=2)
    assert "no config.json there" in run("push", str(tmp_path), "org/m", code=2)
    model.config.base_llm = str(tmp_path)
    apart = str(saved(tmp_path / "apart", model))
    assert "where nobody else finds it: `mico-c" in run("push", apart, "org/m", code=2)
    assert "no name of a model on the hub" in run("push", "mini", "a/b/c", code=2)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "does not know the token" in run("push", "mini", "org/m", code=2)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "there is no token of the hub here: hf auth" in run("push", "mini", "org/m", code=2)
    assert not member.repos


LOADS = """
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained("chat", trust_remote_code=True)  # nothing imports us yet
model = AutoModel.from_pretrained("chat", trust_remote_code=True)
model.generate(processor.tokenizer("Hello", return_tensors="pt")["input_ids"], max_new_tokens=2)
print(type(model).__name__, type(processor).__name__)
print(type(AutoModel.from_pretrained("encoder", trust_remote_code=True)).__name__)
model.save_pretrained("out")
"""


@pytest.mark.slow
def test_auto_classes_find_this_package(member: FakeHub, run: Run, tmp_path: Path) -> None:
    for folder in (saved(tmp_path / "chat"), stage1_folder(tmp_path / "encoder")):
        run("push", str(folder), f"org/{folder.name}")
        for file, content in member.repos[f"org/{folder.name}"].items():
            (folder / file).write_bytes(content)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "m"), "HF_HUB_OFFLINE": "1"}
    command: Any = {"args": [sys.executable, "-c", LOADS], "env": environment, "cwd": tmp_path}
    done = subprocess.run(**command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("Mico")]
    assert found == ["MicoChatForConditionalGeneration MicoChatProcessor", "MicoForPretraining"]
    # Saved again it is a plain folder of this package: no code, and no name of one.
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.slow
def test_a_pulled_model_loads_without_a_network(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    hub.add_folder("org/tiny", saved(tmp_path / "tiny"))
    hub.repos["org/tiny"]["pytorch_model.bin"] = WEIGHTS
    assert "fits: running it takes about" in run("pull", "org/tiny")
    assert "pytorch_model.bin" not in hub.names()
    hub.repos.clear()
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = ("ask", "--model", "org/tiny", "--engine", "transformers", "--max-tokens", "2", "Hello")
    done = subprocess.run(
        [sys.executable, "-m", "mico_chat.cli", *words],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout  # a random model may say spaces alone


def test_a_voice_of_the_hub(
    hub: FakeHub, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hibari = pytest.importorskip("hibari.voices", reason="pip install 'mico-chat[speech]'")
    heart = Path(hibari.ASSETS, "hibari.onnx").read_bytes()
    hub.repos["somebody/voice"] = {"README.md": b"A voice.", "kim.onnx": heart}
    hub.repos["somebody/voices"] = {"voices/emma.onnx": heart, "voices/lee.onnx": b"no model"}
    hub.repos["somebody/oov"] = {"oov.onnx": Path(hibari.ASSETS, "oov.onnx").read_bytes()}
    monkeypatch.setenv("MICO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("mico_chat.checkpoints.folders.fetch_base_llm", lambda: "there")
    monkeypatch.setattr("mico_chat.checkpoints.folders.download", lambda missing: None)
    monkeypatch.setattr("mico_chat.reading.speech.fetch", lambda: "there")
    monkeypatch.setattr("mico_chat.cli.models.llama_cpp.PACKAGE", "no_such_package")

    def say(name: str, *, setup: bool = True, code: int = 0) -> str:
        monkeypatch.setenv("MICO_VOICE", name)
        if setup:
            run("setup")
        return run("say", "Hello.", "--output", str(tmp_path / "hello.wav"), code=code)

    assert "somebody/voice is not on this machine; `mico-chat setup` fetches it" in say(
        "somebody/voice", setup=False, code=2
    )
    say("somebody/voice")
    assert (tmp_path / "hello.wav").is_file()
    assert hub.names() == ["kim.onnx"]
    say("somebody/voices:emma")
    say("somebody/voices:emma")
    assert [file for file, _ in hub.sent] == ["kim.onnx", "voices/emma.onnx"]
    folder = tmp_path / "cache/speech/somebody--voices--emma/voices"
    say(str(folder))
    say(f"{folder}:emma")
    say(str(folder / "emma.onnx"))
    assert "it has emma; name one of them" in say(f"{folder}:kore", code=2)
    assert "lee.onnx: no voice of hibari" in say("somebody/voices:lee", code=2)
    assert "oov.onnx: no voice of hibari: it takes" in say("somebody/oov", code=2)
    for name, why in (
        ("somebody/voices", "it has emma, lee; name one of them: somebody/voices:emma"),
        ("somebody/voices:kore", "it has no ONNX file"),
        ("somebody/nothing", "the hub has no such model"),
    ):
        assert "is not on this machine" in say(name, code=2)
        with pytest.raises(ModelError, match=why):
            voices.fetch()
    with pytest.raises(RequestError, match="no voice 'somebody/voice' here"):
        voices.Voices().get("somebody/voice")  # a client has no say in what is read
