"""Equality of greedy answers, where the last bits of two computations may decide between words."""

from collections.abc import Sequence

from mico_chat.engine.base import Delta

NEAR = 0.05
"""Two words with log-probabilities nearer than this are a tie: kernels round differently. llama.cpp
keeps keys and values in 16 bits, and the same prompt differed by 0.02 in other company."""


class Answered(list[int]):
    """The tokens of a greedy answer, with the likeliest tokens at each place.

    It equals a list of tokens that is the same up to a tie. Behind a tie answers go apart.
    """

    def __init__(self, deltas: Sequence[Delta]) -> None:
        super().__init__(token for delta in deltas for token in delta.token_ids)
        said = [logprob for delta in deltas for logprob in delta.logprobs]
        self.likeliest = [{top.token_id: top.logprob for top in one.top} for one in said]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list):
            return NotImplemented
        for place, (ours, theirs) in enumerate(zip(self, other, strict=False)):
            if ours != theirs:
                known = self.likeliest[place] if place < len(self.likeliest) else {}
                return theirs in known and abs(known[ours] - known[theirs]) < NEAR
        return len(self) == len(other)

    __hash__ = None
