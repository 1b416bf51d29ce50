"""The sample that every reader returns; its media are still encoded and not yet read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mico_chat.media import MediaFile
from mico_chat.messages import Message
from mico_training.data.regions import Region
from mico_training.world.sample import Turn

Need = Literal["caption", "conversation", "question"]


@dataclass(frozen=True)
class TrainingSample:
    """Media, and the texts about them.

    ``captions``, ``concepts`` and ``regions`` have keys of ``media``. ``turns`` are single
    questions, of which a conversation is drawn; ``conversation`` is a complete one.
    """

    id: str
    media: Mapping[str, MediaFile]
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    concepts: Mapping[str, str] = field(default_factory=dict)
    regions: Mapping[str, tuple[Region, ...]] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    conversation: tuple[Message, ...] = ()


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TrainingSample: ...
