"""Documents: the pages of a PDF file as pictures, and its text layer, by PDFium.

This PDFium has no JavaScript engine, and no attachment or link is followed.
"""

from math import ceil, isqrt
from typing import Any

import numpy as np

from mico_chat.errors import MediaError
from mico_chat.media.file import MediaFile, MediaLimits, decoder_errors
from mico_chat.media.medium import Image, MediaReport, Pages, WrittenText
from mico_chat.media.view import View

SCALE = 200 / 72
"""Pixels for each point of a page: 200 to the inch, if that is not beyond the limits."""


def decode_document(file: MediaFile, limits: MediaLimits) -> Pages:
    """The first ``limits.max_pages`` pages, each with its own text where the file has it.

    The texts have ``limits.max_characters`` together; one that is cut ends in "…". A page that
    cannot be read is white.
    """
    # Imported here: few files need it. The worker imports it before it is isolated.
    from pypdfium2 import PdfiumError

    fmt = file.format
    pages, written, damaged = list[Image](), list[WrittenText](), list[int]()
    with (
        decoder_errors(file, limits, f"damaged {fmt} (its pages cannot be read)"),
        _opened(file, fmt) as document,
    ):
        total, room = len(document), limits.max_characters
        kept_pages = min(total, limits.max_pages)
        for number in range(1, kept_pages + 1):
            where = f"{file.name}, page {number}"
            try:
                page, text = _read(document[number - 1], where, limits, file.view, kept_pages)
            except PdfiumError:
                page, text = Image(np.full((16, 16, 3), 255, np.uint8)), ""
                damaged.append(number)
            pages.append(page)
            if text:
                kept = text if len(text) <= room else f"{text[:room]}…"
                room = max(0, room - len(text))
                written.append(
                    WrittenText(text=kept, box=(0, 0, 1, 1), confidence=1.0, page=number)
                )
    if len(damaged) == len(pages):
        raise file.damaged(f"damaged {fmt} (none of its {total} pages can be read)")
    cut = [f"page {number} is damaged and shown white" for number in damaged]
    if len(pages) < total:
        cut.append(f"only the first {len(pages)} of {total} pages are used")
    if written and written[-1].text.endswith("…") and not room:
        cut.append(f"only the first {limits.max_characters} characters of its text are used")
    report = file.report(
        fmt,
        frames_used=len(pages),
        frames_total=total,
        written=tuple(written) or None,
        cut=cut,
    )
    return Pages(file.kind, tuple(pages), report=report)


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


def _read(page: Any, name: str, limits: MediaLimits, view: View, n: int) -> tuple[Image, str]:
    """One of ``n`` pages of PDFium as a picture, and its text, a line for each of its own; empty:
    none."""
    side, sides = min(limits.side(view), isqrt(limits.max_pixels)), page.get_size()
    # The sides are rounded up, and only one pixel is sure to be in the smallest page.
    scale = min(SCALE, (side - 0.5) / max(sides))
    scale *= view.scale(ceil(n * sides[0] * sides[1] * scale**2))
    pixels = page.render(scale, rev_byteorder=True).to_numpy().copy()  # (H, W, 3)
    size = {"width": pixels.shape[1], "height": pixels.shape[0]}
    lines = (" ".join(line.split()) for line in page.get_textpage().get_text_bounded().splitlines())
    # Fonts without a map to Unicode give characters that stand for nothing.
    shown = ("".join(filter(str.isprintable, line)) for line in lines)
    text = "\n".join(line for line in shown if line)
    picture = Image(pixels, report=MediaReport(name=name, kind="image", **size))
    return picture, text if any(map(str.isalnum, text)) else ""
