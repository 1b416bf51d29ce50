"""``--load-in-4bit`` and ``--load-in-8bit``: the flags' meaning, and the quantized layers."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mico_chat.adapters.mico import mico_of
from mico_chat.ask import Ask
from mico_chat.checkpoints.assemble import assemble
from mico_chat.cli import evaluate
from mico_chat.cli import main as cli
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import ConfigError
from mico_chat.evaluation import chat
from mico_chat.load import EngineOptions, asked_quantization, load_assistant
from mico_server import app
from mico_server.settings import read_settings
from tests.support.fakes import FakeDecoder
from tests.support.tiny import picture, run, shown, stage1_folder
from tests.support.vicuna import vicuna_folder

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bits")
    llm = vicuna_folder(made / "vicuna")
    return assemble(stage1_folder(made / "stage1"), str(llm), made / "chat")


@pytest.mark.parametrize(
    ("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")]
)
def test_the_language_models_layers_alone_are_quantized(
    folder: Path, quantization: str, kind: str
) -> None:
    pytest.importorskip("bitsandbytes")
    options = EngineOptions(quantization=quantization)
    with closing(load_assistant(folder, FakeDecoder(), options)) as assistant:
        assert assistant.engine.name == "transformers"
        model: nn.Module = mico_of(assistant.adapter).model
        kinds = {name: type(m).__name__ for name, m in model.named_modules()}
        few = {name for name, found in kinds.items() if found == kind}
        assert {name.split(".")[-1] for name in few} == LINEARS
        assert len(few) == 2 * len(LINEARS)
        assert all(name.startswith("llm.model.layers.") for name in few)
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") not in few:
                assert parameter.dtype == torch.bfloat16, name
        assert kinds["llm.lm_head"] == kinds["bridge.proj_out"] == "Linear"
        asked = Ask([shown(picture(), "What?")], GenerationOptions(max_tokens=4))
        assert run(assistant.answer(asked)).usage.completion_tokens >= 1


def test_a_quantization_may_be_given_in_both_ways() -> None:
    assert asked_quantization(None) is None
    assert asked_quantization("Q4_0") == "Q4_0"
    assert asked_quantization("nf4", load_in_4bit=True) == "nf4"


CONFLICTS = [
    (["--load-in-4bit", "--load-in-8bit"], "--load-in-4bit and --load-in-8bit: give one of them"),
    (["--load-in-8bit", "--quantization", "Q4_0"], "--load-in-8bit and --quantization Q4_0: give"),
    (["--load-in-4bit", "--quantization", "int8"], "--load-in-4bit and --quantization int8: give"),
]


@pytest.mark.parametrize(("flags", "said"), CONFLICTS)
def test_conflicting_flags_are_refused(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["ask", *flags, "Hi"])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match=said):
        app.main(read_settings(flags), lambda _: None)
    items = tmp_path / "items.jsonl"
    items.touch()
    with pytest.raises(ConfigError, match=said):
        evaluate.main([str(items), *flags])


@pytest.mark.parametrize(
    ("flag", "expected"), [("--load-in-4bit", "nf4"), ("--load-in-8bit", "int8")]
)
def test_the_flags_reach_the_engine(
    flag: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[EngineOptions] = []

    class Loaded(Exception):
        """Ends the command when the options are known."""

    def load(model: Any, decoder: Any, options: EngineOptions, **_: Any) -> Any:
        loaded.append(options)
        raise Loaded

    monkeypatch.setattr("mico_chat.load.load_assistant", load)
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
    with pytest.raises(Loaded):
        cli.main(["ask", flag, "Hi"])
    monkeypatch.setattr(app, "load_assistant", load)
    monkeypatch.setattr(app, "serve", lambda sources, **_: sources[0].load())
    with pytest.raises(Loaded):
        app.main(read_settings([flag]), lambda _: None)
    monkeypatch.setattr(chat, "load_assistant", load)
    items = tmp_path / "items.jsonl"
    items.write_text('{"id": "1", "skill": "text", "message": "Hi", "accept": ["ho"]}\n')
    with pytest.raises(Loaded):
        evaluate.main([str(items), flag])
    with pytest.raises(Loaded):
        evaluate.main([str(items), flag, "--as-served"])
    assert [options.quantization for options in loaded] == [expected] * 4
    # Figures are those of the weights alone, unless they are asked for as people get them.
    assert [options.chat_defaults for options in loaded] == [True, True, False, True]


def test_a_terminals_own_server_gets_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("mico_ui.terminal.start.main", asked.append)
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
    with pytest.raises(SystemExit):
        cli.main(["chat", "--load-in-4bit", "--model", "mini"])
    assert asked[0].serve == ["--model", "mini", "--load-in-4bit"]
