"""The transformers engine's model and sampler: memory, failures, other models, options."""

import copy
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.scheduler import Chunk, Scheduler, Sequence
from mico_chat.engine.transformers import FIRST_CELLS, TorchSampler, TransformersModel
from mico_chat.errors import ModelError
from mico_chat.model.splice import PLACEHOLDER
from tests.engine.tiny_llm import WIDTH, answer, feed, generated, prompts, text, tiny_llm, whole


def test_logits_come_in_order_for_chunks_that_want_them(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=5)
    batch = [text(n, seed=n) for n in (9, 1, 4, 2, 1)]
    wanting = (0, 2, 3, 4)
    logits = model.run(
        [Chunk(slot, 0, ids, int(slot in wanting)) for slot, ids in enumerate(batch)]
    )
    assert len(logits) == 4
    for slot, row in zip(wanting, logits, strict=True):
        torch.testing.assert_close(row, whole(llm, batch[slot]))
    ids = (*batch[1], 7)
    torch.testing.assert_close(feed(model, 1, 1, [7]), whole(llm, ids))


def test_nan_stays_in_its_row(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=2)
    ids = text(4)
    broken = torch.full((3, WIDTH), float("nan"))
    logits = model.run([Chunk(0, 0, 3 * [PLACEHOLDER], 1, [broken]), Chunk(1, 0, ids[:2], 1)])
    assert logits[0].isnan().all()
    torch.testing.assert_close(logits[1], whole(llm, ids[:2]))
    assert len(model.run([Chunk(0, 3, [5], 1), Chunk(1, 2, ids[2:3], 1)])) == 2
    torch.testing.assert_close(feed(model, 1, 3, ids[3:]), whole(llm, ids))


def test_eager_attention() -> None:
    llm = tiny_llm(attn_implementation="eager")
    model = TransformersModel(llm, n_slots=20)
    assert answer(model, prompts()) == [generated(llm, prompt) for prompt in prompts()]


