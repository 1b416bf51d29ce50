"""Media of OpenAI's content parts: data URIs, ids of stored media, files, and fetched URLs."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mico_chat.errors import LimitError, RequestError
from mico_chat.media import MediaFile
from mico_chat.media.kinds import Kind
from mico_chat.messages import Message, Resolver, from_openai, openai_part, urls_of
from mico_chat.similarity import Item
from mico_server.service import Service
from mico_server.settings import ServerSettings
from mico_server.store.blobs import WorkFolder

MEDIA_SCHEME = "media:"
"""Stands before a stored medium's id, in place of a URL or a file."""

FILE_SCHEME = "file://"


@dataclass(frozen=True)
class MediaReader:
    """Reads a tenant's requests; the media that their URLs name are written to ``folder``."""

    service: Service
    tenant: str
    folder: WorkFolder

    async def messages(
        self, messages: Sequence[Mapping[str, Any]], name: str = "messages"
    ) -> list[Message]:
        """``name`` is the field of the messages, which errors name."""
        resolve = await self._resolver(messages, name)
        # In a thread: a data URI may have many megabytes.
        read = await asyncio.to_thread(from_openai, messages, resolve=resolve, name=name)
        check_number(sum(len(message.media) for message in read), name, self.service.settings)
        return read

    async def items(self, items: Sequence[Any], name: str, depth_scale: float) -> list[Item]:
        """Texts, content parts of media, or lists of these, each list being one item."""
        parts = [item if isinstance(item, list) else [item] for item in items]
        resolve = await self._resolver([{"content": part} for part in parts], name)

        def read() -> list[Item]:
            return [one(item, f"{name}[{n}]") for n, item in enumerate(items)]

        def one(item: Any, where: str) -> Item:
            if isinstance(item, list):
                return [part(value, f"{where}[{n}]") for n, value in enumerate(item)]
            return part(item, where)

        def part(value: Any, where: str) -> str | MediaFile:
            if isinstance(value, str):
                return value
            read = openai_part(where, value, resolve)
            if isinstance(read, MediaFile):
                return replace(read, depth_scale=depth_scale)
            return read.text

        return await asyncio.to_thread(read)

    async def _resolver(self, messages: Sequence[Mapping[str, Any]], name: str) -> Resolver:
        urls = urls_of(messages)
        check_number(len(urls), name, self.service.settings)
        parts = await asyncio.gather(
            *(self._part(kind, url, f"{name}-{n}") for n, (kind, url) in enumerate(urls))
        )
        known = dict(zip(urls, parts, strict=True))
        return lambda kind, url: known[kind, url]

    async def _part(self, kind: Kind, url: str, file: str) -> MediaFile:
        if url.startswith(MEDIA_SCHEME):
            id_ = url.removeprefix(MEDIA_SCHEME)
            return await self.service.stored_part(self.tenant, id_, kind)
        field = f"{kind}_url"
        folder = self.service.settings.allow_files
        if folder is not None and url.startswith(FILE_SCHEME):
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


def check_number(n: int, name: str, settings: ServerSettings) -> None:
    if n > settings.max_media:
        limit = f"over the limit of {settings.max_media} (MICO_SERVER_MAX_MEDIA)"
        raise LimitError(name, f"{n} media, {limit}")


def file_of(url: str, folder: Path, where: str) -> Path:
    """The file in ``folder`` that a ``file://`` URL names, symbolic links followed.

    Off by default: any client can have every medium of the folder described. A file elsewhere and a
    missing file get the same message, which must not tell what files the machine has.
    """
    parts = urlsplit(url)
    try:
        path = Path(unquote(parts.path)).resolve(strict=True)
        inside = path.is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError, RuntimeError):  # missing, too long, with a NUL, links in a circle
        inside = False
    if parts.netloc not in ("", "localhost") or not inside:
        raise RequestError.at(
            where,
            "does not name a file in the folder that this service may read "
            "(MICO_SERVER_ALLOW_FILES)",
        )
    return path


def display_name(filename: str) -> str:
    """The last part of a client's file name, printable and short: it appears in messages only."""
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(character for character in last if character.isprintable())[:100]
