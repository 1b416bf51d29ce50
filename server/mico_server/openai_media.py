"""Media of OpenAI's content parts: data URIs, ids of stored media, files, and fetched URLs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from mico_chat.errors import LimitError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.messages import (
    Message,
    Resolver,
    from_openai,
    openai_part,
    urls_of,
    with_depth_scale,
)
from mico_chat.similarity import Item
from mico_server.local_files import SCHEME, file_of
from mico_server.service import Service
from mico_server.uploads import MEDIA_SCHEME, display_name
from mico_server.work_folder import WorkFolder


@dataclass(frozen=True)
class MediaReader:
    """Reads a tenant's requests; what their URLs name is written to ``folder``."""

    service: Service
    tenant: str
    folder: WorkFolder
    depth_scale: float

    async def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Messages of the OpenAI chat format.

        Raises:
            RequestError: naming the message and the part by index, and what is wrong.
            NotFoundError: for a stored medium that there is not.
            MediaError: for a URL that cannot be fetched.
            LimitError: for more media than a request may have.
        """
        resolve = await self._resolver(messages, "messages")
        # In a thread: a data URI may have many megabytes.
        read = await asyncio.to_thread(from_openai, messages, resolve=resolve)
        self._check_number(sum(len(message.media) for message in read), "messages")
        return with_depth_scale(read, self.depth_scale)

    async def items(self, items: Sequence[Any], name: str) -> list[Item]:
        """Texts, content parts of media, or lists of these that are taken together.

        Raises:
            MicoError: as :meth:`messages`.
        """
        parts = [item if isinstance(item, list) else [item] for item in items]
        resolve = await self._resolver([{"content": part} for part in parts], name)

        def read() -> list[Item]:
            return [self._item(item, f"{name}[{n}]", resolve) for n, item in enumerate(items)]

        return await asyncio.to_thread(read)

    async def _resolver(self, messages: Sequence[Mapping[str, Any]], name: str) -> Resolver:
        """Looks up and fetches what URLs name, all at the same time."""
        urls = urls_of(messages)
        self._check_number(len(urls), name)
        parts = await asyncio.gather(
            *(self._part(kind, url, f"{name}-{n}") for n, (kind, url) in enumerate(urls))
        )
        known = dict(zip(urls, parts, strict=True))
        return lambda kind, url: known[kind, url]

    def _check_number(self, n: int, name: str) -> None:
        most = self.service.settings.max_media
        if n > most:
            raise LimitError(name, f"{n} media, over the limit of {most} (MICO_SERVER_MAX_MEDIA)")

    async def _part(self, kind: Kind, url: str, file: str) -> MediaFile:
        if url.startswith(MEDIA_SCHEME):
            id_ = url.removeprefix(MEDIA_SCHEME)
            return await self.service.stored_part(self.tenant, id_, kind)
        field = f"{kind}_url"
        folder = self.service.settings.allow_files
        if folder is not None and url.startswith(SCHEME):
            named = await asyncio.to_thread(file_of, url, folder, field)
            return MediaFile(kind, named, name=display_name(named.name) or kind)
        if self.service.fetcher is None:
            raise RequestError.at(
                field,
                "this server does not fetch URLs (MICO_SERVER_ALLOW_URLS); send the medium as a "
                f"data URI (data:...;base64,) or upload it to /v1/media and send {MEDIA_SCHEME}ID",
            )
        path = self.folder.file(file)
        await self.service.fetcher.fetch(url, path, field)
        return MediaFile(kind, path, name=display_name(urlsplit(url).path) or kind)

    def _item(self, item: Any, where: str, resolve: Resolver) -> Item:
        if not isinstance(item, list):
            return self._read(item, where, resolve)
        return [self._read(part, f"{where}[{n}]", resolve) for n, part in enumerate(item)]

    def _read(self, part: Any, where: str, resolve: Resolver) -> str | MediaFile:
        if isinstance(part, str):
            return part
        read = openai_part(where, part, resolve)
        if isinstance(read, MediaFile):
            return replace(read, depth_scale=self.depth_scale)
        return read.text
