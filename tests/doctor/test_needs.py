"""What a model takes, against real files and known sizes; what fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mico_chat.checkpoints.footprint import meta_chat, meta_llm
from mico_chat.checkpoints.gguf_export import QUANTIZATIONS, export_gguf
from mico_chat.cli.doctor.needs import (
    LLAMACPP_CACHE,
    Memory,
    Needs,
    Way,
    context_finding,
    count,
    fit_finding,
    gguf_bytes,
    loading_findings,
    weights_finding,
)
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.preprocessing import Preprocessing
from mico_chat.model.processing import MicoChatProcessor
from tests.doctor.fakes import GB
from tests.tiny import SIDE, byte_level, chat_model

INT8 = Way("transformers", "int8", "--quantization int8")
NF4 = Way("transformers", "nf4", "--quantization nf4")
PLAIN = Way("transformers", "bfloat16", "")


@pytest.fixture(scope="module")
def seven_b() -> Needs:
    return Needs.of(meta_chat(MicoChatConfig.named("mico-g-vicuna-7b")))


def test_mico_chat_7b(seven_b: Needs) -> None:
    assert seven_b.llm_parameters == 6_738_415_616
    assert seven_b.llm["bfloat16"] == pytest.approx(13.48 * GB, rel=0.01)
    # Files of this very model that llama.cpp's own tools write.
    assert seven_b.llm["Q8_0"] == pytest.approx(7.16 * GB, rel=0.01)
    assert seven_b.llm["Q4_0"] == pytest.approx(3.83 * GB, rel=0.01)
    assert seven_b.llm["Q4_K_M"] == pytest.approx(4.08 * GB, rel=0.02)
    assert seven_b.kv_per_token == 2 * 32 * 4096 * 2
    assert [part.name for part in seven_b.parts] == ["encoder", "context", "bridge"]


def test_what_an_engine_takes_beside_the_weights(seven_b: Needs) -> None:
    plain = seven_b.total("transformers", "bfloat16")
    context = 4096 * seven_b.kv_per_token
    assert plain - seven_b.llm["bfloat16"] - seven_b.beside - context == pytest.approx(0.6 * GB)
    assert seven_b.total("transformers", "nf4") < 10 * GB < plain
    # llama.cpp has the token table a second time, and logits.
    more = seven_b.total("llamacpp", "Q8_0") - seven_b.llm["Q8_0"]
    assert more > plain - seven_b.llm["bfloat16"] + 32000 * 4096 * 2


def test_keys_and_values_of_llamacpp_are_halves_whatever_the_dtype() -> None:
    chat = meta_chat(MicoChatConfig.named("mico-g-vicuna-7b"))
    precise, usual = Needs.of(chat, torch.float32), Needs.of(chat)
    assert precise.kv_per_token == 2 * usual.kv_per_token
    beside = [n.beside + n.token_table for n in (precise, usual)]
    totals = [n.total("llamacpp", "F16") for n in (precise, usual)]
    assert totals[0] - beside[0] == totals[1] - beside[1]


def test_the_cache_that_llamacpp_takes_at_least() -> None:
    engine = pytest.importorskip("mico_chat.engine.llamacpp")
    assert engine.DEFAULT_CACHE_BYTES == LLAMACPP_CACHE


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("width", "tied"), [(256, True), (256, False), (96, True)])
def test_a_gguf_files_size(tmp_path: Path, quantization: str, width: int, tied: bool) -> None:
    pytest.importorskip("llama_cpp")
    llm_config = LlamaConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    folder = checkpoint(tmp_path / "model", llm_config)
    file = export_gguf(folder, tmp_path / "model.gguf", quantization)
    tensors = file.stat().st_size - header_bytes(file)
    # Which layers of a Q4_K_M get a finer type depends on their number.
    rel = 0.06 if quantization == "Q4_K_M" else 0.005
    assert gguf_bytes(meta_llm(llm_config), quantization) == pytest.approx(tensors, rel=rel)


def checkpoint(folder: Path, llm_config: LlamaConfig) -> Path:
    """A tiny chat model around a language model of a given size."""
    llm = AutoModelForCausalLM.from_config(llm_config)
    llm.save_pretrained(folder / "llm")
    config = MicoChatConfig.tiny()
    config.llm_config, config.base_llm = llm.config, str(folder / "llm")
    chat_model(config).save_pretrained(folder)
    preprocessing = Preprocessing(image_size=SIDE, max_slices=4)
    MicoChatProcessor.for_config(config, byte_level(), preprocessing).save_pretrained(folder)
    return folder


def header_bytes(file: Path) -> int:
    """Bytes before a GGUF file's tensors: metadata and tokenizer."""
    import gguf

    return int(gguf.GGUFReader(file).data_offset)


# --- fit ----------------------------------------------------------------------------------------


def test_it_fits(seven_b: Needs) -> None:
    found = fit_finding(seven_b, "7b", PLAIN, [INT8, NF4], Memory("A card", 24 * GB, 24 * GB))
    assert found.mark == "ok"
    assert "24.0 GB of A card are free" in found.text
    assert found.facts["needed"] == seven_b.total("transformers", "bfloat16")


def test_it_fits_in_8_or_4_bit(seven_b: Needs) -> None:
    def found(free: int) -> str:
        memory = Memory("A card", free, free)
        finding = fit_finding(seven_b, "7b", PLAIN, [INT8, NF4], memory)
        assert finding.mark == "problem"
        return f"{finding.text} / {finding.mend}"

    assert "fits in 8 bit, int8" in found(16 * GB)
    assert found(16 * GB).endswith("mico-chat serve --model 7b --quantization int8")
    assert "fits in 4 bit, nf4" in found(10 * GB)
    nothing = found(2 * GB)
    assert "needs 18.4 GB, 2.0 GB of A card are free" in nothing
    assert "the least, in 4 bit, is 9." in nothing
    assert "a machine with more memory" in nothing


def test_memory_that_others_have(seven_b: Needs) -> None:
    found = fit_finding(seven_b, "7b", PLAIN, [], Memory("memory", 5 * GB, 64 * GB))
    assert found.mark == "problem"
    assert "5.0 GB of memory are free of 64.0 GB: other programs have the rest" in found.text


def test_weights_go_through_the_machines_memory(seven_b: Needs) -> None:
    assert list(loading_findings(seven_b, "bfloat16", Memory("memory", 32 * GB, 32 * GB))) == []
    (found,) = loading_findings(seven_b, "bfloat16", Memory("memory", 8 * GB, 8 * GB))
    assert found.mark == "problem"
    assert "of which 8.0 GB are free" in found.text


def test_what_is_said(seven_b: Needs) -> None:
    context = context_finding(seven_b, "transformers")
    assert "524 KB of keys and values a token, 2.1 GB for 4096 tokens" in context.text
    small = context_finding(Needs.of(meta_chat(MicoChatConfig.tiny())), "llamacpp")
    assert "537 MB at once" in small.text
    weights = weights_finding(seven_b)
    assert len({len(row) for row in weights.rows}) == 1
    json.dumps(weights.facts)


@pytest.mark.parametrize(
    ("n", "said"), [(12, "12"), (1200, "1.2 K"), (134_515_008, "134.5 M"), (6.74e9, "6.74 B")]
)
def test_counts_in_words(n: int, said: str) -> None:
    assert count(n) == said
