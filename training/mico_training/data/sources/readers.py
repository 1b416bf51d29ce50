"""Training data that a user writes: JSON Lines, and what :mod:`.manifests` makes them of.

JSON Lines, one sample a line::

    {"image": "cat.jpg", "caption": "A cat on a sofa."}
    {"image": "cat.jpg", "audio": "a.ogg", "captions": {"image": ["A cat."], "audio": "Purring."}}
    {"image": "cat.jpg", "audio": ["purr.ogg"], "messages": [
        {"role": "user", "content": "<image>\\n<audio>\\nDo these belong together?"},
        {"role": "assistant", "content": "Yes."}]}
    {"video": "s3://clips/cat.mp4", "question": "what is on the sofa?", "answers": ["cat", "a cat"]}
    {"video": "cat.mp4", "caption": "A cat is fed.", "subtitle": "Come here, your food is ready!"}
    {"image": "cat.jpg", "prompt": "What is this?", "chosen": "A cat.", "rejected": "A dog."}

The last line is a preference pair of TRL, whose other forms are read too (:func:`_pair`).

LLaVA: a JSON array of ``{"id", "image" | "video" | ..., "conversations": [{"from": "human",
"value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}``. Markers stand for the
media of their kind in the order given; media without a marker come before the first question. The
whole file is checked when its index is made (:mod:`.index`), so that a wrong line 90,000 is known
before the first step. Whether a medium at an address is there is not asked then. Lines are read
again when they are drawn.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np

from mico_chat.errors import DataError, RequestError
from mico_chat.evaluation.datasets.files import FAULT
from mico_chat.media import MediaFile
from mico_chat.media.addresses import Location, fingerprint, located, opened, read_part
from mico_chat.media.file import Remote
from mico_chat.media.kinds import MODALITIES
from mico_chat.messages import Message, from_llava
from mico_training.data.sources.chosen import Kept
from mico_training.data.sources.index import Found, Kinds, Profile, open_index
from mico_training.data.sources.manifests import folder_of, kind_of
from mico_training.data.sources.sample import Need, TrainingSample
from mico_training.data.sources.written import Turn

Talk = tuple[Message, ...]


class RecordError(ValueError):
    """A record is wrong; its file and line are not known yet."""


class ManifestSource:
    """A JSON Lines file's samples that have a stage's texts; ``bad``: the lines that are wrong.

    ``kinds``: only media of these, and the texts about them. ``shown``: errors name this file, of
    which the JSON Lines were made (:mod:`.manifests`). Their questions have no ``skills``.
    """

    skills: frozenset[str] = frozenset()

    def __init__(
        self,
        path: Location,
        need: Need,
        root: Location | None = None,
        kinds: Kinds = frozenset(MODALITIES),
        shown: Location | None = None,
    ) -> None:
        self.path, self.shown = path, path if shown is None else shown
        self.root = folder_of(path) if root is None else root
        self.kinds = kinds
        try:
            files, form = {path: fingerprint(path)}, f"jsonl 3 {self.root}"
            self.index = open_index(files, self._scan, form)
            if any(map(self._mended, self.index.bad.errors)):  # an index of another form is made
                self.index = open_index(files, self._scan, f"{form} mended")
        except OSError as error:
            raise DataError(path, None, error.strerror or str(error)) from error
        self.kept = Kept(self.index.offering(lambda p: p.offers(need, frozenset(), kinds)))
        self.ends = np.array([len(self.kept)])
        bad = self.index.bad
        errors = tuple(DataError(self.shown, *error.args[1:]) for error in bad.errors)
        self.bad = replace(bad, errors=errors)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> TrainingSample:
        return self.read(self.kept[index]).of_kinds(self.kinds)

    def read(self, line: int) -> TrainingSample:
        """The sample of a line, from 0; a DataError says what is wrong with it."""
        _, start, size = self.index.place(line)
        return self._parse(read_part(self.path, start, size), line + 1)

    def _scan(self, path: Location) -> Iterator[Found]:
        start = 0
        with opened(path) as file:
            for number, line in enumerate(file, start=1):
                profile = Profile()
                try:
                    profile = Profile.of(self._parse(line, number)) if line.strip() else profile
                except DataError as error:
                    yield error
                yield start, len(line), profile  # a bad line offers nothing
                start += len(line)

    def _mended(self, error: DataError) -> bool:
        """Whether a bad line is good by now, because a file that it names is there."""
        if "no such file" in str(error):
            _, start, size = self.index.place(error.args[1] - 1)
            with suppress(DataError):
                return bool(self._parse(read_part(self.path, start, size), error.args[1]))
        return False

    def _parse(self, line: bytes, number: int) -> TrainingSample:
        named = ""
        try:
            record = json.loads(line)
            named = f"{record['id']}: " if isinstance(record, dict) and "id" in record else ""
            return sample_of(record, self.root, f"{Path(self.shown).name}:{number}")
        except (RecordError, OSError) as error:  # such as a name that is too long
            raise DataError(self.shown, number, f"{named}{error}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(self.shown, number, f"not JSON: {error}") from error


def sample_of(record: Any, root: Location, name: str) -> TrainingSample:
    """The sample that a record describes; a RecordError says what is wrong."""
    if not isinstance(record, dict):
        raise RecordError(f"a sample is an object, not {type(record).__name__}")
    if FAULT in record:
        raise RecordError(record[FAULT])
    if isinstance(name_of_file := record.get("file_name"), str):  # Hugging Face's imagefolder
        if (kind := kind_of(name_of_file)) is None:
            raise RecordError(f"file_name {name_of_file}: no medium has this ending")
        record = {kind: name_of_file, "caption": record.get("text", []), **record}
    media = _media(record, root)
    captions = _captions(record, media)
    concept = record.get("concept")
    if concept is not None and not isinstance(concept, str):
        raise RecordError(f"'concept' is {type(concept).__name__}, not a string")
    subtitle = record.get("subtitle", "")
    if not isinstance(subtitle, str):
        raise RecordError(f"'subtitle' is {type(subtitle).__name__}, not a string")
    talks = [key for key in ("messages", "conversations", "chosen") if key in record]
    if len(talks) > 1:
        raise RecordError(f"has both {talks[0]!r} and {talks[1]!r}; give one")
    questions = _strings(record, "question", ())
    answers = _strings(record, "answer", record.get("answers", ()))
    if questions and not media:
        raise RecordError(f"has a question but no medium ({', '.join(MODALITIES)})")
    turns = record.get("messages", record.get("conversations", ()))
    conversation = _conversation(turns, media) if turns else ()
    rejected: Talk = ()
    if "chosen" in record or "rejected" in record:
        conversation, rejected = _pair(record, media)
    if bool(questions) != bool(answers) or len(questions) > 1:
        found = f"has {len(questions)} 'question' and {len(answers)} 'answers'"
        raise RecordError(f"{found}; a record asks one question and has at least one answer")
    # A file of a folder that has no caption says so.
    if not captions and not conversation and not questions and record.get("caption") != []:
        raise RecordError(
            "lacks all of 'caption', 'messages', 'conversations', 'question' and 'chosen'; give one"
        )
    first = next(iter(media), "")
    return TrainingSample(
        id=str(record.get("id", name)),
        media=media,
        captions=captions,
        concepts={first: concept} if concept and media else {},
        turns=tuple(Turn(questions[0], answer, "", tuple(media)) for answer in answers),
        conversation=conversation,
        rejected=rejected,
        subtitle=subtitle.strip(),
    )


def _strings(record: dict[str, Any], key: str, otherwise: Any) -> tuple[str, ...]:
    value = record.get(key, otherwise)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise RecordError(f"{key!r} is neither a string nor a list of strings")
    if any(not v.strip() for v in values):
        raise RecordError(f"{key!r} is empty")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{key!r} is not UTF-8") from error
    return tuple(values)


def _captions(record: dict[str, Any], media: dict[str, MediaFile]) -> dict[str, tuple[str, ...]]:
    """The captions of each medium; ``caption``, and ``captions`` in a list, are the first one's."""
    first, captions = next(iter(media), ""), record.get("captions", ())
    if isinstance(captions, dict):
        for name in captions:
            if name not in media:
                known = ", ".join(media) or "none"
                raise RecordError(f"has a caption of {name!r}, but its media are: {known}")
        found = {name: _strings(captions, name, ()) for name in captions}
    else:
        found = {first: _strings(record, "captions", ())}
    found[first] = (*_strings(record, "caption", ()), *found.get(first, ()))
    if found[first] and not media:
        raise RecordError(f"has a caption but no medium ({', '.join(MODALITIES)})")
    return {name: texts for name, texts in found.items() if texts}


