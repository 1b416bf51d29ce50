"""The transformers engine's model on a tiny random Llama, driven alone and by the scheduler.

The reference is Hugging Face's own ``generate``: greedy tokens are the same whether a prompt runs
alone or among others, whole or in chunks, computed or taken over.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence as Many
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.scheduler import Chunk, Scheduler
from mico_chat.engine.transformers import FIRST_CELLS, TransformersModel
from mico_chat.errors import RequestError
from mico_chat.model.splice import PLACEHOLDER
from tests.engine.tiny_llm import WIDTH, answer, block, generated, prompts, text, tiny_llm, whole


@pytest.fixture(scope="module")
def llm() -> LlamaForCausalLM:
    return tiny_llm()


def feed(model: TransformersModel, slot: int, start: int, ids: Many[int]) -> Tensor:
    """Compute ids of one slot; the logits after them."""
    (logits,) = model.run([Chunk(slot, start, ids, True)])
    assert isinstance(logits, Tensor)
    return logits


# --- the same tokens however they are computed --------------------------------------------------


def test_single_prompts_equal_generate(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm)
    for prompt in prompts():
        assert answer(model, [prompt]) == [generated(llm, prompt)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_batch", [512, 16])
def test_ragged_batch_equals_generate(attention: str, max_batch: int) -> None:
    llm = tiny_llm(attn_implementation=attention)
    model = TransformersModel(llm, n_slots=20, max_batch=max_batch)
    assert answer(model, prompts()) == [generated(llm, prompt) for prompt in prompts()]


def test_more_prompts_than_slots(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=3, max_batch=32)
    assert answer(model, prompts()) == [generated(llm, prompt) for prompt in prompts()]


def test_prefix_taken_over_equals_computed(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=4)
    scheduler = Scheduler(model, (), max_running=4)
    start = (text(20), block(9), text(30, seed=1))
    first = Prompt((*start, text(60, seed=2)))
    assert answer(model, [first], scheduler=scheduler) == [generated(llm, first)]
    others = [Prompt((*start, text(4, seed=seed))) for seed in (3, 4)]
    expected = [generated(llm, prompt) for prompt in others]
    assert answer(model, others, scheduler=scheduler) == expected
    # Copied into two slots: the first prompt's own is worth keeping.
    assert scheduler.stats().cached_tokens >= 2 * 59
    assert answer(model, [first], scheduler=scheduler) == [generated(llm, first)]


def test_copy_leaves_its_source(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=3)
    ids, ours, theirs = text(30), text(5, seed=1), text(6, seed=2)
    feed(model, 0, 0, ids)
    model.copy(0, 2, 20)
    copied = feed(model, 2, 20, theirs)
    torch.testing.assert_close(copied, whole(llm, (*ids[:20], *theirs)))
    torch.testing.assert_close(feed(model, 0, 30, ours), whole(llm, (*ids, *ours)))


def test_truncated_slot_is_used_again(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=2)
    ids, other = text(30), text(25, seed=1)
    feed(model, 1, 0, ids)
    model.truncate(1, 10)
    torch.testing.assert_close(feed(model, 1, 10, other), whole(llm, (*ids[:10], *other)))
    model.truncate(1, 0)
    torch.testing.assert_close(feed(model, 1, 0, other), whole(llm, other))


def test_logits_come_in_order_for_chunks_that_want_them(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=5)
    batch = [text(n, seed=n) for n in (9, 1, 4, 2, 1)]
    wanting = (0, 2, 3, 4)
    logits = model.run([Chunk(slot, 0, ids, slot in wanting) for slot, ids in enumerate(batch)])
    assert len(logits) == 4
    for slot, row in zip(wanting, logits, strict=True):
        torch.testing.assert_close(row, whole(llm, batch[slot]))
    ids = (*batch[1], 7)
    torch.testing.assert_close(feed(model, 1, 1, [7]), whole(llm, ids))


def test_what_is_no_number_stays_in_its_row(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=2)
    ids = text(4)
    broken = torch.full((3, WIDTH), float("nan"))
    logits = model.run([Chunk(0, 0, 3 * [PLACEHOLDER], True, [broken]), Chunk(1, 0, ids[:2], True)])
    assert logits[0].isnan().all()
    torch.testing.assert_close(logits[1], whole(llm, ids[:2]))
    assert len(model.run([Chunk(0, 3, [5], True), Chunk(1, 2, ids[2:3], True)])) == 2
    torch.testing.assert_close(feed(model, 1, 3, ids[3:]), whole(llm, ids))


# --- memory -------------------------------------------------------------------------------------


def test_memory_grows_with_what_is_held(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=4)
    assert (model.n_cells, model.max_position) == (4 * 1024, 1024)
    assert model.capacity == FIRST_CELLS
    long = text(700)
    first = feed(model, 0, 0, long)
    assert 700 <= model.capacity <= 2 * 700
    torch.testing.assert_close(first, whole(llm, long), atol=1e-4, rtol=1e-4)
    held = model.capacity
    for _ in range(5):
        model.truncate(0, 0)
        assert torch.equal(feed(model, 0, 0, long), first)
    assert model.capacity == held
    for slot in range(4):
        model.truncate(slot, 0)
    batch = [text(1024, seed=slot) for slot in range(4)]
    model.run([Chunk(slot, 0, ids, False) for slot, ids in enumerate(batch)])
    assert model.capacity == model.n_cells
    model.truncate(2, 1023)
    last = feed(model, 2, 1023, batch[2][1023:])
    torch.testing.assert_close(last, whole(llm, batch[2]), atol=1e-4, rtol=1e-4)


def test_cells_follow_from_memory_and_positions(llm: LlamaForCausalLM) -> None:
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head width, float32
    model = TransformersModel(llm, max_position=100, max_bytes=300 * token_bytes)
    assert (model.n_slots, model.n_cells, model.max_position) == (32, 300, 100)
    short = [prompt for prompt in prompts() if len(prompt) < 80]
    assert answer(model, short) == [generated(llm, prompt) for prompt in short]
    assert model.capacity <= 300
    assert TransformersModel(llm, max_position=5000).max_position == 1024


def test_failed_step_leaves_the_slots_usable(
    llm: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TransformersModel(llm, n_slots=3)
    ids, other = text(10), text(5, seed=1)
    feed(model, 0, 0, ids[:6])
    with monkeypatch.context() as patch:
        patch.setattr(llm.model.layers[1], "forward", None)
        for slot, start in ((0, 6), (1, 0), (2, 0)):
            with pytest.raises(TypeError):
                feed(model, slot, start, other)
    torch.testing.assert_close(feed(model, 0, 6, ids[6:]), whole(llm, ids))
    torch.testing.assert_close(feed(model, 1, 0, other), whole(llm, other))
    model.copy(0, 2, 4)
    torch.testing.assert_close(feed(model, 2, 4, other), whole(llm, (*ids[:4], *other)))


def test_closing_gives_back_memory(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm)
    feed(model, 0, 0, text(5))
    pools = [weakref.ref(pool) for layer in model._layers for pool in (layer.keys, layer.values)]
    model.close()
    assert [pool() for pool in pools] == [None] * 4
    assert llm.get_input_embeddings() is not None


# --- other models -------------------------------------------------------------------------------


def test_adapter_equals_its_merge() -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny_llm(), config).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = [generated(merged, prompt) for prompt in prompts()]
    assert answer(TransformersModel(adapted), prompts()) == expected
    assert expected != [generated(tiny_llm(), prompt) for prompt in prompts()]


def test_bfloat16() -> None:
    llm = tiny_llm()
    torch.nn.Module.to(llm, torch.bfloat16)
    model = TransformersModel(llm)
    assert [len(tokens) for tokens in answer(model, prompts())] == [12] * 16
    logits = feed(model, 0, 0, text(20))
    assert logits.dtype == torch.float32
    expected = whole(llm, text(20)).float()
    assert torch.nn.functional.cosine_similarity(logits, expected, dim=0) > 0.99


def test_eight_bits(tmp_path: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_llm().save_pretrained(tmp_path)
    llm = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    assert isinstance(llm.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear8bitLt)
    logits = feed(TransformersModel(llm), 0, 0, text(20))
    torch.testing.assert_close(logits, whole(llm, text(20)).float(), atol=1e-3, rtol=1e-3)


# --- sampling ---------------------------------------------------------------------------------


def test_sampled_answers_through_the_scheduler(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=4)
    options = GenerationOptions(max_tokens=12, temperature=1.0, seed=3)
    (alone,) = answer(model, prompts()[3:4], options)
    among = answer(model, prompts()[3:6], options)
    assert alone == among[0] != generated(llm, prompts()[3])


def test_schema_is_refused(llm: LlamaForCausalLM) -> None:
    options = GenerationOptions(json_schema={"type": "object"})
    with pytest.raises(RequestError, match=r"^json_schema: .*--engine llamacpp$"):
        TransformersModel(llm, n_slots=1).sampler(options, 0)
