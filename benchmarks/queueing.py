"""How many answers a second a replica bears, and whether its simulation agrees with theory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.replica import Card, Run, simulate
from benchmarks.traffic import Traffic


@dataclass(frozen=True)
class Limits:
    """``first``: seconds to the first token; ``token``: between tokens; both for 99 of 100."""

    first: float
    token: float

    def kept(self, run: Run) -> bool:
        first, token = run.p99()
        return first <= self.first and token <= self.token


def fluid_rate(card: Card, run: Run, limits: Limits) -> float:
    """Answers a second that no queue could exceed: a full batch at every moment, no chance.

    With n answers of A tokens at once and P tokens computed for a prompt, a token takes at least
    the time to read the weights and their contexts, and to make the products of 1 + P / A tokens.
    """
    answers, held = np.array(run.answers), np.array(run.held)
    a, p, e = answers.mean(), np.mean(run.computed), np.mean(run.encoded)
    context = float((answers * (held - answers / 2)).sum() / answers.sum())
    room = min(card.most, int(card.room / ((answers * held).sum() / answers.sum())))
    best = 0.0
    for n in range(1, room + 1):
        token = card.step(n, n * context)
        token = max(token, n * (1 + p / a) * card.per_token / card.flops) + n * e / a / card.flops
        if token <= limits.token:
            best = max(best, float(n / (a * token)))
    return best


def largest_rate(
    card: Card, traffic: Traffic, limits: Limits, *, answers: int, seed: int = 0
) -> tuple[float, float]:
    """The most answers a second within the limits, at a steady rate, and the fluid bound."""

    quiet = run_at(card, traffic, answers / 1e6, seed, answers)
    low, high = 0.0, fluid_rate(card, quiet, limits)
    bound = high
    while high - low > bound / 100:
        rate = (low + high) / 2
        run = run_at(card, traffic, rate, seed, answers)
        low, high = (rate, high) if limits.kept(run) else (low, rate)
    return low, bound


def run_at(card: Card, traffic: Traffic, rate: float, seed: int, answers: int) -> Run:
    """So many answers or more at a steady rate, and 36 times as long as a user thinks: an hour."""
    seconds = max(answers / rate, 36 * traffic.think)
    return simulate(card, replace(traffic, rate=rate, peak=1.0), seconds, seed)


def checks(seconds: float = 300_000.0, seed: int = 0) -> Iterator[tuple[str, str, float, float]]:
    """Queues whose answer is known: the queue, the quantity, as simulated, by the formula.

    A step takes 10 ms whoever is in it. With one answer at a time the replica is a queue with one
    server, M/D/1 for answers of one length and M/G/1 for others; with room for all it is M/G/inf.
    """
    step, n = 0.01, 100
    card = Card(bandwidth=1e12, flops=1e15, weights=step * 1e12, per_token=1e9, kv=0.0)
    for name, sigma, load in (("M/D/1", 1e-9, 0.5), ("M/D/1", 1e-9, 0.8), ("M/G/1", 0.5, 0.7)):
        traffic = Traffic(load / (n * step), turns=1.0, answer=n, sigma=sigma)
        run = simulate(replace(card, most=1), traffic, seconds, seed)
        service = np.array(run.answers) * step
        # Pollaczek and Khinchine: E[wait] = rate E[S^2] / (2 (1 - rate E[S]))
        rate = traffic.rate
        known = rate * (service**2).mean() / (2 * (1 - rate * service.mean()))
        what = f"mean wait at a load of {load:g}, s"
        yield name, what, float(np.mean(run.first)) - step, float(known)
    traffic = Traffic(5.0, answer=2 * n)
    run = simulate(replace(card, most=10_000), traffic, seconds / 30, seed)
    known = (
        traffic.rate * (float(np.mean(run.answers)) - 1) * step
    )  # the first token is the prompt's
    yield "M/G/inf", "answers at once", run.running, known
