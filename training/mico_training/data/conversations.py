"""Examples of stages 2 and 3: messages, and the media that their parts stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message, Part, TextPart
from mico_training.data.contexts import captions_of, joint_caption
from mico_training.data.mixture import Mixture
from mico_training.data.regions import Region
from mico_training.data.sample import TrainingMedium, TrainingSample
from mico_training.world.sample import Turn

INSTRUCTIONS: dict[Kind, tuple[str, ...]] = {
    "image": (
        "Describe the picture.",
        "What does this picture show?",
        "What can you see here?",
        "Give a short caption for this image.",
    ),
    "audio": (
        "Describe the sound.",
        "What do you hear?",
        "What is this a recording of?",
        "Give a short caption for this sound.",
    ),
    "video": (
        "Describe the video.",
        "What happens in this clip?",
        "What does this video show?",
        "Give a short caption for this video.",
    ),
    "depth": (
        "Describe the depth map.",
        "What does this depth map show?",
        "Describe the scene from its depth.",
    ),
    "normal": (
        "Describe the normal map.",
        "What does this normal map show?",
        "Describe the surfaces here.",
    ),
}
JOINT_INSTRUCTIONS = (
    "Describe these together.",
    "What is all this?",
    "Describe each of these in order.",
)


@dataclass(frozen=True)
class ChatExample:
    """A conversation, and the encoded media its media parts stand for, in order.

    ``simulated``: the number of the concept name that its one picture is taken for, or -1.
    ``regions``: those of each medium, where the stage asks for them.
    """

    id: str
    messages: tuple[Message, ...]
    media: tuple[TrainingMedium, ...]
    simulated: int = -1
    regions: tuple[tuple[Region, ...], ...] = ()


class CaptionDataset:
    """Stage 2: a medium (now and then several) and its caption as the answer to an instruction.

    ``regions``: whether the examples bring them.
    """

    def __init__(self, mixture: Mixture, draws: int, join: float, *, regions: bool = False) -> None:
        self.mixture = mixture
        self.draws = draws
        self.join = join
        self.regions = regions

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, draw: int) -> ChatExample:
        generator = self.mixture.generator(draw)
        sample = self.mixture.sample(draw)
        captioned = [key for key in sample.media if sample.captions.get(key)]
        keys = [captioned[int(generator.integers(len(captioned)))]]
        if generator.random() < self.join:
            keys = captioned
        kinds = {sample.media[key].kind for key in keys}
        choices = INSTRUCTIONS[next(iter(kinds))] if len(keys) == 1 else JOINT_INSTRUCTIONS
        instruction = choices[int(generator.integers(len(choices)))]
        caption = joint_caption([captions_of(sample, key, generator) for key in keys])
        return ChatExample(
            id=sample.id,
            messages=(
                Message("user", (*(_part(sample, key) for key in keys), TextPart(instruction))),
                Message("assistant", (TextPart(caption),)),
            ),
            media=tuple(sample.media[key] for key in keys),
            regions=tuple(sample.regions.get(key, ()) for key in keys) if self.regions else (),
        )


class ConversationDataset:
    """Stage 3: a finished conversation, or one drawn from a sample's questions."""

    def __init__(self, mixture: Mixture, draws: int, max_turns: int) -> None:
        self.mixture = mixture
        self.draws = draws
        self.max_turns = max_turns

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, draw: int) -> ChatExample:
        sample = self.mixture.sample(draw)
        if sample.conversation:
            return finished(sample)
        return ask(sample, self.mixture.generator(draw), self.max_turns)


def finished(sample: TrainingSample) -> ChatExample:
    """A sample's own conversation; its media parts are paths."""
    media = tuple(
        TrainingMedium(part.kind, part.path, part.name)
        for message in sample.conversation
        for part in message.files
        if part.path is not None
    )
    return ChatExample(sample.id, sample.conversation, media)


def ask(sample: TrainingSample, generator: np.random.Generator, max_turns: int) -> ChatExample:
    """One to ``max_turns`` of a sample's questions in random order, as one conversation.

    A medium is shown in the first question about it. A question that would be ambiguous by then
    ("the picture", after two pictures) is left out.
    """
    wanted = int(generator.integers(1, max_turns + 1))
    shown: list[str] = []
    messages: list[Message] = []
    for place in generator.permutation(len(sample.turns)):
        turn = sample.turns[int(place)]
        if len(messages) == 2 * wanted:
            break
        if not _clear(turn, shown, sample.media):
            continue
        new = [key for key in turn.media if key not in shown]
        shown += new
        parts: tuple[Part, ...] = (
            *(_part(sample, key) for key in new),
            TextPart(turn.question),
        )
        messages += [Message("user", parts), Message("assistant", (TextPart(turn.answer),))]
    return ChatExample(sample.id, tuple(messages), tuple(sample.media[key] for key in shown))


def _clear(turn: Turn, shown: list[str], media: Mapping[str, TrainingMedium]) -> bool:
    """Whether a question means its media, given those already shown."""
    old = [key for key in turn.media if key in shown]
    if not old:
        return True
    kinds = {media[key].kind for key in turn.media}
    related = [key for key in shown if media[key].kind in kinds]
    return related == old and list(turn.media[: len(old)]) == old


def _part(sample: TrainingSample, key: str) -> MediaFile:
    return MediaFile(kind=sample.media[key].kind, source="", name=key)
