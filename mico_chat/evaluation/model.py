"""The protocol of a model under evaluation: it gives a reply for each item."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from mico_chat.evaluation.store import Record
from mico_chat.evaluation.task import Item, Task

if TYPE_CHECKING:
    from torch import nn

CONTROLS = ("full", "withheld", "swapped", "without-concepts", "without-grid", "base-llm")
"""What a model is shown; the module :mod:`.run` explains each control."""


@dataclass(frozen=True)
class Reply:
    """An answer, or the reason why the model refuses the item or its medium is broken.

    Refused and broken items do not count as wrong answers.
    """

    kind: Literal["answer", "refused", "broken"]
    text: str

    @classmethod
    def of(cls, text: str, finish_reason: str | None, max_tokens: int | None) -> Reply:
        if text or finish_reason != "length":
            return cls("answer", text)
        return cls(
            "refused",
            f"the model wrote no answer within {max_tokens} tokens: a model that thinks "
            "first needs a higher --max-tokens",
        )


class Model(Protocol):
    name: str
    controls: tuple[str, ...]

    def header(self) -> Record:
        """Everything that the answers depend on; ``model`` is its name, ``weights`` a digest."""
        ...

    def use(self, control: str) -> None:
        """Switch off the parts that a control leaves out. ``base-llm`` cannot be undone."""
        ...

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        """The batches, as places of items. The last bits of an answer depend on its batch."""
        ...

    def answers(
        self, task: Task, items: Sequence[Item], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """Yields the place of each item and its greedy or beam-searched answer, in any order."""
        ...

    def close(self) -> None: ...


def chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def fingerprint(model: nn.Module, more: str = "") -> str:
    """A digest of ``more`` and of each tensor's shape and sum: faster than one of all bytes."""
    digest = hashlib.sha256(more.encode())
    for name, tensor in sorted(model.state_dict().items()):
        total = tensor.double().sum().item()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total!r}\n".encode())
    return digest.hexdigest()[:16]
