"""Sharing steps, slots and cells with other requests changes no answer."""

import itertools
import random
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mico_chat.engine.base import GenerationOptions, Preference, Prompt
from mico_chat.engine.scheduler import Chunk, PrefillBudget, Sampled, Scheduler, Sequence
from mico_chat.errors import RequestError
from tests.engine.fake_model import END, FakeModel, block, expected, ids

EIGHT = GenerationOptions(max_tokens=8)


def ragged(n: int, seed: int = 0, longest: int = 90) -> list[Prompt]:
    rng = random.Random(seed)
    made: list[Prompt] = []
    for number in range(n):
        text = tuple(rng.randrange(4, 99) for _ in range(rng.randrange(1, longest // 2)))
        start = rng.choice(made).segments[:1] if made and rng.random() < 0.5 else (text,)
        middle = (block(rng.randrange(1, longest // 4), number),) if rng.random() < 0.5 else ()
        made.append(Prompt((*start, *middle, text[: longest // 4 - 1])))
    return made


def scheduler_of(model: FakeModel, max_running: int = 16) -> Scheduler:
    """A scheduler whose clock gives every step the same time."""
    return Scheduler(model, (END,), max_running=max_running, clock=itertools.count().__next__)


def put(
    scheduler: Scheduler, *prompts: Prompt, options: GenerationOptions = EIGHT
) -> list[Sequence]:
    sequences = [Sequence(prompt, options) for prompt in prompts]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def finish(scheduler: Scheduler) -> None:
    while not scheduler.idle:
        scheduler.step()


def answers(scheduler: Scheduler, *prompts: Prompt) -> list[list[int]]:
    sequences = put(scheduler, *prompts)
    finish(scheduler)
    return [sequence.tokens for sequence in sequences]


def finished(scheduler: Scheduler, prompt: Prompt) -> Sequence:
    """The sequence of a prompt, which is answered rightly."""
    (sequence,) = put(scheduler, prompt)
    finish(scheduler)
    assert sequence.tokens == expected(prompt, EIGHT)
    return sequence


def right(*prompts: Prompt, options: GenerationOptions = EIGHT) -> list[list[int]]:
    return [expected(prompt, options) for prompt in prompts]


def held(model: FakeModel) -> int:
    return sum(map(len, model.slots))


@pytest.mark.parametrize("state_bytes", [0, 9])
@pytest.mark.parametrize("max_batch", [1, 3, 16, 512])
@pytest.mark.parametrize("n_slots", [1, 3, 16])
def test_together_equals_alone(max_batch: int, n_slots: int, state_bytes: int) -> None:
    sizes: Any = {"n_slots": n_slots, "max_batch": max_batch, "state_bytes": state_bytes}
    model = FakeModel(n_cells=600, **sizes)
    prompts = ragged(40)
    scheduler = scheduler_of(model)
    assert answers(scheduler, *prompts) == right(*prompts)
    assert answers(scheduler, *prompts[::-1]) == right(*prompts[::-1])
    assert not model.samplers


@pytest.mark.parametrize("max_batch", [1, 3, 512])
def test_a_given_answer_is_scored_and_not_continued(max_batch: int) -> None:
    model = FakeModel(n_slots=3, n_cells=600, max_batch=max_batch)
    scheduler = scheduler_of(model)
    prompts = ragged(8)
    whole = right(*prompts, options=GenerationOptions(max_tokens=5))
    asked = [
        prompt.with_answer([*answer[:4], 5 if answer[4] != 5 else 6])
        for prompt, answer in zip(prompts, whole, strict=True)
    ]
    scored = put(scheduler, *asked)
    growing = put(scheduler, *prompts)
    found: dict[Sequence, list[float]] = {sequence: [] for sequence in (*scored, *growing)}
    ends = []
    while not scheduler.idle:
        for step in scheduler.step():
            assert isinstance(step.result, Sampled)
            assert step.result.logprob is not None
            found[step.sequence].append(step.result.logprob)
            if step.finish_reason and step.sequence in scored:
                ends.append(step.finish_reason)
    assert [found[one][:4] for one in scored] == [[-0.5] * 4] * 8
    assert [found[one][4:] for one in scored] == [[-9.0]] * 8
    assert ends == ["length"] * 8
    assert [one.tokens for one in growing] == right(*prompts)
    assert all(not one.tokens for one in scored)
    assert not model.samplers


def test_a_prefix_is_taken_over() -> None:
    model = FakeModel()
    scheduler = scheduler_of(model)
    start = (ids("a common start"), block(20))
    first, second = (Prompt((*start, ids(end))) for end in ("?", " and more"))
    assert answers(scheduler, first) == right(first)
    assert finished(scheduler, second).cached == 34
    assert not model.copies, "the first slot held little else"
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (len(first) + len(second), 34)
    assert stats.completion_tokens == 16


def test_a_recurrent_state_is_kept_where_prompts_go_apart() -> None:
    model = FakeModel(n_slots=16, n_cells=4000, state_bytes=9)
    scheduler = scheduler_of(model)
    system, bot = (*ids("Be brief."), END), ids("bot:")
    picture = (*system, *ids("see ")), block(20)
    first = Prompt((*picture, (*ids("What?"), END), bot))
    said = finished(scheduler, first).tokens
    kept = len(system), len(system) + 24, len(first) - 4, len(first) + len(said) - 1
    assert sorted(length for _, _, length in model.copies) == list(kept[:3])
    assert scheduler.stats().state_bytes == 9 * 4
    before = model.computed
    assert answers(scheduler, first, first) == right(first, first)
    assert model.computed - before == 2 * (4 + 7)
    for prompt, cached in (
        (Prompt(((*system, *ids("Another."), END), bot)), kept[0]),
        (Prompt((*picture, (*ids("And now?"), END), bot)), kept[1]),
        (first, kept[2]),
        (Prompt((*first.segments[:-1], (*bot, *ids("Other words."), END), bot)), kept[2]),
        (Prompt((*first.segments, tuple(said), (END, *ids("Why?"), END), bot)), kept[3]),
    ):
        before = model.computed
        assert finished(scheduler, prompt).cached == cached
        assert model.computed - before == len(prompt) - cached + 7


def test_a_long_conversations_forks_outlast_the_idle_cells() -> None:
    """Their cells are its own; those of others are given up."""
    scheduler = scheduler_of(FakeModel(n_slots=8, n_cells=2000, max_idle_cells=20, state_bytes=9))
    for name in ("a", "b"):
        start = (*ids(name * 40), END), block(30), (*ids("What?"), END)
        finished(scheduler, Prompt((*start, ids("bot:"))))
    assert finished(scheduler, Prompt((*start[:2], ids("Else?")))).cached == 71
    assert not any(slot.held[:1] == list(ids("a")) for slot in scheduler.slots)


def test_a_medium_is_taken_over_as_a_whole() -> None:
    scheduler = scheduler_of(FakeModel())
    prompt = Prompt((ids("look "), block(20)))
    for cached in (0, 5):  # the last token must be computed, and so all of the medium
        assert finished(scheduler, prompt).cached == cached


def test_a_medium_that_is_not_causal_is_a_chunk_of_its_own() -> None:
    model = FakeModel(max_batch=25)
    scheduler = scheduler_of(model)
    whole = replace(block(20), causal=False)
    prompts = [
        Prompt((ids(f"{name} begins"), whole, replace(block(7), causal=False), ids("and ends")))
        for name in "ab"
    ]
    assert answers(scheduler, *prompts) == right(*prompts)
    chunks = [chunk for batch in model.batches for chunk in batch]
    assert sorted(chunk.length for chunk in chunks if not chunk.causal) == [7, 7, 20, 20]
    assert all(bool(chunk.context) != chunk.causal for chunk in chunks)
    with pytest.raises(RequestError, match=r"26 tokens that must be computed together, .* 25"):
        put(scheduler, Prompt((replace(block(26), causal=False), ids("?"))))
    assert answers(scheduler, *prompts) == right(*prompts)


def test_the_next_turn_takes_over_prompt_and_answer() -> None:
    scheduler = scheduler_of(FakeModel())
    first = Prompt((ids("question"),))
    (answer,) = answers(scheduler, first)
    second = Prompt((ids("question"), tuple(answer), ids("next")))
    cached = finished(scheduler, second).cached
    assert cached == 8 + 7, "the last token of an answer is never computed"


def test_tenants_share_the_service_s_own_words() -> None:
    model = FakeModel()
    scheduler = scheduler_of(model)
    own = ids("be helpful ")
    prompts = [
        Prompt((own, ids("a secret of one tenant")), tenant, common=len(own))
        for tenant in ("a", "b", "", "a")
    ]
    cached = [finished(scheduler, prompt).cached for prompt in prompts]
    assert cached == [0, len(own), len(own), len(prompts[0]) - 1]


def test_another_conversation_leaves_a_short_one_its_tokens() -> None:
    scheduler = scheduler_of(FakeModel())
    own = ids("words of the service, more than of anybody else: ")
    first, second = (Prompt((own, ids(text)), "a", common=len(own)) for text in ("x?", "y?"))
    (answer,) = answers(scheduler, first)
    answers(scheduler, second)
    next_turn = replace(first, segments=(*first.segments, tuple(answer), ids("z?")))
    assert finished(scheduler, next_turn).cached == len(first) + 7


def test_a_large_holder_is_copied_from() -> None:
    model = FakeModel(n_slots=3)
    scheduler = scheduler_of(model)
    long = Prompt((ids("start"), ids("x" * 90)))
    short = Prompt((ids("start"), ids("y")))
    answers(scheduler, long, short)
    assert [length for _, _, length in model.copies] == [5]
    before = model.computed
    answers(scheduler, long)
    assert model.computed - before == 1 + 7, "what it held is still there"


def test_a_waiting_sequence_computes_a_common_prompt_once() -> None:
    model = FakeModel(max_batch=16)
    scheduler = scheduler_of(model)
    start = ids("s" * 60)
    prompts = [Prompt((start, ids(end))) for end in ("abc", "def", "ghi")]
    assert answers(scheduler, *prompts) == right(*prompts)
    assert model.computed == 60 + 3 * (3 + 7)
    assert scheduler.stats().cached_tokens == 120


def test_a_waiting_sequence_goes_on_when_the_other_is_cancelled() -> None:
    scheduler = scheduler_of(FakeModel(max_batch=16))
    prompt = Prompt((ids("s" * 60),))
    first, second = put(scheduler, prompt, prompt)
    scheduler.step()
    assert scheduler.stats().waiting == 1
    scheduler.remove(first)
    finish(scheduler)
    assert second.tokens == expected(prompt, EIGHT)
    assert second.cached == 16


@pytest.mark.parametrize("n_slots", [2, 8])
def test_n_answers_compute_the_prompt_once(n_slots: int) -> None:
    model = FakeModel(n_slots=n_slots, max_batch=16)
    scheduler = scheduler_of(model)
    options = GenerationOptions(max_tokens=8, temperature=1.0, seed=5, n=4)
    prompt = Prompt((ids("p" * 50), block(20), ids("?")))
    sequences = [Sequence(prompt, options, index) for index in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    finish(scheduler)
    assert [s.tokens for s in sequences] == [expected(prompt, options, n) for n in range(4)]
    assert len({tuple(s.tokens) for s in sequences}) == 4
    assert model.computed == len(prompt) + 3 * 1 + 4 * 7


@pytest.mark.parametrize(("n_slots", "n_cells"), [(3, 400), (8, 120)])
@pytest.mark.parametrize(
    ("order", "kept"), [("abcd", "bcd"), ("abcad", "acd"), ("abcacbd", "bcd"), ("abcde", "cde")]
)
def test_the_least_recently_used_is_given_up_first(
    order: str, kept: str, n_slots: int, n_cells: int
) -> None:
    scheduler = scheduler_of(FakeModel(n_slots=n_slots, n_cells=n_cells))
    for letter in order:
        answers(scheduler, Prompt((ids(letter * 30),)))
    assert {slot.held[0] for slot in scheduler.slots if slot.held} == set(ids(kept))


def test_no_more_is_kept_than_the_model_wants_idle() -> None:
    scheduler = scheduler_of(FakeModel(n_slots=8, max_idle_cells=80))
    for letter in "abcd":
        answers(scheduler, Prompt((ids(letter * 30),)))
        assert scheduler.stats().cells_used <= 80
    assert {slot.held[0] for slot in scheduler.slots if slot.held} == set(ids("cd"))


def test_the_last_conversation_may_go_on_however_long_it_is() -> None:
    scheduler = scheduler_of(FakeModel(n_slots=8, max_idle_cells=20))
    for letter in "ab":
        answers(scheduler, Prompt((ids(letter * 90),)))
    answers(scheduler, Prompt((ids("b" * 90 + "c"),)))
    assert scheduler.stats().cached_tokens == 90


def test_empty_slots_are_taken_before_held_ones() -> None:
    model = FakeModel(n_slots=3)
    scheduler = scheduler_of(model)
    a, b, c = (Prompt((ids(letter * 30),)) for letter in "abc")
    answers(scheduler, a)
    scheduler.forget()
    for prompt in (b, c, a):
        answers(scheduler, prompt)
    before = model.computed
    answers(scheduler, a, b, c)
    assert model.computed - before == 3 * (1 + 7)


@pytest.mark.parametrize("n_cells", [110, 150, 200, 400])
def test_a_donor_is_cut_if_a_copy_does_not_fit(n_cells: int) -> None:
    model = FakeModel(n_slots=4, n_cells=n_cells)
    scheduler = scheduler_of(model)
    first, second = (Prompt((ids("s" * 20), ids(letter * 70))) for letter in "ab")
    answers(scheduler, first)
    assert answers(scheduler, second) == right(second)
    assert scheduler.stats().cached_tokens == 20
    assert len(model.copies) == (n_cells >= 97 + 98)


def test_first_come_first_served_when_cells_are_short() -> None:
    scheduler = scheduler_of(FakeModel(n_slots=4, n_cells=150))
    prompts = [Prompt((ids(text),)) for text in ("a" * 90, "b" * 90, "c" * 10, "d" * 90)]
    sequences = put(scheduler, *prompts)
    came: list[Sequence] = []
    while not scheduler.idle:
        scheduler.step()
        came += [sequence for sequence in scheduler.running if sequence not in came]
        assert len(scheduler.running) <= 2
        assert sum(sequence.max_length for sequence in scheduler.running) <= 150
    assert came == sequences, "the small one waits for its turn, though there is room for it"
    assert [sequence.tokens for sequence in came] == right(*prompts)


def test_a_removed_sequence_frees_its_slot_at_once() -> None:
    model = FakeModel(n_slots=1)
    scheduler = scheduler_of(model)
    first, second = put(scheduler, Prompt((ids("first"),)), Prompt((ids("second"),)))
    scheduler.step()
    assert (first.decoding, second.slot) == (True, None)
    scheduler.remove(first)
    scheduler.step()
    assert second.decoding
    assert (scheduler.stats().running, scheduler.stats().waiting) == (1, 0)


class Clock:
    """A step takes ``fixed`` seconds, and ``token`` seconds for each prompt token."""

    def __init__(self, fixed: float, token: float) -> None:
        self.now, self.fixed, self.token = 0.0, fixed, token

    def __call__(self) -> float:
        return self.now

    def run(self, batch: Many[Chunk]) -> None:
        prompt = sum(chunk.length for chunk in batch if chunk.length > 1)
        self.now += self.fixed + self.token * prompt


@pytest.mark.parametrize(
    ("prefer", "token", "most"),
    [
        *((None, 0.001, 100), (None, 0.01, 10), (None, 0.1, 8)),
        *(("pauses", 0.01, 10), ("pauses", 0.03, 3), ("pauses", 0.05, 2)),
        *(("first-token", 0.001, 100), ("first-token", 0.01, 64), ("first-token", 0.1, 64)),
    ],
)
def test_a_long_prompt_is_cut_beside_decoding_sequences(
    prefer: Preference | None, token: float, most: int
) -> None:
    clock = Clock(0.1, token)
    model = FakeModel(n_slots=4, n_cells=4000, max_position=2000, max_batch=512, before=clock.run)
    scheduler = Scheduler(model, (END,), max_running=4, prefer=prefer, clock=clock)
    options = GenerationOptions(max_tokens=900)
    decoding = put(scheduler, *ragged(2), options=options)
    for _ in range(10):
        scheduler.step()
    long = Prompt((ids("l" * 800),))
    (late,) = put(scheduler, long)
    cuts = []
    while not late.decoding:
        before = [len(sequence.tokens) for sequence in decoding]
        scheduler.step()
        assert [len(sequence.tokens) for sequence in decoding] == [n + 1 for n in before]
        cuts.append(model.batches[-1][-1].length)
    assert sum(cuts) == 800
    assert max(cuts[2:]) <= most
    assert cuts[-2] >= 0.6 * most
    finish(scheduler)
    assert late.tokens == expected(long, EIGHT)
    assert [s.tokens for s in decoding] == right(*ragged(2), options=options)


def test_a_prompt_without_company_takes_all_that_fits() -> None:
    assert PrefillBudget().tokens(0, 1, 512) == 512
    assert PrefillBudget().tokens(3, 1, 512) == PrefillBudget.FIRST
    slow = PrefillBudget()
    slow.observe(0, 10, 100.0)
    slow.observe(3, 0, 0.01)
    assert slow.tokens(3, 1, 512) == PrefillBudget.LEAST
    assert slow.tokens(3, 5, 512) == 5 * PrefillBudget.LEAST
    assert slow.tokens(3, 1, 2) == 2
    assert slow.tokens(3, 1, 0) == 0


@pytest.mark.parametrize(("prefer", "room"), [(None, 40), ("pauses", 10), ("first-token", 256)])
def test_only_pauses_that_are_preferred_stay_as_short_beside_many_prompts(
    prefer: Preference | None, room: int
) -> None:
    budget = PrefillBudget(prefer=prefer)
    budget.observe(3, 0, 0.1)
    budget.observe(0, 10, 0.1)
    assert budget.tokens(3, 4, 512) == room
    assert budget.tokens(0, 4, 512) == 512, "nobody pauses"
    apart = PrefillBudget(apart=True, prefer="pauses")
    apart.observe(3, 8, 100.0)
    assert apart.tokens(3, 4, 512) == PrefillBudget.LEAST_APART


def test_prompts_that_came_together_soon_decode_together() -> None:
    """The first of eight prompts decodes beside seven, which have seven times the usual room."""
    clock = Clock(0.1, 0.01)
    model = FakeModel(n_slots=9, n_cells=4000, max_position=2000, max_batch=512, before=clock.run)
    scheduler = Scheduler(model, (END,), max_running=9, clock=clock)
    options = GenerationOptions(max_tokens=40)
    put(scheduler, *ragged(1), options=options)
    finish(scheduler)  # so that the times are known: 10 tokens of a prompt take as long as a step
    put(scheduler, Prompt((ids("0" * 40),)), options=options)
    scheduler.step()
    put(scheduler, *(Prompt((ids(f"{n}" * 40),)) for n in range(1, 8)), options=options)
    rooms = []
    while any(not sequence.decoding for sequence in scheduler.running) or scheduler.waiting:
        scheduler.step()
        rooms.append(sum(chunk.length for chunk in model.batches[-1] if chunk.length > 1))
    assert rooms[0] > 50
    assert len(rooms) < 14, "with 10 tokens a step there are 28 steps"
    finish(scheduler)


def test_a_forward_apart_is_no_cost_of_its_tokens() -> None:
    """50 tokens of a forward add as much as decoding takes, which is its time for no tokens."""
    rooms = {}
    for apart in (True, False):
        budget = PrefillBudget(apart=apart)
        budget.observe(3, 0, 0.1)
        for _ in range(30):
            room = budget.tokens(3, 1, 512)
            budget.observe(3, room, 0.1 + 0.1 + 0.002 * room)
        rooms[apart] = room
    assert rooms == {True: 50, False: PrefillBudget.LEAST}
    budget = PrefillBudget(apart=True)
    budget.observe(3, 0, 0.1)
    budget.observe(3, 8, 100.0)
    assert budget.tokens(3, 1, 512) == PrefillBudget.LEAST_APART


Event = tuple[str, int, int]
"""A prompt to add and its tokens; which sequence to remove; how many steps to make."""


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 29), st.integers(1, 12)),
            st.tuples(st.just("remove"), st.integers(0, 29), st.just(0)),
            st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
        ),
        max_size=60,
    ),
    st.sampled_from([(1, 130, 1), (2, 150, 7), (4, 300, 32), (9, 2000, 64)]),
    st.sampled_from([0, 9]),
)
def test_any_order_of_events(
    events: list[Event], sizes: tuple[int, int, int], state_bytes: int
) -> None:
    n_slots, n_cells, max_batch = sizes
    given: Any = {"max_position": 130, "state_bytes": state_bytes}
    model = FakeModel(n_slots=n_slots, n_cells=n_cells, max_batch=max_batch, **given)
    scheduler = scheduler_of(model, max_running=3)
    prompts = ragged(30, seed=7)
    alive: list[Sequence] = []
    kept: list[Sequence] = []
    for event, number, length in events:
        if event == "add":
            alive += put(scheduler, prompts[number], options=GenerationOptions(max_tokens=length))
        elif event == "remove" and alive:
            scheduler.remove(alive.pop(number % len(alive)))
        elif event == "step":
            for _ in range(number):
                scheduler.step()
        kept += [sequence for sequence in alive if sequence.finished]
        alive = [sequence for sequence in alive if not sequence.finished]
        assert [len(slot.held) for slot in scheduler.slots] == list(map(len, model.slots))
    finish(scheduler)
    for sequence in kept + alive:
        assert sequence.tokens == expected(sequence.prompt, sequence.options)
    assert not model.samplers
    assert all(slot.sequence is None for slot in scheduler.slots)
    stats = scheduler.stats()
    assert (stats.running, stats.waiting, stats.cells_used) == (0, 0, held(model))
    scheduler.forget()
    assert (scheduler.stats().cells_used, held(model)) == (0, 0)
