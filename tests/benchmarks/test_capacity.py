"""The queue of a replica on a card: against theory, and in what it says when its inputs change."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.capacity import (
    DAY,
    Card,
    Given,
    Medium,
    Run,
    Simulation,
    Traffic,
    checks,
    day_curve,
    fluid_rate,
    largest_rate,
    prices_of,
    run_at,
)
from mico_chat.errors import ConfigError

ROOT = Path(__file__).parents[2]

CARD = Card(bandwidth=1e12, flops=1e14, weights=1e10, per_token=1e10, kv=5e5, room=50_000)
PICTURE = Medium(tokens=32, flops=5e11, cached=1 << 19)
TRAFFIC = Traffic(rate=2.0, media=(PICTURE,), think=10.0, simulated=500)


def simulate(card: Card, traffic: Traffic, seconds: float, seed: int = 0) -> Run:
    return Simulation(card, traffic, seconds, seed).run()


def test_queues_whose_answer_is_known() -> None:
    found = list(checks(seconds=60_000))
    assert {name for name, *_ in found} == {"M/D/1", "M/G/1", "M/G/inf"}
    for name, what, simulated, known in found:
        assert simulated == pytest.approx(known, rel=0.06), (name, what)


def test_one_answer_alone_takes_its_steps() -> None:
    """The prompt's step gives the first token, and each token reads what was said before it."""
    card = replace(CARD, kv=1e7)
    run = simulate(card, Traffic(rate=1e-4, turns=1.0, prompt=50, answer=200, sigma=1e-9), 2e6)
    steps = np.arange(51, 250)  # tokens that are read for each later token
    assert run.of("first").mean() == pytest.approx(card.step(50, 50))
    assert np.nanmean(run.of("token")) == pytest.approx(
        np.mean([card.step(1, n) for n in steps.tolist()])
    )
    assert run.running < 0.01


def test_the_time_of_many_steps_is_the_sum_of_each() -> None:
    for n, context, seconds in ((1, 0, 0.5), (20, 5_000, 0.3), (200, 40_000, 1.0)):
        count, took = CARD.steps_until(n, context, seconds, 1_000)
        alone = [CARD.step(n, context + n * i) for i in range(count)]
        assert took == pytest.approx(sum(alone))
        if count > 1:  # otherwise the products are the slower, and each step is looked at
            assert sum(alone[:-1]) < seconds <= took


def test_more_traffic_waits_longer_and_a_better_card_bears_more() -> None:
    quiet, busy = (simulate(CARD, TRAFFIC.but(rate=rate), 2_000).p99() for rate in (0.5, 4.0))
    assert busy[0] > quiet[0]
    assert busy[1] > quiet[1]
    rates = [
        largest_rate(card, TRAFFIC)[0]
        for card in (CARD, replace(CARD, bandwidth=2e12), replace(CARD, room=5_000))
    ]
    assert rates[2] < rates[0] < rates[1]
    strict = largest_rate(CARD, TRAFFIC.but(first=0.2, token=0.03))[0]
    assert strict < rates[0]


def test_no_rate_is_beyond_the_fluid_bound_or_the_limits() -> None:
    rate, bound = largest_rate(CARD, TRAFFIC.but(seed=3))
    assert 0 < rate < bound
    run = run_at(CARD, TRAFFIC, rate, 3, 500)
    assert run.keeps(TRAFFIC)
    assert not run_at(CARD, TRAFFIC, 1.1 * bound, 3, 500).keeps(TRAFFIC)
    assert fluid_rate(CARD, run, 0.009) == 0, "a step takes 10 ms alone"
    assert largest_rate(CARD, TRAFFIC.but(token=0.009, simulated=100)) == (0, 0)


def test_never_more_is_held_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    advance = Simulation.advance

    def watched(self: Simulation, steps: int, seconds: float) -> None:
        advance(self, steps, seconds)
        assert self.context <= self.used
        seen.append(self.used + self.kept.total)
        assert len(self.running) + len(self.prefilling) <= self.card.most

    monkeypatch.setattr(Simulation, "advance", watched)
    card = replace(CARD, room=6_000, most=9)
    run = simulate(card, TRAFFIC.but(rate=6.0), 600)
    assert max(seen) <= 6_000
    assert max(seen) > 5_000
    assert (run.of("took") > 0).all(), "all that waited were answered"


