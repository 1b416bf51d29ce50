"""The functions that the page calls: each takes the browser's data and returns an answer or error.

An answer is ``{"value": ...}``, an error ``{"problem": ...}`` with the server's reason. Each call
brings its browser's user, because no function stores one.
"""

import asyncio
import base64
import json
import logging
import re
from collections.abc import Callable, Coroutine
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

import numpy as np
import yaml
from pydantic import Field, TypeAdapter, ValidationError, validate_call

from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_chat.wire import (
    ChatEvent,
    ConversationList,
    ConversationObject,
    Estimate,
    ModelInfo,
    Progress,
)
from mico_ui import describe, routes
from mico_ui.browser.cards import Attached, Card, MediaDesk
from mico_ui.browser.share import shared
from mico_ui.browser.turns import (
    Answers,
    ConversationView,
    PageQuestion,
    problem_of,
    views_of,
    with_answering,
    words,
)
from mico_ui.browser.visitor import NO_ACCESS, Access, Frozen, Visitor
from mico_ui.client import ApiError
from mico_ui.routes import Call, MediumId, Upload, read_as

logger = logging.getLogger(__name__)

PageFunction: TypeAlias = Callable[..., Coroutine[Any, Any, dict[str, Any]]]

CONVERSATIONS = 40  # listed at once
MAX_COMPARED = 24  # media, and sentences, at once
EXAMPLES_FOLDER = Path(__file__).parents[1] / "examples"


class Cost(Estimate):
    """The cost of a question without the reports of its media, of which there are ``cards``."""

    cards: tuple[Card, ...]


class ExampleFile(Frozen):
    kind: Kind
    file: str


class Example(Frozen):
    """A question about files; ``cards`` show them before the server has them."""

    name: str
    message: str
    files: tuple[ExampleFile, ...]
    credit: str = ""
    cards: tuple[Card, ...] = ()


class Examples(Frozen):
    chats: tuple[Example, ...]
    compared: tuple[ExampleFile, ...]
    sentences: tuple[str, ...]


def read_examples() -> Examples:
    text = (EXAMPLES_FOLDER / "examples.yaml").read_text(encoding="utf-8")
    return Examples.model_validate(yaml.safe_load(text))


class Compared(Frozen):
    model: str
    media: tuple[MediumId, ...] = ()
    texts: tuple[str, ...] = ()


class Grid(Frozen):
    """``similarity[i][j]`` of items i and j, media first: the cosine of their embeddings."""

    similarity: list[list[float]]


class Changes(Frozen):
    """What changes of a conversation; without ``system`` the model's own is used."""

    title: str = ""
    pinned: bool = False
    archived: bool = False
    system: str | None = Field(None, max_length=20_000)


class Exported(ConversationObject):
    """A conversation as it is exported: ``files`` has its media by their ids, in base64."""

    files: dict[str, str] = Field(default_factory=dict)


_EXPORTED = TypeAdapter(list[Exported])


class _Items(Frozen):
    data: list[dict[str, Any]]


