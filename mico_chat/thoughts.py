"""What a model thinks before it answers, told from the answer while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True)
class ThoughtFormat:
    """Thoughts stand between ``open`` and ``close``; an answer without any may begin with ``bare``.

    ``begun``: the prompt ends with ``open``, so that the model writes its thoughts at once.
    """

    open: str
    close: str
    bare: str = ""
    begun: bool = False


FORMATS = (
    ThoughtFormat("<think>", "</think>"),  # Qwen3, DeepSeek R1, GLM-4.5 and most others
    ThoughtFormat("[THINK]", "[/THINK]"),  # Magistral
    ThoughtFormat("<|channel>thought", "<channel|>"),  # Gemma 4
    ThoughtFormat(  # gpt-oss
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
)


def thoughts_of(source: str, answers: Mapping[str, Any]) -> ThoughtFormat | None:
    """The format that a response template describes, or that a chat template knows, if any."""
    fields = answers.get("fields", {})
    for name in {"reasoning_content", "thinking", "reasoning"} & fields.keys():
        match fields[name]:
            case {"open": str(opening), "close": str(close)}:
                return ThoughtFormat(opening.strip(), close.strip())
    return next((form for form in FORMATS if form.open in source or form.close in source), None)


State: TypeAlias = Literal["start", "thoughts", "between", "text"]


class ThoughtReader:
    """Tells the thoughts at the beginning of one answer from its text.

    White space around the thoughts is left out. ``answering`` is false while nothing of the answer
    itself has been read, and after thoughts alone.
    """

    def __init__(self, form: ThoughtFormat) -> None:
        self._form = form
        self._state: State = "thoughts" if form.begun else "start"
        self._held = ""
        self._thought = ""  # what was read and not yet taken
        self._any = False

    @property
    def thinking(self) -> bool:
        """Whether all that was read are thoughts, and what divides them from the answer."""
        return self._state in ("thoughts", "between")

    @property
    def undecided(self) -> bool:
        """Whether nobody knows yet if the answer begins with thoughts."""
        return self._state == "start"

    def take(self) -> str:
        """The thoughts that came since the last call."""
        found, self._thought = self._thought, ""
        return found

    def feed(self, text: str, *, final: bool = False) -> str:
        """The text of the answer that is certain now; ``final``: nothing comes behind ``text``."""
        self._held += text
        if self._state == "start":
            self._start()
        if self._state == "thoughts":
            self._think(final)
        if self._state == "between" and (rest := self._held.lstrip()):
            self._state, self._held = "text", rest
        if self._state != "text" and not (final and self._state == "start"):
            return ""
        found, self._held = self._held, ""
        return found

    def _start(self) -> None:
        said = self._held.lstrip()
        openings: tuple[tuple[str, State], ...] = (
            (self._form.open, "thoughts"),
            (self._form.bare, "between"),
        )
        for opening, state in openings:
            if opening and said.startswith(opening):
                self._held, self._state = said[len(opening) :], state
                return
        if not any(opening.startswith(said) for opening, _ in openings):
            self._state = "text"

    def _think(self, final: bool) -> None:
        close = self._form.close
        at = self._held.find(close)
        if at >= 0:
            self._say(self._held[:at].rstrip())
            self._state, self._held = "between", self._held[at + len(close) :]
            return
        most = range(len(close) - 1, 0, -1)
        part = next((n for n in most if self._held.endswith(close[:n])), 0)
        certain = self._held[: len(self._held) - part].rstrip()
        self._say(certain)
        self._held = "" if final else self._held[len(certain) :]

    def _say(self, text: str) -> None:
        text = text if self._any else text.lstrip()
        self._any = self._any or bool(text)
        self._thought += text