def _media(record: dict[str, Any], root: Location) -> dict[str, MediaFile]:
    media = {}
    for kind in MODALITIES:
        pictures = record.get("images", ()) if kind == "image" else ()  # TRL's key
        for count, text in enumerate(_strings(record, kind, pictures), start=1):
            key = kind if count == 1 else f"{kind}{count}"
            place = located(text)
            if isinstance(place, Path):
                place = root / place if isinstance(root, Path) else f"{root}/{text}"
            if isinstance(place, Path) and not place.is_file():
                raise RecordError(f"{kind} {text}: no such file in {root}")
            source = place if isinstance(place, Path) else Remote(place)
            media[key] = MediaFile(kind=kind, source=source, name=text)
    return media


def _conversation(turns: Any, media: dict[str, MediaFile]) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise RecordError(f"the conversation is {type(turns).__name__}, not a list")
    plain = [_plain(number, turn) for number, turn in enumerate(turns, start=1)]
    words = "".join(turn["value"] for turn in plain)
    unplaced = [f"<{m.kind}>\n" for m in media.values() if f"<{m.kind}>" not in words]
    for turn in plain:
        if turn["from"] in ("user", "human"):
            turn["value"] = "".join(unplaced) + turn["value"]
            break
    own = {kind: [m for m in media.values() if m.kind == kind] for kind in MODALITIES}
    names: dict[str, Any] = {kind: [m.name for m in found] for kind, found in own.items()}
    try:
        read = from_llava({**names, "conversations": plain})
    except RequestError as error:
        raise RecordError(str(error)) from error
    rest = {kind: iter(found) for kind, found in own.items()}
    messages = tuple(
        replace(
            message,
            content=tuple(
                next(rest[p.kind]) if isinstance(p, MediaFile) else p for p in message.content
            ),
        )
        for message in read
    )
    speakers = [message.role for message in messages if message.role != "system"]
    if speakers != ["user", "assistant"] * (len(speakers) // 2) or not speakers:
        raise RecordError(
            "the turns must be user, assistant, and so on, and end with an answer; they "
            f"are {', '.join(speakers) or 'none'}"
        )
    return messages


def _pair(record: dict[str, Any], media: dict[str, MediaFile]) -> tuple[Talk, Talk]:
    """The conversations with the chosen and with the rejected answer, from a pair in TRL's form.

    The values are texts or lists of messages. Without a ``prompt``, what both answers begin with is
    the prompt: whole messages, or whole words.
    """
    prompt, answers = record.get("prompt"), [record.get("chosen"), record.get("rejected")]
    if {type(one) for one in answers} not in ({str}, {list}):
        raise RecordError("'chosen' and 'rejected' are not two texts or two lists of messages")
    if prompt is None:
        alike = zip(*cast(Any, answers), strict=False)
        n = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], alike))
        while isinstance(answers[0], str) and n and not answers[0][n - 1].isspace():
            n -= 1
        prompt, answers = cast(Any, answers[0])[:n], [cast(Any, one)[n:] for one in answers]
    if not isinstance(prompt, str | list) or not prompt:
        reason = "lacks a 'prompt', a text or a list of messages, and its answers begin differently"
        raise RecordError(reason if not prompt else f"'prompt' is {type(prompt).__name__}")
    asked = _turns(prompt, "user")
    chosen, rejected = (_conversation([*asked, *_turns(a, "assistant")], media) for a in answers)
    if chosen == rejected:
        raise RecordError("'chosen' and 'rejected' are the same")
    if any(message.media for talk in (chosen, rejected) for message in talk[len(asked) :]):
        raise RecordError("an answer shows a medium; media stand in the 'prompt'")
    return chosen, rejected


def _turns(said: Any, role: str) -> list[Any]:
    return [{"role": role, "content": said.strip()}] if isinstance(said, str) else list(said)


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
        case {"type": kind} if kind in MODALITIES:
            return f"<{kind}>\n"
    kind = part.get("type") if isinstance(part, dict) else None
    known = ", ".join(("text", *MODALITIES))
    raise RecordError(
        f"turn {number} has a part of the unknown type {kind!r}; the types are {known}"
    )
