"""Decoded media: numpy arrays with a report. Media as a prompt has them: their context tokens.

A medium is a :class:`~mico_chat.media.file.MediaFile`, then decoded a :data:`Medium` with a
:class:`MediaReport`, then a :class:`MeasuredMedium`, which gets a :class:`ContextBlock` when it is
encoded.

Legend: H height, W width, T frames, n samples or context tokens, L width of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from mico_chat.media.kinds import TABLE, Kind
from mico_chat.media.taught import TaughtName
from mico_chat.media.view import View

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE = 16_000  # samples a second of every decoded sound (mono)


class WrittenText(BaseModel):
    """A text in a picture, in a video's frame at ``time`` (seconds), or on a ``page``, 1 the first.

    ``box`` is the left, top, right and bottom edge, as parts of the width and the height: 0 to 1.
    ``confidence`` is the recogniser's own, from 0 to 1.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    box: tuple[float, float, float, float]
    confidence: float
    time: float | None = None
    page: int | None = None


class SpokenText(BaseModel):
    """What was said in a recording from second ``start`` to ``end``.

    ``confidence``, from 0 to 1, is the mean probability that the recogniser gave its tokens.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    start: float
    end: float
    confidence: float


class MediaReport(BaseModel):
    """What a medium holds, and which part of it is used. Sizes and rates are the file's."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Kind
    format: str = "array"
    bytes: int = 0
    width: int | None = None
    height: int | None = None
    seconds: float | None = None  # length of a video clip; of a sound, the length kept
    frames_used: int | None = None
    frames_total: int | None = None
    frame_times: list[float] | None = None
    pages: tuple[int, ...] | None = None
    """The numbers, from 1, of a document's pages that are used; of a page's picture, its number."""
    sample_rate: int | None = None
    channels: int | None = None
    audio_used: bool | None = None
    """Of a video: True if its sound is used, False if it is not, None if there is no sound."""
    cut: list[str] = []  # sentences on what was left out or scaled down
    shown_as: Literal["picture"] | None = None
    """"picture" is a map that the model lacks, shown to it as a picture with a legend."""
    estimated: str | None = None
    """This model estimated the depth map from a picture; None means measured, rendered or
    unknown."""
    metric: bool | None = None
    """Of a depth map: True if its distances are metres, False if they have no unit."""
    tokens: int | None = None  # context tokens, with those of the sound track
    written: tuple[WrittenText, ...] | None = None
    """The text in a picture or in a video's frames, in reading order; None: it was not read."""
    spoken: tuple[SpokenText, ...] | None = None
    """It is the speech in a sound or in a video's sound track; None means that nobody listened to
    it."""
    cached: bool | None = None
    """True: its context tokens were in the cache, or another request was computing them."""
    decode_ms: float | None = None
    encode_ms: float | None = None
    """These are milliseconds in the media encoder, waiting included. ``decode_ms`` and
    ``encode_ms`` are None if the context tokens were cached."""

    def of_pages(self, pages: Sequence[int]) -> MediaReport:
        """The report of a document of which these pages are used."""
        cut = [line for line in self.cut if not SENT.search(line)]
        if self.frames_total != len(pages):
            cut.insert(0, _sent(pages, self.frames_total))
        found = {"pages": tuple(pages), "frames_used": len(pages), "cut": cut}
        return self.model_copy(update=found)


SENT = re.compile(r"^pages? .* of \d+ (is|are) sent$")
"""The sentence of ``cut`` that says which pages are used."""


def _sent(pages: Sequence[int], total: int | None) -> str:
    """``pages 1 to 4 and 12 of 30 are sent``; the numbers ascend."""
    runs: list[list[int]] = []
    for n in pages:
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    *texts, last = (" to ".join(map(str, run)) for run in runs or [[0]])
    said = " and ".join(filter(None, (", ".join(texts), last)))
    page, are = ("page", "is") if len(pages) == 1 else ("pages", "are")
    return f"{page} {said} of {total} {are} sent"


_NO_REPORT = MediaReport(name="", kind="image")


def _quoted(texts: Iterable[WrittenText | SpokenText]) -> str:
    """Texts in one line, which holds no quotation mark: the mark behind it ends it."""
    return " ".join(" ".join(one.text for one in texts).split()).replace('"', "'")


