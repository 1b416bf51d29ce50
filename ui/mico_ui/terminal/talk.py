"""One conversation with the server: its media, questions and settings. It prints nothing.

Settings and paths of media are read here as people write, paste and drop them.
"""

import json
import os
import re
import time
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mico_chat import wire
from mico_chat.media.kinds import TABLE, Kind
from mico_chat.options import options_at
from mico_ui import routes
from mico_ui.client import STORED_S, ApiError, Client
from mico_ui.routes import MediumId, Question, Upload

SETTINGS = {name: field.description or "" for name, _, field in options_at("settings")}
"""Settings of an answer, by the server's names; the server checks the values."""

# A terminal puts a dropped path into quotes, or backslashes before its spaces. A quote within a
# word is an apostrophe.
_WORD = re.compile(r"""(?<!\S)(?:'[^']*'(?:\\''[^']*')*|"[^"]*"|(?:\\.|[^\s\\])+)""")

_ROOTED = ("/", "~", "./", "../", "file://")

_MAX_NAME = 200  # characters of a path in a message: it may be a whole text that was pasted


def setting(name: str, text: str) -> Any:
    """The value that is written as ``text``: lists and objects are JSON, other text is kept."""
    if name not in SETTINGS:
        close = get_close_matches(name, SETTINGS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(SETTINGS)}"
        raise ApiError(f"no setting {name!r}; {meant}")
    if text[:1] not in ("[", "{"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def applied(settings: Mapping[str, Any], question: Question) -> Question:
    options = {name: value for name, value in settings.items() if name != "depth_scale"}
    return replace(question, options=options, depth_scale=settings.get("depth_scale"))


def named(models: list[wire.ModelInfo], name: str | None) -> wire.ModelInfo:
    """The served model of a name; without a name the first one."""
    for model in models:
        if name in (None, model.id):
            return model
    raise ApiError(f"no model {name!r} there; the server has {', '.join(m.id for m in models)}")


def paths_of(text: str) -> list[Path]:
    """The files that the text behind a command names: one path, perhaps with spaces, or several."""
    for written in (text.strip(), text.strip(" '\"")):  # completion leaves a quote open
        if os.path.isfile(whole := _path(written)):  # unlike the method, for any text
            return [whole]
    words = [_path(_plain(word)) for word in _WORD.findall(text)]
    missing = [path for path in words if not os.path.isfile(path)]
    if not missing:
        return words
    # An unquoted path with spaces that does not exist is one path to its writer.
    wrong = whole if len(missing) == len(words) and "'" not in text else missing[0]
    reason = "is a folder" if os.path.isdir(wrong) else "no such file"
    raise ApiError(f"{str(wrong)[:_MAX_NAME]}: {reason}")


def dropped(text: str) -> tuple[str, list[tuple[Kind, Path]]]:
    """A message without the paths of pictures, sounds and clips in it, and these paths.

    Only rooted paths (``/...``, ``~/...``, ``./...``, ``file://...``) of files that exist count.
    """
    found: list[tuple[Kind, Path]] = []

    def take(match: re.Match[str]) -> str:
        word = match[0]
        for ending in ("", word[-1] if word[-1] in ".,;:?!" else ""):
            name = _plain(word.removesuffix(ending) if ending else word)
            kind = kind_of(name)
            if kind is not None and name.startswith(_ROOTED) and os.path.isfile(_path(name)):
                found.append((kind, _path(name)))
                return ending
        return word

    rest = _WORD.sub(take, text)
    if not found:
        return text, []
    return re.sub(r" +([.,;:?!]?)", lambda m: m[1] or " ", rest).strip(" "), found


def kind_of(name: str) -> Kind | None:
    """The kind that a file's ending says. Nobody can say of a map by its ending that it is one."""
    suffix = Path(name).suffix.lower()
    rows = TABLE.items()
    return next((kind for kind, row in rows if suffix in row.endings and not row.is_map), None)


def _plain(word: str) -> str:
    if len(word) > 1 and word[0] == word[-1] == "'":
        return word[1:-1].replace("'\\''", "'")
    if len(word) > 1 and word[0] == word[-1] == '"':
        return word[1:-1]
    return re.sub(r"\\(.)", r"\1", word)


def _path(name: str) -> Path:
    try:
        if name.startswith("file://"):
            return Path(unquote(urlsplit(name).path))
        return Path(name).expanduser()
    except (ValueError, RuntimeError):  # no URL; ~somebody whom this machine does not know
        return Path(name)


@dataclass
class _Unanswered:
    """The last question, if it has no whole answer: it was refused, failed or was stopped.

    ``turn`` is its number in the conversation, None if it was refused. ``said``: some words came.
    """

    text: str
    media: list[wire.MediaObject]
    turn: int | None = None
    said: bool = False


@dataclass
class Talk:
    """A conversation. Attached media belong to the next question.

    ``id`` is the server's, None before the first answer. Without a ``model`` the server chooses:
    the conversation's, or its first one. The methods raise ApiError, mostly with
    the server's own reason.
    """

    client: Client
    id: str | None = None
    system: str | None = None
    model: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    attached: list[wire.MediaObject] = field(default_factory=list)
    _unanswered: _Unanswered | None = None
    _told: str | None = None  # the system text that the server has

    def set(self, name: str, text: str) -> None:
        """Set an option; an empty text takes it back to the server's default."""
        settings = {key: value for key, value in self.settings.items() if key != name}
        value = setting(name, text)
        if text:
            settings[name] = value
            self.client.send(routes.estimate(applied(settings, Question("?"))))  # checks the value
        self.settings = settings

    def attach(self, medium: Upload) -> wire.MediaObject:
        scale = self.settings.get("depth_scale")
        stored = self.client.send(routes.upload(medium, depth_scale=scale, model=self.model))
        self.attached.append(stored)
        return stored

    def detach(self, number: int | None = None) -> list[wire.MediaObject]:
        """Take the ``number``-th attached medium (from 1) back, or all of them."""
        n = len(self.attached)
        if number is not None and not 1 <= number <= n:
            raise ApiError(f"no medium {number}; {n} attached")
        removed = self.attached[:] if number is None else [self.attached[number - 1]]
        self.attached = [medium for medium in self.attached if medium not in removed]
        for medium in removed:
            # A medium that a conversation shows stays; the server deletes others in time.
            with suppress(ApiError):
                self.client.send(routes.delete_medium(medium.id))
        return removed

    def ask(self, text: str) -> Generator[wire.ChatEvent, None, None]:
        """The events of the answer. Closing the iterator stops the server.

        Media of a question that got no word as its answer are attached again.
        """
        media, self.attached = self.attached, []
        yield from self._answer(text, media)

    def retry(self) -> Generator[wire.ChatEvent, None, None]:
        """Ask the last question again with the present settings; the old turn stays a version."""
        turns = [] if self.id is None else self.conversation().turns
        if (last := self._unanswered) is not None:
            text, media = last.text, last.media
            # Only the turn of that question: it was stopped, or its server was killed.
            turns = [turn for turn in turns if (turn.turn, turn.message) == (last.turn, text)]
        elif turns:
            text = turns[-1].message
            media = [self.client.send(routes.medium(medium.id)) for medium in turns[-1].media]
        else:
            raise ApiError("no question has been asked yet")
        after = turns[-1].parent if self.id is not None and turns else None
        self.attached = [medium for medium in self.attached if medium not in media]
        yield from self._answer(text, media, after)

    def estimate(self, text: str) -> wire.Estimate:
        return self.client.send(routes.estimate(self._question(text, self.attached)))

    def new(self) -> None:
        self.id = self._unanswered = self._told = None

    def open(self, id_: str) -> wire.ConversationObject:
        found = self.client.send(routes.conversation(id_))
        self.new()
        self.id, self.system = found.id, found.system
        self._told = found.system
        return found

    def conversation(self) -> wire.ConversationObject:
        """The conversation as the server has it, once the server has stored a stopped answer."""
        if self.id is None:
            raise ApiError("nothing has been said yet")
        stopped = self._unanswered is not None and self._unanswered.said
        until = time.monotonic() + STORED_S
        while True:
            found = self.client.send(routes.conversation(self.id))
            ended = bool(found.turns) and found.turns[-1].finish_reason != "unanswered"
            if ended or not stopped or time.monotonic() > until:
                return found
            time.sleep(0.1)

    def _question(self, text: str, media: list[wire.MediaObject]) -> Question:
        shown = [MediumId(medium.kind, medium.id) for medium in media]
        # One that was set elsewhere meanwhile stays, if nobody sets another one here.
        system = None if self.id and self.system == self._told else self.system
        question = Question(text, shown, self.id, system, model=self.model)
        return applied({"truncation": "auto", **self.settings}, question)

    def _answer(
        self, text: str, media: list[wire.MediaObject], after: int | None = None
    ) -> Generator[wire.ChatEvent, None, None]:
        question = replace(self._question(text, media), after=after)
        self._unanswered = asked = _Unanswered(text, media)
        try:
            with self.client.stream(question) as events:
                for event in events:
                    match event:
                        case wire.MediaEvent():
                            self.id, asked.turn = event.conversation_id, event.turn
                        case wire.DeltaEvent():
                            asked.said = asked.said or bool(event.text)
                        case wire.ChatResponse():
                            self._unanswered = None
                            self._told = self.system
                    yield event
        finally:
            if not asked.said and self._unanswered is asked:
                self.attached = [*media, *self.attached]
                self.id = question.conversation_id  # without a word, no conversation has begun
