"""Media of a chat: sent to the server as soon as they are dropped, and shown as cards.

A card is what the page needs of a medium: what it is, its preview, what of it was used, its tokens.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mico_chat.errors import MicoError
from mico_chat.media.kinds import Kind
from mico_chat.media.medium import MediaReport
from mico_ui import calls
from mico_ui.answers import ShownMedium
from mico_ui.browser.filetypes import HEAD_BYTES, kinds_of
from mico_ui.browser.previews import Picture, Previewer
from mico_ui.browser.profile import Profile
from mico_ui.calls import MediumId, Upload
from mico_ui.client import ApiError
from mico_ui.describe import size


class Card(BaseModel):
    """A medium as the page shows it.

    ``kinds`` are those it could be shown as instead. Without ``pictures`` none were made yet, and
    the page asks for them; ``facts`` and ``cut`` say in words what was used and what was not.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    kind: Kind
    name: str
    kinds: tuple[Kind, ...] = ()
    tokens: int | None = None
    pictures: tuple[Picture, ...] = ()
    facts: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()


class Shown(BaseModel):
    """A medium of a question, by the id of its upload."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    kind: Kind

    @property
    def attachment(self) -> MediumId:
        """As the client takes it."""
        return MediumId(self.kind, self.id)


class Attached(BaseModel):
    """A file that the page has uploaded: ``path`` in its cache, ``kind`` if the user chose one."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: Path
    name: str
    kind: Kind | None = None


@dataclass(frozen=True)
class MediaDesk:
    """Takes media in and shows them. ``uploads`` is the folder that the page's uploads are in."""

    api: str
    previewer: Previewer
    uploads: Path

    async def attach(self, profile: Profile, file: Attached) -> Card:
        """Send a file to the server, which decodes it, and make its preview.

        Raises:
            ApiError: for a file that is no medium, or that the server refuses.
        """
        path = self._inside(file.path)
        return await self.attach_path(profile, file.model_copy(update={"path": path}))

    async def attach_path(self, profile: Profile, file: Attached) -> Card:
        """As :meth:`attach`, for a file of this machine's own choice.

        Raises:
            ApiError: as :meth:`attach`.
        """
        path = file.path
        head = await asyncio.to_thread(_head, path)
        kinds = kinds_of(head, file.name)
        upload = Upload(file.kind or kinds[0], path, file.name)
        async with profile.client(self.api) as client:
            stored = await client.send(calls.upload(upload))
        report = stored.report or MediaReport(name=stored.name, kind=stored.kind)
        card = await self._card(profile, stored.id, report, path)
        return card.model_copy(update={"kinds": kinds})

    async def forget(self, profile: Profile, medium_id: str) -> None:
        """Take an upload back that no conversation shows.

        Raises:
            ApiError: when the server does not.
        """
        async with profile.client(self.api) as client:
            await client.send(calls.delete_medium(medium_id))

    async def preview(self, profile: Profile, shown: Shown) -> Card:
        """The card of a medium that the server has, with pictures.

        Raises:
            ApiError: when the server no longer has it.
        """
        async with profile.client(self.api) as client:
            stored = await client.send(calls.medium(shown.id))
            report = stored.report or MediaReport(name=stored.name, kind=stored.kind)
            report = report.model_copy(update={"kind": shown.kind, "name": stored.name})
            if (kept := self.kept(profile, shown.id, report)).pictures:
                return kept
            content = await client.send(calls.medium_content(shown.id))
        return await self._card(profile, shown.id, report, content)

    async def original(self, profile: Profile, medium_id: str) -> Path:
        """The file itself, in a folder of the page's cache whose name nobody can guess.

        Raises:
            ApiError: when the server no longer has it.
        """
        async with profile.client(self.api) as client:
            stored = await client.send(calls.medium(medium_id))
            content = await client.send(calls.medium_content(medium_id))
        folder = self.uploads / secrets.token_urlsafe(24)
        path = folder / (Path(stored.name).name or stored.kind)

        def write() -> None:
            folder.mkdir(parents=True)
            path.write_bytes(content)

        await asyncio.to_thread(write)
        return path

    def kept(self, profile: Profile, medium_id: str, report: MediaReport) -> Card:
        """The card of a medium, with its pictures if they were made before."""
        preview = self.previewer.kept(profile.user, medium_id, report.kind)
        return Card(
            id=medium_id,
            kind=report.kind,
            name=report.name,
            tokens=report.tokens,
            pictures=() if preview is None else preview.pictures,
            facts=facts_of(report) + (() if preview is None else preview.facts),
            cut=cut_of(report),
        )

    def cards(
        self, profile: Profile, media: list[ShownMedium], reports: list[MediaReport]
    ) -> list[Card]:
        """Cards of a turn's media, one report each."""
        blank = [MediaReport(name=m.name, kind=m.kind) for m in media]
        matched = reports if len(reports) == len(media) else blank
        return [
            self.kept(profile, m.id, r.model_copy(update={"name": m.name, "kind": m.kind}))
            for m, r in zip(media, matched, strict=True)
        ]

    async def _card(
        self, profile: Profile, medium_id: str, report: MediaReport, source: Path | bytes
    ) -> Card:
        try:
            await self.previewer.make(profile.user, medium_id, source, report)
        except MicoError as error:
            card = self.kept(profile, medium_id, report)
            return card.model_copy(update={"cut": (*card.cut, f"no preview: {error}")})
        return self.kept(profile, medium_id, report)

    def _inside(self, path: Path) -> Path:
        """The path, if it is an upload: a page must not name other files of this machine.

        Raises:
            ApiError: if it is none, or no longer there.
        """
        resolved = path.resolve()
        if not resolved.is_relative_to(self.uploads.resolve()) or not resolved.is_file():
            raise ApiError(f"{path.name}: no such upload; add the file again", status=415)
        return resolved


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def facts_of(report: MediaReport) -> tuple[str, ...]:
    """A report's facts in words: size, length, frames, sound."""
    facts = []
    if report.width and report.height:
        facts.append(f"{report.width} × {report.height} px")  # noqa: RUF001
    if report.seconds is not None:
        facts.append(f"{report.seconds:.1f} s")
    if report.frames_used is not None and report.frames_total is not None:
        some = ", spread evenly" if report.frames_used < report.frames_total else ""
        facts.append(f"{report.frames_used} of {report.frames_total} frames{some}")
    if report.kind == "video":
        heard = {True: "sound track used", False: "sound track not used", None: "no sound track"}
        facts.append(heard[report.audio_used])
    elif report.sample_rate:
        channels = {1: "mono", 2: "stereo"}.get(report.channels or 0, f"{report.channels} channels")
        facts.append(f"{report.sample_rate / 1000:g} kHz, {channels}")
    if report.format and report.bytes:
        facts.append(f"{report.format}, {size(report.bytes)}")
    return tuple(facts)


def cut_of(report: MediaReport) -> tuple[str, ...]:
    """What was left out of a medium, in a report's words.

    Without the number of frames, which is among its facts, and without the names of the limits,
    which only an operator can change.
    """
    words = (re.sub(r" \([^()]*MICO_\w+\)", "", cut) for cut in report.cut)
    return tuple(cut for cut in words if not cut.startswith("frames:"))
