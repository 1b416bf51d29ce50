"""What the service is told: the engine's arguments by flag, variable and file, and shown again."""

from pathlib import Path

import pytest

from mico_chat.errors import ConfigError
from mico_server.settings import read_settings, shown_settings

ARGUMENTS = '{"enforce_eager": true, "compilation_config": {"mode": 0}, "seeds": [1, 2]}'
EXPECTED = {"enforce_eager": True, "compilation_config": {"mode": 0}, "seeds": [1, 2]}


def test_an_engines_arguments_come_by_any_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_settings([]).engine_arguments == {}
    by_flag = read_settings(["--engine-args", ARGUMENTS])
    assert by_flag.engine_arguments == EXPECTED
    file = tmp_path / "shown.toml"
    file.write_text(shown_settings(by_flag))
    assert read_settings(["--config", str(file)]).engine_arguments == EXPECTED
    monkeypatch.setenv("MICO_SERVER_ENGINE_ARGS", ARGUMENTS)
    assert read_settings([]).engine_arguments == EXPECTED


def test_settings_that_are_an_engines_arguments_are_given_once() -> None:
    flags = ["--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.5"]
    settings = read_settings([*flags, "--engine-args", '{"block_size": 32}'])
    expected = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "block_size": 32}
    assert settings.engine_arguments == expected
    settings = read_settings(["--max-model-len", "5", "--engine-args", '{"max_model_len": 6}'])
    with pytest.raises(ConfigError, match="max_model_len: set by itself and in engine_args"):
        _ = settings.engine_arguments


@pytest.mark.parametrize("given", ["nonsense", "[1]", '{"enforce_eager"'])
def test_arguments_that_are_no_json(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="engine_args: expected a JSON object"):
        read_settings(["--engine-args", given])
    monkeypatch.setenv("MICO_SERVER_ENGINE_ARGS", given)
    with pytest.raises((ConfigError, ValueError), match=r"engine_args"):
        read_settings([])


def test_a_preference_is_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings([]).prefer is None
    assert read_settings(["--prefer", "first-token"]).prefer == "first-token"
    with pytest.raises(ValueError, match="should be 'pauses' or 'first-token'"):
        read_settings(["--prefer", "both"])
    monkeypatch.setenv("MICO_SERVER_PREFER", "pauses")
    assert read_settings([]).prefer == "pauses"
