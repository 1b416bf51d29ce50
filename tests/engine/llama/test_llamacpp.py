"""llama.cpp's model: its vectors, options and JSON schemas, broken files, steps given up."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mico_chat.checkpoints.folders import model_folder
from mico_chat.checkpoints.pretrained import load_llm
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.grammar import Grammar, Grammars
from mico_chat.engine.llamacpp_export import gguf_of
from mico_chat.engine.scheduler import Scheduler, Sequence
from mico_chat.engine.transformers import TransformersModel
from mico_chat.errors import ModelError
from mico_chat.media.medium import ContextBlock
from mico_chat.model.splice import PLACEHOLDER
from tests.engine.tiny_llm import answer, exported, feed, prompts, steps, text
from tests.support.tiny import byte_level

llamacpp = pytest.importorskip("mico_chat.engine.llamacpp")


def opened(file: Path, n_slots: int = 20, **options: Any) -> Any:
    return llamacpp.LlamaCppModel(file, n_slots=n_slots, n_cells=4096, threads=1, **options)


@pytest.fixture
def model(file: Path) -> Iterator[Any]:
    model = opened(file)
    yield model
    model.close()


@pytest.fixture(scope="module")
def file(llm: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(llm, tmp_path_factory.mktemp("checkpoint"))


def test_sizes(model: Any) -> None:
    assert (model.n_slots, model.n_cells, model.max_position) == (20, 4096, 1024)
    assert (model.n_vocab, model.ends) == (300, {byte_level().eos_token_id})


def test_rows_of_the_table_are_the_tokens_themselves(model: Any, llm: LlamaForCausalLM) -> None:
    ids = list(text(30))
    rows = llm.model.embed_tokens.weight.detach()[ids]
    expected = feed(model, 0, 0, ids)
    assert torch.equal(feed(model, 1, 0, 30 * [PLACEHOLDER], rows), expected)
    mixed = [*ids[:9], *11 * [PLACEHOLDER], *ids[20:]]
    assert torch.equal(feed(model, 2, 0, mixed, rows[9:20]), expected)
    coarse = rows.bfloat16()
    assert not torch.equal(feed(model, 3, 0, 30 * [PLACEHOLDER], coarse), expected)


def test_a_failed_step_can_be_forgotten(model: Any) -> None:
    scheduler = Scheduler(model, (), max_running=4)
    ids = list(text(9))
    feed(model, 0, 0, ids)  # of which the scheduler knows nothing
    sequence = Sequence(Prompt((text(5),)), GenerationOptions(max_tokens=4))
    scheduler.add(sequence)
    with pytest.raises(ModelError, match="llama_decode gave -1 for 5 tokens"):
        scheduler.step()
    scheduler.remove(sequence)
    scheduler.forget()
    assert len(answer(model, [sequence.prompt], scheduler=scheduler)[0]) == 12


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0, "repetition_penalty": 1.2},
        {"frequency_penalty": -1.0},
    ],
)
def test_penalties_equal_transformers(
    model: Any, llm: LlamaForCausalLM, said: list[list[int]], penalty: dict[str, float]
) -> None:
    options = GenerationOptions(max_tokens=12, **penalty)
    found = answer(model, prompts()[4:], options)
    assert found == answer(TransformersModel(llm), prompts()[4:], options)
    assert found != said[4:]


def test_logprobs_equal_transformers(model: Any, llm: LlamaForCausalLM) -> None:
    options = GenerationOptions(max_tokens=5, logprobs=4, repetition_penalty=1.5)
    ours = steps(model, prompts()[5], options)
    theirs = steps(TransformersModel(llm), prompts()[5], options)
    for our, their in zip(ours, theirs, strict=True):
        assert (our.token, [i for i, _ in our.top]) == (their.token, [i for i, _ in their.top])
        assert our.logprob == pytest.approx(their.logprob, abs=0.01)
        assert [v for _, v in our.top] == pytest.approx([v for _, v in their.top], abs=0.01)
    (none,) = steps(model, prompts()[5], GenerationOptions(max_tokens=1, logprobs=0))
    assert none.logprob is not None
    assert none.top == ()


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["cat", "猫", "dog"]},
        "legs": {"enum": [2, 4, 6]},
        "tame": {"type": "boolean"},
        "names": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["animal", "legs", "tame", "names"],
    "additionalProperties": False,
}


def texts(model: Any, options: GenerationOptions) -> list[str]:
    tokenizer = byte_level()
    assert options.form is not None
    grammar = Grammars(tokenizer.backend_tokenizer, model.ends).compile(*options.form)
    scheduler = Scheduler(model, model.ends, max_running=4)
    many = [Sequence(prompt, options, 0, grammar.copy()) for prompt in prompts()[:8]]
    for sequence in many:
        scheduler.add(sequence)
    while not scheduler.idle:
        scheduler.step()
    scheduler.forget()
    answers = [sequence.tokens for sequence in many]
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in answers]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_follows_the_schema(model: Any, temperature: float) -> None:
    options = GenerationOptions(max_tokens=300, json_schema=SCHEMA, temperature=temperature, seed=1)
    for written in texts(model, options):
        found = json.loads(written)
        assert set(found) == {"animal", "legs", "tame", "names"}
        assert found["animal"] in ("cat", "猫", "dog")
        assert found["legs"] in (2, 4, 6)
        assert isinstance(found["tame"], bool)
        assert 1 <= len(found["names"]) <= 3
        assert set(found["names"]) <= {"a", "b"}


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.5}])
def test_the_likeliest_token_is_chosen_without_a_look_at_all(
    model: Any, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    alone, looked = Grammar.allows, Mock(side_effect=Grammar.allowed)
    monkeypatch.setattr(Grammar, "allowed", lambda *given: looked(*given))
    (letter,) = byte_level()("a").input_ids
    for bias, looks in ({}, True), ({letter: 99.0}, False):
        form = {"regex": "[a-z ]{99}"}
        options = GenerationOptions(max_tokens=60, logit_bias=bias, **form, **more)
        monkeypatch.setattr(Grammar, "allows", alone)
        looked.reset_mock()
        found = texts(model, options)
        assert looked.called is looks
        monkeypatch.setattr(Grammar, "allows", lambda self, token: False)
        assert texts(model, options) == found


def test_a_string_has_no_raw_line_breaks(model: Any) -> None:
    options = GenerationOptions(
        max_tokens=60, json_schema={"type": "string"}, temperature=2.0, seed=1
    )
    written = "".join(texts(model, options))
    assert len(written) > 100
    assert not re.search(r"[\x00-\x1f]", written), "JSON writes these as escapes alone"


@pytest.mark.parametrize("size", [0, 3, 1000, -1000])
def test_a_broken_file_is_named(file: Path, tmp_path: Path, size: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"broken\.gguf: llama\.cpp cannot load it: \w"):
        opened(broken)


def test_every_thread_gets_its_own_reason(tmp_path: Path) -> None:
    def reason(number: int) -> str:
        with pytest.raises(ModelError) as failed:
            opened(tmp_path / f"nowhere-{number}.gguf")
        return str(failed.value).split("cannot load it")[1]

    with ThreadPoolExecutor(4) as pool:
        for number, said in enumerate(pool.map(reason, range(40))):
            assert set(re.findall(r"nowhere-(\d+)", said)) == {str(number)}


@pytest.mark.base_llm
def test_the_mini_answers_text_and_vectors_alike(base_llm_folder: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder("mini"))
    llm: Any = load_llm("mini")
    table = llm.get_input_embeddings().weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True).input_ids
    middle = ContextBlock(table[ids[3:9]].detach().float(), key=b"rows of the table")
    model = llamacpp.LlamaCppModel(gguf_of("mini"), n_slots=4, n_cells=2048, threads=1)
    batch = [Prompt((tuple(ids),)), Prompt((tuple(ids[:3]), middle, tuple(ids[9:])))]
    for tokens in answer(model, batch, GenerationOptions(max_tokens=9)):
        assert "Paris" in tokenizer.decode(tokens)
    model.close()


def test_a_step_that_is_given_up_is_computed_again(file: Path) -> None:
    steady = opened(file)
    model = llamacpp.LlamaCppModel(file, n_slots=20, n_cells=4096)
    prompt, more = list(range(40)), [7]
    expected = [feed(steady, 0, 0, prompt), feed(steady, 0, 40, more)]

    class Rash:
        """Gives up each step at once, the first time."""

        def __init__(self) -> None:
            self.seen: list[tuple[int, int, bool]] = []
            self.threads = 2

        def number(self, tokens: int) -> int:
            return self.threads

        def limit(self, tokens: int, threads: int) -> float | None:
            return -1.0 if threads == 2 else None

        def observe(self, tokens: int, threads: int, seconds: float, *, given_up: bool) -> None:
            self.seen.append((tokens, threads, given_up))
            self.threads = 1 if given_up else 2

    model._threads = rash = Rash()
    # The alarm's thread may come too late for so short a step: it rings from the start.
    model._alarm._set = lambda limit: setattr(
        model._alarm._text, "value", b"" if limit is None else b"!"
    )
    found = [feed(model, 0, 0, prompt), feed(model, 0, 40, more)]
    assert rash.seen == [(40, 2, True), (40, 1, False), (1, 2, True), (1, 1, False)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    model.close()
    steady.close()
