"""The sample that every reader returns, and its regions: words that are true of a place.

The media of a sample are still encoded and not yet read. Legend: R regions of a batch, K words a
region.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from mico_chat.errors import DataError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message
from mico_chat.model.mini.regions import INNER, WHOLE, RegionBatch
from mico_chat.model.mini.things import WORDS
from mico_training.data.language.english import number_word
from mico_training.data.sources.written import NEARER_BY, Turn

Need = Literal["caption", "conversation", "question", "preference"]

APART = 0.12
"""Two things are left and right if they are so far apart, as a fraction of the picture."""
WAYS = WORDS["way"]
MAPS: tuple[Kind, ...] = ("depth", "normal")
SHOWN_BY_MAPS: tuple[Kind, ...] = ("image", "video")
SIDES = (("x", ("left",), ("right",)), ("y", ("above", "top"), ("below", "bottom")))

Box = tuple[float, float, float, float]
WHOLE_BOX: Box = (WHOLE, WHOLE, WHOLE, WHOLE)


@dataclass(frozen=True)
class Region:
    """A thing's box (left, top, right, bottom as fractions), its name, and true words about it.

    ``distance`` from the camera is in metres, NaN where it is unknown. ``way`` is where a clip's
    thing goes, one of :data:`mico_chat.model.mini.things.WORDS`' ways.
    """

    box: Box
    name: str
    words: tuple[str, ...]
    distance: float = nan
    way: str = ""


@dataclass(frozen=True)
class TrainingSample:
    """Media, and the texts about them.

    ``captions``, ``concepts`` and ``regions`` have keys of ``media``. ``turns`` are single
    questions, of which a conversation is drawn; ``conversation`` is a complete one, and
    ``rejected`` the same with a worse end. ``subtitle`` is what is said in the media, in text.
    ``place``: its source in a mixture, and its number there. ``fused``: the captions that tell of
    several media at once. Depth and normal maps without captions have the picture's (3.3).
    """

    id: str
    media: Mapping[str, MediaFile]
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    concepts: Mapping[str, str] = field(default_factory=dict)
    regions: Mapping[str, tuple[Region, ...]] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    conversation: tuple[Message, ...] = ()
    rejected: tuple[Message, ...] = ()
    subtitle: str = ""
    fused: frozenset[str] = frozenset()
    place: tuple[int, int] = field(default=(0, -1), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "captions", _inherited(self.media, self.captions))

    def of_kinds(self, kinds: frozenset[Kind]) -> Self:
        """Its media of some kinds, and the texts about these media alone."""
        media = {name: medium for name, medium in self.media.items() if medium.kind in kinds}
        if len(media) == len(self.media):
            return self
        captions = {name: texts for name, texts in self.captions.items() if name in media}
        turns = tuple(turn for turn in self.turns if set(turn.media) <= set(media))
        talk: dict[str, Any] = {"turns": turns, "conversation": (), "rejected": ()}
        return replace(self, media=media, captions=captions, **talk)


def _inherited(
    media: Mapping[str, MediaFile], captions: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    """The captions, and those that maps have from the picture: (x_I, x_D, x_N, x_T^I), paper 3.3.

    A map belongs to the picture of its number (``depth2``, ``image2``) or to the only picture;
    where that one has no caption, to a clip in the same way.
    """
    found = dict(captions)
    for name in (name for name, medium in media.items() if medium.kind in MAPS):
        for kind in SHOWN_BY_MAPS:
            own = [other for other, medium in media.items() if medium.kind == kind]
            alike = [other for other in own if _number(other) == _number(name)] or own
            if not found.get(name) and len(alike) == 1 and captions.get(alike[0]):
                found[name] = captions[alike[0]]
    return found


def _number(name: str) -> str:
    """The digits of a medium's name: "2" of ``"image2.jpg"``."""
    stem = name.partition(".")[0]
    return stem[len(stem.rstrip("0123456789")) :]


