"""URLs of databases as people write them, and what of them may be shown."""

from __future__ import annotations

from pathlib import Path

from mico_chat.errors import ConfigError


def scheme_of(url: str) -> str:
    """``postgresql``, ``postgres`` or ``sqlite``.

    Raises:
        ConfigError: for any other scheme.
    """
    scheme = url.partition(":")[0]
    if scheme in ("postgres", "postgresql", "sqlite") and url.startswith(f"{scheme}://"):
        return scheme
    raise ConfigError(
        f"database_url: its scheme is {scheme[:32]!r}; it must be postgresql:// or sqlite:///"
    )


def sqlite_file(url: str) -> Path:
    """The file of a ``sqlite:///`` URL, absolute.

    Raises:
        ConfigError: if it names none; a database in memory would be lost.
    """
    path = url.removeprefix("sqlite:///")
    if path == url or path in ("", ":memory:") or "?" in path or path.startswith("file:"):
        raise ConfigError(
            f"database_url: {url!r} does not name a file; write sqlite:///relative.db or "
            "sqlite:////absolute/path.db"
        )
    return Path(path).expanduser().absolute()


def shown(url: str) -> str:
    """A PostgreSQL URL without what may be secret.

    Raises:
        ConfigError: if it cannot be told where the password ends.
    """
    scheme = scheme_of(url)
    auth, at, rest = url.removeprefix(f"{scheme}://").rpartition("@")
    if any(character in auth for character in "@/?#"):
        raise unreadable("")
    return f"{scheme}://{auth.partition(':')[0]}{at}{rest.partition('?')[0]}"


def unreadable(name: str) -> ConfigError:
    """An error that says nothing of the URL: a part of the password may be anywhere in it."""
    return ConfigError(
        f"database_url{name and ' '}{name}: it cannot be read; write special characters "
        "of user, password and options as %XX"
    )