class Page:
    """``keep_file`` gets the path of each file that is written for a browser to fetch."""

    def __init__(
        self, desk: MediaDesk, keep_file: Callable[[str], None] = lambda path: None
    ) -> None:
        self.api = desk.api
        self.desk = desk
        self.answers = Answers(desk)
        self.keep_file = keep_file
        self._examples = read_examples()
        self._shown_examples: list[Example] = []
        self._explaining: dict[tuple[str, str], str] = {}

    def functions(self) -> list[PageFunction]:
        server = (self.health, self.estimate, self.compare)
        desk = self.desk
        media = (desk.attach, self.forget, desk.preview, desk.estimate_depth, self.original)
        answers = (self.answers.ask, self.answers.follow, self.answers.stop, self.explain)
        stored = (self.conversations, self.open, self.change, self.delete, self.delete_turns)
        versions = (self.choose, self.prefer, self.preferences, self.changes, self.bring, self.pin)
        others = (self.teach, self.explaining, self.speak, self.talk)
        examples = (self.examples, self.attach_example, self.compare_example)
        return [
            _page_function(function)
            for function in (
                *server,
                *media,
                *answers,
                *stored,
                *versions,
                *others,
                self.export,
                *examples,
            )
        ]

    async def health(self, visitor: Visitor) -> dict[str, Any]:
        async with visitor.client(self.api) as client:
            await client.send(routes.ready())
            models = await client.send(routes.models())
        if not models:
            raise ApiError(f"{self.api} serves no model")
        return {"models": [_shown(model) for model in models]}

    async def forget(self, visitor: Visitor, id: str) -> None:
        await visitor.send(self.api, routes.delete_medium(id))

    async def original(self, visitor: Visitor, id: str) -> str:
        path = await self.desk.original(visitor, id)
        self.keep_file(str(path))
        return f"gradio_api/file={quote(str(path))}"

    async def estimate(self, visitor: Visitor, asked: PageQuestion) -> Cost:
        """What the answer would cost, and the cards of the question's media: all that was read."""
        cost = await visitor.send(self.api, routes.estimate(asked.for_server(visitor)))
        cards = self.desk.own_cards(visitor, asked.media, cost.media)
        return Cost(cards=cards, **cost.model_dump(exclude={"media"}))

    async def conversations(
        self,
        visitor: Visitor,
        query: str,
        before: str | None = None,
        archived: bool | None = False,
    ) -> ConversationList:
        """Chats, or those of the archive; a search looks in both."""
        wanted = query.strip() or None
        archived = archived if wanted is None else None
        call = routes.conversations(
            limit=CONVERSATIONS, before=before, query=wanted, archived=archived
        )
        return await visitor.send(self.api, call)

    async def changes(self, visitor: Visitor, known: str = "") -> str:
        """The state of all conversations, once it is another one than ``known``."""
        return await visitor.send(self.api, routes.conversations_state(known))

    async def choose(self, visitor: Visitor, id: str, turn: int) -> ConversationView:
        """Show another version of a turn from now on."""
        await visitor.send(self.api, routes.change_conversation(id, turn=turn))
        return await self.open(visitor, id)

    async def open(self, visitor: Visitor, id: str, turn: int | None = None) -> ConversationView:
        """A conversation; with ``turn`` along the newest path through it, if it still exists."""
        # First, because an answer that ends while the server is asked must not get lost.
        answering = self.answers.answering(visitor, id)
        try:
            stored = await visitor.send(self.api, routes.conversation(id, turn))
            found = await asyncio.to_thread(views_of, self.desk, visitor, stored)
            found = await self._with_rival(visitor, found)
        except ApiError as error:
            if turn is not None and error.status == HTTPStatus.NOT_FOUND:
                return await self.open(visitor, id)
            if answering is None or error.status != HTTPStatus.NOT_FOUND:
                raise
            found = ConversationView(id=id, title="", system=None, turns=())  # not stored yet
        return found if answering is None else with_answering(found, answering)

    async def change(self, visitor: Visitor, id: str, changes: Changes) -> None:
        call = routes.change_conversation(id, **changes.model_dump(exclude_unset=True))
        await visitor.send(self.api, call)

    async def _with_rival(self, visitor: Visitor, chat: ConversationView) -> ConversationView:
        """The last turn with the answer beside it, as long as neither is preferred."""
        last = chat.turns[-1] if chat.turns else None
        if last is None or last.rival is None or last.preferred is not None:
            return chat
        other = self.answers.answering(visitor, chat.id, last.rival)
        if other is None:
            stored = await visitor.send(self.api, routes.conversation(chat.id, last.rival))
            viewed = await asyncio.to_thread(views_of, self.desk, visitor, stored)
            other = next(turn for turn in viewed.turns if turn.turn == last.rival)
        shown = last.model_copy(update={"other": other})
        return chat.model_copy(update={"turns": (*chat.turns[:-1], shown)})

    async def prefer(self, visitor: Visitor, id: str, turn: int, over: int) -> ConversationView:
        """Go on with the better one of two answers, and keep that it is."""
        await visitor.send(self.api, routes.prefer(id, turn, over))
        return await self.open(visitor, id)

    async def preferences(self, visitor: Visitor) -> dict[str, str]:
        text = await visitor.send(self.api, routes.preferences())
        rows = map(json.loads, text.split("\n")[:-1])
        if any(one["kind"] == "image" for row in rows for one in row["media"]):
            text = await visitor.send(self.api, routes.preferences(images=True))
        return {"name": "preferences.jsonl", "type": "application/jsonl", "text": text}

    async def pin(self, visitor: Visitor, id: str, medium: str, pinned: bool) -> None:
        """Pin a medium of a conversation, so that it stays where this is shortened, or unpin it."""
        await visitor.send(self.api, routes.change_conversation(id, pinned_media={medium: pinned}))

    async def delete(self, visitor: Visitor, id: str) -> None:
        await visitor.send(self.api, routes.delete_conversation(id))

    async def delete_turns(self, visitor: Visitor, id: str, first: int, turns: int) -> None:
        """Delete turn ``first`` and all that follow it, which are ``turns`` as the page knows."""
        await visitor.send(self.api, routes.delete_turns(id, first, turns))

    async def explain(self, visitor: Visitor, id: str, turn: int) -> ChatEvent:
        asked = routes.explanation(id, turn)
        self._explaining.pop(visitor.owner, None)
        async with visitor.client(self.api) as client, client.stream(asked) as events:
            async for event in events:
                if not isinstance(event, Progress):
                    break
                self._explaining[visitor.owner] = describe.progress(event)
        return event

    async def speak(self, visitor: Visitor, text: str) -> str:
        """A text read aloud: MP3, in base64."""
        said = await visitor.send(self.api, routes.speech(text))
        return base64.b64encode(said).decode("ascii")

    async def talk(self, visitor: Visitor, system: str = "") -> str:
        """The secret of a session in real time, which tells what it has heard."""
        session: dict[str, Any] = {"audio": {"input": {"transcription": {}}}}
        session |= {"instructions": system} if system else {}
        session |= {"model": visitor.model} if visitor.model else {}
        session |= {"max_output_tokens": visitor.max_tokens} if visitor.max_tokens else {}
        return await visitor.send(self.api, routes.client_secret(session))

    async def explaining(self, visitor: Visitor) -> str:
        """What the explanation of an answer waits for."""
        return self._explaining.get(visitor.owner, "")

    async def teach(
        self,
        visitor: Visitor,
        name: str,
        media: list[MediumId],
        id: str | None = None,
        turn: int | None = None,
    ) -> str:
        """Teach a name by media that the server has; ``turn`` of chat ``id`` was answered wrong."""
        how: dict[str, Any] = {"conversation_id": id, "turn": turn} if turn else {}
        call = routes.teach(name, media, model=visitor.model or None, **how)
        return (await visitor.send(self.api, call)).name

    async def export(
        self, visitor: Visitor, id: str, form: Literal["markdown", "json", "html"]
    ) -> dict[str, str]:
        """A conversation as a file: all versions as JSON, else the path that is shown."""
        whole = form == "json"
        found = await visitor.send(self.api, routes.conversation(id, all_versions=whole))
        name = re.sub(r"[^\w-]+", "-", found.title).strip("-")[:60] or "conversation"
        if form == "json":
            exported = found.model_dump(mode="json") | {"files": await self._files(visitor, found)}
            text = json.dumps(exported, indent=1, ensure_ascii=False)
            return {"name": f"{name}.json", "type": "application/json", "text": text}
        if form == "html":
            text = await shared(self.desk, visitor, found)
            return {"name": f"{name}.html", "type": "text/html", "text": text}
        text = describe.markdown(found)
        return {"name": f"{name}.md", "type": "text/markdown", "text": text}

    async def _files(self, visitor: Visitor, chat: ConversationObject) -> dict[str, str]:
        """The media of a conversation by their ids, in base64."""
        found: dict[str, str] = {}
        for medium in (medium for turn in chat.turns for medium in turn.media):
            if medium.id not in found:
                content = await visitor.send(self.api, routes.medium_content(medium.id))
                found[medium.id] = base64.b64encode(content).decode("ascii")
        return found

    async def bring(self, visitor: Visitor, file: Attached) -> list[str]:
        """Store the conversations of an upload that :meth:`export` wrote, one or a list of them."""
        path = self.desk.uploaded(file.path)
        try:
            data = json.loads(await asyncio.to_thread(path.read_bytes))
            chats = _EXPORTED.validate_python(data if isinstance(data, list) else [data])
            return [await self._bring(visitor, chat) for chat in chats]
        except (ValueError, RecursionError) as error:
            reason = f"{file.name}: it holds no chats as they are exported here, as JSON"
            raise ApiError(reason, status=415) from error
        finally:
            self.desk.drop(path)

    async def _bring(self, visitor: Visitor, chat: Exported) -> str:
        """Store the media of a conversation, then its turns, which name them by their new ids."""
        ids: dict[str, str] = {}
        for medium in (medium for turn in chat.turns for medium in turn.media):
            if medium.id in ids:
                continue
            if medium.id not in chat.files:
                raise ApiError(f"{chat.title}: the file of {medium.name} is missing", status=415)
            data = base64.b64decode(chat.files[medium.id], validate=True)
            upload = Upload(medium.kind, data, medium.name)
            ids[medium.id] = (await visitor.send(self.api, routes.upload(upload, read=False))).id
        exported = chat.model_dump(mode="json", exclude={"files"})
        for turn in exported["turns"]:
            turn["media"] = [{**medium, "id": ids[medium["id"]]} for medium in turn["media"]]
        return (await visitor.send(self.api, routes.import_conversation(exported))).id

    async def examples(self, visitor: Visitor) -> list[Example]:
        self._shown_examples = self._shown_examples or [
            example.model_copy(update={"cards": await self._example_cards(example.files)})
            for example in self._examples.chats
        ]
        return self._shown_examples

    async def attach_example(self, visitor: Visitor, name: str) -> list[Card]:
        for example in self._examples.chats:
            if example.name == name:
                return await self._attach_all(visitor, example.files)
        names = ", ".join(example.name for example in self._examples.chats)
        raise ApiError(f"no example {name!r}; there are {names}", status=415)

    async def compare_example(self, visitor: Visitor) -> dict[str, Any]:
        cards = await self._attach_all(visitor, self._examples.compared)
        return {"cards": cards, "texts": self._examples.sentences}

    async def compare(self, visitor: Visitor, compared: Compared) -> Grid:
        kinds = [(f"{medium.kind}_url", f"media:{medium.id}") for medium in compared.media]
        media = [{"type": kind, kind: {"url": url}} for kind, url in kinds]
        texts = [text.strip() for text in compared.texts if text.strip()]
        if len(media) + len(texts) < 2:
            reason = "Compare needs at least two: add a file, or write a sentence on each line"
            raise ApiError(reason, status=415)
        for n, what in ((len(media), "files"), (len(texts), "sentences")):
            if n > MAX_COMPARED:
                reason = f"Compare takes at most {MAX_COMPARED} {what}, and these are {n}"
                raise ApiError(reason, status=415)
        body = {"model": compared.model, "input": [*media, *texts]}
        call = Call("POST", "/v1/embeddings", read_as(_Items), body=body)
        found = (await visitor.send(self.api, call)).data
        vectors = np.array([one["embedding"] for one in found])  # of unit length
        return Grid(similarity=(vectors @ vectors.T).tolist())

    async def _example_cards(self, files: tuple[ExampleFile, ...]) -> tuple[Card, ...]:
        cards = []
        for one in files:
            report = MediaReport(name=one.file, kind=one.kind)
            path = EXAMPLES_FOLDER / one.file
            preview = await self.desk.previewer.make("examples", one.file, path, report)
            cards.append(Card(id=one.file, name=one.file, kind=one.kind, **dict(preview)))
        return tuple(cards)

    async def _attach_all(self, visitor: Visitor, files: tuple[ExampleFile, ...]) -> list[Card]:
        attached = [
            Attached(path=EXAMPLES_FOLDER / one.file, name=one.file, kind=one.kind) for one in files
        ]
        return [await self.desk.attach_path(visitor, file) for file in attached]


