"""Named cut-outs found in the packages: stamps, emoji, clip art and furniture icons.

Every reader turns file names, captions or metadata into a short plain noun and skips what has
none; the curated words are in ``catalogue_words.yaml``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mico_training.world.nouns import COLOUR_WORDS
from mico_training.world.sources import source

_WORDS_FILE = Path(__file__).with_name("catalogue_words.yaml")


@dataclass(frozen=True)
class Words:
    """The curated words; the file says what each group is for."""

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
    kept: frozenset[str]  # phrases that are names as they stand, whatever their last word


@lru_cache(maxsize=1)
def words() -> Words:
    """``catalogue_words.yaml``, read once."""
    rows: dict[str, Any] = yaml.safe_load(_WORDS_FILE.read_text(encoding="utf-8"))
    tuples = ("stamp_skip", "furniture_skip_parts", "clip_art_folders", "clip_art_skip")
    sets = ("heads", "drop", "emoji_groups", "emoji_skip", "furniture_skip")
    rows |= {key: tuple(rows[key]) for key in tuples}
    rows |= {key: frozenset(rows[key]) for key in sets}
    for key in ("synonyms", "alike"):
        rows[key] = {name: tuple(others) for name, others in rows[key].items()}
    kept = frozenset((*rows["rename"].values(), *rows["clip_art_words"].values()))
    return Words(**rows, kept=kept)


def words_digest() -> str:
    """Eight hex digits of the word file: changed words make old caches stale."""
    return hashlib.sha1(_WORDS_FILE.read_bytes()).hexdigest()[:8]


@dataclass(frozen=True)
class Entry:
    """A picture file (``member`` inside a zip, or the file itself) and what it shows."""

    path: str
    member: str
    identity: str
    name: str
    names: tuple[str, ...]
    category: str
    photo: bool

    def open(self) -> Image.Image:
        """The picture, as stored. Opening reads the header only."""
        if not self.member:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(self.path)
        with zipfile.ZipFile(self.path) as archive:
            return Image.open(io.BytesIO(archive.read(self.member)))


def entries() -> Iterator[Entry]:
    """All entries of all packages, in a fixed order."""
    for reader in (stamps, emoji, clip_art, furniture):
        for entry in reader():
            if entry.name not in words().drop:
                yield entry


def plain_name(phrase: str) -> tuple[str, tuple[str, ...]]:
    """A short noun and further right names: "a monarch butterfly" -> "butterfly", (...)."""
    full = re.sub(r"\s+", " ", phrase.lower().strip())
    full = words().rename.get(full, full)
    bare = " ".join([*(w for w in full.split()[:-1] if w not in COLOUR_WORDS), full.split()[-1]])
    bare = words().rename.get(bare, bare)
    head = bare.split()[-1]
    keep = bare in words().synonyms or bare in words().kept
    name = head if head in words().heads and not keep else bare
    others = [*words().synonyms.get(name, ())]
    if bare != name:
        others.append(bare)
    return name, tuple(dict.fromkeys(o for o in others if o != name))


_OPENING = re.compile(
    r"^(?:an?|the|some|two|our|another|big|very)\s+"
    r"|^(?:pair|couple|tube|cluster|bunch|head|string|glass|quarter|model|plant|baby) of\s+"
    r"|^(?:huge|small|large|little|tiny|old|modern|old-fashioned|happy|singing|sleeping|sitting)\s+"
    r"|^(?:colorful|toy|ripe,?|male|female|folded|open|closed|lit|wrapped|red-nosed|clear)\s+"
    r"|^(?:floppy-eared|big eared|wooden|silver|digital|real|freshwater|spiny)\s+"
)
_END = re.compile(
    r"[.!?,(\u2014;:]| (?:is|are|that|with|for|worn|from|at|lets|has|in|used|covered|inside|hatched"
    r"|resembles|called|playing) "
)
_APOSTROPHE = "\u2019"


def caption_name(caption: str) -> str:
    """The noun phrase of a stamp's one-sentence caption."""
    text = caption.strip().lower().replace(f"{_APOSTROPHE}s", "'s")
    text = re.sub("[\u201c\u2018\"'][^\u201d\u2019\"']+[\u201d\u2019\"']\\s*", "", text)
    text = _END.split(text)[0]
    previous = None
    while previous != text:
        previous, text = text, _OPENING.sub("", text.strip())
    return re.sub(r" (fruit|bulb|computer)$", "", text.strip())


