"""Files of this machine that a request names by ``file://`` URLs, from one folder alone.

For evaluations and pipelines whose data lie beside the service: a clip need not be sent. Whoever
may ask the service may then have any medium of the folder described, so that it is off by default.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from mico_chat.errors import RequestError

SCHEME = "file://"


def file_of(url: str, folder: Path, where: str) -> Path:
    """The file that a URL names, symbolic links followed.

    ``where`` is the URL's place in the request. The words are the same for what lies elsewhere and
    for what is not there: they must not tell which files the machine has.

    Raises:
        RequestError: for what is no file below ``folder``.
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