def _whole(texts: Iterable[WrittenText]) -> str:
    """The text of a page as it is. Of several lines, or with a quotation mark, it stands between
    lines of grave accents: more of them than it has in a row."""
    text = "\n".join(one.text for one in texts)
    if not re.search(r'[\n"]', text):
        return f' "{text}"'
    fence = "`" * (1 + max(map(len, re.findall("``+", text)), default=2))
    return f"\n{fence}\n{text}\n{fence}"


@dataclass(frozen=True)
class Words:
    """What was recognised in a medium: text and speech as in :class:`MediaReport`.

    ``cut`` has sentences on the words that were left out.
    """

    written: tuple[WrittenText, ...] | None = None
    spoken: tuple[SpokenText, ...] | None = None
    cut: tuple[str, ...] = ()

    @property
    def spoken_line(self) -> str:
        """The speech as a prompt has it; empty if there is none."""
        return f'A voice says: "{_quoted(self.spoken)}"' if self.spoken else ""

    def written_line(self, kind: Kind) -> str:
        """The text as a prompt has it, which was read in a medium of this kind: a line a page."""
        lines = []
        for page, texts in groupby(self.written or (), lambda one: one.page):
            if page is None:
                lines.append(f'Text in the {TABLE[kind].noun}: "{_quoted(texts)}"')
            else:
                lines.append(f"Text on page {page}:{_whole(texts)}")
        return "\n".join(lines)

    def without_page(self, page: int | None) -> Words:
        """The words without those on a page; None takes none away."""
        kept = (one for one in self.written or () if page is None or one.page != page)
        return replace(self, written=tuple(kept))

    def on_pages(self, pages: Iterable[int]) -> Words:
        """The words on some pages."""
        kept = tuple(one for one in self.written or () if one.page in {*pages})
        return replace(self, written=kept if self.written is not None else None)

    @property
    def nbytes(self) -> int:
        """About the memory that the words take: the texts, and half a kilobyte for each."""
        texts = [line.text for line in self.written or ()]
        texts += [sentence.text for sentence in self.spoken or ()]
        return sum(512 + 4 * len(text) for text in texts)


@dataclass(frozen=True, eq=False)
class _Decoded:
    """The report of a decoded medium. A medium that is made of arrays describes itself."""

    arrays: ClassVar[tuple[str, ...]] = ()
    """The names of the fields that hold arrays; the first is what it shows or says."""
    report: MediaReport = field(default=_NO_REPORT, repr=False, kw_only=True)
    view: View = field(default=View(), repr=False, kw_only=True)

    @property
    def name(self) -> str:
        return self.report.name

    @property
    def inner(self) -> tuple[Medium, ...]:
        """The media in it, which are encoded behind it."""
        return ()

    @property
    def own_arrays(self) -> list[NDArray[Any]]:
        return [getattr(self, name) for name in self.arrays]

    @property
    def all_arrays(self) -> list[NDArray[Any]]:
        """Its arrays, then those of the media in it."""
        return [*self.own_arrays, *(array for one in self.inner for array in one.all_arrays)]

    def _describe(self, kind: Kind, **found: Any) -> None:
        if self.report is _NO_REPORT:
            object.__setattr__(self, "report", MediaReport(name=kind, kind=kind, **found))


def _check(name: str, array: NDArray[np.generic], dtype: type, shape: str, *, ok: bool) -> None:
    if array.dtype != dtype or not ok:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}; it must be {np.dtype(dtype)} {shape}"
        )


@dataclass(frozen=True, eq=False)
class _Picture(_Decoded):
    pixels: NDArray[np.uint8]
    kind: ClassVar[Kind]
    arrays: ClassVar[tuple[str, ...]] = ("pixels",)

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        _check("pixels", self.pixels, np.uint8, "(H, W, 3)", ok=len(shape) == 3 and shape[2] == 3)
        self._describe(self.kind, width=shape[1], height=shape[0])


@dataclass(frozen=True, eq=False)
class Image(_Picture):
    """RGB pixels uint8 (H, W, 3)."""

    kind: ClassVar[Kind] = "image"


@dataclass(frozen=True, eq=False)
class Normal(_Picture):
    """A map of surface normals, x, y, z as R, G, B: pixels uint8 (H, W, 3)."""

    kind: ClassVar[Kind] = "normal"


