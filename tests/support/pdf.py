"""PDF files made on the spot, object by object."""

from collections.abc import Sequence

A4 = b"0 0 595 842"


def line(words: str, size: int = 24, height: int = 760) -> bytes:
    """The content of a page that shows a line of Helvetica."""
    return f"BT /F1 {size} Tf 72 {height} Td ({words}) Tj ET".encode("latin-1")


def pdf(
    *contents: bytes,
    box: bytes = A4,
    catalog: bytes = b"",
    trailer: bytes = b"",
    coding: bytes = b"",
    more: Sequence[bytes] = (),
) -> bytes:
    """A file of a page for each of the ``contents``, which have a ``coding``.

    ``catalog`` and ``trailer`` are entries of those, ``more`` further objects, numbered behind.
    """
    pages = range(4, 4 + 2 * len(contents), 2)
    kids = b" ".join(b"%d 0 R" % page for page in pages)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R %s >>" % catalog,
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(contents)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for page, content in zip(pages, contents, strict=True):
        objects += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [%s] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % (box, page + 1),
            b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), coding, content),
        ]
    written, places = [b"%PDF-1.7\n"], list[int]()
    at = len(written[0])
    for number, one in enumerate([*objects, *more], 1):
        written.append(b"%d 0 obj\n%s\nendobj\n" % (number, one))
        places.append(at)
        at += len(written[-1])
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    written += [b"xref\n0 %d\n0000000000 65535 f \n" % (len(places) + 1), table]
    written.append(b"trailer << /Size %d /Root 1 0 R %s >>\n" % (len(places) + 1, trailer))
    written.append(b"startxref\n%d\n%%%%EOF\n" % at)
    return b"".join(written)
