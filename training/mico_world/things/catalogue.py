"""Things: the named cut-outs of which scenes are composed.

``catalogue()`` gathers the procedural shapes and the pictures of packages: stamps, emoji, clip art
and furniture icons. A file name, a caption or metadata gives each picture a short plain noun; a
picture without one is left out.
"""

import hashlib
import io
import json
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mico_chat.settings import cache_dir
from mico_training.data.language.english import Rng, nouns, pick
from mico_training.data.sources.written import Split
from mico_training.data.table import Table
from mico_world.sources import in_one_step, source, split_of
from mico_world.things import colours, shapes
from mico_world.things.photographs import Photographs, photographs

Pixels = NDArray[np.uint8]
CUT_OUT_SIDE = 384  # longest side of a stored cut-out, pixels
_CACHE_VERSION = 3
_SHARES = {"photograph": 0.42, "picture": 0.48, "shape": 0.1}  # how often a thing is one of these
_FLAT = 0.12  # a photograph's pixel seldom equals its neighbour, and its colours are many
_MAX_PIXELS = 40_000_000  # larger drawings take seconds to decode; there are enough others
_WORDS_FILE = Path(__file__).with_name("catalogue_words.yaml")


class Words(Table):
    heads: frozenset[str]
    rename: dict[str, str]
    drop: frozenset[str]
    synonyms: dict[str, tuple[str, ...]]
    alike: dict[str, tuple[str, ...]]
    emoji_groups: frozenset[str]
    emoji_skip: frozenset[str]
    stamp_skip: tuple[str, ...]
    stamp_names: dict[str, str]
    furniture_skip: frozenset[str]
    furniture_skip_parts: tuple[str, ...]
    clip_art_words: dict[str, str]
    clip_art_folders: tuple[str, ...]
    clip_art_skip: tuple[str, ...]
    clip_art_default: dict[str, str]
    caption_openings: tuple[str, ...]
    caption_endings: tuple[str, ...]

    @cached_property
    def kept(self) -> frozenset[str]:
        return frozenset((*self.synonyms, *self.rename.values(), *self.clip_art_words.values()))


words = Words.reader(_WORDS_FILE)


@dataclass(frozen=True)
class Thing:
    """A named cut-out. Variants of one original share the ``identity``, which decides the split.
    ``load()`` gives RGBA (h, w, 4) without an empty margin; a shape is neutral grey."""

    identity: str
    name: str
    names: tuple[str, ...]
    colour: str | None
    load: Callable[[], Pixels]
    kind: str = "picture"  # or "photograph" or "shape"

    @property
    def accept(self) -> tuple[str, ...]:
        return (self.name, *self.names)

    @property
    def shape(self) -> bool:
        return self.kind == "shape"


class Catalogue:
    """Things by split, kind and name, and the photographs before which they are shown.

    Each name of a kind is drawn equally often, however many things have it."""

    def __init__(self, things: Iterable[Thing], photographs: Photographs | None = None) -> None:
        self.photographs = photographs
        self._by_name: dict[Split, dict[str, list[Thing]]]
        self._by_name = {"train": defaultdict(list), "validation": defaultdict(list)}
        self._by_kind: dict[tuple[Split, str], dict[str, list[Thing]]] = {}
        for thing in things:
            split = split_of(thing.identity)
            self._by_name[split][thing.name].append(thing)
            of_kind = self._by_kind.setdefault((split, thing.kind), defaultdict(list))
            of_kind[thing.name].append(thing)

    def of_name(self, split: Split, name: str) -> list[Thing]:
        return self._by_name[split][name]

    def sample(self, rng: Rng, split: Split) -> Thing:
        kinds = {kind: share for kind, share in _SHARES.items() if (split, kind) in self._by_kind}
        shares = np.array(list(kinds.values()))
        by_name = self._by_kind[split, str(rng.choice(list(kinds), p=shares / shares.sum()))]
        return pick(rng, by_name[pick(rng, list(by_name))])

    def distinct(self, rng: Rng, split: Split, n: int, unlike: Sequence[Thing] = ()) -> list[Thing]:
        """``n`` things such that no right name of one fits another, or any of ``unlike``."""
        found: list[Thing] = []
        draws = iter(range(50 * n))
        while len(found) < n:
            if next(draws, None) is None:
                raise ValueError(f"split {split!r} has fewer than {n} things of distinct names")
            thing = self.sample(rng, split)
            if not any(confusable(thing, other) for other in (*unlike, *found)):
                found.append(thing)
        return found


def confusable(a: Thing, b: Thing) -> bool:
    """Whether a right name of one thing also fits the other ("ball", "soccer ball")."""
    alike = words().alike
    words_a, words_b = ({n.split()[-1] for n in t.accept} | {*t.accept} for t in (a, b))
    return bool(words_a & words_b) or any(
        x in alike.get(y, ()) or y in alike.get(x, ()) for x in words_a for y in words_b
    )