def test_what_stays_is_used_again() -> None:
    """With room for all, follow-ups compute their own question alone, and no medium twice."""
    given = TRAFFIC.but(rate=0.5, sigma=1e-9)
    run = simulate(replace(CARD, room=10**9), given.but(cache=1e12), 20_000)
    assert run.share("kept") == run.share("again", shown=True) == "100%"
    assert run.of("followup").mean() == pytest.approx(0.5, abs=0.05), "of two turns one"
    assert run.of("computed").max() == 70 + PICTURE.tokens
    little = simulate(CARD, given.but(cache=3 * PICTURE.cached), 20_000)
    assert 0 < little.of("again").sum() < little.of("followup").sum()
    strangers = simulate(CARD, given.but(sticky=False), 20_000)
    assert not (strangers.of("kept") | strangers.of("again")).any()
    assert (strangers.of("encoded") == PICTURE.flops).all()
    assert strangers.of("computed").max() > 300, "the whole conversation"


@pytest.mark.parametrize("peak", [1.0, 2.0, 3.0])
def test_the_curve_of_a_day(peak: float) -> None:
    curve = day_curve(np.linspace(0, 1, 10_001), peak)
    assert curve.max() == pytest.approx(peak)
    assert curve[:-1].mean() == pytest.approx(1)
    starts = Traffic(rate=2.0, peak=peak).starts(np.random.default_rng(0), DAY)
    assert len(starts) == pytest.approx(DAY, rel=0.02), "a start for each two turns"
    noon = ((starts > 0.48 * DAY) & (starts < 0.52 * DAY)).mean() / 0.04
    assert noon == pytest.approx(peak, rel=0.05)


def test_the_same_seed_draws_the_same() -> None:
    runs = [simulate(CARD, TRAFFIC, 500, seed) for seed in (1, 1, 2)]
    assert runs[0].p99() == runs[1].p99() != runs[2].p99()


def test_a_card_without_room_for_a_conversation() -> None:
    with pytest.raises(ConfigError, match=r"room for 3,000 tokens.*may have 4,096"):
        simulate(replace(CARD, room=3_000), TRAFFIC, 100)


@pytest.mark.parametrize(
    ("pair", "error"),
    [
        ("peak", r"--set peak=: .*write it as name=value"),
        ("peek=2", r"--set peek=2: .*of the names turns, "),
        ("peak=0.5", r"--set peak=0\.5: .*greater than or equal to 1"),
        ("flops_share=1.5", r"flops_share=1\.5: .*less than or equal to 1"),
        ("users=many", r"users=many: .*valid number"),
        ("users=nan", r"users=nan: .*finite number"),
        ("think=inf", r"think=inf: .*finite number"),
        ("gpu_prices=l4=0.8", r"it lacks a100-80gb, h100-80gb"),
        ("gpu_prices=l5=1", r"'l5=1': write it as l4=0\.8.*GPUs: l4, a100-80gb"),
        ("gpu_prices=l4=cheap", r"'l4=cheap': write it as l4=0\.8"),
        ("gpu_prices=l4=-1", r"'l4=-1': write it as l4=0\.8"),
    ],
)
def test_wrong_assumptions(pair: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        Given.read([pair])


def test_assumptions_change() -> None:
    found = Given.read(["peak=3", "gpu_prices=l4=1,a100-80gb=2,h100-80gb=3"])
    assert found.peak == 3
    assert prices_of(found.gpu_prices)["l4"] == 1


def test_the_page_has_no_figure_of_its_own() -> None:
    """Tables of docs/capacity.md are the command's, and so are the figures of its summary."""
    page = (ROOT / "docs/capacity.md").read_text(encoding="utf-8")
    output = (ROOT / "benchmarks/results/capacity.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 40
    assert [row for row in rows if row not in output.splitlines()] == []
    summary = page.split("## In short")[1].split("\n![")[0]
    figures = re.findall(r"(?<![\w.-])\d[\d,.]*\d|(?<![\w.-])\d\b", summary)
    assert len(figures) > 15
    assert [one for one in figures if one not in output] == []
