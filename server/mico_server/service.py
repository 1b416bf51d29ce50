"""What the routes share: the model, the stores and the settings, and who is asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from mico_chat.errors import RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_server.auth import Caller
from mico_server.conversations import ConversationStore
from mico_server.fetch import Fetcher
from mico_server.keys import KeyStore
from mico_server.media_store import MediaStore
from mico_server.metrics import Metrics
from mico_server.model_host import ModelHost
from mico_server.settings import ServerSettings


@dataclass(frozen=True)
class Service:
    """One running service. ``fetcher`` is None where media are not fetched from URLs."""

    settings: ServerSettings
    host: ModelHost
    keys: KeyStore
    media: MediaStore
    conversations: ConversationStore
    metrics: Metrics
    fetcher: Fetcher | None

    async def stored_part(self, tenant: str, media_id: str, kind: Kind) -> MediaFile:
        """A tenant's stored medium, to be shown as a ``kind``.

        Raises:
            NotFoundError: if there is none.
            RequestError: if it is of another kind.
            GoneError: if its file has vanished.
        """
        record = await self.media.get(tenant, media_id)
        if record.kind != kind:
            raise RequestError.at(
                kind, f"{media_id} ({record.name}) is of kind {record.kind}; show it as that"
            )
        return MediaFile(kind, self.media.path(record), record.name)


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def _caller(request: Request) -> Caller:
    return cast(Caller, request.state.caller)


# Not plain functions: those would be called in a thread each.
CurrentService = Annotated[Service, Depends(_service)]
CurrentCaller = Annotated[Caller, Depends(_caller)]
