"""The table of the kinds of medium, which prompt, command line, API, decoder and page read.

A new kind is a row here, its name in :data:`Kind`, and a file in :mod:`mico_chat.media` that
decodes it. A kind that the encoder reads itself also needs units in
:mod:`mico_chat.model.preprocessing`, unless it decodes to a medium that has some; a kind that is
``made_of`` others needs none, because its parts are encoded.

A kind outside of this package is a row in the ``KINDS`` of a module that the environment variable
``MICO_KINDS`` names. Its decoder then is ``"package.module:function"``.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from mico_chat.errors import ConfigError

if TYPE_CHECKING:
    Kind = Literal["image", "audio", "video", "depth", "normal", "document"]

Layout = Literal["still", "frames", "slices"]
"""It says how a kind's units are arranged: one still, frames of a video, slices of a sound."""

IMAGES = ("JPEG", "PNG", "WebP", "HEIC", "AVIF", "GIF", "TIFF", "BMP")
SOUNDS = ("WAV", "FLAC", "MP3", "OGG", "M4A", "AAC", "AIFF")
VIDEOS = ("MP4", "WebM", "MOV", "AVI")
ARRAYS = ("NPY", "NPZ")
TEXTS = ("text", "HTML", "SVG")

_TEXTS = (".txt", ".md", ".csv", ".json", ".xml", ".html", ".tex", ".log", ".yaml", ".toml")
_CODE = (".py", ".js", ".ts", ".c", ".h", ".cpp", ".java", ".go", ".rs", ".sh", ".sql", ".css")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class KindRow:
    """What all parts of the project know of one kind of medium."""

    noun: str
    """Its name in the page and in errors; an ``s`` makes the plural."""
    words: str
    """Its name with an article, in the texts of commands."""
    label: str
    """These words stand in front of its context tokens in a prompt of MiCo-Chat."""
    layout: Layout
    decoder: str
    """The module of :mod:`mico_chat.media` and the function in it that decode a file; elsewhere
    ``package.module:function``."""
    formats: tuple[str, ...]
    """The formats that are files of this kind before any other."""
    others: tuple[str, ...] = ()
    """More formats that it can be decoded from, such as the sound track of a video's."""
    files: str = ""
    """Its formats as the page names them; empty: the ``formats``."""
    endings: tuple[str, ...] = ()
    """Its files usually have these endings. A command that names the kind takes other files too."""
    accept: str = ""
    """A browser's file dialog offers these for it; if it is empty, its ``endings``."""
    player: Literal["img", "audio", "video", ""] = ""
    """The element of a page that shows its file; without one the page shows its preview."""
    recorder: Literal["microphone", "camera", "film", ""] = ""
    """This device of a browser records one."""
    blank: tuple[float, ...] = (127,)
    """The values of each pixel or sample of one that shows or says nothing."""
    is_map: bool = False
    """A map is shown as a picture with a legend to a model that reads pictures alone."""
    has_scale: bool = False
    """Whether ``depth_scale`` changes it."""
    estimates_depth: bool = False
    """Whether a depth map can be estimated of it."""
    piece: str = "frame"
    """What the report's ``frames_used`` counts."""
    made_of: tuple[Kind, ...] = ()
    """The kinds that it consists of, beside text; empty: the encoder reads it itself."""

    @property
    def plural(self) -> str:
        return f"{self.noun}s"

    @property
    def decodes(self) -> tuple[str, ...]:
        """All formats that it can be decoded from."""
        return (*self.formats, *self.others)


TABLE: dict[Kind, KindRow] = {
    "image": KindRow(
        noun="picture",
        words="a picture",
        label="Picture: ",
        layout="still",
        decoder="image.decode_image",
        formats=IMAGES,
        endings=(*_PICTURES, ".gif", ".heic", ".heif", ".avif"),
        accept="image/*",
        player="img",
        recorder="camera",
        estimates_depth=True,
    ),
    "audio": KindRow(
        noun="sound",
        words="a sound",
        label="Sound: ",
        layout="slices",
        decoder="audio.decode_audio",
        formats=SOUNDS,
        others=VIDEOS,
        endings=(".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aiff"),
        accept="audio/*",
        player="audio",
        recorder="microphone",
        blank=(0,),
    ),
    "video": KindRow(
        noun="video",
        words="a clip",
        label="Video: ",
        layout="frames",
        decoder="video.decode_video",
        formats=VIDEOS,
        endings=(".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v"),
        accept="video/*",
        player="video",
        recorder="film",
    ),
    "depth": KindRow(
        noun="depth map",
        words="a depth map",
        label="Depth map: ",
        layout="still",
        decoder="maps.decode_depth",
        formats=ARRAYS,
        others=IMAGES,
        files="16-bit PNG, NPY, NPZ",
        endings=(".png", ".npy", ".npz", ".tif", ".tiff"),
        blank=(1,),
        is_map=True,
        has_scale=True,
    ),
    "normal": KindRow(
        noun="normal map",
        words="a map of surface normals",
        label="Normal map: ",
        layout="still",
        decoder="maps.decode_normal",
        formats=(),
        others=IMAGES,
        files="PNG",
        endings=_PICTURES,
        accept="image/*",
        player="img",
        blank=(127, 127, 255),
        is_map=True,
    ),
    "document": KindRow(
        noun="document",
        words="a document",
        label="Document: ",
        layout="still",
        decoder="document.decode_document",
        formats=("PDF", *TEXTS),
        files="PDF, text",
        endings=(".pdf", *_TEXTS, *_CODE),
        piece="page",
        made_of=("image",),
    ),
}
if module := os.environ.get("MICO_KINDS"):
    try:
        TABLE |= import_module(module).KINDS
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"MICO_KINDS {module}: {error}; name a module with KINDS") from error

KINDS: tuple[Kind, ...] = tuple(TABLE)
"""A kind's place is its modality id in the model: new names stand last."""

if not TYPE_CHECKING:
    Kind = Literal[KINDS]

MODALITIES: tuple[Kind, ...] = tuple(kind for kind in KINDS if not TABLE[kind].made_of)
"""The kinds that MiCo's encoder reads itself."""


def kinds_of_format(fmt: str | None) -> tuple[Kind, ...]:
    """The kinds that a file of a format can be, the likeliest first."""
    found = [kind for kind in KINDS if fmt in TABLE[kind].decodes]
    return tuple(sorted(found, key=lambda kind: fmt not in TABLE[kind].formats))


def listed(kinds: tuple[Kind, ...] = KINDS) -> dict[str, dict[str, Any]]:
    """The rows as JSON, for the page."""
    return {kind: asdict(TABLE[kind]) | {"plural": TABLE[kind].plural} for kind in kinds}
