"""Media as cards: the kinds that a file can be, its preview, and the server's report.

Files come from users. The media layer's own worker process decodes them for a preview, under its
limits, with as many frames as the server's report says it used.
"""

import asyncio
import base64
import io
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mico_chat.errors import MicoError
from mico_chat.media import Audio, Depth, MediaDecoder, MediaFile, MediaLimits, Medium, Pages, Video
from mico_chat.media import file as formats
from mico_chat.media.kinds import KINDS, TABLE, Kind, kinds_of_format
from mico_chat.media.medium import MediaReport
from mico_chat.media.view import View
from mico_chat.wire import MediaObject, ShownMedium
from mico_ui import describe, routes
from mico_ui.browser.visitor import Frozen, Visitor
from mico_ui.client import ApiError
from mico_ui.describe import MEL_SIZE, Pixels, depth_pixels, distances, mel_pixels, wave_pixels
from mico_ui.routes import MediumId, Upload

STILL_SIDE, FRAME_SIDE = 360, 176  # longest sides of preview pictures, in pixels


class Picture(Frozen):
    """``src`` is a data URI, ``alt`` is for people who cannot see the picture. Of a page there is
    its ``text``, and maybe nothing else."""

    src: str
    alt: str
    caption: str = ""
    text: str = ""


class Preview(Frozen):
    """``never`` are the kinds as which such pixels are refused."""

    pictures: tuple[Picture, ...]
    facts: tuple[str, ...] = ()
    never: tuple[Kind, ...] = ()


class Card(Frozen):
    """A medium as the page shows it. ``kinds`` are the kinds that its file could be.

    A card without ``pictures`` makes the page ask for them. ``facts`` describe the part of the
    medium that the model gets, ``cut`` the part that it does not get. ``spoken`` is what is said in
    it, ``pages`` the numbers of those of a document. A ``pinned`` one stays where its
    conversation is shortened; no model is shown a ``heard`` sound.
    """

    id: str
    kind: Kind
    name: str
    kinds: tuple[Kind, ...] = ()
    tokens: int | None = None
    pictures: tuple[Picture, ...] = ()
    facts: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    spoken: str = ""
    pinned: bool = False
    heard: bool = False
    pages: tuple[int, ...] = ()


class Attached(Frozen):
    """A file that the page has uploaded: ``path`` in its cache, ``kind`` if the user chose one.

    ``reads`` are the kinds that the chosen model reads.
    """

    path: Path
    name: str
    kind: Kind | None = None
    reads: tuple[Kind, ...] = KINDS

    def readable(self, kinds: Sequence[Kind], model: str) -> tuple[Kind, ...]:
        """Those of the kinds that the file can be that the model reads; an error for none."""
        found = tuple(kind for kind in kinds if kind in self.reads)
        if not found:
            read = ", ".join(TABLE[kind].words for kind in self.reads) or "text alone"
            wrong = f"{self.name} is {TABLE[kinds[0]].words}, but {model or 'this model'} reads"
            raise ApiError(f"{wrong} {read}. Choose another model for it.", status=415)
        return found


def kinds_of(head: bytes, name: str) -> tuple[Kind, ...]:
    """The kinds that a file can be, the likeliest first; ``head`` is its first HEAD_BYTES.

    A 16-bit grey PNG and a numpy array are depth by nature. A WebM or MP4 without a picture is a
    sound, which only its decoder can tell: video comes first.
    """
    fmt = formats.format_of(head)
    # A PNG's header has the bit depth in byte 24 and the colour type in byte 25: 0 is grey.
    deep_grey = fmt == "PNG" and head[12:16] == b"IHDR" and head[24:26] == b"\x10\x00"
    if deep_grey:
        return ("depth",)
    if found := kinds_of_format(fmt):
        return found
    if not head:
        raise ApiError(f"{name}: the file is empty", status=415)
    rows = TABLE.values()
    *taken, last = (f"{row.plural} ({row.files or ', '.join(row.formats)})" for row in rows)
    known = f"This chat takes {', '.join(taken)} and {last}."
    raise ApiError(f"{name}: the bytes {formats.looks_like(fmt, head)}. {known}", status=415)


