"""The table of engines: one walk chooses, and no other file names an engine."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mico_chat.engine import batching
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.scheduler import Scheduler
from mico_chat.engines.base import EngineOptions, batching_engine
from mico_chat.engines.source import Form, Source
from mico_chat.engines.table import ENGINES, candidates, choose, reference
from mico_chat.errors import ConfigError, MissingExtraError, ModelError
from mico_chat.load import load_assistant
from tests.engine.fake_model import FakeModel, joined_letters
from tests.support.fakes import FakeDecoder

ROOT = Path(__file__).parents[2]

PROSE = re.compile(r"\b(?:llamacpp|vllm)\b|engine[= ]transformers|transformers engine")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    machine = {"llama_cpp": True, "vllm": False, "gpu": False}
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        name = "llama_cpp" if name == llama_cpp.PACKAGE else name
        if name in machine:
            return object() if machine[name] else None
        return find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine["gpu"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return machine


@pytest.mark.parametrize(
    ("machine", "options", "engine", "why"),
    [
        ({}, {}, "llamacpp", "without a GPU"),
        ({}, {"device": "cpu"}, "llamacpp", "the fastest on a CPU"),
        ({"gpu": True}, {}, "transformers", "on a GPU; vLLM is not installed"),
        ({"gpu": True}, {"device": "cuda:1"}, "transformers", "on cuda:1"),
        ({"gpu": True}, {"quantization": "Q4_0"}, "llamacpp", "Q4_0 is GGUF's"),
        ({}, {"quantization": "nf4"}, "transformers", "nf4 is bitsandbytes'"),
        ({"llama_cpp": False}, {}, "transformers", "llama.cpp is not installed"),
        ({"llama_cpp": False}, {"quantization": "int8"}, "transformers", "int8 is bitsandbytes'"),
        ({"gpu": True}, {"engine": "llamacpp"}, "llamacpp", "asked for"),
        ({}, {"engine": "transformers"}, "transformers", "asked for"),
        ({"vllm": True}, {}, "llamacpp", "without a GPU"),
        ({"vllm": True, "gpu": True}, {}, "vllm", "on a GPU"),
        ({"vllm": True, "gpu": True}, {"quantization": "Q8_0"}, "llamacpp", "Q8_0 is GGUF's"),
        ({"vllm": True, "gpu": True}, {"quantization": "nf4"}, "transformers", "bitsandbytes'"),
        ({"vllm": True, "gpu": True}, {"quantization": "fp8"}, "vllm", "on a GPU"),
        ({"vllm": True, "gpu": True}, {"device": "cpu"}, "llamacpp", "the fastest on a CPU"),
        ({"vllm": True}, {"engine": "vllm"}, "vllm", "asked for"),
    ],
)
def test_the_engine_that_auto_chooses(
    installed: dict[str, bool],
    machine: dict[str, bool],
    options: dict[str, Any],
    engine: str,
    why: str,
) -> None:
    installed.update(machine)
    found, said = choose(EngineOptions(**options))
    assert (found.name, why in said) == (engine, True), said


@pytest.mark.parametrize(
    ("form", "engine", "chosen"),
    [
        ("open", "auto", "transformers"),
        ("open", "vllm", "vllm"),
        ("open", "llamacpp", "llamacpp does not read other projects' folders: use --engine vllm"),
        ("gguf", "auto", "llamacpp"),
        ("gguf", "transformers", "transformers does not read GGUF files: use --engine llamacpp"),
    ],
)
def test_each_form_of_model_has_its_engines(
    installed: dict[str, bool], tmp_path: Path, form: Form, engine: str, chosen: str
) -> None:
    installed.update(vllm=True, gpu=True)
    source = Source("a model", form, tmp_path, {})
    if chosen in ENGINES:
        assert choose(EngineOptions(engine), source)[0].name == chosen
    else:
        with pytest.raises(ConfigError, match=f"a model: {chosen}"):
            choose(EngineOptions(engine), source)
    assert [reference("open"), reference("gguf")] == ["transformers", "llamacpp"]


@pytest.mark.parametrize(
    "options",
    [EngineOptions("llamacpp"), EngineOptions("vllm"), EngineOptions(quantization="Q8_0")],
)
def test_a_missing_extra_is_named(installed: dict[str, bool], options: EngineOptions) -> None:
    installed["llama_cpp"] = False
    extra = "vllm" if options.engine == "vllm" else "llamacpp"
    with pytest.raises(MissingExtraError, match=rf"pip install 'mico-chat\[{extra}\]'"):
        choose(options)


def test_a_refused_model_goes_to_the_next_engine_once(
    installed: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("a model", "chat", tmp_path, {})
    llamacpp = ENGINES["llamacpp"]

    def names(**options: Any) -> list[str]:
        found = candidates(EngineOptions(**options), source)
        return [f"{row.name}: {why}" for row, why in found]

    monkeypatch.setattr(llamacpp, "why_not", lambda source, options: None)
    assert [name.partition(":")[0] for name in names()] == ["llamacpp", "transformers"]
    for asked in ({"quantization": "F16"}, {"engine": "llamacpp"}, {"arguments": {"threads": 2}}):
        assert len(names(**asked)) == 1, asked
    monkeypatch.setattr(llamacpp, "why_not", lambda source, options: "it is no llama")
    (only,) = names()
    assert only == "transformers: on the processor; not llamacpp: it is no llama"
    for asked in ({"quantization": "F16"}, {"engine": "llamacpp"}, {"arguments": {"threads": 2}}):
        with pytest.raises(ModelError, match="it is no llama"):
            names(**asked)


@pytest.mark.parametrize("engine", ["auto", "llamacpp", "transformers"])
def test_an_unknown_model(installed: dict[str, bool], engine: str) -> None:
    with pytest.raises(ModelError, match="no model 'maxi'"):
        load_assistant("maxi", FakeDecoder(), EngineOptions(engine))


def named_in(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value in ENGINES or PROSE.search(node.value):
                yield f"{file.relative_to(ROOT)}:{node.lineno}: {node.value[:60]}"
        elif isinstance(node, ast.Name | ast.Attribute | ast.arg):
            name = str(getattr(node, "id", None) or getattr(node, "attr", None) or node)
            if re.search("(?i)llamacpp|vllm", name):
                yield f"{file.relative_to(ROOT)}:{node.lineno}: {name}"


def test_no_other_file_names_an_engine() -> None:
    """A file of an engine's own has the engine's name."""
    files = [f for folder in ("mico_chat", "server", "ui") for f in (ROOT / folder).rglob("*.py")]
    others = [f for f in files if f.stem != "table" and not any(n in f.stem for n in ENGINES)]
    assert len(files) > len(others) > 100
    found = [place for file in others for place in named_in(file)]
    assert not found, "\n".join(found)
    page = [*(ROOT / "ui").rglob("*.js"), *(ROOT / "ui").rglob("*.html")]
    assert not [str(file) for file in page if PROSE.search(file.read_text(encoding="utf-8"))]


def test_the_manual_has_a_row_for_each_engine() -> None:
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", text))
    for name, engine in ENGINES.items():
        assert all(f"`{one}`" in rows[name] for one in engine.quantizations)
        settings = [f"--{setting.replace('_', '-')}" for setting in engine.settings]
        assert not [flag for flag in settings if flag not in text]
        for argument in engine.sizes or ():
            assert f"`{argument}`" in text


def test_only_an_engine_that_is_told_its_steps_has_a_preference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = EngineOptions(prefer="pauses")
    ENGINES["llamacpp"].check(options)
    ENGINES["transformers"].check(options)
    with pytest.raises(ConfigError, match=r"prefer pauses: the vllm engine .*; leave it out"):
        ENGINES["vllm"].check(options)
    told: list[Any] = []

    class Told(Scheduler):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            told.append(settings["prefer"])

    monkeypatch.setattr(batching, "Scheduler", Told)
    batching_engine("fake", FakeModel(), joined_letters(), (), options).close()
    assert told == ["pauses"]
