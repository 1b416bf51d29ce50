"""The media folder: files named by their content, separate for each tenant, and work in progress.

``folder/<tenant>/<first two digits>/<SHA-256>`` holds the bytes of a medium; no part of a path
comes from a client. ``folder/tmp`` is on the same file system, so that a finished upload is moved
in one step. These functions block; a file is durable once :func:`move_in` returns.
"""

import asyncio
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Self

from mico_chat.system import sync

_BLOB = re.compile("([0-9a-f]{16}/)[0-9a-f]{2}/([0-9a-f]{64})")


def blob_id(tenant: str, sha256: str) -> str:
    """The name of a tenant's content: 16 digits of the tenant's hash, ``/``, the content's hash."""
    owner = hashlib.sha256(tenant.encode()).hexdigest()[:16]
    return f"{owner}/{sha256}"


def blob_path(folder: Path, blob: str) -> Path:
    owner, sha256 = blob.split("/")
    return folder / owner / sha256[:2] / sha256


def finish(path: Path) -> tuple[str, int]:
    """SHA-256 and bytes of a complete file, which is synced to disk."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    sync(path)
    return sha256, path.stat().st_size


def move_in(source: Path, folder: Path, blob: str) -> None:
    """Move a finished file to the path of its content; the same content may be there already."""
    target = blob_path(folder, blob)
    prefix, owner = target.parent, target.parent.parent
    for path in (folder, owner, prefix):
        path.mkdir(mode=0o700, parents=path == folder, exist_ok=True)
    os.replace(source, target)
    # The folders too: another process may have made them a moment ago.
    for path in (prefix, owner, folder):
        sync(path)


def copy(folder: Path, source: str, target: str) -> bool:
    """Give content a second name, by a link if possible; False if there is no such content."""
    path = blob_path(folder, source)
    if not path.is_file():
        return False
    with closing(WorkFolder(folder)) as work:
        new = work.file("content")
        try:
            os.link(path, new)
        except OSError:  # a file system without links
            shutil.copyfile(path, new)
            sync(new)
        move_in(new, folder, target)
    return True


def remove(folder: Path, blob: str) -> None:
    blob_path(folder, blob).unlink(missing_ok=True)


def walk(folder: Path) -> Iterator[str]:
    """The names of all contents in the folder."""
    for path in folder.glob("[0-9a-f]*/[0-9a-f]*/*"):  # not in tmp, whose folders come and go
        if found := _BLOB.fullmatch(path.relative_to(folder).as_posix()):
            yield "".join(found.groups())


class WorkFolder:
    """A temporary folder for the files of one request, on the same file system as the store.

    It is made for the first file: most requests have none. Files that were not moved away are
    removed at the end of the block.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def file(self, name: str) -> Path:
        if self._temporary is None:
            work = self._folder / "tmp"
            work.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._temporary = tempfile.TemporaryDirectory(prefix="work-", dir=work)
        return Path(self._temporary.name) / name

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._temporary is not None:
            try:
                # Disks take milliseconds to remove a folder; no stream should wait for that.
                await asyncio.to_thread(self.close)
            finally:
                self.close()  # a request cancelled here may have kept the thread from starting


def sweep_work(folder: Path, age_s: float) -> None:
    """Remove work folders that got no file for ``age_s`` seconds."""
    for path in (folder / "tmp").glob("work-*"):
        with suppress(FileNotFoundError):  # its request has just ended
            if time.time() - path.stat().st_mtime >= age_s:
                shutil.rmtree(path, ignore_errors=True)