_KINDS = {"layer_types": ["linear_attention", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
RECURRENT: dict[str, dict[str, Any]] = {
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "Bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "GraniteMoeHybrid": {
        **_KINDS,
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        **_MAMBA,
    },
    "NemotronH": {
        **{"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]},
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "head_dim": 8, "n_groups": 1},
        **{"ssm_state_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
    },
}


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_states_batch(family: str) -> None:
    """Tokens are those of ``generate`` alone; in parts, beside others, and from copies of slots."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 1024, "tie_word_embeddings": False, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(
        **sizes, eos_token_id=299, **RECURRENT[family]
    )
    llm = getattr(transformers, f"{family}ForCausalLM")(config).train(False)
    for weight in llm.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=2 / weight[0].numel() ** 0.5)

    def said(prompt: Prompt) -> list[int]:
        ids = torch.tensor([prompt.tokens(0, len(prompt))[0]])
        given = {"attention_mask": torch.ones_like(ids), "min_new_tokens": 12}
        found = llm.generate(ids, **given, max_new_tokens=12, do_sample=False)
        return list(found[0, len(prompt) :].tolist())

    first = Prompt(((*text(30), 299), text(4, seed=9)))
    asked = [first, *(Prompt((text(n, seed=n),)) for n in (1, 2, 17, 40, 17, 90))]
    right = [said(prompt) for prompt in asked]
    model = TransformersModel(llm, n_slots=30, max_batch=16)
    scheduler = Scheduler(model, (299,), max_running=8)
    options = GenerationOptions(max_tokens=12, min_tokens=12)
    assert answer(model, asked, options, scheduler) == right
    starts = (*first.segments, tuple(right[0])), first.segments[:1]
    turns = [Prompt((*start, text(9, seed=5))) for start in starts]
    before = scheduler.stats().cached_tokens
    assert answer(model, turns, options, scheduler) == [said(turn) for turn in turns]
    assert scheduler.stats().cached_tokens - before == len(first) + 11 + 31
    assert scheduler.stats().state_bytes > model.state_bytes
    with pytest.raises(ModelError, match="cannot go back to 1 tokens"):
        model.truncate(next(slot.number for slot in scheduler.slots if slot.held), 1)
    small = TransformersModel(llm, max_bytes=2 * 20 * model.state_bytes)  # half is for states
    scheduler = Scheduler(small, (299,), max_running=8)
    assert (small.n_slots, answer(small, asked[:3], options, scheduler)) == (20, right[:3])


def test_memory_grows_with_what_is_held(llm: LlamaForCausalLM) -> None:
    model = TransformersModel(llm, n_slots=4)
    assert (model.n_cells, model.max_position) == (4 * 1024, 1024)
    assert model._cells.capacity == FIRST_CELLS
    long = text(700)
    first = feed(model, 0, 0, long)
    assert 700 <= model._cells.capacity <= 2 * 700
    torch.testing.assert_close(first, whole(llm, long), atol=1e-4, rtol=1e-4)
    held = model._cells.capacity
    for _ in range(5):
        model.truncate(0, 0)
        assert torch.equal(feed(model, 0, 0, long), first)
    assert model._cells.capacity == held
    for slot in range(4):
        model.truncate(slot, 0)
    batch = [text(1024, seed=slot) for slot in range(4)]
    model.run([Chunk(slot, 0, ids, 0) for slot, ids in enumerate(batch)])
    assert model._cells.capacity == model.n_cells
    model.truncate(2, 1023)
    last = feed(model, 2, 1023, batch[2][1023:])
    torch.testing.assert_close(last, whole(llm, batch[2]), atol=1e-4, rtol=1e-4)


def test_cells_follow_from_memory_and_positions(llm: LlamaForCausalLM) -> None:
    token_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head width, float32
    model = TransformersModel(llm, max_position=100, max_bytes=300 * token_bytes)
    assert (model.n_slots, model.n_cells, model.max_position) == (32, 300, 100)
    short = [prompt for prompt in prompts() if len(prompt) < 80]
    assert answer(model, short) == [generated(llm, prompt) for prompt in short]
    assert model._cells.capacity <= 300
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


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, -1.0, -2.0])


def sampler_of(grammar: Any = None, **options: Any) -> TorchSampler:
    answer = Sequence(Prompt(((1,),)), GenerationOptions(**options), 0, grammar)
    return TorchSampler(answer, torch.device("cpu"))


def sample(n: int, logits: Tensor = LOGITS, **options: Any) -> list[int]:
    sampler = sampler_of(**options)
    return [sampler.sample(logits).token for _ in range(n)]


def test_sampling_leaves_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    for seed in (1, None):
        sample(40, temperature=1.0, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_0_is_greedy() -> None:
    assert sample(3, temperature=0.0) == sample(3, temperature=1e-30) == [0, 0, 0]


def test_unlikely_tokens_are_cut_off() -> None:
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}):
        assert set(sample(200, temperature=1.0, seed=0, **options)) == {0, 1}


def test_penalties_are_for_the_answers_own_tokens() -> None:
    # 2.0 / 2 = 1.0 < 1.5; 1.5 / 2 < 1.0; then all three are repeated, and 1.0 is the most.
    assert sample(4, repetition_penalty=2.0) == [0, 1, 0, 0]
    assert sample(4, presence_penalty=0.75) == [0, 1, 0, 0]
    # 2.0, 1.5, 1.0, 2.0 - 0.75, 1.0, 1.5 - 0.75
    assert sample(6, frequency_penalty=0.75) == [0, 1, 0, 2, 1, 0]
    assert sample(3, frequency_penalty=-1.0) == [0, 0, 0]
    negative = torch.tensor([-1.0, -1.5])
    assert sample(2, logits=negative, repetition_penalty=2.0) == [0, 1]


def test_extreme_options_give_a_token() -> None:
    penalties: dict[str, Any] = {"repetition_penalty": 1e-300, "frequency_penalty": 2.0}
    assert len(sample(5, seed=0, temperature=1e-5, **penalties)) == 5


def test_logprobs_are_those_of_the_model() -> None:
    sampler = sampler_of(logprobs=3, temperature=1.0, seed=0, presence_penalty=2.0)
    expected = LOGITS.log_softmax(0).tolist()
    for _ in range(5):
        sampled = sampler.sample(LOGITS)
        assert sampled.logprob == pytest.approx(expected[sampled.token])
        assert [token for token, _ in sampled.top] == [0, 1, 2]
        assert [value for _, value in sampled.top] == pytest.approx(expected[:3])
    top = sampler_of(logprobs=20).sample(LOGITS).top
    assert sum(torch.tensor([value for _, value in top]).exp().tolist()) == pytest.approx(1.0)
    for n in (None, 0):
        one = sampler_of(logprobs=n).sample(LOGITS)
        assert one.logprob == pytest.approx(expected[0])
        assert one.top == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_follows_the_grammar(temperature: float) -> None:
    class OddTokens:
        """Allows odd tokens alone, one less each time."""

        def __init__(self) -> None:
            self.accepted: list[int] = []

        def allowed(self, n_vocab: int) -> Any:
            found = np.arange(n_vocab) % 2 == 1
            found[self.accepted] = False
            return found

        def accept(self, token: int) -> None:
            self.accepted.append(token)

    grammar: Any = OddTokens()
    sampler = sampler_of(grammar, temperature=temperature, seed=1)
    n = len(LOGITS) // 2
    found = [sampler.sample(LOGITS).token for _ in range(n)]
    assert sorted(found) == list(range(1, len(LOGITS), 2))[:n]