@dataclass(frozen=True, eq=False)
class Pages(_Decoded):
    """Pictures that are one medium of a kind that is made of them; its text is in the report.

    Some pages have no picture: of a text file none has one.
    """

    kind: Kind
    pages: tuple[Image, ...]

    def __post_init__(self) -> None:
        numbers = tuple(range(1, len(self.pages) + 1))
        self._describe(self.kind, frames_used=len(numbers), frames_total=len(numbers))
        if self.report.pages is None:
            pages = zip(self.pages, numbers, strict=True)
            named = ((page, page.report.model_copy(update={"pages": (n,)})) for page, n in pages)
            pictures = tuple(replace(page, report=report) for page, report in named)
            object.__setattr__(self, "pages", pictures)
            report = self.report.model_copy(update={"pages": numbers})
            object.__setattr__(self, "report", report)
        if not self.report.pages:
            raise ValueError(f"a medium of kind {self.kind} needs at least one page")

    @property
    def inner(self) -> tuple[Medium, ...]:
        return self.pages

    @property
    def numbered(self) -> dict[int, Image]:
        """The pictures by the numbers of their pages."""
        return {n: page for page in self.pages for n in page.report.pages or ()}

    @property
    def unread(self) -> dict[int, Image]:
        """The pages, by number, whose text the report does not have."""
        read = {one.page for one in self.report.written or ()}
        return {n: page for n, page in self.numbered.items() if n not in read}


@dataclass(frozen=True, eq=False)
class Audio(_Decoded):
    """A sound: ``samples`` float32 (n,) in [-1, 1], mono, at ``sample_rate`` 16,000 Hz."""

    samples: NDArray[np.float32]
    sample_rate: int = SAMPLE_RATE
    kind: ClassVar[Kind] = "audio"
    arrays: ClassVar[tuple[str, ...]] = ("samples",)

    def __post_init__(self) -> None:
        _check("samples", self.samples, np.float32, "(n,)", ok=self.samples.ndim == 1)
        if self.sample_rate != SAMPLE_RATE:
            raise ValueError(f"sample_rate is {self.sample_rate}; it must be {SAMPLE_RATE}")
        self._describe(self.kind, seconds=self.seconds, sample_rate=self.sample_rate, channels=1)

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate


@dataclass(frozen=True, eq=False)
class Video(_Decoded):
    """Frames uint8 (T, H, W, 3) RGB, shown at ``times`` float64 (T,), seconds of the clip."""

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    audio: Audio | None = None
    kind: ClassVar[Kind] = "video"
    arrays: ClassVar[tuple[str, ...]] = ("frames", "times")

    def __post_init__(self) -> None:
        shape = self.frames.shape
        ok = len(shape) == 4 and shape[3] == 3 and shape[0] > 0
        _check("frames", self.frames, np.uint8, "(T, H, W, 3)", ok=ok)
        _check("times", self.times, np.float64, f"({shape[0]},)", ok=self.times.shape == shape[:1])
        self._describe(
            self.kind,
            width=shape[2],
            height=shape[1],
            frames_used=shape[0],
            frames_total=shape[0],
            frame_times=self.times.tolist(),
            audio_used=None if self.audio is None else True,
        )

    @property
    def inner(self) -> tuple[Medium, ...]:
        return () if self.audio is None else (self.audio,)


@dataclass(frozen=True, eq=False)
class Depth(_Decoded):
    """A depth map float32 (H, W), NaN in holes; larger is farther.

    ``metric`` values are metres; others are relative, in [0, 1].
    """

    values: NDArray[np.float32]
    metric: bool = True
    kind: ClassVar[Kind] = "depth"
    arrays: ClassVar[tuple[str, ...]] = ("values",)

    def __post_init__(self) -> None:
        shape = self.values.shape
        _check("values", self.values, np.float32, "(H, W)", ok=len(shape) == 2)
        self._describe(self.kind, width=shape[1], height=shape[0])

    @property
    def estimated(self) -> str | None:
        return self.report.estimated


Medium = Image | Audio | Video | Depth | Normal | Pages


def parts_of(medium: Medium) -> tuple[Medium, ...]:
    """The media that are encoded for a medium: itself, unless it is made of others, and those."""
    return medium.inner if isinstance(medium, Pages) else (medium, *medium.inner)


