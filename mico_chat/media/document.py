"""Documents: the pages of a PDF file as pictures, and their text, by PDFium; and files of text.

This PDFium has no JavaScript engine, and no attachment or link is followed.
"""

import codecs
import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from math import ceil, isqrt
from typing import Any

import numpy as np
from charset_normalizer import from_bytes

from mico_chat.errors import MediaError
from mico_chat.media.file import MediaFile, MediaLimits, decoder_errors
from mico_chat.media.medium import Image, MediaReport, Pages, WrittenText
from mico_chat.media.view import View

SCALE = 200 / 72
"""Pixels for each point of a page: 200 to the inch, if that is not beyond the limits."""

MOST_LOOKED = 1024
"""So many pages of a file are looked at for text."""

LEAF = 2000
"""A page of a file of text has at most so many characters: about 40 lines, and 500 tokens."""

_SAMPLE = 1 << 16
"""From so many bytes the encoding is recognised: those of lines that are not ASCII."""

_BOMS = (
    (codecs.BOM_UTF8, "utf_8"),
    (codecs.BOM_UTF32_LE, "utf_32"),  # which begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf_32"),
    (codecs.BOM_UTF16_LE, "utf_16"),
    (codecs.BOM_UTF16_BE, "utf_16"),
)
_USUAL = ("cp1252", "cp1251", "cp1254", "cp1253", "cp1250")
"""Of encodings that are as likely, those of Windows are those of most files."""
_WIDE = ["utf_16_le", "utf_16_be", "utf_32_le", "utf_32_be"]
"""Recognised where there are zeros alone: a few accented letters look like Chinese in these."""


def decode_document(file: MediaFile, limits: MediaLimits) -> Pages:
    """Pages, each with its own text where the file has it; pages that the view names come first.

    The first ``limits.max_pages`` of them are pictures too, if the file is no text. The texts have
    ``limits.max_characters`` together; one that is cut ends in "…". A page that cannot be read is
    white.
    """
    fmt = file.format
    if fmt != "PDF":
        with decoder_errors(file, limits, "this text cannot be read"):
            text, encoding = _text_of(file)
            leaves = _leaves(text)
            if not any(leaves):
                raise MediaError(file.name, "the file has no text: white space alone", "empty")
            own = "text" if encoding == "utf_8" else f"text ({encoding})"
            return _taken(file, limits, own, len(leaves), lambda n, seen: (None, leaves[n - 1]))
    with (
        decoder_errors(file, limits, f"damaged {fmt} (its pages cannot be read)"),
        _opened(file, fmt) as document,
    ):
        read = partial(_read, document, file, limits)
        return _taken(file, limits, fmt, len(document), read)


def _taken(
    file: MediaFile,
    limits: MediaLimits,
    fmt: str,
    total: int,
    read: Callable[[int, bool], tuple[Image | None, str]],
) -> Pages:
    """The pages that are within the limits. ``read`` gives a page's picture and text."""
    # Imported here: few files need it. The worker imports it before it is isolated.
    from pypdfium2 import PdfiumError

    pictures, texts, damaged = dict[int, Image](), dict[int, str](), list[int]()
    room, short = limits.max_characters, False
    for number in islice(file.view.in_turn(total), MOST_LOOKED):
        seen = len(pictures) < limits.max_pages
        try:
            picture, text = read(number, seen)
        except PdfiumError:
            picture, text = Image(np.full((16, 16, 3), 255, np.uint8)) if seen else None, ""
            damaged.append(number)
        if picture is not None:
            report = picture.report.model_copy(update={"pages": (number,)})
            pictures[number] = Image(picture.pixels, report=report)
        elif short or not room:
            break
        short |= len(text) > room
        if text and room:
            texts[number] = text if len(text) <= room else f"{text[:room]}…"
            room = max(0, room - len(text))
    if damaged and len(damaged) == len(pictures):
        raise file.damaged(f"damaged {fmt} (none of its {total} pages can be read)")
    cut = [f"page {number} is damaged and shown white" for number in damaged]
    missing = [n for n in file.view.pages if n > total]
    cut += [f"there is no page {n}: it has {total}" for n in missing]
    if short:
        cut.append(f"only the first {limits.max_characters} characters of its text are used")
    sent = sorted(pictures.keys() | texts.keys())
    if not sent:
        reason = f"nothing of it fits max_characters, {limits.max_characters}"
        raise MediaError(file.name, f"{reason}; raise it with MICO_MEDIA_MAX_CHARACTERS")
    written = [
        WrittenText(text=texts[n], box=(0, 0, 1, 1), confidence=1.0, page=n)
        for n in sent
        if n in texts
    ]
    report = file.report(fmt, frames_total=total, written=tuple(written) or None, cut=cut)
    shown = tuple(pictures[n] for n in sent if n in pictures)
    return Pages(file.kind, shown, report=report.of_pages(sent))