def preview_of(
    medium: Medium, name: str, side: int = STILL_SIDE, pages: Sequence[int] | None = None
) -> Preview:
    """Pictures of a medium, of a document these ``pages``; a still and a page have at most ``side``
    pixels on a side."""
    match medium:
        case Audio():
            return Preview(pictures=_of_sound(medium, f"the sound {name}"))
        case Video():
            frames = [
                _picture(frame, FRAME_SIDE, f"frame of {name} at {time:.1f} s", f"{time:.1f} s")
                for frame, time in zip(medium.frames, medium.times, strict=True)
            ]
            sound = _of_sound(medium.audio, f"the sound track of {name}") if medium.audio else ()
            return Preview(pictures=(*frames, *sound))
        case Depth():
            facts = [distances(medium)]
            if holes := float(np.isnan(medium.values).mean()):
                facts.append(f"not measured: {max(holes, 0.01):.0%} (grey)")
            alt, caption = f"depth map {name} in colours, {facts[0]}", "bright is near, dark is far"
            if medium.estimated:
                alt, caption = f"estimated {alt}", f"estimated: {caption}"
            colours = depth_pixels(medium.values)
            shown = _picture(colours, side, alt, caption, lossless=True)
            return Preview(pictures=(shown,), facts=tuple(facts), never=("normal",))
        case Pages():
            texts = {one.page: one.text for one in medium.report.written or ()}
            drawn = list[Picture]()
            for n in pages or medium.report.pages or ():
                caption, page = f"{TABLE[medium.kind].piece} {n}", medium.numbered.get(n)
                alt, text = f"{caption} of {name}", texts.get(n, "")
                found = Picture(src="", alt=alt, caption=caption)
                if page is not None:
                    found = _picture(page.pixels, side, alt, caption)
                drawn += [found.model_copy(update={"text": text})] if page or text else []
            return Preview(pictures=tuple(drawn))
    noun, (red, green, blue) = TABLE[medium.kind].noun, np.moveaxis(medium.pixels, 2, 0)
    in_colour = bool((red != green).any() or (green != blue).any())
    still = _picture(medium.pixels, side, f"{noun} {name}")
    return Preview(pictures=(still,), never=("depth" if in_colour else "normal",))


def _of_sound(sound: Audio, name: str) -> tuple[Picture, Picture]:
    wave, mel = wave_pixels(sound.samples), mel_pixels(sound.samples, sound.sample_rate)
    of_wave = f"waveform of {name}, {sound.seconds:.1f} s"
    of_mel = f"spectrogram of {name}: time to the right, pitch upwards"
    return (
        _picture(wave, MEL_SIZE[0], of_wave, "waveform", lossless=True),
        _picture(mel, MEL_SIZE[0], of_mel, "spectrogram (pitch over time)"),
    )


