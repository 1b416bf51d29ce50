"""Small files with questions that the mini answers rightly: a photograph, and what this project's
data engine made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_ui.browser.media import Attached, Card, MediaDesk
from mico_ui.browser.previews import Previewer
from mico_ui.browser.profile import Profile
from mico_ui.client import ApiError

FOLDER = Path(__file__).parents[1] / "examples"

OWN = "examples"
"""Whose previews the examples' are."""


@dataclass(frozen=True)
class Example:
    """A question about files of the folder; ``name`` is how the page asks for it.

    ``credit`` names the author of a file that this project did not make (``README.md`` there).
    """

    name: str
    message: str
    files: tuple[tuple[Kind, str], ...]
    credit: str = ""


EXAMPLES = (
    Example(
        "photograph",
        "What is in this photograph?",
        (("image", "coffee.jpg"),),
        credit="Photograph: Rachel Michetti, CC0",
    ),
    Example("picture", "What is to the right of the sheep?", (("image", "sheep-and-diamond.jpg"),)),
    Example("sound", "What happens in this recording?", (("audio", "snare-drum.flac"),)),
    Example("video", "Which way is the dragon going?", (("video", "dragon.mp4"),)),
    Example(
        "depth",
        "Which is farther, the roast chicken or the bottle?",
        (("depth", "chicken-and-bottle.depth.png"),),
    ),
    Example("distance", "At what distance is the nearest thing?", (("depth", "near.depth.png"),)),
    Example("normal", "What does this normal map show?", (("normal", "box.normal.png"),)),
    Example(
        "both",
        "Which is farther away, the oval or the otter?",
        (("image", "otter-and-oval.jpg"), ("depth", "otter-and-oval.depth.png")),
    ),
    Example(
        "see-and-hear",
        "What do you see and what do you hear?",
        (("image", "sheep.jpg"), ("audio", "sheep.flac")),
    ),
)

COMPARED: tuple[tuple[Kind, str], ...] = (
    ("image", "sheep.jpg"),
    ("audio", "snare-drum.flac"),
    ("video", "dragon.mp4"),
    ("depth", "chicken-and-bottle.depth.png"),
)
# Of each medium in this order, as the data engine says such things: its scores know no other words.
COMPARED_TEXTS = (
    "a sheep",
    "a snare drum",
    "a dragon that moves to the right",
    "a roast chicken and a bottle",
)


class ExampleView(BaseModel):
    """An example as the page offers it; its cards are not on the server yet."""

    model_config = ConfigDict(frozen=True)

    name: str
    message: str
    credit: str
    cards: tuple[Card, ...]


async def example_views(previewer: Previewer) -> list[ExampleView]:
    """All examples with their pictures, which are made once."""
    return [
        ExampleView(
            name=example.name,
            message=example.message,
            credit=example.credit,
            cards=tuple([await _card(previewer, kind, file) for kind, file in example.files]),
        )
        for example in EXAMPLES
    ]


async def _card(previewer: Previewer, kind: Kind, file: str) -> Card:
    preview = previewer.kept(OWN, file, kind)
    if preview is None:
        report = MediaReport(name=file, kind=kind)
        preview = await previewer.make(OWN, file, FOLDER / file, report)
    return Card(id=file, kind=kind, name=file, pictures=preview.pictures, facts=preview.facts)


async def attach_files(
    desk: MediaDesk, profile: Profile, files: tuple[tuple[Kind, str], ...]
) -> list[Card]:
    """Send files of the folder to the server, as if the user had dropped them.

    Raises:
        ApiError: when the server refuses.
    """
    return [
        await desk.attach_path(profile, Attached(path=FOLDER / file, name=file, kind=kind))
        for kind, file in files
    ]


async def attach_example(desk: MediaDesk, profile: Profile, name: str) -> list[Card]:
    """The cards of an example, on the server.

    Raises:
        ApiError: for a name that no example has, or when the server refuses.
    """
    for example in EXAMPLES:
        if example.name == name:
            return await attach_files(desk, profile, example.files)
    names = ", ".join(example.name for example in EXAMPLES)
    raise ApiError(f"no example {name!r}; there are {names}", status=415)
