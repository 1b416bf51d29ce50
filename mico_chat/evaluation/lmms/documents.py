"""Documents of lmms-eval's data sets, their sounds and clips as files and not as decoders.

``datasets`` decodes a sound as the document is read, with torchcodec, into an object that
lmms-eval's chat interface refuses. The media layer wants the file, so that none of it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any


class Documents:
    """Reads documents of ``task_dict``, which lmms-eval fills after its model is made."""

    def __init__(self, task_dict: Mapping[str, Any]) -> None:
        self._task_dict = task_dict
        self._undecoded: dict[tuple[str, str], tuple[Any, Any, dict[str, str]]] = {}

    def document(self, task: str, split: str, number: int) -> Any:
        """Document ``number`` of a task's split, a sound as ``{"type": "audio", "url": file}``."""
        whole = self._task_dict[task][split]
        known = self._undecoded.get((task, split))
        if known is None or known[0] is not whole:
            known = self._undecoded[task, split] = (whole, *_undecoded(whole))
        _, files, kinds = known
        document = files[number]
        for column, kind in kinds.items():
            if (file := document[column]) is not None:
                url = file["path"] if file["bytes"] is None else file["bytes"]
                document[column] = {**file, "type": kind, "url": url}
        return document


def _undecoded(split: Any) -> tuple[Any, dict[str, str]]:
    """A split that gives files, and the kinds of the columns that do."""
    from datasets import Audio, Dataset, Video

    kinds: dict[str, str] = {}
    if not isinstance(split, Dataset):  # a task may have made a list of it
        return split, kinds
    for column, feature in split.features.items():
        if isinstance(feature, Audio | Video):
            kinds[column] = "audio" if isinstance(feature, Audio) else "video"
            split = split.cast_column(column, replace(feature, decode=False))
    return split, kinds
