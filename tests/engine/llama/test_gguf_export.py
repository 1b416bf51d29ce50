"""In llama.cpp, an exported file gives the logits and tokens of its model."""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers import decoders as dec
from tokenizers import pre_tokenizers as pre
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mico_chat.checkpoints import folders
from mico_chat.checkpoints.configs import digest_of
from mico_chat.checkpoints.folders import model_folder
from mico_chat.checkpoints.pretrained import load_llm
from mico_chat.cli import main as cli
from mico_chat.cli import models as cli_models
from mico_chat.engine import llamacpp_export as gguf_export
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.llamacpp import Weights
from mico_chat.engine.llamacpp_export import export_gguf, gguf_of
from mico_chat.engine.llamacpp_tokenizer import PRE_TOKENIZERS
from mico_chat.errors import ConfigError, MissingExtraError, ModelError
from mico_chat.model.config import MicoChatConfig
from mico_chat.reading import speech
from tests.engine.tiny_llm import save_llm
from tests.support.replicas.mtmd_loop import decode, signed
from tests.support.tiny import TEMPLATE, chat_model, command, letters
from tests.support.vicuna import write_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 times that we've seen it.",
    "A red ball lies    on the table.\n\n\tThe cat doesn't care: they'll play at 10:45, I'M SURE.",
    "Größe, naïve, 東京 and Москва; price: $3.50 (or 42 %)! <tag> [x] {y} </s> _under_score_",
] * 3
ODD = [
    "Hello world",
    "it's WE'VE i'll They'D don't",
    "a  b   c    d",
    "one\ntwo\n\nthree\r\n\r\n four\t\tfive \n six",
    "1 22 333 4444 55555 3.14159 x1y22z",
    "a  12  345\n67",
    "smile 🙂👩‍👩‍👧 of the day",
    "naïve Größe Москва 東京 ñ é",
    "plain <|im_start|>user<|im_end|> and <s></s><unk><0x0A> as text",
    "trailing space ",
    "!?...,;:--(){}[]<>@#$%^&*~`|\\/\"'",
    "x",
    "",
]
LEADING_SPACE = [" leading", "   three", "\n first"]


class File:
    """A GGUF file in llama.cpp, its key-value cache in float32."""

    def __init__(self, path: Path) -> None:
        self._weights = Weights(path)
        self._vocab = llama_cpp.llama_model_get_vocab(self._weights.pointer)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 128
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = params.flash_attn_type = 0  # not as the engine sets it
        self._context = llama_cpp.llama_init_from_model(self._weights.pointer, params)

    def metadata(self, key: str) -> str:
        value = ctypes.create_string_buffer(4096)
        read = signed("llama_model_meta_val_str", "int32_t", "void *, const char *, void *, size_t")
        assert read(self._weights.pointer, key.encode(), value, len(value)) >= 0
        return value.value.decode()

    def tokens(self, text: str, special: bool = False, framed: bool = False) -> list[int]:
        raw, ids = text.encode(), np.zeros(4096, np.int32)
        given = (raw, len(raw), ids.ctypes.data, len(ids), framed, special)
        return list(map(int, ids[: llama_cpp.llama_tokenize(self._vocab, *given)]))

    def framed(self, text: str) -> list[int]:
        return self.tokens(text, framed=True)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        decode(self._context, ids, 0)
        width = llama_cpp.llama_vocab_n_tokens(self._vocab)
        rows = (llama_cpp.llama_get_logits_ith(self._context, row) for row in range(len(ids)))
        return np.stack([np.ctypeslib.as_array(row, (width,)).copy() for row in rows])


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    return [int(token) for token in ids]