def _shown(model: ModelInfo) -> dict[str, Any]:
    """A model as the page shows it."""
    defaults = {} if model.defaults is None else model.defaults.model_dump()
    return {
        **model.model_dump(include={"id", "context_length", "embeddings", "max_media"}),
        "depth_model": model.depth_model if "depth" in model.modalities else None,
        "kinds": model.modalities,
        "status": model.status.value,
        "reason": model.status.reason,
        "defaults": {**defaults, "system": model.system_prompt},
        "caution": words()["cautions"].get(model.id, ""),
    }


def _page_function(method: Callable[..., Coroutine[Any, Any, Any]]) -> PageFunction:
    """A method of the page as the browser calls it: its arguments are checked first."""

    @validate_call
    @wraps(method)
    def checked(*arguments: Any, **named: Any) -> Coroutine[Any, Any, Any]:
        return method(*arguments, **named)

    async def called(sent: dict[str, Any], access: Access = NO_ACCESS) -> dict[str, Any]:
        visitor = None
        try:
            visitor = Visitor.of(sent.get("profile"), access)
            given = {name: value for name, value in sent.items() if name != "profile"}
            try:
                work = checked(visitor, **given)
            except ValidationError as error:
                first = error.errors()[0]
                raise ApiError(f"{first['loc'][0]}: {first['msg']}", status=415) from error
            value = await work
        except ApiError as error:
            return {"problem": problem_of(error, visitor).model_dump(mode="json")}
        except Exception:
            logger.exception("%s failed", method.__name__)
            return {"problem": problem_of().model_dump(mode="json")}
        return {"value": _ANY.dump_python(value, mode="json")}

    called.__name__ = method.__name__  # by which the page calls it
    return called


_ANY: TypeAdapter[Any] = TypeAdapter(Any)
