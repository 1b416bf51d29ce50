"""Real photographs of packages, with the names of what each shows (``photo_names.yaml``)."""

import base64
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from PIL import Image

from mico_chat.errors import ConfigError
from mico_training.data.language.english import Rng, agreement, article, listed, pick
from mico_training.data.sources.written import Sample, Split, Turn
from mico_world import language as en
from mico_world.glosses import gloss, use
from mico_world.pictures.pictures import present_turn
from mico_world.sources import source, split_of
from mico_world.things.photographs import VIEWS, groups, views

TABLE = Path(__file__).with_name("photo_names.yaml")
SIDE = 480  # longest side of a sample's photograph, pixels
IMAGE = "image.jpg"
# The package whose photographs are in an archive: the archive, and the folder in it.
_ARCHIVES = {"ufoai-textures": ("usr/share/games/ufoai/base/0textures.pk3", "textures")}


@dataclass(frozen=True)
class Labelled:
    """A photograph: ``file`` ends its path in the package; the first name is the main thing's.
    Of a panorama it is the view of this number."""

    package: str
    file: str
    names: tuple[str, ...]
    view: int = 0

    def image(self) -> Image.Image:
        """The photograph, at most ``SIDE`` pixels a side, on white where it is transparent.

        Raises:
            ConfigError: the package has no such file.
        """
        root = source(self.package)
        if self.package in _ARCHIVES:
            archive, folder = _ARCHIVES[self.package]
            with zipfile.ZipFile(root / archive) as opened:
                data = opened.read(f"{folder}/{self.file}")
        else:
            found = next(root.rglob(self.file), None)
            if found is None:
                raise ConfigError(f"{TABLE.name}: the package {self.package} has no {self.file}")
            data = found.read_bytes()
        if ".exr" in self.file:
            image = list(views(io.BytesIO(_exr(data))))[self.view].convert("RGBA")
        else:
            image = Image.open(io.BytesIO(data)).convert("RGBA")
        image.thumbnail((SIDE, SIDE))
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")


def _exr(data: bytes) -> bytes:
    """The OpenEXR file, also out of a JavaScript module that has it in base64."""
    _, packed, text = data.partition(b"base64,")
    return base64.b64decode(text) if packed else data


@cache
def labelled(split: Split) -> dict[str, list[Labelled]]:
    found: dict[str, list[Labelled]] = {}
    for package, files in yaml.safe_load(TABLE.read_text(encoding="utf-8")).items():
        for file, names in files.items():
            if split_of(f"{package}/{file}") == split:
                for view in range(VIEWS if ".exr" in file else 1):
                    one = Labelled(package, file, tuple(names), view)
                    found.setdefault(names[0], []).append(one)
    return found


def _presence(rng: Rng, one: Labelled, names: Sequence[str]) -> Turn:
    """Is there a dog? As often yes as no: then it is what another photograph shows."""
    words = {word for name in one.names for word in name.split()}
    others = [name for name in names if not {*name.split()} & (words | groups().shows)]
    there = not others or bool(rng.random() < 0.5)
    return present_turn(rng, one.names[0] if there else pick(rng, others), present=there)


def make(rng: Rng, split: Split) -> Sample:
    """A crop of a photograph, as often mirrored as not, and the questions what it shows, what
    that is and what it is used for, and whether a thing is there.

    Each name is as likely as another. Nobody drew boxes around the things, so there is no truth.
    """
    names = labelled(split)
    one = pick(rng, names[pick(rng, sorted(names))])
    image = one.image()
    side = float(rng.uniform(0.7, 1.0))
    width, height = (max(1, round(side * length)) for length in image.size)
    left, top = (
        int(rng.integers(a - b + 1)) for a, b in zip(image.size, (width, height), strict=True)
    )
    image = image.crop((left, top, left + width, top + height))
    if rng.random() < 0.5 and "text" not in one.names:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=88)
    main = one.names[0]
    question, answer = en.say(rng, "name", one=article(main), **agreement(main))
    turns = [Turn(question, answer, "name", (IMAGE,), accept=one.names)]
    for skill, phrase in (("gloss", gloss(main)), ("use", use(main))):
        if phrase is not None:
            facts = {"one": article(main), skill: phrase, **agreement(main)}
            turns.append(Turn(*en.say(rng, skill, **facts), skill, (IMAGE,), accept=one.names))
    turns.append(_presence(rng, one, sorted(names)))
    said = (article(main), f"a photo of {listed([article(n) for n in one.names])}")
    files = {IMAGE: packed.getvalue()}
    return Sample("", split, files, {IMAGE: said}, tuple(turns), {IMAGE: main})
