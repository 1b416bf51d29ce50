"""A request's own folder for files, made for the first of them: most requests have none."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from mico_server.media_store import MediaStore


class WorkFolder:
    """Where a request writes files; what was not moved away is removed at the end of the block."""

    def __init__(self, store: MediaStore) -> None:
        self._store = store
        self._stack = ExitStack()
        self._path: Path | None = None

    def file(self, name: str) -> Path:
        """Where a file of this name is to be written."""
        if self._path is None:
            self._path = self._stack.enter_context(self._store.work_folder())
        return self._path / name

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._path is not None:
            # Disks take milliseconds to remove a folder, for which no stream should wait.
            await asyncio.to_thread(self._stack.close)