def shape_things() -> list[Thing]:
    things = []
    for name, names in shapes.shapes().names.items():
        solid = name in ("ball", "cube", "cylinder", "cone")
        for style in ("plain",) if solid else shapes.STYLES:
            for seed in range(3):
                identity = f"shape/{name}/{style}/{seed}"
                load = partial(shapes.draw, name, style, seed)
                things.append(Thing(identity, name, names, None, load, "shape"))
    return things


@cache
def catalogue() -> Catalogue:
    """The shapes and the packages' cut-outs and photographs. The first call fetches and decodes the
    packages."""
    folder = cache_dir() / "world"
    digest = hashlib.sha1(_WORDS_FILE.read_bytes()).hexdigest()[:8]  # other words make other things
    index, blob = (folder / f"things-{_CACHE_VERSION}-{digest}.{end}" for end in ("json", "bin"))
    if not index.exists():
        _write_cache(index, blob)
    things = shape_things()
    for row in json.loads(index.read_text()):
        offset, size = row.pop("offset"), row.pop("size")
        load = partial(_decode, str(blob), offset, size)
        things.append(Thing(**row | {"names": tuple(row["names"]), "load": load}))
    return Catalogue(things, photographs())


@lru_cache(maxsize=256)
def _decode(blob: str, offset: int, size: int) -> Pixels:
    with open(blob, "rb") as file:
        file.seek(offset)
        return np.asarray(Image.open(io.BytesIO(file.read(size))).convert("RGBA"))


def _write_cache(index: Path, blob: Path) -> None:
    rows = []
    with in_one_step(blob) as scratch, scratch.open("wb") as out:
        for entry in chain(_stamps(), _emoji(), _clip_art(), _furniture()):
            name, names = plain_name(entry.phrase)
            original = entry.open()
            if name in words().drop or (rgba := trim(original)) is None:
                continue
            packed = io.BytesIO()
            Image.fromarray(rgba).save(packed, "WEBP", quality=92, method=4)
            row = {
                "identity": entry.identity,
                "name": name,
                "names": names,
                "colour": colours.dominant(rgba),
                "kind": "photograph" if entry.photograph(original) else "picture",
                "offset": out.tell(),
                "size": packed.tell(),
            }
            out.write(packed.getvalue())
            rows.append(row)
    with in_one_step(index) as scratch:
        scratch.write_text(json.dumps(rows, ensure_ascii=False))


