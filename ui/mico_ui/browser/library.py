"""The conversations that the server keeps for a browser: listed, renamed, deleted, exported."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from mico_ui import calls
from mico_ui.answers import Conversation, ConversationPage
from mico_ui.browser.media import MediaDesk, facts_of
from mico_ui.browser.profile import Profile
from mico_ui.browser.turns import ConversationView, views_of

PAGE = 40
"""Conversations that are listed at once."""


class Export(BaseModel):
    """A file to save: its name, media type and text."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: str
    text: str


@dataclass(frozen=True)
class Library:
    """A user's conversations. All methods raise ApiError with the server's reason."""

    api: str
    desk: MediaDesk

    async def page(self, profile: Profile, query: str, before: str | None) -> ConversationPage:
        """The conversations with a text in them, the last one answered first."""
        call = calls.conversations(limit=PAGE, before=before, query=query.strip() or None)
        async with profile.client(self.api) as client:
            return await client.send(call)

    async def open(self, profile: Profile, conversation_id: str) -> ConversationView:
        """A conversation to look at."""
        async with profile.client(self.api) as client:
            found = await client.send(calls.conversation(conversation_id))
        return await asyncio.to_thread(views_of, self.desk, profile, found)

    async def rename(self, profile: Profile, conversation_id: str, title: str) -> str:
        """Its new title, as the server keeps it."""
        async with profile.client(self.api) as client:
            call = calls.rename_conversation(conversation_id, title)
            return (await client.send(call)).title

    async def delete(self, profile: Profile, conversation_id: str) -> None:
        """Forget a conversation and its media."""
        async with profile.client(self.api) as client:
            await client.send(calls.delete_conversation(conversation_id))

    async def delete_turns(self, profile: Profile, conversation_id: str, first: int) -> None:
        """Forget a turn and all after it."""
        async with profile.client(self.api) as client:
            await client.send(calls.delete_turns(conversation_id, first))

    async def export(
        self, profile: Profile, conversation_id: str, form: Literal["markdown", "json"]
    ) -> Export:
        """A conversation as a file."""
        async with profile.client(self.api) as client:
            found = await client.send(calls.conversation(conversation_id))
        name = re.sub(r"[^\w-]+", "-", found.title).strip("-")[:60] or "conversation"
        if form == "json":
            text = found.model_dump_json(indent=2)
            return Export(name=f"{name}.json", type="application/json", text=text)
        return Export(name=f"{name}.md", type="text/markdown", text=markdown_of(found))


def markdown_of(conversation: Conversation) -> str:
    """A conversation as Markdown; of media the names and what was used of them."""
    lines = [f"# {conversation.title}", ""]
    if conversation.system:
        lines += [f"> {line}" for line in conversation.system.splitlines()] + [""]
    for turn in conversation.turns:
        lines += ["## Question", ""]
        for shown, report in zip(turn.media, turn.reports, strict=False):
            tokens = () if report.tokens is None else (f"{report.tokens} tokens",)
            facts = ", ".join((*facts_of(report), *tokens))
            lines.append(f"- {shown.kind}: {shown.name} ({facts})")
        answer = "(not answered)" if turn.finish_reason == "unanswered" else turn.answer
        lines += ["", turn.message, "", f"## Answer ({conversation.model})", "", answer, ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
