"""The whole command: what is started, how it ends, what it prints."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from mico_chat.cli import main as cli
from mico_chat.cli.doctor import command, examine
from mico_chat.cli.doctor.children import Outcome
from mico_chat.cli.doctor.environment import Source
from mico_chat.cli.doctor.examine import Service
from mico_chat.cli.doctor.finding import Finding, Report
from mico_chat.cli.main import main
from mico_chat.load import EngineOptions
from mico_server.settings import ServerSettings, read_settings
from tests.doctor.fakes import GB, machine, torch_facts

SERVER = Source(ServerSettings, read_settings)
FIT = Finding("fit", "ok", "fits")

WELL: dict[str, Outcome] = {
    "torch": Outcome(torch_facts()),
    "transformers": Outcome({"version": "5.24.0", "device": "cpu"}),
    "model": Outcome({"findings": [FIT.record()], "engine": "llamacpp"}),
    "bitsandbytes": Outcome({"version": "0.50.0", "device": "cpu", "error": 0.1}),
    "llamacpp": Outcome({"version": "0.3.36", "features": ["AVX2"], "gpu": False}),
    "vllm": Outcome({"version": "0.32.0", "device": "cpu"}),
    "codecs": Outcome({"version": "18.1.0", "missing": []}),
    "decoder": Outcome({"seconds": 1.0}),
}

Look = Callable[..., Report]


class _Done:
    def __init__(self, outcomes: dict[str, Outcome]) -> None:
        self._outcomes = outcomes

    def result(self) -> dict[str, Outcome]:
        return self._outcomes


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """A report of a machine that there is not, whose probes say what they are told."""
    for name in [name for name in os.environ if name.startswith("MICO_")]:
        monkeypatch.delenv(name)

    def report(
        outcomes: dict[str, Outcome] | None = None,
        missing: tuple[str, ...] = (),
        options: EngineOptions | None = None,
        service: Service | None = None,
        **changes: Any,
    ) -> Report:
        told = {**WELL, **(outcomes or {})}

        class Children:
            asked: dict[str, Any]

            def __enter__(self) -> Children:
                return self

            def __exit__(self, *_: object) -> None: ...

            def start(self, names: list[str], asked: dict[str, Any], seconds: float) -> _Done:
                json.dumps(asked)  # which goes to another process
                return _Done({name: told[name] for name in names})

        monkeypatch.setattr(examine, "Children", Children)
        monkeypatch.setattr(examine, "is_installed", lambda module: module not in missing)
        return examine.examine(
            "mini",
            options or EngineOptions(),
            service or Service(port=0, ui_port=0),
            machine(cache=tmp_path, **changes),
        )

    return report


def test_a_machine_where_all_is_well(look: Look) -> None:
    report = look()
    assert report.exit_code == 0, report.marked("problem")
    assert report.engine == "llamacpp"
    titles = [section.title for section in report.sections]
    assert titles == ["Machine", "Packages", "Engines", "Service", "Model"]
    assert FIT in report.findings
    json.dumps(report.record())


def test_what_is_not_installed_is_not_tried(look: Look) -> None:
    report = look(missing=("llama_cpp", "vllm", "bitsandbytes"))
    marks = {finding.name: finding.mark for finding in report.findings}
    assert report.exit_code == 0
    assert (marks["llamacpp"], marks["vllm"], marks["bitsandbytes"]) == ("note",) * 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (EngineOptions("llamacpp"), "llamacpp"),
        (EngineOptions(quantization="nf4"), "bitsandbytes"),
    ],
)
def test_what_was_asked_for_and_is_not_installed(
    look: Look, options: EngineOptions, named: str
) -> None:
    report = look(missing=("llama_cpp", "bitsandbytes"), options=options)
    assert [finding.name for finding in report.marked("problem")] == [named]
    assert report.exit_code == 1


def test_a_torch_that_ends_its_process(look: Look) -> None:
    after = Outcome(None, "not tried: torch ended the process")
    dead = {"torch": Outcome(None, "killed by SIGILL"), "transformers": after, "model": after}
    report = look(dead)
    assert report.exit_code == 1
    assert report.engine is None
    assert report.record()["ok"] is False
    assert [finding.name for finding in report.marked("problem")] == [
        *("torch", "transformers", "model"),
    ]


def test_a_container_of_two_cores(look: Look) -> None:
    report = look(usable_cores=2, shm=64 << 20)
    names = [finding.name for finding in report.marked("warning")]
    assert names == ["torch", "shared memory"]
    assert report.exit_code == 0


def test_a_database_without_its_driver(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mico_chat.cli.doctor.engines.is_installed", lambda module: False)
    service = Service(port=0, ui_port=0, database_url="postgresql://somewhere/mico")
    assert [finding.name for finding in look(service=service).marked("problem")] == ["PostgreSQL"]


# --- the command --------------------------------------------------------------------------------


def test_where_the_server_would_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICO_SERVER_PORT", "8123")
    monkeypatch.setenv("MICO_SERVER_DATABASE_URL", "postgresql://somewhere/mico")
    found = command.service_of(SERVER)
    assert (found.port, found.database_url) == (8123, "postgresql://somewhere/mico")
    monkeypatch.setenv("MICO_SERVER_PORT", "no number")
    assert command.service_of(SERVER).port == 8000


@pytest.mark.parametrize("as_json", [True, False])
def test_the_exit_code(monkeypatch: pytest.MonkeyPatch, cache: Path, as_json: bool) -> None:
    seen: list[Any] = []

    def found(*arguments: Any, **keywords: Any) -> Report:
        seen.append((*arguments, keywords))
        return Report("1", "mini", None, [])

    monkeypatch.setattr(command, "examine", found)
    monkeypatch.setenv("MICO_MODEL", "another")
    out = io.StringIO()
    commands = typer.main.get_command(cli.app)
    code = command.run(None, EngineOptions(), SERVER, commands, as_json=as_json, out=out)
    assert code == 0
    assert seen[0][0] == "another"
    assert seen[0][3].disk_free > 0
    assert "MICO_API_KEY" in seen[0][4]["variables"]
    assert out.getvalue().startswith("{") == as_json


@pytest.mark.base_llm
def test_for_real(
    base_llm_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--engine", "transformers", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert (end.value.code, record["ok"]) == (0, True)
    assert (record["model"], record["engine"]) == ("mini", "transformers")
    found = {finding["name"]: finding for finding in record["findings"]["model"]}
    assert found["language model"]["facts"]["folder"] == str(base_llm_folder)
    assert 0.5 * GB < found["fit"]["facts"]["needed"] < 2 * GB
    assert {finding["mark"] for finding in record["findings"]["engines"]} <= {
        "ok",
        "note",
        "warning",
    }