def _picture(
    pixels: Pixels, side: int, alt: str, caption: str = "", *, lossless: bool = False
) -> Picture:
    """Pixels (H, W, 3) as a picture inside the page, its longest side at most ``side``."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    # By Pillow's own method, 4, it would take twice as long, and be 3 % smaller.
    picture.save(buffer, "WEBP", quality=82, lossless=lossless, method=2)
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(src=f"data:image/webp;base64,{content}", alt=alt, caption=caption)


@dataclass
class Previewer:
    """Makes previews and keeps the last ones, for each user apart, within ``max_bytes``."""

    max_bytes: int = 64 << 20
    _kept: dict[Any, Preview] = field(default_factory=dict)  # the oldest first
    _decoder: MediaDecoder = field(default_factory=MediaDecoder)

    def kept(self, user: str, medium_id: str, report: MediaReport) -> Preview | None:
        return self._kept.get((user, medium_id, report.kind, report.pages))

    async def make(
        self, user: str, medium_id: str, source: Path | bytes, report: MediaReport
    ) -> Preview:
        preview = await asyncio.to_thread(self.draw, source, report)
        self._kept[user, medium_id, report.kind, report.pages] = preview
        n_bytes = sum(len(p.src + p.text) for kept in self._kept.values() for p in kept.pictures)
        while n_bytes > self.max_bytes:
            oldest = self._kept.pop(next(iter(self._kept)))
            n_bytes -= sum(len(picture.src + picture.text) for picture in oldest.pictures)
        return preview

    def draw(self, source: Path | bytes, report: MediaReport, side: int = STILL_SIDE) -> Preview:
        """Decode a file and draw it, and keep nothing."""
        # A photograph is decoded about as small as it is drawn: a JPEG at an eighth takes a tenth.
        pixels = side**2 if report.kind == "image" else None
        view = View(pages=report.pages or (), pixels=pixels)
        file = MediaFile(report.kind, source, report.name, view=view)
        medium = self._decoder.decode(file)
        if isinstance(medium, Video) and not _same_frames(medium, report):
            # The server uses another number of frames than this machine's limits say.
            limits = MediaLimits(max_frames=max(1, report.frames_used or 1))
            with MediaDecoder(limits) as decoder:
                medium = decoder.decode(file)
        return preview_of(medium, report.name, side, report.pages)

    def close(self) -> None:
        self._decoder.close()


def _same_frames(video: Video, report: MediaReport) -> bool:
    times = report.frame_times
    return times is None or (len(times) == len(video.times) and np.allclose(times, video.times))


@dataclass(frozen=True)
class MediaDesk:
    """Takes media in and shows them. ``uploads`` is the folder that the page's uploads are in.

    ``drop`` gets the path of an upload that is no longer needed.
    """

    api: str
    previewer: Previewer
    uploads: Path
    drop: Callable[[Path], None] = lambda path: None

    async def attach(self, visitor: Visitor, file: Attached) -> Card:
        """Send an upload to the server; any other path is refused, as a page must name none."""
        path = self.uploaded(file.path)
        try:
            return await self.attach_path(visitor, file.model_copy(update={"path": path}))
        finally:
            self.drop(path)

    def uploaded(self, path: Path) -> Path:
        """The path of an upload; an error for any other path."""
        path = path.resolve()
        if not path.is_relative_to(self.uploads.resolve()) or not path.is_file():
            raise ApiError(f"{path.name}: no such upload; add the file again", status=415)
        return path

    async def attach_path(self, visitor: Visitor, file: Attached) -> Card:
        with file.path.open("rb") as opened:
            kinds = kinds_of(opened.read(formats.HEAD_BYTES), file.name)
        kinds = file.readable(kinds, visitor.model)
        upload = Upload(file.kind or kinds[0], file.path, file.name)
        # What is written or said in it comes with the estimate of the question, or the answer.
        call = routes.upload(upload, model=visitor.model or None, read=False)
        stored = await visitor.send(self.api, call)
        card = await self._card(visitor, stored.id, report_of(stored), file.path)
        made = self.previewer.kept(visitor.user, stored.id, report_of(stored))
        never = () if made is None else made.never
        return card.model_copy(update={"kinds": tuple(one for one in kinds if one not in never)})

    async def estimate_depth(self, visitor: Visitor, id: str) -> Card:
        """The card of a depth map that the server estimates of a stored picture."""
        call = routes.estimate_depth(id, model=visitor.model or None)
        stored = await visitor.send(self.api, call)
        content = await visitor.send(self.api, routes.medium_content(stored.id))
        card = await self._card(visitor, stored.id, report_of(stored), content)
        return card.model_copy(update={"kinds": (stored.kind,)})

    async def preview(self, visitor: Visitor, shown: MediumId) -> Card:
        """The card of a medium that the server has, with pictures."""
        stored = await visitor.send(self.api, routes.medium(shown.id))
        changed: dict[str, Any] = {"kind": shown.kind, "name": stored.name}
        changed |= {"pages": tuple(dict.fromkeys(shown.pages))} if shown.pages else {}
        report = report_of(stored).model_copy(update=changed)
        if (kept := self.kept(visitor, shown.id, report, whole=True)).pictures:
            return kept
        content = await visitor.send(self.api, routes.medium_content(shown.id))
        return await self._card(visitor, shown.id, report, content)

    async def original(self, visitor: Visitor, medium_id: str) -> Path:
        """The file itself, in a folder of the page's cache whose name nobody can guess."""
        stored = await visitor.send(self.api, routes.medium(medium_id))
        content = await visitor.send(self.api, routes.medium_content(medium_id))
        folder = self.uploads / secrets.token_urlsafe(24)
        path = folder / (Path(stored.name).name or stored.kind)

        def write() -> None:
            folder.mkdir(parents=True)
            path.write_bytes(content)

        await asyncio.to_thread(write)
        return path

    def kept(
        self, visitor: Visitor, medium_id: str, report: MediaReport, *, whole: bool = False
    ) -> Card:
        """A card; that of a document has pages if it is ``whole``: they are sent once."""
        preview = self.previewer.kept(visitor.user, medium_id, report) or Preview(pictures=())
        return Card(
            id=medium_id,
            pictures=preview.pictures if whole or report.pages is None else (),
            pages=report.pages or (),
            facts=(*describe.facts(report), *preview.facts),
            cut=describe.cuts(report),
            spoken=describe.joined(report.spoken or ()),
            **report.model_dump(include={"kind", "name", "tokens"}),
        )

    def own_cards(
        self, visitor: Visitor, media: Sequence[MediumId], reports: Sequence[MediaReport]
    ) -> tuple[Card, ...]:
        """The cards of a question's own media, of which the last reports are."""
        own = zip(media, reports[len(reports) - len(media) :], strict=False)
        return tuple(self.kept(visitor, shown.id, report) for shown, report in own)

    def cards(
        self, visitor: Visitor, media: Sequence[ShownMedium], reports: Sequence[MediaReport]
    ) -> tuple[Card, ...]:
        if len(reports) != len(media):
            reports = [MediaReport(name=m.name, kind=m.kind) for m in media]
        return tuple(
            self.kept(
                visitor, m.id, r.model_copy(update={"name": m.name, "kind": m.kind})
            ).model_copy(update={"pinned": m.pinned, "heard": m.heard})
            for m, r in zip(media, reports, strict=True)
        )

    async def _card(
        self, visitor: Visitor, medium_id: str, report: MediaReport, source: Path | bytes
    ) -> Card:
        try:
            await self.previewer.make(visitor.user, medium_id, source, report)
        except MicoError as error:
            card = self.kept(visitor, medium_id, report, whole=True)
            return card.model_copy(update={"cut": (*card.cut, f"no preview: {error}")})
        return self.kept(visitor, medium_id, report, whole=True)


def report_of(stored: MediaObject) -> MediaReport:
    return stored.report or MediaReport(name=stored.name, kind=stored.kind)
