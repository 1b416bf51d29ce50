"""The packages that the data engine's raw material comes from.

``source("tuxpaint-stamps-default")`` is ``$MICO_CACHE_DIR/sources/<name>`` with the unpacked
package. The first call fetches the package with its package manager.
"""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mico_chat.errors import MicoError
from mico_chat.settings import cache_dir
from mico_training.data.sources.written import Split
from mico_training.data.table import Table

logger = logging.getLogger(__name__)

_FETCH_SECONDS = 1800
# The command of each package manager that downloads a package into the current folder.
_DOWNLOAD = {
    "apt": ("apt-get", "download"),
    "npm": ("npm", "pack"),
    "pip": ("pip", "download", "--no-deps"),
}


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A scratch file that is renamed to ``path`` at the end: no process reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}{path.suffix}")
    yield scratch
    scratch.replace(path)


class SourceError(MicoError):
    status = 501


class Packages(Table):
    apt: tuple[str, ...]
    npm: tuple[str, ...]
    pip: tuple[str, ...]


@cache
def packages() -> dict[str, tuple[str, str]]:
    table = Packages.read(Path(__file__).with_name("packages.yaml"))
    return {
        re.sub(r"(==|(?<=.)@).*", "", package).lstrip("@").replace("/", "-"): (manager, package)
        for manager, names in table
        for package in names
    }


def split_of(identity: str) -> Split:
    """The split of everything made from ``identity``; one identity in ten is held out."""
    digest = int(hashlib.sha1(identity.encode()).hexdigest(), 16)
    return "validation" if digest % 10 == 0 else "train"


def source(name: str) -> Path:
    """The folder of the unpacked package ``name``, which is fetched when it is missing."""
    folder = cache_dir() / "sources" / name
    if folder.is_dir():
        return folder
    if name not in packages():
        known = ", ".join(sorted(packages()))
        raise SourceError(f"unknown source {name!r}; the sources are {known}")
    manager, package = packages()[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s with %s", package, manager)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        downloads, unpacked = Path(scratch) / "downloads", Path(scratch) / "unpacked"
        downloads.mkdir()
        _run([*_DOWNLOAD[manager], package], downloads)
        (archive,) = downloads.iterdir()
        if manager == "apt":
            _run(["dpkg", "-x", archive.name, str(unpacked)], downloads)
        elif archive.suffix in (".whl", ".zip"):
            shutil.unpack_archive(archive, unpacked, "zip")
        else:
            shutil.unpack_archive(archive, unpacked, filter="data")
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster: its folder is the same
            if not folder.is_dir():
                raise
    return folder


def _run(command: list[str], cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise SourceError(f"{command[0]} is not installed, but the download of data needs it")
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=_FETCH_SECONDS, check=False
    )
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise SourceError(f"{' '.join(command)} failed: {reason[0]}")
