"""Folders: where a name leads, and what is said where it leads nowhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mico_chat.checkpoints import folders
from mico_chat.checkpoints.assemble import save_text_branch
from mico_chat.checkpoints.folders import model_folder
from mico_chat.checkpoints.load import has_text_branch, load_pretraining
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import ModelError
from tests.support.tiny import captions, chat_model, letters, pretraining_model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's models folder, with ``mini`` in it."""
    folder = tmp_path / "models"
    (folder / "mini").mkdir(parents=True)
    (folder / "mini" / "config.json").write_text("{}")
    monkeypatch.setattr(folders, "MODELS", folder)
    return folder


def test_names_and_folders(models: Path, tmp_path: Path) -> None:
    mini = str(models / "mini")
    assert model_folder("mini") == model_folder(mini) == mini
    assert model_folder("someone/some-model") == "someone/some-model"
    for name in ("./nowhere", "/no/such/place", "~/x", "a/b/c"):
        with pytest.raises(ModelError, match=f"^{name}: there is no such folder$"):
            model_folder(name)
    with pytest.raises(ModelError, match=r"no model 'minni': .* brings mini; did you mean mini"):
        model_folder("minni")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: no config\.json there"):
        model_folder(tmp_path / "empty")


def test_load_pretraining_shares_what_a_chat_model_has(tmp_path: Path) -> None:
    whole, pretrained = chat_model(), pretraining_model()
    whole.save_pretrained(tmp_path)
    assert not has_text_branch(tmp_path)
    with pytest.raises(ModelError, match="no text branch there"):
        load_pretraining(tmp_path)
    save_text_branch(pretrained, letters(), tmp_path)
    assert has_text_branch(tmp_path)
    chat = MicoChatForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in chat.state_dict().items()}
    shared, _ = load_pretraining(tmp_path, chat)
    assert shared.encoder is chat.encoder
    assert shared.context is chat.context
    assert shared.concepts is chat.concepts
    assert not shared.training
    for name, tensor in chat.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    alone, _ = load_pretraining(tmp_path)
    for name, tensor in whole.encoder.state_dict().items():
        assert torch.equal(alone.encoder.state_dict()[name], tensor)
    text = pretrained.train(False).encode_text(*captions())
    for loaded in (shared, alone):
        torch.testing.assert_close(loaded.encode_text(*captions()), text)


def test_the_text_branch_of_another_model_says_so(tmp_path: Path) -> None:
    chat = chat_model()
    chat.save_pretrained(tmp_path)
    beside = save_text_branch(pretraining_model(), letters(), tmp_path)
    state = load_file(beside / "model.safetensors")
    state["media_projection.weight"] = torch.zeros(16, 48)
    save_file(state, beside / "model.safetensors")
    for given in (None, chat):
        with pytest.raises(ModelError, match=r"not the text branch .*media_projection") as caught:
            load_pretraining(tmp_path, given)
        assert "\n" not in str(caught.value)