# --- text -----------------------------------------------------------------------------------------


def _text_of(file: MediaFile) -> tuple[str, str]:
    """The text of a file, without control characters but tabs and line feeds, and its encoding."""
    data = file.read()
    encoding = _encoding_of(data)
    if encoding is not None:
        try:
            return _cleaned(data.decode(encoding)), encoding
        except UnicodeDecodeError:
            pass
    how = "no known encoding" if encoding is None else f"{encoding}, but not all of it can be read"
    raise MediaError(file.name, f"the text is of {how}; save it as UTF-8", "unsupported")


def _encoding_of(data: bytes) -> str | None:
    if found := next((name for bom, name in _BOMS if data.startswith(bom)), None):
        return found
    wide, text = b"\0" in data[:_SAMPLE], data.decode(errors="replace")
    signs = len(text) - len(text.encode("ascii", "ignore"))
    # An escape begins signs in ISO 2022. Of UTF-8 a few bytes may be damaged.
    if 20 * text.count("\ufffd") <= signs and not wide and b"\x1b" not in data:
        return "utf_8"
    lines = [data] if wide else (line for line in data.split(b"\n") if not line.isascii())
    sample = b"\n".join(lines)[:_SAMPLE] or data[:_SAMPLE]
    matches = from_bytes(sample, cp_exclusion=[] if wide else _WIDE)
    best = matches.best()
    if _is_western(sample) and not (best and best.coherence):
        return "cp1252"
    likely = {one.encoding for one in matches if best and one.chaos <= best.chaos}
    own = None if best is None else best.encoding
    return next((name for name in _USUAL if name in likely), own)


def _is_western(sample: bytes) -> bool:
    """Whether it is letters of western Europe, few of them accented: no language may be known."""
    text = sample.decode("cp1252", errors="replace")
    marked = "".join(filter(lambda sign: not sign.isascii(), text))
    return marked.isalpha() and 3 * len(marked) < len(text)


def _cleaned(text: str) -> str:
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]", "", text)


def _leaves(text: str) -> list[str]:
    """The pages of a text: form feeds divide it, and lines of LEAF characters together."""
    leaves = []
    for sheet in text.split("\f"):
        start = 0
        while len(sheet) - start > LEAF:
            end = sheet.rfind("\n", start, start + LEAF) + 1 or start + LEAF
            leaves.append(sheet[start:end].strip("\n"))
            start = end
        leaves.append(sheet[start:].strip("\n").rstrip())
    return leaves


# --- PDF ------------------------------------------------------------------------------------------


def _opened(file: MediaFile, fmt: str) -> Any:
    """The document of a file, with the fields of its forms, which are drawn as they are filled."""
    from pypdfium2 import PdfDocument, PdfiumError
    from pypdfium2.raw import FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY

    data = file.read()
    try:
        document = PdfDocument(data)
    except PdfiumError as error:
        # PDFium may give the error of an earlier file.
        if error.err_code in (FPDF_ERR_PASSWORD, FPDF_ERR_SECURITY) and b"/Encrypt" in data:
            reason = f"this {fmt} file is encrypted; save it without a password"
            raise MediaError(file.name, reason, "unsupported") from error
        raise
    document.init_forms()
    return document


def _read(
    document: Any, file: MediaFile, limits: MediaLimits, number: int, seen: bool
) -> tuple[Image | None, str]:
    """A page of PDFium as a picture, if it is ``seen``, and its text, a line for each of its own;
    empty: none."""
    page, picture = document[number - 1], None
    if seen:
        n = min(len(document), limits.max_pages)
        picture = _picture(page, f"{file.name}, page {number}", limits, file.view, n)
    lines = (" ".join(line.split()) for line in page.get_textpage().get_text_bounded().splitlines())
    # Fonts without a map to Unicode give characters that stand for nothing.
    shown = ("".join(filter(str.isprintable, line)) for line in lines)
    text = "\n".join(line for line in shown if line)
    return picture, text if any(map(str.isalnum, text)) else ""


def _picture(page: Any, name: str, limits: MediaLimits, view: View, n: int) -> Image:
    """One of ``n`` pages of PDFium."""
    side, sides = min(limits.side(view), isqrt(limits.max_pixels)), page.get_size()
    # The sides are rounded up, and only one pixel is sure to be in the smallest page.
    scale = min(SCALE, (side - 0.5) / max(sides))
    scale *= view.scale(ceil(n * sides[0] * sides[1] * scale**2))
    pixels = page.render(scale, rev_byteorder=True).to_numpy().copy()  # (H, W, 3)
    size = {"width": pixels.shape[1], "height": pixels.shape[0]}
    return Image(pixels, report=MediaReport(name=name, kind="image", **size))
