"""The files of a GGUF model, by the names that people give it."""

from pathlib import Path

import pytest

from mico_chat.checkpoints.gguf_files import gguf_files
from mico_chat.errors import ConfigError, MicoError, ModelError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF")


def test_a_file_and_the_projector_beside_it(folder: Path) -> None:
    put(folder, "omni-Q4_K_M.gguf")
    alone = gguf_files(folder / "omni-Q4_K_M.gguf")
    assert alone is not None
    assert (alone.name, alone.mmproj, alone.bytes) == ("omni-Q4_K_M", None, 4)
    put(folder, "mmproj-omni-f16.gguf")
    both = gguf_files(folder / "omni-Q4_K_M.gguf")
    assert both is not None
    assert (both.mmproj, both.bytes) == (folder / "mmproj-omni-f16.gguf", 8)
    put(folder, "mmproj-omni-Q8_0.gguf")
    with pytest.raises(ConfigError, match=r"choose one with --mmproj: mmproj-omni-Q8_0\.gguf, mm"):
        gguf_files(folder / "omni-Q4_K_M.gguf")
    chosen = gguf_files(folder / "omni-Q4_K_M.gguf", folder / "mmproj-omni-f16.gguf")
    assert chosen == both


def test_parts_of_a_model_count_together(folder: Path) -> None:
    put(folder, "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "bigger.gguf")
    found = gguf_files(folder / "big-00001-of-00002.gguf")
    assert found is not None
    assert found.bytes == 8


def test_a_folder_of_files(folder: Path) -> None:
    put(
        folder / "omni", "omni-Q4_K_M.gguf", "omni-Q8_0.gguf", "mmproj-f16.gguf", "mmproj-bf16.gguf"
    )
    found = gguf_files(folder / "omni")
    assert found is not None
    assert (found.name, found.model.name) == ("omni", "omni-Q4_K_M.gguf")
    assert found.mmproj == folder / "omni" / "mmproj-bf16.gguf"
    (folder / "omni" / "config.json").write_text("{}")
    assert gguf_files(folder / "omni") is None


def test_a_name_of_the_hub(folder: Path) -> None:
    repo = folder / "hub" / "models--owner--omni-GGUF"
    put(repo / "snapshots" / "1234", "omni-Q4_K_M.gguf", "omni-Q8_0.gguf", "mmproj-f16.gguf")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1234")
    for name, file in (
        ("owner/omni-GGUF", "omni-Q4_K_M.gguf"),
        ("owner/omni-GGUF:Q8_0", "omni-Q8_0.gguf"),
    ):
        found = gguf_files(name)
        assert found is not None
        assert (found.name, found.model.name) == (name, file)
        assert found.mmproj is not None
    with pytest.raises(ModelError, match="no quantization 'Q2_K' there; it has Q4_K_M, Q8_0"):
        gguf_files("owner/omni-GGUF:Q2_K")
    with pytest.raises(ModelError, match="not on this machine: mico-chat pull owner/other:Q8_0"):
        gguf_files("owner/other:Q8_0")


@pytest.mark.parametrize("name", ["mini", "owner/model", "nothing", "../up/and/away"])
def test_other_models(folder: Path, name: str) -> None:
    assert gguf_files(name) is None
    with pytest.raises(ConfigError, match=r"--mmproj .*: it goes with a GGUF file"):
        gguf_files(name, folder / "mmproj.gguf")


def test_files_that_are_missing(folder: Path) -> None:
    put(folder, "omni.gguf")
    for model, mmproj in ((folder / "no.gguf", None), (folder / "omni.gguf", folder / "no.gguf")):
        with pytest.raises(MicoError, match=r"no\.gguf: there is no such file"):
            gguf_files(model, mmproj)
