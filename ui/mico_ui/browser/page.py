"""What the page can call: each function takes what the browser sent, and answers or says why not.

An answer is ``{"value": ...}``, an error ``{"problem": ...}`` with the server's own reason. No
function keeps anything of a browser's: whose request it is comes with each call.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any, TypeAlias
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from mico_ui import calls
from mico_ui.browser.asking import Asked, Asking
from mico_ui.browser.comparing import CAUTIONS, Compared, Comparing
from mico_ui.browser.examples import (
    COMPARED,
    COMPARED_TEXTS,
    attach_example,
    attach_files,
    example_views,
)
from mico_ui.browser.library import Library
from mico_ui.browser.media import Attached, MediaDesk, Shown
from mico_ui.browser.profile import NO_ACCESS, Access, Profile
from mico_ui.browser.turns import FAILED, ConversationView, TurnView, problem_of, with_answering
from mico_ui.client import ApiError

logger = logging.getLogger(__name__)

Sent: TypeAlias = dict[str, Any]
PageFunction: TypeAlias = Callable[..., Coroutine[Any, Any, dict[str, Any]]]


class Health(BaseModel):
    """The served model, as the page shows it.

    ``defaults`` are its own options by name; ``caution`` says how far its comparisons can be
    trusted.
    """

    id: str
    context_length: int
    embeddings: bool
    models: list[str]
    defaults: dict[str, Any]
    caution: str


class Page:
    """The functions of a page that talks to the server at ``api``."""

    def __init__(
        self, api: str, desk: MediaDesk, keep_file: Callable[[str], None] = lambda path: None
    ) -> None:
        """``keep_file`` is told of each file that is written for a browser to fetch."""
        self.api = api
        self.desk = desk
        self.asking = Asking(api, desk)
        self.library = Library(api, desk)
        self.comparing = Comparing(api)
        self.keep_file = keep_file

    def functions(self) -> list[PageFunction]:
        """All of them, by the names that the page knows."""
        given: dict[str, Callable[[Profile, Sent], Awaitable[Any]]] = {
            "health": self._health,
            "attach": self._attach,
            "forget": lambda p, s: self.desk.forget(p, _text(s, "id")),
            "preview": lambda p, s: self.desk.preview(p, _as(Shown, s, "shown")),
            "original": self._original,
            "estimate": self._estimate,
            "ask": self._ask,
            "follow": self._follow,
            "stop": self._stop,
            "conversations": self._conversations,
            "open": self._open,
            "rename": lambda p, s: self.library.rename(p, _text(s, "id"), _text(s, "title")),
            "delete": lambda p, s: self.library.delete(p, _text(s, "id")),
            "delete_turns": self._delete_turns,
            "export": self._export,
            "examples": self._examples,
            "attach_example": lambda p, s: attach_example(self.desk, p, _text(s, "name")),
            "compare": lambda p, s: self.comparing.compare(p, _as(Compared, s, "compared")),
            "compare_example": self._compare_example,
        }
        return [_function(name, work) for name, work in given.items()]

    async def _health(self, profile: Profile, sent: Sent) -> Health:
        async with profile.client(self.api) as client:
            await client.send(calls.ready())
            models = await client.send(calls.models())
        if not models:
            raise ApiError(f"{self.api} serves no model")
        served = models[0]
        return Health(
            id=served.id,
            context_length=served.context_length,
            embeddings=served.embeddings,
            models=[model.id for model in models],
            defaults={**served.defaults, "system": served.system_prompt},
            caution=CAUTIONS.get(served.id, ""),
        )

    async def _attach(self, profile: Profile, sent: Sent) -> Any:
        return await self.desk.attach(profile, _as(Attached, sent, "file"))

    async def _original(self, profile: Profile, sent: Sent) -> str:
        path = await self.desk.original(profile, _text(sent, "id"))
        self.keep_file(str(path))
        return f"gradio_api/file={quote(str(path))}"

    async def _estimate(self, profile: Profile, sent: Sent) -> Any:
        question = _as(Asked, sent, "asked").question(profile)
        async with profile.client(self.api) as client:
            return await client.send(calls.estimate(question))

    async def _stop(self, profile: Profile, sent: Sent) -> None:
        self.asking.stop(profile, _text(sent, "ask"))

    async def _ask(self, profile: Profile, sent: Sent) -> None:
        self.asking.ask(profile, _as(Asked, sent, "asked"))

    async def _follow(self, profile: Profile, sent: Sent) -> TurnView:
        return await self.asking.follow(profile, _text(sent, "ask"), _as(int, sent, "version"))

    async def _open(self, profile: Profile, sent: Sent) -> ConversationView:
        id_ = _text(sent, "id")
        # Before the server is asked: an answer that ends meanwhile is found to have ended later.
        answering = self.asking.answering(profile, id_)
        try:
            found = await self.library.open(profile, id_)
        except ApiError as error:
            if answering is None or error.status != HTTPStatus.NOT_FOUND:
                raise
            found = ConversationView(id=id_, title="", system=None, turns=())  # not stored yet
        return found if answering is None else with_answering(found, answering)

    async def _conversations(self, profile: Profile, sent: Sent) -> Any:
        before = _as(str | None, sent, "before")
        return await self.library.page(profile, _text(sent, "query"), before)

    async def _delete_turns(self, profile: Profile, sent: Sent) -> None:
        await self.library.delete_turns(profile, _text(sent, "id"), _as(int, sent, "first"))

    async def _export(self, profile: Profile, sent: Sent) -> Any:
        form = _text(sent, "form")
        return await self.library.export(
            profile, _text(sent, "id"), "json" if form == "json" else "markdown"
        )

    async def _examples(self, profile: Profile, sent: Sent) -> Any:
        return await example_views(self.desk.previewer)

    async def _compare_example(self, profile: Profile, sent: Sent) -> Sent:
        cards = await attach_files(self.desk, profile, COMPARED)
        return {"cards": [card.model_dump(mode="json") for card in cards], "texts": COMPARED_TEXTS}


def _function(name: str, work: Callable[[Profile, Sent], Awaitable[Any]]) -> PageFunction:
    async def called(sent: Sent, access: Access = NO_ACCESS) -> dict[str, Any]:
        try:
            value = await work(Profile.of(sent.get("profile"), access), sent)
        except ApiError as error:
            return _problem(error)
        except Exception:
            logger.exception("%s failed", name)
            return _problem(FAILED)
        return {"value": _ANY.dump_python(value, mode="json")}

    called.__name__ = name  # by which the page calls it
    return called


_ANY: TypeAdapter[Any] = TypeAdapter(Any)


def _problem(error: ApiError) -> dict[str, Any]:
    return {"problem": problem_of(error).model_dump(mode="json")}


def _as(kind: Any, sent: Sent, name: str) -> Any:
    """A part of what was sent, checked.

    Raises:
        ApiError: naming it.
    """
    try:
        return TypeAdapter(kind).validate_python(sent.get(name))
    except ValidationError as error:
        raise ApiError(f"{name}: {error.errors()[0]['msg']}", status=415) from error


def _text(sent: Sent, name: str) -> str:
    text: str = _as(str, sent, name)
    return text
