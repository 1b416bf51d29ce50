"""A merged folder is whole, can be moved, and answers as before; what is found on the hub."""

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mico_chat.checkpoints.assemble import assemble, save_text_branch
from mico_chat.checkpoints.configs import chat_config
from mico_chat.checkpoints.folders import LLM, LORA, llm_source, local_folder
from mico_chat.checkpoints.load import has_text_branch, load_chat, load_encoder, load_pretraining
from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration, load_llm, merge
from mico_chat.errors import ConfigError, ModelError
from mico_chat.load import EngineOptions, load_assistant, lora_of
from mico_chat.messages import Message
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.options import GenerationOptions
from tests.support.fakes import FakeDecoder
from tests.support.tiny import (
    captions,
    command,
    letters,
    picture,
    pretraining_model,
    saved,
    shown,
    stage1_folder,
)
from tests.support.vicuna import pickle_weights, vicuna_folder

TALK = [shown(picture(), "What is it?"), Message.assistant("A cat."), Message.user("Sure?")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vicuna_folder(tmp_path_factory.mktemp("base") / "vicuna", legacy=True)


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoder with text branch, a bridge, an adapter on a Vicuna that lies elsewhere."""
    folder = tmp_path_factory.mktemp("tuned")
    stage1 = stage1_folder(folder / "stage1")
    return with_adapter(assemble(stage1, str(base), folder / "chat"), base)


def with_adapter(folder: Path, base: Path, seed: int = 3) -> Path:
    llm: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(llm, settings).save_pretrained(str(folder / LORA))
    return folder


def table(model: Any) -> Any:
    return model.get_input_embeddings().weight


def logits(folder: str | Path, **options: Any) -> Tensor:
    model, processor = load_chat(folder, dtype="float32", **options)
    with torch.inference_mode():
        found: Tensor = model(**processor([TALK])).logits[0]
    return found


def test_a_merged_folder_is_whole(tuned: Path, tmp_path: Path) -> None:
    merged = merge(tuned, tmp_path / "merged")
    moved = tmp_path / "moved"
    shutil.move(merged, moved)
    assert chat_config(moved).base_llm == LLM
    assert not (moved / LORA).exists()
    # Merged in float16, as the base is stored; the adapter's part was exact before.
    torch.testing.assert_close(logits(moved), logits(tuned), rtol=0.02, atol=0.05)
    before, after = (MicoChatProcessor.from_pretrained(folder) for folder in (tuned, moved))
    media = [before.measured(picture())]
    assert after.tokenize(TALK, True, media) == before.tokenize(TALK, True, media)
    assert has_text_branch(moved)
    for given in (load_pretraining(moved), load_pretraining(moved, load_encoder(moved)[0])):
        expected = load_pretraining(tuned)[0].encode_text(*captions())
        torch.testing.assert_close(given[0].encode_text(*captions()), expected)


@pytest.mark.parametrize("within", [False, True])
def test_what_a_checkpoint_says_about_its_chats_is_kept(
    tuned: Path, tmp_path: Path, within: bool
) -> None:
    folder = tmp_path / "chat"
    if within:
        saved(folder)
    else:
        shutil.copytree(tuned, folder)
    processor = MicoChatProcessor.from_pretrained(folder)
    processor.system_prompt = "You see."
    processor.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    model, processor = load_chat(merge(folder, tmp_path / "merged"))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    for written in (tmp_path / "merged", tmp_path / "saved"):
        encoder, processor = load_encoder(written)
        assert encoder.generation == {"repetition_penalty": 1.5}
        assert processor.system_prompt == "You see."


def test_the_language_models_folder_is_hugging_faces(
    tuned: Path, base: Path, tmp_path: Path
) -> None:
    llm = merge(tuned, tmp_path / "merged") / LLM
    model = AutoModelForCausalLM.from_pretrained(llm)
    assert model.dtype == torch.float16
    expected = load_llm(tuned).state_dict()
    own = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
        assert torch.equal(value, own[name]) != ("q_proj" in name or "down_proj" in name)
    # The prompt that a server over that folder alone makes is ours.
    tokenizer = AutoTokenizer.from_pretrained(llm)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rendered = str(tokenizer.apply_chat_template(talk, tokenize=False))
    assert rendered.startswith("<s>A chat between")
    assert rendered.endswith("USER: Hi ASSISTANT: Ho</s>")
    processor = MicoChatProcessor.from_pretrained(tuned)
    ids, _ = processor.tokenize([Message.user("Hi"), Message.assistant("Ho")], False)
    assert tokenizer(rendered, add_special_tokens=False).input_ids == ids
    assert not [p for p in llm.rglob("*") if "lora" in p.name or "adapter" in p.name]
    # All releases of transformers can write it again.
    generation = GenerationConfig.from_pretrained(llm)
    generation.validate(strict=True)
    assert generation.temperature == 0.9


def test_a_language_model_inside_the_weights_moves_out(tmp_path: Path) -> None:
    model, _ = load_chat(saved(tmp_path / "inside"), dtype="float32")
    save_text_branch(pretraining_model(), letters(), tmp_path / "inside")
    with pytest.raises(ModelError, match="inside the model's own weights; `mico-chat merge`"):
        llm_source(tmp_path / "inside", chat_config(tmp_path / "inside"))
    merged = merge(tmp_path / "inside", tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(tmp_path / "inside"))
    assert has_text_branch(merged)
    llm = AutoModelForCausalLM.from_pretrained(merged / LLM)
    assert torch.equal(table(llm), table(model))


def test_without_an_adapter_it_becomes_whole(base: Path, tmp_path: Path) -> None:
    stage1 = stage1_folder(tmp_path / "stage1")
    own = tmp_path / "vicuna"
    shutil.copytree(base, own)
    pickle_weights(own)
    folder = assemble(stage1, str(own), tmp_path / "chat")
    before = logits(folder)
    merged = merge(folder, tmp_path / "merged")
    shutil.rmtree(own)
    torch.testing.assert_close(logits(merged), before)


def test_what_is_not_merged(tuned: Path, base: Path, tmp_path: Path) -> None:
    merged = merge(tuned, tmp_path / "merged")
    with pytest.raises(ModelError, match="merged: nothing to merge"):
        merge(merged, tmp_path / "again")
    with pytest.raises(ConfigError, match="merged: it is there already"):
        merge(tuned, merged)
    with pytest.raises(ModelError, match="a model of type 'llama', expected 'mico_chat'"):
        merge(base, tmp_path / "other")
    with pytest.raises(ModelError, match="no such folder"):
        merge(tmp_path / "nothing", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]


def test_an_adapter_on_a_merged_model(tuned: Path, tmp_path: Path) -> None:
    """Trained further: the adapter's base is ``llm/`` in the same folder."""
    merged = merge(tuned, tmp_path / "merged")
    with_adapter(merged, merged / LLM)
    twice = merge(merged, tmp_path / "twice")
    torch.testing.assert_close(logits(twice), logits(merged), rtol=0.02, atol=0.1)
    assert not torch.allclose(logits(twice), logits(tuned), rtol=0.02, atol=0.05)


def test_saved_elsewhere_it_still_finds_its_language_model(tuned: Path, tmp_path: Path) -> None:
    merged = merge(tuned, tmp_path / "merged")
    model = MicoChatForConditionalGeneration.from_pretrained(merged)
    model.save_pretrained(tmp_path / "elsewhere")
    assert chat_config(tmp_path / "elsewhere").base_llm == str(merged / LLM)
    MicoChatForConditionalGeneration.from_pretrained(tmp_path / "elsewhere")
    model.save_pretrained(merged)
    assert chat_config(merged).base_llm == LLM
    (merged / LLM).rename(merged / "gone")
    with pytest.raises(ModelError, match="no folder 'llm' with the language model there"):
        load_chat(merged)


def test_the_command(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("merge", str(tuned), "--output", str(tmp_path / "m"), "--dtype", "bfloat16")
    assert f"{tmp_path / 'm'}: " in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m" / LLM).dtype == torch.bfloat16
    command("merge", str(tuned), "--output", str(tmp_path / "n"), "--dtype", "int4", code=2)
    assert "no dtype 'int4'" in capsys.readouterr().err


# --- on the hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that cannot be reached."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def put(hub: Path, name: str, folder: Path) -> None:
    """As if ``name`` had been fetched."""
    repository = hub / f"models--{name.replace('/', '--')}"
    revision = "0123456789012345678901234567890123456789"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(folder, repository / "snapshots" / revision)


def test_an_adapter_on_the_hub(tuned: Path, hub: Path) -> None:
    put(hub, "someone/chat", tuned)
    torch.testing.assert_close(logits("someone/chat"), logits(tuned))
    assert has_text_branch("someone/chat")
    assert len(load_pretraining("someone/chat")[1]) == len(letters())
    elsewhere = hub.rename(hub.with_name("elsewhere"))
    model = MicoChatForConditionalGeneration.from_pretrained(
        "someone/chat", cache_dir=str(elsewhere), dtype=torch.float16
    )
    for name, value in load_llm(tuned, torch.float16).state_dict().items():
        assert torch.equal(model.llm.state_dict()[name], value)


def test_a_merged_model_on_the_hub(tuned: Path, hub: Path, tmp_path: Path) -> None:
    merged = merge(tuned, tmp_path / "merged")
    put(hub, "someone/merged", merged)
    torch.testing.assert_close(logits("someone/merged"), logits(merged))
    source = llm_source(local_folder("someone/merged"), chat_config("someone/merged"))
    assert Path(source).name == LLM
    assert Path(source).is_relative_to(hub)
    assert table(load_encoder("someone/merged")[0]).shape[1] == 64
    assert torch.equal(table(load_llm("someone/merged")), table(load_llm(merged)))


def test_a_hub_that_does_not_have_it(hub: Path) -> None:
    with pytest.raises(ModelError) as caught:
        merge("someone/nothing", hub.parent / "out")
    assert "someone/nothing" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_was_tuned_further_is_an_adapter_of_the_model(
    tuned: Path, base: Path, tmp_path: Path
) -> None:
    own = with_adapter(shutil.copytree(tuned, tmp_path / "own"), base, seed=4)
    weights = load_file(own / "model.safetensors")
    moved = {n: t + 0.5 if n.startswith("bridge") else t for n, t in weights.items()}
    save_file(moved, own / "model.safetensors", {"format": "pt"})
    options, how = GenerationOptions(max_tokens=8), EngineOptions("transformers", dtype="float32")
    asked = [shown(picture(), "What is it?")], [Message.user("Hi")]
    said = {}
    for folder in (tuned, own):
        with closing(load_assistant(folder, FakeDecoder(), how)) as assistant:
            said[folder] = [one.text for one in assistant.answer_all(asked, options)]
            if folder == tuned:
                lora = lora_of(tuned, None, "own", str(own))
                assistant.wardrobe.load_lora(lora)
                worn = assistant.wearing(lora)
                found = [one.text for one in worn.answer_all(asked, options)]
                again = [one.text for one in assistant.answer_all(asked, options)]
    assert found == said[own] != said[tuned] == again
