"""Tenants come in turn: counted in steps and in tokens of a step."""

from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.scheduler import Scheduler, Sequence
from tests.engine.fake_model import FakeModel, expected, ids
from tests.engine.test_scheduler import finish, put, scheduler_of

ONE = GenerationOptions(max_tokens=1)
LONG = GenerationOptions(max_tokens=60)


def prompt(text: str, tenant: str) -> Prompt:
    return Prompt((ids(text),), tenant=tenant)


def load(n: int, length: int, tenant: str = "greedy") -> list[Prompt]:
    return [prompt(chr(40 + number) * length, tenant) for number in range(n)]


def steps_until(scheduler: Scheduler, sequence: Sequence) -> int:
    for step in range(1, 1000):
        scheduler.step()
        if sequence.finished:
            return step
    raise AssertionError("never")


def test_a_small_request_passes_a_load_of_another_tenant() -> None:
    model = FakeModel(n_slots=8, n_cells=2000, max_position=200, max_batch=32)
    scheduler = scheduler_of(model, max_running=4)
    many = put(scheduler, *load(30, 120), options=ONE)
    scheduler.step()
    (small,) = put(scheduler, prompt("hello", "small"), options=ONE)
    before = model.computed
    assert steps_until(scheduler, small) == 1, "not behind 30 prompts of four steps each"
    assert model.computed - before <= 2 * 32
    assert small.tokens == expected(small.prompt, ONE)
    finish(scheduler)
    assert [one.tokens for one in many] == [expected(one.prompt, ONE) for one in many]


def test_a_step_is_as_short_as_the_small_prompt_needs() -> None:
    model = FakeModel(n_slots=8, n_cells=4000, max_position=900, max_batch=512)
    scheduler = scheduler_of(model, max_running=4)
    put(scheduler, *load(4, 800), options=ONE)
    (small,) = put(scheduler, prompt("a" * 30, "small"), options=ONE)
    scheduler.step()
    assert small.finished
    assert model.computed == 30 + 32, "about as many tokens of the load as of the small prompt"


def test_steps_are_short_where_several_tenants_ask() -> None:
    computed = []
    for asked in (["a"], ["a", "b"]):
        model = FakeModel(n_slots=8, n_cells=4000, max_position=900, max_batch=512)
        scheduler = Scheduler(model, (), max_running=4, clock=lambda: 0.0)
        for tenant in asked[1:]:
            put(scheduler, prompt("hello", tenant), options=ONE)
            finish(scheduler)
        before = model.computed
        put(scheduler, prompt("x" * 800, "a"), options=ONE)
        scheduler.step()
        computed.append(model.computed - before)
    assert computed == [512, 64]


def test_a_tenants_prompts_slow_down_only_its_own_answers() -> None:
    computed = []
    for tenant in ("greedy", "small"):
        model = FakeModel(n_slots=16, n_cells=8000, max_position=900, max_batch=512)
        scheduler = scheduler_of(model, max_running=12)
        put(scheduler, prompt("hi", tenant), options=LONG)
        scheduler.step()
        scheduler.step()
        put(scheduler, *load(8, 800), options=ONE)
        before = model.computed
        scheduler.step()
        computed.append(model.computed - before)
    own, others = computed
    assert others * 4 < own


def test_some_cells_are_left_for_who_has_none() -> None:
    model = FakeModel(n_slots=16, n_cells=1640, max_position=200, max_batch=32)
    scheduler = scheduler_of(model, max_running=12)
    put(scheduler, *load(12, 120), options=LONG)
    scheduler.step()
    assert len(scheduler.running) == 8, "a ninth would leave less than one cell in 16"
    (small,) = put(scheduler, prompt("hello", "small"), options=ONE)
    assert steps_until(scheduler, small) <= 2


def test_a_large_request_that_finds_no_room_does_not_stop_a_small_one() -> None:
    model = FakeModel(n_slots=8, n_cells=400, max_position=300, max_batch=32)
    scheduler = scheduler_of(model, max_running=4)
    (running,) = put(scheduler, prompt("r" * 150, "a"), options=LONG)
    scheduler.step()
    (large,) = put(scheduler, prompt("l" * 230, "b"), options=LONG)
    (small,) = put(scheduler, prompt("hello", "c"), options=ONE)
    assert steps_until(scheduler, small) <= 2
    assert not running.finished
    assert steps_until(scheduler, large)


def test_a_freed_place_goes_to_who_has_none() -> None:
    model = FakeModel(n_slots=2, n_cells=2000, max_position=200, max_batch=32)
    scheduler = scheduler_of(model, max_running=2)
    many = put(scheduler, *load(20, 90), options=ONE)
    scheduler.step()
    (small,) = put(scheduler, prompt("hello", "small"), options=ONE)
    steps_until(scheduler, small)
    assert sum(one.finished for one in many) == 1


def test_users_of_one_key_take_turns_with_other_keys() -> None:
    model = FakeModel(n_slots=4, n_cells=2000, max_position=200, max_batch=32)
    scheduler = scheduler_of(model, max_running=2)
    users = [put(scheduler, prompt("u" * 90, f"key/{n}"), options=ONE)[0] for n in range(20)]
    scheduler.step()
    (small,) = put(scheduler, prompt("hello", "other"), options=ONE)
    steps_until(scheduler, small)
    assert sum(user.finished for user in users) <= 2
    finish(scheduler)
