"""Training data in their files: WebDataset shards, and a user's own JSON Lines or LLaVA-style JSON.

A shard is a tar, whose members have known offsets. The headers are read once, and the offsets are
kept in a small ``.idx`` file beside the shard (in memory if the folder is read-only). Each member
of a sample is then one seek away. So a seeded permutation can visit the samples, and a resumed run
goes on at the exact sample, which streaming cannot do.

JSON Lines, one sample a line::

    {"image": "cat.jpg", "caption": "A cat on a sofa."}
    {"image": "cat.jpg", "audio": ["purr.ogg"], "messages": [
        {"role": "user", "content": "<image>\\n<audio>\\nDo these belong together?"},
        {"role": "assistant", "content": "Yes."}]}
    {"video": "cat.mp4", "question": "what is on the sofa?", "answers": ["cat", "a cat"]}
    {"video": "cat.mp4", "caption": "A cat is fed.", "subtitle": "Come here, your food is ready!"}

LLaVA: a JSON array of ``{"id", "image" | "video" | ..., "conversations": [{"from": "human",
"value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}``. Markers stand for the
media of their kind in the order given; media without a marker come before the first question. The
whole file is checked when it is opened, so that a wrong line 90,000 cannot end a run after a day.
Lines are read again when they are drawn, so that a large manifest takes 16 bytes for each line.
"""

import glob
import json
import logging
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mico_chat.errors import DataError, RequestError
from mico_chat.media import KINDS, MediaFile
from mico_chat.media.file import TarMember
from mico_chat.messages import Message, from_llava
from mico_training.data.sample import Need, TrainingSample, regions_of
from mico_training.world.sample import Turn, kind_of

logger = logging.getLogger(__name__)

INDEX_FORMAT = 1
_TURN = TypeAdapter(Turn)


@dataclass(frozen=True)
class ShardEntry:
    """The members of a sample (name -> offset, size), and the texts in its record."""

    key: str
    members: Mapping[str, Sequence[int]]
    skills: Sequence[str]
    captioned: bool


