"""Samples in WebDataset shards: this project's own record, and the files of img2dataset and others.

A shard is a tar. The members of a sample stand together and share a key, their name up to the first
dot. Its index (:mod:`.index`) says where a sample begins and ends. So one read brings a sample, and
draws may come in any order.

* Our record: ``KEY.json`` with ``files``, the names of the media (``KEY.image.jpg``), and their
  texts (:class:`Record`; ``docs/data.md`` has each field).
* img2dataset and video2dataset: ``KEY.jpg`` or ``KEY.mp4``, ``KEY.wav``, by their endings, with a
  caption in ``KEY.txt`` or in ``caption`` of ``KEY.json``. Either file may be missing.

A shard may hold both. In a folder, the members of a sample are read when they are needed; at an
address, all of a sample's members come with one request.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from mico_chat.errors import DataError
from mico_chat.media import MediaFile
from mico_chat.media.addresses import Location, matching
from mico_chat.media.file import TarMember
from mico_chat.media.kinds import MODALITIES, Kind
from mico_training.data.sources.chosen import Kept
from mico_training.data.sources.index import Found, Kinds, Profile, open_index
from mico_training.data.sources.sample import Need, TrainingSample, regions_of
from mico_training.data.sources.tar import ENDINGS, Members, found_in, members_of, wrong
from mico_training.data.sources.written import FUSED, Turn, kind_of

FORM = "shard 2"


class Said(BaseModel):
    """What one annotator of ``mico-chat data build`` said; a record keeps more of it."""

    annotator: str = ""
    text: str = ""


class Record(BaseModel):
    """Our ``KEY.json``; the keys of ``captions`` and ``concepts`` are names of ``files``."""

    files: list[str]
    captions: dict[str, tuple[str, ...]] = {}
    concepts: dict[str, str] = {}
    truth: dict[str, Any] = {}
    turns: tuple[Turn, ...] = ()
    subtitle: str = ""
    annotations: tuple[Said, ...] = ()


class ShardSource:
    """The samples of the shards in a path, address or pattern that have a stage's texts.

    ``skills``: only questions of these; ``kinds``: only media of these, and the texts about them.
    ``ends``: the number of samples to the end of each shard. ``bad``: the bad ones of all shards.
    """

    def __init__(
        self,
        pattern: str,
        need: Need,
        skills: tuple[str, ...] = (),
        kinds: Kinds = frozenset(MODALITIES),
    ) -> None:
        shards = matching(pattern)
        if not shards:
            raise DataError(pattern, None, "this shard does not exist")
        self.skills = frozenset(skills)
        self.kinds = kinds
        self.index = open_index(shards, scan, FORM)
        self.kept = Kept(self.index.offering(lambda p: p.offers(need, self.skills, kinds)))
        self.ends = np.array([self.kept.below(int(end)) for end in self.index.ends])
        self.bad = self.index.bad

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> TrainingSample:
        return self.read(self.kept[index]).of_kinds(self.kinds)

    def read(self, number: int) -> TrainingSample:
        """A sample by its number in all shards; a DataError says what is wrong with it."""
        shard, start, size = self.index.place(number)
        try:
            key, members = members_of(shard, start, size)
        except (OSError, ValueError) as error:
            reason = f"the sample at byte {start} cannot be read: {error}"
            raise DataError(shard, None, reason) from error
        return sample_of(shard, key, members, self.skills)


def scan(shard: Location) -> Iterator[Found]:
    for found in found_in(shard):
        if isinstance(found, DataError):
            yield found
            continue
        key, start, size, members = found
        try:
            yield start, size, Profile.of(sample_of(shard, key, members))
        except DataError as error:
            yield error


def sample_of(
    shard: Location, key: str, members: Members, skills: frozenset[str] = frozenset()
) -> TrainingSample:
    """A sample from its members; a DataError names the shard, the key and what is wrong."""
    about = _json(shard, key, members["json"]) if "json" in members else {}
    if "files" not in about:
        return _of_files(shard, key, members, about)
    try:
        record = Record.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise wrong(shard, key, f"has a bad {key}.json: {where}: {first['msg']}") from error
    media = {}
    for name in record.files:
        if name not in members:
            raise wrong(shard, key, f"names {name}, which the shard lacks")
        kind = kind_of(name)
        if kind not in MODALITIES:
            reason = f"has {name} of an unknown kind; the kinds are {', '.join(MODALITIES)}"
            raise wrong(shard, key, reason)
        media[name] = _medium(kind, shard, key, name, members[name])
    for name, texts in record.captions.items():
        if not all(map(str.strip, texts)):
            raise wrong(shard, key, f"has an empty caption of {name}")
    for name in (name for turn in record.turns for name in turn.media):
        if name not in media:
            raise wrong(shard, key, f"has a question about {name}, which it lacks")
    return TrainingSample(
        id=key,
        media=media,
        captions={k: v for k, v in record.captions.items() if k in media},
        concepts={k: v for k, v in record.concepts.items() if k in media},
        regions={k: regions_of(m.kind, record.truth) for k, m in media.items()},
        turns=tuple(turn for turn in record.turns if not skills or turn.skill in skills),
        subtitle=record.subtitle,
        fused=frozenset(said.text for said in record.annotations if said.annotator == FUSED),
    )


def _of_files(
    shard: Location, key: str, members: Members, about: Mapping[str, Any]
) -> TrainingSample:
    """A sample without a record of ours: media by their endings, and one caption."""
    caption = about.get("caption")
    if caption is not None and not isinstance(caption, str):
        raise wrong(shard, key, f"has a caption that is {type(caption).__name__}, not a string")
    if "txt" in members:
        try:
            caption = members["txt"].read().decode() or caption
        except UnicodeDecodeError as error:
            raise wrong(shard, key, f"has a {key}.txt that is not UTF-8") from error
    media = {
        name: _medium(kind, shard, key, name, members[name])
        for kind, endings in ENDINGS.items()
        for name in sorted(members)
        if name.rpartition(".")[2].lower() in endings
    }
    texts = (caption.strip(),) if caption and caption.strip() else ()
    return TrainingSample(key, media, {name: texts for name in [*media][:1] if texts})


def _medium(kind: Kind, shard: Location, key: str, name: str, member: TarMember) -> MediaFile:
    return MediaFile(kind, member, f"{str(shard).rpartition('/')[2]}/{key}.{name}")


def _json(shard: Location, key: str, member: TarMember) -> dict[str, Any]:
    try:
        record = json.loads(member.read())
    except (ValueError, RecursionError) as error:
        raise wrong(shard, key, f"has a {key}.json that is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise wrong(shard, key, f"has a {key}.json that is a {type(record).__name__}, no object")
    return record
