"""One omni-modal training sample, and WebDataset shards of samples.

Media are already encoded, so that a shard is a plain tar that any tool can open. A sample ``KEY``
is the member ``KEY.json`` followed by its media, ``KEY.image.jpg`` and so on. Members carry no
time, owner or mode, so equal samples give equal bytes.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from mico_chat.errors import DataError

Split = Literal["train", "validation"]
FUSED = "fuse"
"""This annotator joins what others said, so its captions tell of several media."""
NEARER_BY = 1.12  # a thing counts as nearer than another that is this many times as far away


@dataclass(frozen=True)
class Turn:
    """A question about some of the sample's media and its true answer.

    ``media`` names members of ``Sample.files`` in the order in which they are shown. ``skill``
    groups questions for evaluation. ``choices`` are the possible answers of a closed question. A
    free answer is right if it contains one of the words ``accept``.
    """

    question: str
    answer: str
    skill: str
    media: tuple[str, ...]
    choices: tuple[str, ...] = ()
    accept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Media of one scene with captions and questions.

    ``files`` maps a member name to encoded bytes. The letters before the dot are the media kind:
    "image" of "image2.jpg". ``captions`` maps a member name to sentences that describe it,
    ``concepts`` to the plain name of its main thing, if it has a single one.
    """

    id: str
    split: Split
    files: dict[str, bytes]
    captions: dict[str, tuple[str, ...]]
    turns: tuple[Turn, ...]
    concepts: dict[str, str] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)

    def record(self) -> str:
        """The sample's JSON member: all but the media bytes."""
        data = asdict(self)
        data["files"] = list(self.files)
        return json.dumps(data, ensure_ascii=False)


_SAMPLE = TypeAdapter(Sample)


def kind_of(member: str) -> str:
    """The media kind of a member name: ``"image2.jpg"`` -> ``"image"``."""
    return member.split(".", 1)[0].rstrip("0123456789")


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write ``samples`` to the tar ``path``; returns how many there were."""
    count = 0
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            add_sample(tar, sample.id, sample.record(), sample.files)
            count += 1
    partial.replace(path)
    return count


def add_sample(tar: tarfile.TarFile, key: str, record: str, files: Mapping[str, bytes]) -> None:
    for member, data in {"json": record.encode(), **files}.items():
        info = tarfile.TarInfo(f"{key}.{member}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def read_shard(path: str | Path) -> Iterator[Sample]:
    """The samples of a shard, in order. If a sample lacks a medium, a DataError names it."""
    with tarfile.open(path) as tar:
        for key, members in groupby(tar, lambda info: info.name.partition(".")[0]):
            files: dict[str, bytes] = {}
            for info in members:
                if opened := tar.extractfile(info):
                    files[info.name.partition(".")[2]] = opened.read()
            if "json" not in files:
                raise DataError(path, None, f"sample {key} lacks {key}.json")
            record: dict[str, Any] = json.loads(files.pop("json"))
            if missing := sorted(set(record["files"]) - set(files)):
                raise DataError(path, None, f"sample {key} lacks {', '.join(missing)}")
            yield _SAMPLE.validate_python(record | {"files": files})
