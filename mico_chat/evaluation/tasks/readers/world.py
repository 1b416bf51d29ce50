"""The validation shards of this project's own data engine (``mico-chat world``)."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from mico_chat.errors import DataError
from mico_chat.evaluation.tasks.task import Contents, ItemMedia, Split
from mico_chat.media.file import TarMember
from mico_chat.media.kinds import KINDS

SHARDS: dict[Split, str] = {"test": "validation-*.tar", "train": "train-*.tar"}


def world(folder: Path, split: Split) -> Contents:
    """Every medium of the shards that has captions: pictures, sounds, clips, depth and normals.

    A scene's captions are made of few words, and many scenes have the same: one is right for all.

    Raises:
        DataError: there is no shard, or one that is no tar of the data engine.
    """
    shards = sorted(folder.glob(SHARDS[split]))
    if not shards:
        raise DataError(folder, None, f"no file in this folder is named like {SHARDS[split]}")
    contents = Contents(same_words=True)
    for path in shards:
        try:
            with tarfile.open(path) as tar:
                _read(path, tar, contents)
        except tarfile.TarError as error:
            raise DataError(path, None, "this is not a tar file that can be read") from error
    return contents


def _read(path: Path, tar: tarfile.TarFile, contents: Contents) -> None:
    members: dict[str, TarMember] = {}
    records: list[dict[str, Any]] = []
    for info in tar:
        if info.name.endswith(".json"):
            member = tar.extractfile(info)
            assert member is not None, info.name
            try:
                records.append(json.loads(member.read()))
            except ValueError as error:
                raise DataError(path, None, f"{info.name} is not JSON") from error
        else:
            members[info.name] = TarMember(path, info.offset_data, info.size)
    for record in records:
        for name, captions in record["captions"].items():
            id = f"{record['id']}.{name}"
            contents.caption(id, _media(name, members.get(id)), captions)


def _media(name: str, member: TarMember | None) -> ItemMedia | str:
    kind = name.split(".", 1)[0].rstrip("0123456789")
    if member is None:
        return "the shard lacks this file"
    for known in KINDS:
        if known == kind:
            return ItemMedia(known, member)
    return f"its kind is unknown; the kinds are {', '.join(KINDS)}"