def fingerprint(path: Path) -> str:
    """A name for one state of a file: its size and time of modification."""
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def index_shard(path: Path) -> list[ShardEntry]:
    """The samples of a shard, from its ``.idx`` if that is up to date, else from the tar."""
    beside = path.with_name(path.name + ".idx")
    state = fingerprint(path)
    if beside.is_file():
        cached = json.loads(beside.read_text(encoding="utf-8"))
        if cached.get("format") == INDEX_FORMAT and cached.get("fingerprint") == state:
            return [ShardEntry(*sample) for sample in cached["samples"]]
    entries = _walk(path)
    samples = [[e.key, e.members, e.skills, e.captioned] for e in entries]
    content = {"format": INDEX_FORMAT, "fingerprint": state, "samples": samples}
    partial = beside.with_name(f"{beside.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(beside)
    except OSError as error:
        logger.info(
            "%s: its index could not be written, so it is kept in memory (%s)", path, error.strerror
        )
    return entries


def _walk(path: Path) -> list[ShardEntry]:
    members: dict[str, dict[str, Sequence[int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                # WebDataset's rule: the key ends at the first dot of the base name.
                folder, slash, base = info.name.rpartition("/")
                stem, dot, name = base.partition(".")
                if info.isfile() and dot:
                    place = [info.offset_data, info.size]
                    members.setdefault(folder + slash + stem, {})[name] = place
    except (tarfile.TarError, EOFError) as error:
        raise DataError(path, None, "this is not a tar file that can be read") from error
    entries = []
    for key, files in members.items():
        record = _record(path, key, files)
        skills = sorted({turn.get("skill", "") for turn in record.get("turns", ())})
        entries.append(ShardEntry(key, files, skills, any(record.get("captions", {}).values())))
    return entries


def _record(path: Path, key: str, members: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    if "json" not in members:
        raise _wrong(path, key, f"lacks {key}.json; it has {', '.join(sorted(members))}")
    try:
        record = json.loads(TarMember(path, *members["json"]).read())
    except ValueError as error:
        raise _wrong(path, key, f"has a {key}.json that is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise _wrong(path, key, f"has a {key}.json that is a {type(record).__name__}, no object")
    return record


def _wrong(path: Path, key: str, reason: str) -> DataError:
    return DataError(path, None, f"{key}: the sample {reason}")


class ShardSource:
    """The samples of the shards in a path or glob pattern that have a stage's texts, by index."""

    def __init__(self, pattern: str, need: Need, skills: tuple[str, ...] = ()) -> None:
        self.shards = sorted(map(Path, glob.glob(pattern)))
        if not self.shards:
            raise DataError(pattern, None, "this shard does not exist")
        self.skills = frozenset(skills)
        self.entries = [
            (number, entry)
            for number, path in enumerate(self.shards)
            for entry in index_shard(path)
            if (not skills or self.skills & set(entry.skills))
            and (entry.captioned if need == "caption" else entry.skills)
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> TrainingSample:
        number, entry = self.entries[index]
        path = self.shards[number]
        record = _record(path, entry.key, entry.members)
        media = {}
        for name in record.get("files", ()):
            if name not in entry.members:
                raise _wrong(path, entry.key, f"names {name}, which the shard lacks")
            kind = kind_of(name)
            if kind not in KINDS:
                reason = f"has {name} of an unknown kind; the kinds are {', '.join(KINDS)}"
                raise _wrong(path, entry.key, reason)
            source = TarMember(path, *entry.members[name])
            media[name] = MediaFile(kind, source, f"{path.name}/{entry.key}.{name}")
        try:
            turns = tuple(
                _TURN.validate_python(turn)
                for turn in record.get("turns", ())
                if not self.skills or turn.get("skill") in self.skills
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _wrong(path, entry.key, f"has a bad turn: {where}: {first['msg']}") from error
        for name in (name for turn in turns for name in turn.media):
            if name not in media:
                raise _wrong(path, entry.key, f"has a question about {name}, which it lacks")
        return TrainingSample(
            id=entry.key,
            media=media,
            captions={k: tuple(v) for k, v in record.get("captions", {}).items() if k in media},
            concepts={k: v for k, v in record.get("concepts", {}).items() if k in media},
            regions={k: regions_of(m.kind, record.get("truth", {})) for k, m in media.items()},
            turns=turns,
            subtitle=record.get("subtitle", ""),
        )


class RecordError(ValueError):
    """A record is wrong; its file and line are not known yet."""


class ManifestSource:
    """A JSON Lines file's samples that have a stage's texts; a DataError names a wrong line."""

    def __init__(self, path: Path, need: Need, root: Path | None = None) -> None:
        self.path = path
        self.root = path.parent if root is None else root
        found: list[tuple[int, int]] = []
        offset = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip() and offers(self._parse(line, number), need):
                        found.append((number, offset))
                    offset += len(line)
        except OSError as error:
            raise DataError(path, None, error.strerror or str(error)) from error
        self.lines = np.array(found, dtype=np.int64).reshape(-1, 2)  # number (from 1), offset

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> TrainingSample:
        number, offset = self.lines[index].tolist()
        with self.path.open("rb") as file:
            file.seek(offset)
            return self._parse(file.readline(), number)

    def _parse(self, line: bytes, number: int) -> TrainingSample:
        try:
            return sample_of(json.loads(line), self.root, f"{self.path.name}:{number}")
        except RecordError as error:
            raise DataError(self.path, number, str(error)) from error
        except ValueError as error:
            raise DataError(self.path, number, f"not JSON: {error}") from error


def read_llava(path: Path, need: Need, root: Path | None = None) -> list[TrainingSample]:
    """A LLaVA-style array's samples that have a stage's texts; a DataError names a wrong item."""
    root = path.parent if root is None else root
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(path, None, error.strerror or str(error)) from error
    except ValueError as error:
        raise DataError(path, None, f"not JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(path, None, f"a LLaVA file is an array, not {type(records).__name__}")
    samples = []
    for number, record in enumerate(records):
        try:
            samples.append(sample_of(record, root, f"{path.name}#{number}"))
        except RecordError as error:
            raise DataError(path, None, f"item {number}: {error}") from error
    return [sample for sample in samples if offers(sample, need)]


def offers(sample: TrainingSample, need: Need) -> bool:
    """Whether a sample has the captions, questions or conversation that a stage needs."""
    if need == "caption":
        return bool(sample.captions)
    return bool(sample.turns or (need == "conversation" and sample.conversation))


def sample_of(record: Any, root: Path, name: str) -> TrainingSample:
    """The sample that a record describes; a RecordError says what is wrong."""
    if not isinstance(record, dict):
        raise RecordError(f"a sample is an object, not {type(record).__name__}")
    media = _media(record, root)
    captions = _strings(record, "caption", record.get("captions", ()))
    concept = record.get("concept")
    if concept is not None and not isinstance(concept, str):
        raise RecordError(f"'concept' is {type(concept).__name__}, not a string")
    subtitle = record.get("subtitle", "")
    if not isinstance(subtitle, str):
        raise RecordError(f"'subtitle' is {type(subtitle).__name__}, not a string")
    if "messages" in record and "conversations" in record:
        raise RecordError("has both 'messages' and 'conversations'; give one")
    questions = _strings(record, "question", ())
    answers = _strings(record, "answer", record.get("answers", ()))
    for what, texts in (("caption", captions), ("question", questions)):
        if texts and not media:
            raise RecordError(f"has a {what} but no medium ({', '.join(KINDS)})")
    turns = record.get("messages", record.get("conversations", ()))
    conversation = _conversation(turns, media, root) if turns else ()
    if bool(questions) != bool(answers) or len(questions) > 1:
        found = f"has {len(questions)} 'question' and {len(answers)} 'answers'"
        raise RecordError(f"{found}; a record asks one question and has at least one answer")
    if not captions and not conversation and not questions:
        raise RecordError(
            "lacks all of 'caption', 'messages', 'conversations' and 'question'; give one of them"
        )
    first = next(iter(media), "")
    return TrainingSample(
        id=str(record.get("id", name)),
        media=media,
        captions={first: captions} if captions else {},
        concepts={first: concept} if concept and media else {},
        turns=tuple(Turn(questions[0], answer, "", tuple(media)) for answer in answers),
        conversation=conversation,
        subtitle=subtitle.strip(),
    )


def _strings(record: dict[str, Any], key: str, otherwise: Any) -> tuple[str, ...]:
    value = record.get(key, otherwise)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise RecordError(f"{key!r} is neither a string nor a list of strings")
    if any(not v.strip() for v in values):
        raise RecordError(f"{key!r} is empty")
    return tuple(values)


def _media(record: dict[str, Any], root: Path) -> dict[str, MediaFile]:
    media = {}
    for kind in KINDS:
        for count, text in enumerate(_strings(record, kind, ()), start=1):
            path = root / text
            if not path.is_file():
                raise RecordError(f"{kind} {text}: no such file in {root}")
            key = kind if count == 1 else f"{kind}{count}"
            media[key] = MediaFile(kind=kind, source=path, name=text)
    return media


def _conversation(turns: Any, media: dict[str, MediaFile], root: Path) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise RecordError(f"the conversation is {type(turns).__name__}, not a list")
    plain = [_plain(number, turn) for number, turn in enumerate(turns, start=1)]
    words = "".join(turn["value"] for turn in plain)
    unplaced = [f"<{m.kind}>\n" for m in media.values() if f"<{m.kind}>" not in words]
    for turn in plain:
        if turn["from"] in ("user", "human"):
            turn["value"] = "".join(unplaced) + turn["value"]
            break
    paths: dict[str, Any] = {
        kind: [m.name for m in media.values() if m.kind == kind] for kind in KINDS
    }
    try:
        messages = tuple(from_llava({**paths, "conversations": plain}, root=root))
    except RequestError as error:
        raise RecordError(str(error)) from error
    speakers = [message.role for message in messages if message.role != "system"]
    if speakers != ["user", "assistant"] * (len(speakers) // 2) or not speakers:
        raise RecordError(
            "the turns must be user, assistant, and so on, and end with an answer; they "
            f"are {', '.join(speakers) or 'none'}"
        )
    return messages


def _plain(number: int, turn: Any) -> dict[str, str]:
    """A turn in LLaVA's form, where markers stand for media."""
    if not isinstance(turn, dict):
        raise RecordError(f"turn {number} is {type(turn).__name__}, not an object")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_inline(number, part) for part in content)
    if not isinstance(content, str) or not content.strip():
        raise RecordError(f"turn {number} has no text")
    return {"from": str(turn.get("role", turn.get("from"))), "value": content}


def _inline(number: int, part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": kind} if kind in KINDS:
            return f"<{kind}>\n"
    kind = part.get("type") if isinstance(part, dict) else None
    known = ", ".join(("text", *KINDS))
    raise RecordError(
        f"turn {number} has a part of the unknown type {kind!r}; the types are {known}"
    )
