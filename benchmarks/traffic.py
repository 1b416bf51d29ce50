"""Conversations with a service: when they begin, how long they are, which media they show."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import i0e

DAY = 86_400.0


@dataclass(frozen=True)
class Medium:
    """What one medium of a kind costs: ``tokens`` of context, ``flops``, ``cached`` bytes."""

    tokens: int
    flops: float
    cached: int


@dataclass(frozen=True)
class Traffic:
    """Conversations. Lengths in tokens are log-normal with these means and this ``sigma``.

    ``rate``: answers a second, on the mean of the day. ``peak``: its largest hour over its mean; 1
    is a steady rate. ``media``: shown with the first turn of ``shown`` of the conversations, each
    kind as often. ``think``: mean seconds before the next turn. ``sticky``: follow-ups meet the
    replica that answered before. ``cache``: bytes for encoded media.
    """

    rate: float
    turns: float = 2.0
    prompt: float = 69.5
    answer: float = 214.5
    sigma: float = 1.0
    system: int = 0
    longest: int = 1024
    context: int = 4096
    think: float = 100.0
    media: tuple[Medium, ...] = ()
    shown: float = 1.0
    peak: float = 1.0
    sticky: bool = True
    cache: float = 256 << 20

    def lengths(self, rng: np.random.Generator, mean: float, n: int) -> NDArray[np.int64]:
        drawn = rng.lognormal(math.log(mean) - self.sigma**2 / 2, self.sigma, n)
        return np.clip(np.rint(drawn), 1, self.longest).astype(np.int64)

    def starts(self, rng: np.random.Generator, seconds: float) -> NDArray[np.float64]:
        """When conversations begin, by a Poisson process over the curve of the day."""
        most = self.rate * self.peak / self.turns
        at = np.cumsum(rng.exponential(1 / most, int(most * seconds * 1.2) + 100))
        at = at[at < seconds]
        return at[rng.random(len(at)) * self.peak < day_curve(at / DAY, self.peak)]


def day_curve(part: NDArray[np.float64], peak: float) -> NDArray[np.float64]:
    """The rate over its mean at a part of the day; the peak is at noon (von Mises' density)."""
    if peak == 1:
        return np.ones_like(part)
    kappa = brentq(lambda k: 1 / i0e(k) - peak, 1e-9, 1e4)  # i0e(k) = I0(k) exp(-k)
    curve: NDArray[np.float64] = np.exp(-kappa * (1 + np.cos(2 * np.pi * part))) * peak
    return curve


@dataclass(slots=True)
class Turn:
    conversation: int
    at: float
    prompt: int  # new tokens of the prompt, with the medium's
    answer: int
    more: int  # turns after this one
    medium: Medium | None
    before: int = 0  # tokens of the conversation so far
    first: bool = True
    left: int = 0  # prompt tokens still to compute
    encoding: float = 0.0
    began: float = 0.0

    @property
    def need(self) -> int:
        return self.before + self.prompt + self.answer
