"""The five kinds of medium; a kind's index in KINDS is its modality id in the model."""

from typing import Literal

Kind = Literal["image", "audio", "video", "depth", "normal"]

KINDS: tuple[Kind, ...] = ("image", "audio", "video", "depth", "normal")

IN_WORDS: dict[Kind, str] = {
    "image": "a picture",
    "audio": "a sound",
    "video": "a clip",
    "depth": "a depth map",
    "normal": "a map of surface normals",
}
"""Each kind of medium in everyday words."""
