"""Loading a model: the choice of the engine, the weights, and refused options."""

import asyncio
import json
import logging
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mico_chat.adapters.mico import mico_of
from mico_chat.checkpoints.assemble import save_text_branch
from mico_chat.checkpoints.load import load_chat, load_encoder, read_token_table
from mico_chat.checkpoints.marks import Marks
from mico_chat.checkpoints.pretrained import plain_llm
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.base import GenerationOptions
from mico_chat.errors import ConfigError, ModelError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.messages import Message
from mico_chat.model.media_path import TokenTable
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.similarity import Item
from mico_chat.wire import Choice
from tests.engine.tiny_llm import save_llm, tiny_llm
from tests.support.fakes import FakeDecoder
from tests.support.tiny import (
    SIDE,
    beside,
    byte_level,
    chat_model,
    letters,
    llm_folder,
    one_of_each,
    picture,
    pretraining_model,
    saved,
    shown,
)

PROCESSED = ["media_kind", "media_units", "pixel_values"]


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("inside"))


def with_arguments(engine: str, **arguments: Any) -> dict[str, Any]:
    return {"engine": engine, "arguments": arguments}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "vlm"}, "no engine 'vlm'; known are auto, llamacpp"),
        ({"dtype": "int4"}, "no dtype 'int4'; known are float32"),
        ({"device": "tpu9"}, "no device 'tpu9' here: "),
        (with_arguments("llamacpp", tensor_parallel_size=2), "engine lacks the option 'tensor"),
        (with_arguments("llamacpp", n_cell=2), "the option 'n_cell'; did you mean 'n_cells'"),
        (with_arguments("transformers", threads=2), "lacks the option 'threads'; its options are"),
        (with_arguments("auto", enforce_eager=True), "llamacpp engine lacks the option 'enforce_e"),
        (with_arguments("llamacpp", n_cells=0), "n_cells: expected a whole .* at least 1, got 0"),
        (with_arguments("transformers", max_bytes=True), "max_bytes: expected a whole .*got True"),
        ({"engine": "transformers", "quantization": "Q4_0"}, "no .* 'Q4_0'; known are int8, nf4"),
        ({"engine": "llamacpp", "quantization": "int8"}, "no .* 'int8'; known are F32"),
        ({"quantization": "Q3"}, "the llamacpp engine has no quantization 'Q3'; known are F32"),
    ],
)
def test_options_that_make_no_sense(inside: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_assistant(inside, FakeDecoder(), EngineOptions(**options))


def test_arguments_reach_the_engine(inside: Path) -> None:
    options = EngineOptions("transformers", arguments={"n_slots": 3, "max_position": 50})
    with closing(load_assistant(inside, FakeDecoder(), options)) as assistant:
        assert assistant.engine.max_position == 50
        assert assistant.engine.stats().slots == 3


@pytest.mark.parametrize(("free", "share"), [(24 << 30, 0.92), (21 << 30, 0.825), (1 << 30, 0.01)])
def test_vllms_share_of_a_gpu(free: int, share: float) -> None:
    from mico_chat.engine.vllm_start import gpu_share

    assert gpu_share(free, 24 << 30) == share


def test_auto_does_without_llama_cpp_and_says_why(
    inside: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp cannot read the tokenizer of letters."""
    caplog.set_level(logging.INFO, "mico_chat.load")
    options = EngineOptions(dtype="float32")
    with closing(load_assistant(inside, FakeDecoder(), options)) as assistant:
        assert (assistant.engine.name, assistant.name) == ("transformers", inside.name)
        (answer,) = assistant.answer_all([[shown(picture(), "?")]], GenerationOptions(max_tokens=2))
        assert answer.usage.completion_tokens > 0
    first, then = (r.message for r in caplog.records if r.name == "mico_chat.load")
    assert first.startswith("engine: llamacpp (the fastest on ")
    assert then.startswith("engine: transformers (not llamacpp: ")
    for asked in (EngineOptions("llamacpp"), EngineOptions(quantization="F16")):
        with pytest.raises(ModelError):
            load_assistant(inside, FakeDecoder(), asked)


def exportable(folder: Path) -> Path:
    config = save_llm(folder, tiny_llm(tie_word_embeddings=True))
    chat_model(config).save_pretrained(folder)
    preprocessing = Preprocessing(image_size=SIDE, max_slices=4)
    MicoChatProcessor.for_config(config, byte_level(), preprocessing).save_pretrained(folder)
    return folder


def test_both_engines_answer_alike(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip(llama_cpp.PACKAGE)
    folder = exportable(tmp_path / "model")
    batch = [[Message.user("hello there")], [shown(picture(), "?")], [shown(*one_of_each())]]
    texts: dict[str, list[str]] = {}
    for name, quantization in (("llamacpp", "F32"), ("transformers", None)):
        options = EngineOptions(name, quantization, "float32", "cpu")
        with closing(load_assistant(folder, FakeDecoder(), options)) as assistant:
            assert assistant.engine.name == name
            answers = assistant.answer_all(batch, GenerationOptions(max_tokens=6))
        texts[name] = [answer.text for answer in answers]
    assert all(texts["llamacpp"])
    assert texts["llamacpp"] == texts["transformers"]


@pytest.mark.parametrize("engine", ["llamacpp", "transformers"])
def test_a_checkpoints_chat_defaults(tmp_path: Path, cache: Path, engine: str) -> None:
    pytest.importorskip(llama_cpp.PACKAGE)
    folder = exportable(tmp_path / "model")
    processor = MicoChatProcessor.from_pretrained(folder)
    processor.system_prompt = "You see."
    processor.save_pretrained(folder)
    options = {"repetition_penalty": 1.5, "unsure_below": 0.4}
    (folder / "generation_config.json").write_text(json.dumps(options))
    chats = EngineOptions(engine, dtype="float32", device="cpu")
    with closing(load_assistant(folder, FakeDecoder(), chats)) as assistant:
        assert assistant.system_prompt == "You see."
        assert assistant.defaults == GenerationOptions(repetition_penalty=1.5)
        assert assistant.marks == Marks({"": 0.4})
    weights_alone = replace(chats, chat_defaults=False)
    with closing(load_assistant(folder, FakeDecoder(), weights_alone)) as assistant:
        assert assistant.system_prompt is None
        assert assistant.defaults == GenerationOptions()
        assert assistant.marks is None
    wrongs: list[tuple[str, Any, str]] = [("repetition_penalty", "x", "'x'")]
    for wrong, said in [
        (-0.5, "-0.5"),
        (True, "True"),
        ({"^y": 2}, r"\^y: .* got 2"),
        ({"(": 0}, "'\\('"),
    ]:
        wrongs.append(("unsure_below", wrong, said))
    before = threading.active_count()
    for name, wrong, said in wrongs:
        (folder / "generation_config.json").write_text(json.dumps({name: wrong}))
        with pytest.raises(ModelError, match=rf"generation_config\.json: {name}: .*{said}"):
            load_assistant(folder, FakeDecoder(), chats)
    assert threading.active_count() == before  # the engine of a model that is refused is closed


@pytest.mark.parametrize("engine", ["llamacpp", "transformers"])
def test_similarity_comes_with_the_text_branch(tmp_path: Path, cache: Path, engine: str) -> None:
    pytest.importorskip(llama_cpp.PACKAGE)
    folder = exportable(tmp_path / "model")
    options = EngineOptions(engine, device="cpu", context_cache_bytes=1000)
    with closing(load_assistant(folder, FakeDecoder(), options)) as assistant:
        assert assistant.similarity is None
    save_text_branch(pretraining_model(), letters(), folder)
    with closing(load_assistant(folder, FakeDecoder(), options)) as assistant:
        similarity = assistant.similarity
        assert similarity is not None
        assert mico_of(assistant.adapter).model.dtype == torch.bfloat16
        items: list[Item] = [picture(), "a cat"]
        weights = folder / "pretraining/model.safetensors"  # they are read for the first item
        kept = weights.read_bytes()
        weights.write_bytes(b"broken")
        with pytest.raises(ModelError, match="a file there is broken"):
            asyncio.run(similarity.embed(items))
        weights.write_bytes(kept)
        assert asyncio.run(similarity.embed(items)).vectors.shape == (2, similarity.dim)
        assert similarity._encoder.cache.max_bytes == 1000
    with pytest.raises(ModelError, match="closed"):
        asyncio.run(similarity.embed(["a cat"]))


def test_end_tokens_of_the_generation_config(tmp_path: Path) -> None:
    """Some models name their end token only in the generation config."""
    llm = llm_folder(tmp_path / "llm")
    folder = beside(tmp_path / "model", llm)
    options = EngineOptions("transformers", dtype="float32", device="cpu")

    def answer() -> Choice:
        with closing(load_assistant(folder, FakeDecoder(), options)) as assistant:
            long = GenerationOptions(max_tokens=9, logprobs=0, temperature=1.0, seed=3)
            (found,) = assistant.answer_all([[Message.user("hi")]], long)
        return found.choices[0]

    free = answer()
    assert free.finish_reason == "length"
    ends = [free.logprobs[4].token_id, 1]
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    stopped = answer()
    assert stopped.finish_reason == "stop"
    # The same answer up to its first end, which is not part of it.
    said = [found.token_id for found in free.logprobs]
    until = next(n for n, token in enumerate(said) if token in ends)
    assert [found.token_id for found in stopped.logprobs] == said[:until]


@pytest.mark.parametrize("llm_is", ["inside", "beside"])
@pytest.mark.parametrize("files", ["one file", "several files"])
def test_the_encoder_alone_gives_the_models_context_tokens(
    llm_is: str, files: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if llm_is == "inside":
        saved(folder)
    else:
        beside(folder, llm_folder(tmp_path / "llm"))
    if files == "several files":
        for part in (path.parent for path in tmp_path.glob("*/model.safetensors")):
            model = (AutoModel if part == folder else AutoModelForCausalLM).from_pretrained(part)
            (part / "model.safetensors").unlink()
            model.save_pretrained(part, max_shard_size="40KB")
            assert len(list(part.glob("model-*.safetensors"))) > 1
    whole, processor = load_chat(folder, dtype="float32", device="cpu")
    alone, same = load_encoder(folder, dtype="float32", device="cpu")
    assert isinstance(alone.llm, TokenTable)
    assert not alone.training
    assert same.to_dict() == processor.to_dict()
    assert [name for name, _ in alone.llm.named_parameters()] == ["embed_tokens.weight"]
    inputs = processor([[shown(*one_of_each())]])
    media = [inputs[name] for name in PROCESSED]
    with torch.inference_mode():
        expected, found = (model.context_tokens(*media) for model in (whole, alone))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_token_table_there(tmp_path: Path) -> None:
    folder = llm_folder(tmp_path)
    save_file({"wte.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no model\.embed_tokens\.weight in model\.safetensors"):
        read_token_table(folder, torch.float32)


def test_weights_of_another_config(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["bridge.scale"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"not the weights of its config: Missing .*bridge\.scale"):
        load_encoder(folder)


def test_a_language_model_inside_is_written_once(inside: Path, cache: Path) -> None:
    folder = plain_llm(inside)
    assert isinstance(folder, Path)
    assert cache in folder.parents
    llm = AutoModelForCausalLM.from_pretrained(folder)
    whole, processor = load_chat(inside, dtype="float32", device="cpu")
    for name, weight in whole.llm.state_dict().items():
        assert torch.equal(weight, llm.state_dict()[name])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert plain_llm(inside) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_an_adapter_is_merged_unless_the_model_is_quantized(tmp_path: Path, cache: Path) -> None:
    llm = llm_folder(tmp_path / "llm")
    folder = beside(tmp_path / "model", llm)
    assert plain_llm(folder) == llm, "without an adapter it is taken where it lies"
    torch.manual_seed(2)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(llm), lora)
    adapted.save_pretrained(str(folder / "lora"))
    merged = AutoModelForCausalLM.from_pretrained(plain_llm(folder)).state_dict()
    base = AutoModelForCausalLM.from_pretrained(llm).state_dict()
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)
    config = json.loads((llm / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (llm / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantized: merge the adapter"):
        plain_llm(folder)
