"""``mico-chat ps``: the models of a running service."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mico_chat.cli.main import main
from mico_chat.errors import ModelError
from tests.server.service.test_models import MB, Shelf, ask
from tests.server.support.running import new_key
from tests.support.fakes import FakeAssistant

Run = Callable[..., str]


@pytest.fixture
def ps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr("mico_chat.cli.main._quiet_libraries", lambda: None)

    def run(*words: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["ps", *words])
        said = capsys.readouterr()
        assert (ended.value.code or 0) == code, said
        return said.err if code else said.out

    return run


def test_what_is_loaded_and_in_use(
    tmp_path: Path, ps: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(broken={"c": ModelError("c: no weights there")})
    with shelf.served(tmp_path, "abc", max_models_bytes=250 * MB) as client:
        ask(client, "c")
        url = str(client.base_url)
        table = [line.split("  ") for line in ps("--url", url).splitlines()]
        rows = [[cell.strip() for cell in line if cell.strip()] for line in table]
        assert rows[0] == ["NAME", "STATUS", "MEMORY", "REQUESTS", "LAST USED", "READS"]
        reads = "text, image, audio, video, depth, normal, document"
        assert [*rows[1][:2], *rows[1][3:]] == ["a", "loaded", "0", "just now", reads]
        assert rows[1][2].endswith("MB")
        assert rows[2] == ["b", "unloaded", "-", "0", "-", reads]
        assert rows[3][-1] == "c: no weights there"
        found = json.loads(ps("--url", url, "--json"))["models"]
        assert [one["status"]["value"] for one in found] == ["loaded", "unloaded", "failed"]
        key = new_key(tmp_path, "alice")
        assert "key" in ps("--url", url, code=2)
        monkeypatch.setenv("MICO_API_KEY", key)
        monkeypatch.setenv("MICO_API", url)
        assert "unloaded" in ps()


def test_what_a_model_does_in_another_way_is_said(tmp_path: Path, ps: Run) -> None:
    note = "requests run alone, without batching: its layers of mamba cannot be batched"

    def make(name: str) -> FakeAssistant:
        made = FakeAssistant()
        made.notes = (note,)
        return made

    with Shelf(make=make).served(tmp_path, "a") as client:
        assert client.get("/v1/models/a").json()["notes"] == [note]
        assert ps("--url", str(client.base_url)).rstrip().endswith(note)


def test_no_service(ps: Run) -> None:
    error = ps("--url", "http://127.0.0.1:9", code=2)
    assert error == "error: no server answers at http://127.0.0.1:9\n"