@dataclass(frozen=True)
class Skipped:
    """The bad samples that a source has left out: how many, and what is wrong with the first."""

    n: int = 0
    errors: tuple[DataError, ...] = ()


class Source(Protocol):
    """Samples; one that reads files has ``bad``, too (:class:`Skipped`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TrainingSample: ...


def bad_of(source: Source) -> Skipped:
    return getattr(source, "bad", Skipped())


def regions_of(kind: Kind, truth: Mapping[str, Any]) -> tuple[Region, ...]:
    """The regions of one medium by the sample's truth: colour, side, nearness, number, motion.

    A medium whose truth lists no thing has a region of the whole; one without a truth has none.
    """
    if truth.get("things") == [] and kind != "audio":
        return (Region(WHOLE_BOX, "", ("nothing",)),)
    things = [
        thing for thing in truth.get("things", ()) if isinstance(thing, Mapping) and "name" in thing
    ]
    if kind == "audio" or not all("x" in thing and "y" in thing for thing in things):
        return ()
    names = Counter(thing["name"] for thing in things)
    regions = []
    for thing in things:
        others = [other for other in things if other is not thing]
        words = [*_sides(thing, others), *_nearness(thing, others)]
        if kind in ("image", "video") and thing.get("colour"):
            words.append(thing["colour"])
        number = names[thing["name"]]
        if number <= 4:
            words.append(number_word(number))
        distance = float(thing.get("depth") or nan)
        regions.append(
            Region(_box(thing), thing["name"], tuple(words), distance, thing.get("way", ""))
        )
    if 1 <= len(things) <= 4:
        regions.append(Region(WHOLE_BOX, "", (number_word(len(things)),)))
    return tuple(regions)


def _box(thing: Mapping[str, Any]) -> Box:
    x, y = thing["x"], thing["y"]
    half_width, half_height = INNER / 2 * thing["width"], INNER / 2 * thing["height"]
    return (x - half_width, y - half_height, x + half_width, y + half_height)


def _sides(thing: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """On which side of all others the thing is; a single thing: of the picture."""
    words: list[str] = []
    for axis, low, high in SIDES:
        rest = [other[axis] for other in others] or [0.5]
        if all(thing[axis] < place - APART for place in rest):
            words += low
        elif all(thing[axis] > place + APART for place in rest):
            words += high
        elif len(rest) == 2 and axis == "x" and min(rest) < thing[axis] < max(rest):
            words.append("middle")
    return words


def _nearness(thing: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    own, *depths = (float(t.get("near") or t.get("depth") or 0.0) for t in (thing, *others))
    if not depths or min(own, *depths) <= 0:
        return []
    if own * NEARER_BY <= min(depths):
        return ["nearer", "closer"]
    return ["farther", "far"] if own >= max(depths) * NEARER_BY else []


def region_batch(
    regions: Sequence[Sequence[Region]], tokens: Callable[[str], Sequence[int]]
) -> RegionBatch | None:
    """The regions of a batch's media in order, or None if none has words.

    ``tokens`` returns a word's ids.
    """
    media, boxes, words, names, metres, ways = [], [], [], [], [], []
    for number, found in enumerate(regions):
        for region in found:
            said = [token for word in region.words for token in tokens(word)]
            named = list(tokens(region.name)) if region.name else []
            if said or named:
                media.append(number)
                boxes.append(region.box)
                words.append(said)
                names.append(named)
                metres.append(region.distance)
                ways.append(WAYS.index(region.way) if region.way in WAYS else -1)
    if not media:
        return None

    def padded(rows: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        filled = [ids + [-1] * (longest - len(ids)) for ids in rows]
        return torch.tensor(filled, dtype=torch.long).view(len(rows), longest)

    return RegionBatch(
        torch.tensor(media),
        torch.tensor(boxes),
        padded(words),
        padded(names),
        torch.tensor(metres),
        torch.tensor(ways),
    )
