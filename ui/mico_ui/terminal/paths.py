"""Paths as people write, paste and drop them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mico_chat.media.kinds import Kind
from mico_ui.client import ApiError

SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (
        *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".heic", ".heif", ".avif"),
    ),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aiff"),
    "video": (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v"),
    "depth": (".png", ".npy", ".npz", ".tif", ".tiff"),
    "normal": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
}
"""Usual endings of each kind's files; a command that names the kind takes other files too."""

# A terminal puts a dropped path into quotes, or backslashes before its spaces. A quote within a
# word is an apostrophe.
_WORD = re.compile(r"""(?<!\S)(?:'[^']*'(?:\\''[^']*')*|"[^"]*"|(?:\\.|[^\s\\])+)""")

_ROOTED = ("/", "~", "./", "../", "file://")

_MAX_NAME = 200  # characters of a path in a message: it may be a whole text that was pasted


def paths_of(text: str) -> list[Path]:
    """The files that the text behind a command names: one path, perhaps with spaces, or several."""
    for written in (text.strip(), text.strip(" '\"")):  # completion leaves a quote open
        if os.path.isfile(whole := _path(written)):  # unlike the method, for any text
            return [whole]
    words = [_path(_plain(word)) for word in _WORD.findall(text)]
    missing = [path for path in words if not os.path.isfile(path)]
    if not missing:
        return words
    # An unquoted path with spaces that does not exist is one path to its writer.
    wrong = whole if len(missing) == len(words) and "'" not in text else missing[0]
    reason = "is a folder" if os.path.isdir(wrong) else "no such file"
    raise ApiError(f"{str(wrong)[:_MAX_NAME]}: {reason}")


def dropped(text: str) -> tuple[str, list[tuple[Kind, Path]]]:
    """A message without the paths of pictures, sounds and clips in it, and these paths.

    Only rooted paths (``/...``, ``~/...``, ``./...``, ``file://...``) of files that exist count.
    """
    found: list[tuple[Kind, Path]] = []

    def take(match: re.Match[str]) -> str:
        word = match[0]
        for ending in ("", word[-1] if word[-1] in ".,;:?!" else ""):
            name = _plain(word.removesuffix(ending) if ending else word)
            kind = kind_of(name)
            if kind is not None and name.startswith(_ROOTED) and os.path.isfile(_path(name)):
                found.append((kind, _path(name)))
                return ending
        return word

    rest = _WORD.sub(take, text)
    if not found:
        return text, []
    return re.sub(r" +([.,;:?!]?)", lambda m: m[1] or " ", rest).strip(" "), found


def kind_of(name: str) -> Kind | None:
    """The kind that a file's ending says. A file that could be a picture or a map is a picture."""
    suffix = Path(name).suffix.lower()
    kinds: tuple[Kind, ...] = ("image", "audio", "video")
    return next((kind for kind in kinds if suffix in SUFFIXES[kind]), None)


def _plain(word: str) -> str:
    if len(word) > 1 and word[0] == word[-1] == "'":
        return word[1:-1].replace("'\\''", "'")
    if len(word) > 1 and word[0] == word[-1] == '"':
        return word[1:-1]
    return re.sub(r"\\(.)", r"\1", word)


def _path(name: str) -> Path:
    try:
        if name.startswith("file://"):
            return Path(unquote(urlsplit(name).path))
        return Path(name).expanduser()
    except (ValueError, RuntimeError):  # no URL; ~somebody whom this machine does not know
        return Path(name)
