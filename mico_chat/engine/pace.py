"""How much of waiting prompts a step carries without holding up those that decode."""

from __future__ import annotations


class Pace:
    """How many tokens of prompts a step may carry beside decoding, from the time steps took.

    A step should last at most ``slowdown`` times one that only decodes.
    """

    FIRST = 32
    LEAST = 8

    def __init__(self, slowdown: float = 2.0) -> None:
        self.slowdown = slowdown
        self._decode: float | None = None  # seconds of a step that only decodes
        self._token: float | None = None  # seconds a prompt token adds

    def observe(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step with so many decoding sequences and prompt tokens took so long."""
        if not prompt:
            self._decode = _mean(self._decode, seconds)
        elif not decoding:
            self._token = _mean(self._token, seconds / prompt)
        elif self._decode is not None:
            self._token = _mean(self._token, max(0.0, seconds - self._decode) / prompt)

    def room(self, decoding: int, most: int) -> int:
        """Prompt tokens for the next step, ``most`` at the most."""
        if not decoding:
            return most
        if not self._decode or not self._token:
            return min(most, self.FIRST)
        return min(most, max(self.LEAST, int((self.slowdown - 1) * self._decode / self._token)))


def _mean(mean: float | None, value: float) -> float:
    """A running mean that follows changes within a few steps."""
    return value if mean is None else 0.7 * mean + 0.3 * value
