"""A fake model, which remembers the questions."""

from collections.abc import Callable, Iterator, Sequence

from mico_chat.evaluation.store import Record
from mico_chat.evaluation.task import Item, Model, Reply, Task, chunks
from mico_chat.messages import Message


class Parrot(Model):
    """Answers each message with the reply of ``says``, in batches of two."""

    name = "parrot"

    def __init__(self, says: Callable[[Message], Reply] | None = None) -> None:
        self.says = says or (lambda _: Reply("answer", "Four."))
        self.used: list[str] = []
        self.asked: list[Message] = []
        self.conversations: list[list[Message]] = []
        self.limits: list[int] = []

    def header(self) -> Record:
        return {"model": self.name, "weights": None, "how": "by heart"}

    def use(self, control: str) -> None:
        self.used.append(control)

    def batches(self, items: Sequence[Item]) -> list[list[int]]:
        return chunks(len(items), 2)

    def answers(
        self, task: Task, items: Sequence[Item], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        for place, item in enumerate(items):
            self.conversations.append(item.messages())
            self.asked.append(item.messages()[-1])
            self.limits.append(max_tokens)
            yield place, self.says(self.asked[-1])