def trim(image: Image.Image) -> Pixels | None:
    """The picture without its empty margin, at most CUT_OUT_SIDE long; None if it is too large, or
    if hardly anything is visible, or if what is visible fills the frame."""
    if image.width * image.height > _MAX_PIXELS:
        return None
    rgba = image.convert("RGBA")
    if max(rgba.size) > 3 * CUT_OUT_SIDE:
        rgba = rgba.reduce(max(1, max(rgba.size) // (2 * CUT_OUT_SIDE)))
    alpha = np.asarray(rgba)[..., 3]
    rows, columns = np.flatnonzero((alpha > 24).any(1)), np.flatnonzero((alpha > 24).any(0))
    if len(rows) < 24 or len(columns) < 24:
        return None
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    if not 0.06 <= (alpha[box[1] : box[3], box[0] : box[2]] > 128).mean() <= 0.985:
        return None
    rgba = rgba.crop(box)
    rgba.thumbnail((CUT_OUT_SIDE, CUT_OUT_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(rgba)


class PictureEntry(NamedTuple):
    """A picture (the file ``path``, or ``member`` of the zip ``path``) and words for its thing."""

    path: Path
    identity: str
    phrase: str
    member: str = ""

    def open(self) -> Image.Image:
        if not self.member:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(self.path)
        with zipfile.ZipFile(self.path) as archive:
            return Image.open(io.BytesIO(archive.read(self.member)))

    def photograph(self, image: Image.Image) -> bool:
        """Whether this stamp is a photograph: hardly any pixel has the colour of its right
        neighbour, and the colours are many."""
        if not self.identity.startswith("stamp/"):
            return False
        rgba = np.asarray(image.convert("RGBA")).astype(np.int32)
        solid = rgba[..., 3] > 250
        number = (rgba[..., 0] << 16) + (rgba[..., 1] << 8) + rgba[..., 2]
        equal = (np.diff(number, axis=1) == 0)[solid[:, 1:] & solid[:, :-1]]
        different = len(np.unique(number[solid])) / max(1, int(solid.sum()))
        return len(equal) > 0 and float(equal.mean()) < _FLAT < different


def plain_name(phrase: str) -> tuple[str, tuple[str, ...]]:
    """A short noun and further right names: "a monarch butterfly" -> "butterfly", (...)."""
    full = re.sub(r"\s+", " ", phrase.lower().strip())
    full = words().rename.get(full, full)
    bare = " ".join([*(w for w in full.split()[:-1] if w not in nouns().colours), full.split()[-1]])
    bare = words().rename.get(bare, bare)
    head = bare.split()[-1]
    name = head if head in words().heads and bare not in words().kept else bare
    others = dict.fromkeys((*words().synonyms.get(name, ()), bare))
    return name, tuple(other for other in others if other != name)


_APOSTROPHE = "\u2019"


def caption_name(caption: str) -> str:
    """The noun of a caption: "A small dog that barks." -> "dog"."""
    opening = rf"^(?:{'|'.join(words().caption_openings)})\s+"
    ending = rf"[.!?,(\u2014;:]| (?:{'|'.join(words().caption_endings)}) "
    text = caption.strip().lower().replace(f"{_APOSTROPHE}s", "'s")
    text = re.sub("[\u201c\u2018\"'][^\u201d\u2019\"']+[\u201d\u2019\"']\\s*", "", text)
    text = re.split(ending, text)[0]
    previous = None
    while previous != text:
        previous, text = text, re.sub(opening, "", text.strip())
    return re.sub(r" (fruit|bulb|computer)$", "", text.strip())


def _stamps() -> Iterator[PictureEntry]:
    root = source("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    for png in sorted(root.rglob("*.png")):
        key = png.relative_to(root).with_suffix("").as_posix()
        text = png.with_suffix(".txt")
        if key.startswith(words().stamp_skip) or not text.exists() or png.stem.endswith("_mirror"):
            continue
        caption = text.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        phrase = words().stamp_names.get(key) or caption_name(caption)
        if phrase and len(phrase.split()) <= 3:
            yield PictureEntry(png, f"stamp/{_stem(key)}", phrase)


def _emoji() -> Iterator[PictureEntry]:
    table = source("unicode-emoji-json") / "package/data-by-emoji.json"
    assets = source("lobehub-fluent-emoji-3d") / "package/assets"
    for character, row in json.loads(table.read_text(encoding="utf-8")).items():
        phrase = row["name"].lower().replace(_APOSTROPHE, "'")
        if row["group"] not in words().emoji_groups or phrase in words().emoji_skip:
            continue
        if re.search(r"thirty|o'clock|medal|ticket|japanese", phrase) and phrase != "one o'clock":
            continue
        codes = "-".join(f"{ord(c):x}" for c in character)
        phrase = "clock" if "o'clock" in phrase else phrase
        files = (assets / f"{c}.webp" for c in (codes, codes.removesuffix("-fe0f")))
        if path := next((file for file in files if file.exists()), None):
            yield PictureEntry(path, f"emoji/{row['slug']}", phrase)


def _clip_art() -> Iterator[PictureEntry]:
    """Open Clip Art drawings whose file name has a known noun, or whose folder is one kind."""
    root = source("openclipart-png") / "usr/share/openclipart/png"
    seen: set[str] = set()
    for png in sorted(root.rglob("*.png")):
        key = png.relative_to(root).with_suffix("").as_posix().lower()
        folder, stem = key.rsplit("/", 1) if "/" in key else ("", key)
        skipped = any(part in key for part in words().clip_art_skip)
        if skipped or not folder.startswith(words().clip_art_folders):
            continue
        # "dodge_neon_pink_ganson": the first known pair of words, else the first known word
        parts = [part for part in re.split(r"[_\s.]+", stem) if part]
        places = [(size, at) for size in (2, 1) for at in range(min(4, len(parts) - size + 1))]
        known = (words().clip_art_words.get(" ".join(parts[at : at + n])) for n, at in places)
        phrase = next(filter(None, known), words().clip_art_default.get(folder))
        if phrase is None or stem in seen:
            continue
        if phrase == "computer mouse" and not folder.startswith("computer"):
            continue
        seen.add(stem)
        yield PictureEntry(png, f"clip/{_stem(stem)}", phrase)


def _furniture() -> Iterator[PictureEntry]:
    root = source("sweethome3d-furniture") / "usr/share/sweethome3d/furniture"
    for archive in sorted(root.glob("*.sh3f")):
        for entry in furniture(archive):
            member, phrase = entry.get("icon", "").strip().lstrip("/"), entry["name"].lower()
            skipped = any(part in phrase for part in ("\\u", *words().furniture_skip_parts))
            if member and not skipped and phrase not in words().furniture_skip:
                identity = f"furniture/{archive.stem}/{_stem(member.rsplit('.', 1)[0])}"
                yield PictureEntry(archive, identity, phrase, member)


def furniture(archive: Path) -> list[dict[str, str]]:
    """The entries of a Sweet Home 3D catalogue: their name, icon, model, size and so on."""
    entries: dict[str, dict[str, str]] = defaultdict(dict)
    with zipfile.ZipFile(archive) as catalogue:
        text = catalogue.read("PluginFurnitureCatalog.properties").decode("latin-1")
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*?)\r?$", text, re.MULTILINE):
        entries[number][key] = value
    return [entry for entry in entries.values() if "name" in entry]


def _stem(key: str) -> str:
    """``key`` without variant numbers: variants of one original share the split."""
    return re.sub(r"[-_ ]?(bw|colou?r)?[-_]?\d*$", "", key.lower()).rstrip("_-0123456789")