def logits_of(llm: PreTrainedModel, ids: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = llm.float()(torch.tensor([ids])).logits[0].numpy()
    return logits


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


IDS = [5, 17, 200, 3, 3, 90, 41, 250, 8, 120, 77, 6]


def llama_config(**changes: Any) -> LlamaConfig:
    """A config whose heads, key-value heads and layers differ in number, with large weights."""
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": True}
    return LlamaConfig(**(sizes | changes))


def checkpoint(
    folder: Path,
    config: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A chat model's folder whose language model lies in ``folder / "llm"``."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config or llama_config())
    with torch.no_grad():
        for tensor in llm.parameters():
            if tensor.ndim == 1:  # norms and biases, which start as ones and zeros
                tensor.add_(torch.randn_like(tensor) * 0.2)
    save_llm(folder, llm.to(dtype)).save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return folder


def add_lora(folder: Path, seed: int = 0) -> None:
    """An adapter that is not zero."""
    torch.manual_seed(seed)
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    parts = ["q_proj", "k_proj", "down_proj"]
    lora = LoraConfig(r=4, target_modules=parts, init_lora_weights=False)
    get_peft_model(llm, lora).save_pretrained(str(folder / "lora"))


def pre_tokenizer(steps: tuple[str, ...]) -> Any:
    known = {
        "words": pre.ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": pre.ByteLevel(add_prefix_space=False, use_regex=False),
        "digits": pre.Digits(individual_digits=True),
    }
    parts = [known.get(step) or pre.Split(Regex(step), "isolated") for step in steps]
    return pre.Sequence(parts) if len(parts) > 1 else parts[0]


def byte_level(
    steps: tuple[str, ...] = ("digits", "words"), ignore_merges: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(steps)
    tokenizer.decoder = dec.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def with_byte_fallback(tokens: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    vocab = {token: number for number, token in enumerate(tokens)}
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<unk>")


MODELS: dict[str, dict[str, Any]] = {
    "grouped-query, tied": {},
    "grouped-query, untied": {"tie_word_embeddings": False},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
}
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS |= {"llama3": {"rope_parameters": SCALED | LLAMA3}}
MODELS |= {"yarn": {"rope_parameters": SCALED | {"rope_type": "yarn"}}}


def logits_of_both(
    folder: Path, quantization: str = "F32"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits of the exported file, and of the checkpoint's language model."""
    file = export_gguf(folder, folder / "tiny.gguf", quantization)
    return File(file).logits(IDS), logits_of(load_llm(folder), IDS)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_logits_agree(tmp_path: Path, changes: dict[str, Any]) -> None:
    found, expected = logits_of_both(checkpoint(tmp_path, llama_config(**changes)))
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=5e-5)


# Rows of 64 random weights; the mini's error at Q8_0 is a third of this one.
OFF = {"F16": 0.005, "BF16": 0.03, "Q8_0": 0.06, "Q4_K_M": 0.4, "Q4_0": 0.4}


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [*((name, torch.float32) for name in OFF), ("F16", torch.bfloat16), ("Q8_0", torch.float16)],
)
def test_smaller_numbers_are_near(tmp_path: Path, quantization: str, dtype: torch.dtype) -> None:
    folder = checkpoint(tmp_path, dtype=dtype)
    found, expected = logits_of_both(folder, quantization)
    assert relative_error(found, expected) < OFF[quantization]
    whole = export_gguf(folder, tmp_path / "f32.gguf", "F32").stat().st_size
    assert (tmp_path / "tiny.gguf").stat().st_size < whole


def test_the_adapter_is_merged(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    without = logits_of(load_llm(folder), IDS)
    add_lora(folder)
    found, expected = logits_of_both(folder)
    assert np.abs(expected - without).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_language_model_inside_the_checkpoint(tmp_path: Path) -> None:
    config = MicoChatConfig.tiny()
    config.llm_config = llama_config()
    chat_model(config).save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    np.testing.assert_allclose(*logits_of_both(tmp_path), atol=5e-5)


@pytest.mark.parametrize(("steps", "ignore_merges"), PRE_TOKENIZERS, ids=PRE_TOKENIZERS.values())
def test_byte_level_tokens_agree(
    tmp_path: Path, steps: tuple[str, ...], ignore_merges: bool
) -> None:
    tokenizer = byte_level(steps, ignore_merges)
    folder = checkpoint(tmp_path, tokenizer=tokenizer)
    file = File(export_gguf(folder, tmp_path / "tiny.gguf", "F16"))
    for text in [*CORPUS, *ODD, *LEADING_SPACE]:
        assert file.tokens(text) == plain(tokenizer, text), text
    markup = "<|im_start|>user\nHi  12<|im_end|>\n<|im_start|>assistant\n"
    assert file.tokens(markup, special=True) == tokenizer(markup).input_ids
    assert file.framed("Hi") == tokenizer("Hi").input_ids


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.json"])
def test_sentence_piece_tokens_agree(tmp_path: Path, source: str) -> None:
    (tmp_path / "trained").mkdir()
    write_tokenizer(tmp_path / "trained", legacy=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained")
    folder = checkpoint(tmp_path / "model", tokenizer=tokenizer)
    if source == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
        for file in (tmp_path / "trained").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    else:
        assert not (folder / "tokenizer.model").exists()
    written = File(export_gguf(folder, tmp_path / "tiny.gguf", "F16"))
    for text in [*CORPUS, *ODD]:
        assert written.tokens(text) == plain(tokenizer, text), text
    assert written.framed("Hi") == tokenizer("Hi").input_ids
    assert written.framed("Hi")[0] == tokenizer.bos_token_id


def test_runs_of_spaces_that_share_a_score(tmp_path: Path) -> None:
    # As in Llama 2's ``tokenizer.json``, where their merges mix.
    one, two, three, four = ("▁" * n for n in range(1, 5))
    merges = [("▁", "a"), (three, one), (two, two), (two, one), (one, three), (one, two)]
    merges.append((one, one))
    tokenizer = with_byte_fallback(["a", "b", "▁a", one, two, three, four], merges)
    folder = checkpoint(tmp_path, tokenizer=tokenizer)
    written = File(export_gguf(folder, tmp_path / "tiny.gguf", "F16"))
    for text in (f"a{' ' * n}b" for n in range(20)):
        assert written.tokens(text) == plain(tokenizer, text), text


def test_special_tokens_and_template_are_written(tmp_path: Path) -> None:
    tokenizer = byte_level()
    folder = checkpoint(tmp_path, tokenizer=tokenizer)
    metadata = File(export_gguf(folder, tmp_path / "tiny.gguf")).metadata
    assert metadata("tokenizer.chat_template") == TEMPLATE
    assert metadata("tokenizer.ggml.pre") == "smollm"
    assert metadata("tokenizer.ggml.add_bos_token") == "false"
    for name in ("bos", "eos"):
        written = metadata(f"tokenizer.ggml.{name}_token_id")
        assert int(written) == getattr(tokenizer, f"{name}_token_id")
    assert metadata("tokenizer.ggml.padding_token_id") == str(tokenizer.pad_token_id)
    assert metadata("general.name") == tmp_path.name


def lowercase() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def endless() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)


def with_merges(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer with byte fallback, whose merges a SentencePiece model cannot have."""
    return with_byte_fallback(["▁", "a", "b", "c", "ab", "bc", "abc"], list(merges))


AB, BC, A_BC, AB_C = ("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (letters, "its type is WordLevel, and not BPE"),
        (lowercase, "cannot read this tokenizer: it changes the text first .*Lowercase"),
        (endless, "the tokenizer lacks an eos_token"),
        (partial(with_merges, AB, BC, A_BC), r"BPE, because it lacks the merge \('ab', 'c'\)"),
        (partial(with_merges, A_BC, AB, BC, AB_C), "because its merges are in another order"),
        (partial(byte_level, (r"\p{L}+", "bytes")), r"\+ bytes, .* none of .* \(gpt-2, smollm,"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_follow(
    tmp_path: Path, tokenizer: Any, said: str
) -> None:
    refused(checkpoint(tmp_path / "model", tokenizer=tokenizer()), tmp_path, said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=512), "'llama', not 'gpt2'"),
        (llama_config(hidden_act="gelu"), "activation 'silu', not 'gelu'"),
        (llama_config(rope_parameters=DYNAMIC), "default, linear, llama3, yarn, not 'dynamic'"),
        (llama_config(vocab_size=300), "id 300, but the model has only 300 token"),
    ],
)
def test_a_model_that_llama_cpp_cannot_follow(tmp_path: Path, config: Any, said: str) -> None:
    refused(checkpoint(tmp_path / "model", config), tmp_path, said)


def test_a_number_beyond_float16(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    with torch.no_grad():
        llm.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    llm.save_pretrained(folder / "llm")
    refused(folder, tmp_path, r"^blk\.0\.ffn_up\.weight has numbers above 65504")


def refused(folder: Path, out: Path, said: str) -> None:
    """Check that an export fails with ``said``, in one line, and leaves no file."""
    before = set(out.iterdir())
    with pytest.raises(ModelError, match=said) as caught:
        export_gguf(folder, out / "tiny.gguf")
    assert "\n" not in str(caught.value)
    assert set(out.iterdir()) == before


def test_what_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "tiny.gguf"
    for make in (partial(export_gguf, "mini", output), partial(gguf_of, "mini")):
        with pytest.raises(ConfigError, match=r"'../Q9' is unknown; choose one of F32, F16"):
            make("../Q9")
    with pytest.raises(ConfigError, match="is a folder: name the file"):
        export_gguf("mini", tmp_path)
    with pytest.raises(ModelError, match=r"\./nowhere: there is no such folder"):
        export_gguf("./nowhere", output)
    (tmp_path / "config.json").write_text(llama_config().to_json_string())
    with pytest.raises(ModelError, match="a model of type 'llama', expected 'mico_chat'"):
        export_gguf(tmp_path, output)
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    monkeypatch.setattr(llama_cpp, "_library", llama_cpp._library.__wrapped__)
    monkeypatch.delitem(vars(llama_cpp), "llama_backend_init", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'mico-chat\[llamacpp\]'"):
        export_gguf(tmp_path, output, "Q8_0")


def test_an_interrupted_export_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model")
    output = tmp_path / "tiny.gguf"
    output.write_text("old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_export, "_quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(folder, output, "Q8_0")
    assert output.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tiny.gguf"]
    export_gguf(folder, output, "Q8_0")
    assert output.read_bytes()[:4] == b"GGUF"


def test_llama_cpps_reason_is_passed_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.gguf").write_text("no GGUF")
    with pytest.raises(ModelError, match=r"could not quantize to Q8_0: .*failed to load model"):
        gguf_export._quantize(tmp_path / "broken.gguf", tmp_path / "out.gguf", "Q8_0")
    assert capfd.readouterr() == ("", "")


def test_built_once_and_anew_for_another_adapter(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[Path] = []

    def build(model: object, output: Path, quantization: str) -> Path:
        builds.append(output)
        output.write_text(quantization)
        return output

    monkeypatch.setattr(gguf_export, "export_gguf", build)
    folder = checkpoint(tmp_path / "tiny")
    with ThreadPoolExecutor(4) as pool:
        (first,) = set(pool.map(lambda _: gguf_of(folder, "F16"), range(4)))
    assert builds == [first]
    assert first.match(str(cache / "gguf" / "tiny-*-F16.gguf"))
    assert gguf_of(folder, "Q8_0") != first

    add_lora(folder)
    second = gguf_of(folder, "F16")
    add_lora(folder, seed=1)
    third = gguf_of(folder, "F16")
    checkpoint(folder, llama_config(initializer_range=0.1))
    fourth = gguf_of(folder, "F16")
    assert len({first, second, third, fourth}) == 4
    assert gguf_of(folder, "F16") == fourth


def test_the_encoders_weights_and_the_place_do_not_matter(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    before = digest_of(folder)
    (folder / "model.safetensors").write_bytes(b"encoder and bridge")
    assert digest_of(folder) == before
    shutil.copytree(folder, tmp_path / "0")  # its base LLM stays where it is
    assert digest_of(tmp_path / "0") == before


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands leave the log settings unchanged for the tests that follow."""
    monkeypatch.setattr(cli, "_quiet_libraries", lambda: None)
    monkeypatch.setattr(cli_models, "log_to_stderr", lambda: None)


@pytest.mark.usefixtures("quiet")
def test_the_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "model")
    output = tmp_path / "new" / "tiny.gguf"
    command("export", "gguf", "--model", str(folder), "--output", str(output))
    assert f"{output}: 0." in capsys.readouterr().out
    assert File(output).tokens("Hi") == plain(byte_level(), "Hi")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("installed", [True, False])
def test_setup_makes_the_file_where_llama_cpp_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(folders, "fetch_base_llm", lambda: "folder")
    monkeypatch.setattr(gguf_export, "gguf_of", lambda: "file")
    monkeypatch.setattr(speech, "fetch", lambda: "weights")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed or None)
    command("setup")
    said = capsys.readouterr().out
    assert ("GGUF: file" in said) == installed
    assert "speech: weights" in said, "the mini's ear needs them, whatever recognises speech"


@pytest.mark.slow
@pytest.mark.base_llm
def test_the_mini_talks_in_llama_cpp(tmp_path: Path, base_llm_folder: Path) -> None:
    file = File(export_gguf("mini", tmp_path / "mini.gguf", "Q8_0"))
    llm = load_llm("mini")
    tokenizer = AutoTokenizer.from_pretrained(model_folder("mini"))
    for text in [*CORPUS, *ODD, *LEADING_SPACE]:
        assert file.tokens(text) == plain(tokenizer, text), text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(str(rendered)).input_ids
    assert file.tokens(str(rendered), special=True) == ids
    found, expected = file.logits(ids), logits_of(llm, ids)
    assert relative_error(found, expected) < 0.08
    assert found[-1].argmax() == expected[-1].argmax()
