"""The media folder: files named by their content, apart for each tenant, and work in progress.

``folder/<tenant>/<first two digits>/<SHA-256>`` holds the bytes of a medium; nothing of a path
comes from a client. ``folder/tmp`` is on the same file system, so that a finished upload is moved
into place in one step. These functions block; a path is durable once :func:`place` returns.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def blob_id(tenant: str, sha256: str) -> str:
    """The name of a tenant's content: 16 digits of the tenant's hash, ``/``, the content's."""
    owner = hashlib.sha256(tenant.encode()).hexdigest()[:16]
    return f"{owner}/{sha256}"


def blob_path(folder: Path, blob: str) -> Path:
    """Where content is, if it is there."""
    owner, sha256 = blob.split("/")
    return folder / owner / sha256[:2] / sha256


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finish(path: Path, sha256: str | None) -> tuple[str, int]:
    """SHA-256 (read from the file if None) and bytes of a complete file, which is then on disk."""
    if sha256 is None:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    sync(path)
    return sha256, path.stat().st_size


def place(source: Path, folder: Path, blob: str) -> None:
    """Move a finished file to where its content belongs; the same content may be there already."""
    target = blob_path(folder, blob)
    prefix, owner = target.parent, target.parent.parent
    for path in (folder, owner, prefix):
        path.mkdir(mode=0o700, parents=path == folder, exist_ok=True)
    os.replace(source, target)
    # The folders too: another process may have made them a moment ago.
    for path in (prefix, owner, folder):
        sync(path)


def copy(folder: Path, source: str, target: str) -> bool:
    """Give content another name too, by a link where there can be one; whether it was there."""
    path = blob_path(folder, source)
    if not path.is_file():
        return False
    with work_folder(folder) as work:
        new = work / "content"
        try:
            os.link(path, new)
        except OSError:  # a file system without links
            shutil.copyfile(path, new)
            sync(new)
        place(new, folder, target)
    return True


def remove(folder: Path, blob: str) -> None:
    """Remove content, if it is there."""
    blob_path(folder, blob).unlink(missing_ok=True)


def walk(folder: Path) -> Iterator[str]:
    """All content there is."""
    if not folder.is_dir():
        return
    for owner in _entries(folder, 16):
        for prefix in _entries(owner, 2):
            for path in _entries(prefix, 64):
                yield f"{owner.name}/{path.name}"


def _entries(folder: Path, digits: int) -> Iterator[Path]:
    name = re.compile(f"[0-9a-f]{{{digits}}}")
    return (path for path in folder.iterdir() if name.fullmatch(path.name))


@contextmanager
def work_folder(folder: Path) -> Iterator[Path]:
    """A folder for the files of one request; what was not moved away is removed with it."""
    work = folder / "tmp"
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=work) as name:
        yield Path(name)


def sweep_work(folder: Path, age_s: float) -> int:
    """Remove the work folders that nothing was put into for ``age_s`` seconds; how many."""
    removed = 0
    for path in (folder / "tmp").glob("work-*"):
        try:
            if time.time() - path.stat().st_mtime < age_s:
                continue
        except FileNotFoundError:
            continue  # its request has just ended
        shutil.rmtree(path, ignore_errors=True)
        removed += 1
    return removed