@dataclass(frozen=True, eq=False)
class ContextBlock:
    """Context tokens (n, W) of a medium; blocks of equal ``key`` hold equal tokens.

    W is the width of the language model's token vectors, or more: some models add rows to later
    layers too (:mod:`mico_chat.adapters.capture`). ``positions`` (A, n) count from the block's
    start on each axis of a rotary embedding with A axes, and the token after the block is
    ``n_positions`` further than its first; without them each token takes one position. ``inputs``
    are those of a model that runs alone, which encodes a medium itself: W is 0 then.

    Tokens of a block that is not ``causal`` attend to all tokens of the block, not only to those
    before them: the block must be computed as a whole.
    """

    tokens: Tensor
    key: bytes
    positions: Tensor | None = None
    n_positions: int = 0
    causal: bool = True
    inputs: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def is_finite(self) -> bool:
        return bool(self.tokens.isfinite().all())

    @property
    def nbytes(self) -> int:
        held = (self.tokens, self.positions, self.inputs)
        return sum(one.nbytes for one in held if one is not None)


@dataclass(frozen=True, eq=False)
class MeasuredMedium:
    """A medium as a prompt has it: its size, from which the number of its context tokens follows,
    its words, and its context tokens once it is encoded.

    ``units`` counts stills, frames or slices, ``n_tokens`` the context tokens without those of
    ``inner``: a video's sound track, or the pages of a medium that has no tokens of its own. A
    video's ``words`` include what is said in its sound track. ``cut`` has sentences on what the
    model's adapter left out; ``as_picture`` says that a map is shown as a picture. ``inputs`` are
    what the adapter encodes, ``notes`` what it puts into a prompt. The context tokens get the
    ``key``; the ``block`` that has them is None until then. ``taught`` are the names that somebody
    taught for such media, ``lora`` the adapter with which the model encodes it.
    """

    kind: Kind
    units: int
    inner: tuple[MeasuredMedium, ...] = ()
    report: MediaReport = field(default=_NO_REPORT, repr=False)
    words: Words = field(default=Words(), repr=False)
    n_tokens: int = 0
    cut: tuple[str, ...] = ()
    as_picture: bool = False
    notes: Any = field(default=None, repr=False)
    inputs: Any = field(default=None, repr=False)
    key: bytes = b""
    block: ContextBlock | None = None
    taught: tuple[TaughtName, ...] = field(default=(), repr=False)
    lora: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def parts(self) -> tuple[MeasuredMedium, ...]:
        """The media whose context tokens stand for it: itself, unless it is made of others."""
        return self.inner if TABLE[self.kind].made_of else (self, *self.inner)

    @property
    def pieces(self) -> Iterator[MeasuredMedium | str]:
        """The medium as a prompt has it: its parts; of a document the parts and texts of pages."""
        row, report = TABLE[self.kind], self.report
        if not row.made_of:
            yield from self.parts
            return
        sent = "".join(f" ({line})" for line in report.cut if SENT.search(line))
        yield f"{row.label}{Path(report.name).name}{sent}\n"
        for n in report.pages or ():
            for one in (one for one in self.inner if n in (one.report.pages or ())):
                yield from (f"{row.piece.capitalize()} {n}: ", one, "\n")
            if text := self.words.on_pages([n]).written_line(self.kind):
                yield f"{text}\n"

    @property
    def all_tokens(self) -> int:
        return sum(len(part) for part in self.parts)

    def within(self, view: View) -> MeasuredMedium:
        """A document with the most pages that its view says."""
        known, most = self.report.pages, view.most_pages
        if known is None or most is None or len(known) <= most:
            return self
        turn = (n for n in view.in_turn(self.report.frames_total or max(known)) if n in known)
        kept = sorted(islice(turn, most))
        inner = tuple(one for one in self.inner if set(one.report.pages or ()) <= set(kept))
        report, words = self.report.of_pages(kept), self.words.on_pages(kept)
        return replace(self, inner=inner, report=report, words=words)

    @property
    def encoded(self) -> ContextBlock:
        """The block of a medium that is encoded."""
        assert self.block is not None, f"{self.report.name} is measured and not encoded"
        return self.block

    @property
    def nbytes(self) -> int:
        return sum(part.encoded.nbytes for part in self.parts)
