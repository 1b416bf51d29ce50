"""Files at addresses that fsspec opens: ``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://``.

Each protocol's own library finds the credentials, in its usual environment variables and files. An
address may ask fsspec for a local copy first: ``simplecache::s3://bucket/train-000000.tar``.
"""

import glob
from pathlib import Path
from typing import Any, BinaryIO, cast

from mico_chat.errors import ConfigError, MissingProtocolError

Location = Path | str
"""A file in a folder, or an address, which has ``://``."""

PACKAGES = {
    **{"abfs": "adlfs", "az": "adlfs", "gcs": "gcsfs", "gs": "gcsfs", "hf": "huggingface_hub"},
    **{"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs"},
}
"""The package that reads a protocol."""


def located(text: str | Path) -> Location:
    return text if isinstance(text, str) and "://" in text else Path(text)


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it.

    fsspec keeps the file systems of a process. They do not survive a fork, so keep none.

    Raises:
        MissingProtocolError: the package that reads the protocol is not installed.
        ConfigError: no package reads it.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingProtocolError(address, "fsspec") from error
    protocol = address.partition("://")[0].rpartition("::")[2]
    try:
        found: tuple[Any, str] = url_to_fs(address)
    except ImportError as error:
        raise MissingProtocolError(address, PACKAGES.get(protocol, str(error))) from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ConfigError(
            f"{address}: nothing reads {protocol}:// ({error}); use a folder, or one of {known}"
        ) from error
    return found


def opened(location: Location) -> BinaryIO:
    """A seekable stream of a file."""
    if isinstance(location, Path):
        return location.open("rb")
    system, path = file_system(location)
    return cast(BinaryIO, system.open(path, "rb"))


def read_part(location: Location, start: int = 0, size: int | None = None) -> bytes:
    """``size`` bytes of a file from ``start``, or all to its end, in one request."""
    if isinstance(location, Path):
        with location.open("rb") as file:
            file.seek(start)
            return file.read(-1 if size is None else size)
    system, path = file_system(location)
    if not start and size is None:
        return bytes(system.cat_file(path))
    return bytes(system.cat_file(path, start, None if size is None else start + size))


VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified")
"""The fields of fsspec's information that change with a file's content."""


def fingerprint(location: Location) -> str:
    """A name for one state of a file: its size, and its time of modification or its version."""
    if isinstance(location, Path):
        stat = location.stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"
    system, path = file_system(location)
    return state_of(system.info(path))


def state_of(about: dict[str, Any]) -> str:
    version = next((about[name] for name in (*VERSIONS, "created") if about.get(name)), "")
    return f"{about.get('size')}-{version}"


def matching(pattern: str) -> dict[Location, str]:
    """The files of a path, an address or a pattern with ``*``, in order, with fingerprints."""
    if isinstance(located(pattern), Path):
        return {path: fingerprint(path) for path in sorted(map(Path, glob.glob(pattern)))}
    system, path = file_system(pattern)
    before = pattern[: len(pattern) - len(pattern.partition("://")[2])]
    try:
        listed = system.glob(path, detail=True)
    except FileNotFoundError:
        return {}
    return {
        name if "://" in name else before + name.lstrip("/"): state_of(about)  # HTTP's are whole
        for name, about in sorted(listed.items())
    }
