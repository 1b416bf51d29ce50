"""What every reader returns: one sample with media that are still encoded and not yet read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from mico_chat.errors import DataError
from mico_chat.media.file import TarMember
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message
from mico_training.data.regions import Region
from mico_training.world.sample import Turn

Need = Literal["caption", "conversation", "question"]


@dataclass(frozen=True)
class TrainingMedium:
    """One encoded medium. ``key`` names it in a feature cache; "" = never cached."""

    kind: Kind
    source: Path | TarMember
    name: str
    key: str = ""

    def encoded(self) -> Path | bytes:
        """What the media decoder takes: a path, or the bytes."""
        return self.source if isinstance(self.source, Path) else self.source.read()


@dataclass(frozen=True)
class TrainingSample:
    """Media of one thing, and the words about them.

    ``media`` is in order. ``captions``, ``concepts`` and ``regions`` are keyed like it. ``turns``
    are single questions of which a conversation is drawn; ``conversation`` is a finished one,
    whose media parts are paths.
    """

    id: str
    media: Mapping[str, TrainingMedium]
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    concepts: Mapping[str, str] = field(default_factory=dict)
    regions: Mapping[str, tuple[Region, ...]] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    conversation: tuple[Message, ...] = ()


class Source(Protocol):
    """Random access to samples that all have what a stage needs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TrainingSample: ...


def require(source: Source, path: str, need: Need, detail: Sequence[str] = ()) -> None:
    """Refuse a source that has nothing for a stage.

    Raises:
        DataError: no sample of it is left.
    """
    if len(source) == 0:
        skills = f" of the skills {', '.join(detail)}" if detail else ""
        raise DataError(path, None, f"no sample has a {need}{skills}")
