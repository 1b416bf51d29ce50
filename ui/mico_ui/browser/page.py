"""What the page can call: each function takes what the browser sent, and answers or says why not.

An answer is ``{"value": ...}``, an error ``{"problem": ...}`` with the server's own reason. No
function keeps anything of a browser's: whose request it is comes with each call.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeAlias
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter, ValidationError

from mico_ui import calls
from mico_ui.browser.asking import Asked, Asking
from mico_ui.browser.comparing import Compared, Comparing
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
from mico_ui.browser.turns import TurnView, problem_of
from mico_ui.client import ApiError

logger = logging.getLogger(__name__)

FAILED = ApiError("a defect of this page; its log has the details", status=500)
"""What is told of an error that nobody foresaw; the reason goes to the log alone."""

Sent: TypeAlias = dict[str, Any]
PageFunction: TypeAlias = Callable[..., Coroutine[Any, Any, dict[str, Any]]]


class Health(BaseModel):
    """The served model, as the page shows it."""

    id: str
    context_length: int
    embeddings: bool
    models: list[str]


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
            "stop": self._stop,
            "conversations": self._conversations,
            "open": lambda p, s: self.library.open(p, _text(s, "id")),
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

    async def ask(
        self, sent: Sent, access: Access = NO_ACCESS
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The turn that answers a question, as it grows."""
        try:
            profile = Profile.of(sent.get("profile"), access)
            asked = _as(Asked, sent, "asked")
        except ApiError as error:
            name = (sent.get("asked") or {}).get("ask")
            yield {"ask": name, "state": "error", "media": [], "html": "", **_problem(error)}
            return
        view = TurnView(ask=asked.ask, state="waiting")
        try:
            async for view in self.asking.ask(profile, asked):
                yield view.model_dump(mode="json")
        except Exception:
            logger.exception("a question failed")
            yield {**view.model_dump(mode="json"), "state": "error", **_problem(FAILED)}

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