def stamps() -> Iterator[Entry]:
    """Tux Paint stamps; those without a vector original are photographs."""
    root = source("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    for png in sorted(root.rglob("*.png")):
        key = png.relative_to(root).with_suffix("").as_posix()
        text = png.with_suffix(".txt")
        if key.startswith(words().stamp_skip) or not text.exists() or png.stem.endswith("_mirror"):
            continue
        caption = text.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        phrase = words().stamp_names.get(key) or caption_name(caption)
        if not phrase or len(phrase.split()) > 3:
            continue
        name, names = plain_name(phrase)
        photo = not png.with_suffix(".svg").exists() and "cartoon" not in key
        yield Entry(str(png), "", f"stamp/{_stem(key)}", name, names, key.split("/")[0], photo)


def emoji() -> Iterator[Entry]:
    """Fluent 3D emoji of animals, food, objects, vehicles."""
    table = source("unicode-emoji-json") / "package/data-by-emoji.json"
    assets = source("lobehub-fluent-emoji-3d") / "package/assets"
    for character, row in json.loads(table.read_text(encoding="utf-8")).items():
        phrase = row["name"].lower().replace(_APOSTROPHE, "'")
        if row["group"] not in words().emoji_groups or phrase in words().emoji_skip:
            continue
        if re.search(r"thirty|o'clock|medal|ticket|japanese", phrase) and phrase != "one o'clock":
            continue
        codes = "-".join(f"{ord(c):x}" for c in character)
        files = [assets / f"{c}.webp" for c in (codes, codes.removesuffix("-fe0f"))]
        path = next((f for f in files if f.exists()), None)
        if path is None:
            continue
        name, names = plain_name("clock" if "o'clock" in phrase else phrase)
        yield Entry(str(path), "", f"emoji/{row['slug']}", name, names, row["group"], False)


def clip_art() -> Iterator[Entry]:
    """Open Clip Art drawings whose file name has a known noun, or whose folder is one kind."""
    root = source("openclipart-png") / "usr/share/openclipart/png"
    seen: set[str] = set()
    for png in sorted(root.rglob("*.png")):
        key = png.relative_to(root).with_suffix("").as_posix().lower()
        folder, stem = key.rsplit("/", 1) if "/" in key else ("", key)
        if not folder.startswith(words().clip_art_folders) or any(
            s in key for s in words().clip_art_skip
        ):
            continue
        phrase = _clip_art_word(stem) or words().clip_art_default.get(folder)
        if phrase is None or stem in seen:
            continue
        if phrase == "computer mouse" and not folder.startswith("computer"):
            continue
        seen.add(stem)
        name, names = plain_name(phrase)
        yield Entry(str(png), "", f"clip/{_stem(stem)}", name, names, folder.split("/")[0], False)


def _clip_art_word(stem: str) -> str | None:
    """The noun in "dodge_neon_pink_ganson": the first two-word or one-word entry that fits."""
    parts = [p for p in re.split(r"[_\s.]+", stem) if p]
    for size in (2, 1):
        for start in range(min(4, len(parts) - size + 1)):
            found = words().clip_art_words.get(" ".join(parts[start : start + size]))
            if found:
                return found
    return None


def furniture() -> Iterator[Entry]:
    """Sweet Home 3D icons: furniture, appliances, vehicles, plants."""
    root = source("sweethome3d-furniture") / "usr/share/sweethome3d/furniture"
    for archive in sorted(root.glob("*.sh3f")):
        with zipfile.ZipFile(archive) as opened:
            text = opened.read("PluginFurnitureCatalog.properties").decode("latin-1")
        rows = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        for key, phrase in rows.items():
            member = rows.get(key.replace("name#", "icon#"), "").strip().lstrip("/")
            phrase = phrase.strip().lower()
            if not key.startswith("name#") or not member or "\\u" in phrase:
                continue
            if phrase in words().furniture_skip or any(
                part in phrase for part in words().furniture_skip_parts
            ):
                continue
            name, names = plain_name(phrase)
            identity = f"furniture/{archive.stem}/{_stem(member.rsplit('.', 1)[0])}"
            yield Entry(str(archive), member, identity, name, names, "furniture", False)


def _stem(key: str) -> str:
    """``key`` without variant numbers: variants of one original share the split."""
    return re.sub(r"[-_ ]?(bw|colou?r)?[-_]?\d*$", "", key.lower()).rstrip("_-0123456789")
