"""What surrounds a run: variables, folders, ports, shared memory."""

from __future__ import annotations

import difflib
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

from mico_chat.cli.doctor.finding import Finding, Mark, gigabytes
from mico_chat.cli.doctor.machine import existing
from mico_chat.errors import ConfigError
from mico_chat.media.file import MediaLimits
from mico_chat.settings import Settings

PREFIX = "MICO_"

LITTLE_SHM = 1 << 30
"""Bytes. vLLM's processes and training's loaders hand over in /dev/shm, of which Docker gives 64
MB."""


@dataclass(frozen=True)
class Source:
    """Settings that the environment sets: their class, and what reads them."""

    settings: type[BaseSettings]
    read: Callable[[], BaseSettings]

    @property
    def variables(self) -> set[str]:
        """``MICO_SERVER_PORT`` and so on."""
        prefix = str(self.settings.model_config["env_prefix"])
        return {f"{prefix}{name}".upper() for name in self.settings.model_fields}


LIBRARY = (Source(Settings, Settings), Source(MediaLimits, MediaLimits))
"""The library's own."""


def variable_findings(
    environment: Mapping[str, str], sources: Sequence[Source], others: Iterable[str] = ()
) -> list[Finding]:
    """Variables that cannot be read, those that nothing reads, and those that are set.

    ``others`` are variables that are read in another way, such as a command's options.
    """
    given = sorted(name for name in environment if name.upper().startswith(PREFIX))
    known = {name for source in sources for name in source.variables} | set(others)
    found = [finding for source in sources for finding in _unreadable(source)]
    found += [_unknown(name, known) for name in given if name.upper() not in known]
    if found:
        return found
    said = ", ".join(given) or "none is set"
    return [Finding("variables", "ok", said, facts={"names": given})]


def _unreadable(source: Source) -> Iterator[Finding]:
    try:
        source.read()
    except ValidationError as error:
        prefix = str(source.settings.model_config["env_prefix"])
        for one in error.errors():
            name = f"{prefix}{'.'.join(str(part) for part in one['loc'])}".upper()
            text = f"{name}: {one['msg']}, got {one['input']!r}"
            yield Finding("variables", "problem", text, f"unset {name}", {"variable": name})
    except (ConfigError, SettingsError) as error:
        yield Finding("variables", "problem", " ".join(str(error).split()))


def _unknown(name: str, known: Iterable[str]) -> Finding:
    close = difflib.get_close_matches(name.upper(), sorted(known), n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    mend = f"unset {name}" if not close else f'export {close[0]}="${name}"; unset {name}'
    return Finding("variables", "warning", f"nothing reads {name}{meant}", mend)


def variables_of(command: Any) -> set[str]:
    """The variables that a command line's options read, those of its commands too."""
    found = {
        name
        for option in command.params
        for name in ([option.envvar] if isinstance(option.envvar, str) else option.envvar or ())
    }
    for below in getattr(command, "commands", {}).values():  # a group has them
        found |= variables_of(below)
    return found


def folder_finding(cache: Path) -> Finding:
    """Whether the cache folder can be written to, or made."""
    nearest = existing(cache)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        text = f"{nearest} cannot be written to: {error.strerror or error}"
        mend = f"sudo chown -R $USER {nearest}, or MICO_CACHE_DIR=/another/folder"
        return Finding("cache", "problem", text, mend, {"folder": str(cache)})
    text = str(cache) if nearest == cache else f"{cache}, which will be made"
    return Finding("cache", "ok", text, facts={"folder": str(cache)})


def port_finding(name: str, host: str, port: int, mend: str) -> Finding:
    """Whether a port can be listened on. One that is taken is often our own server."""
    facts: dict[str, Any] = {"host": host, "port": port}
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        by = _listener(port)
        whose = f", by {by}" if by else ""
        why = os.strerror(error.errno) if error.errno else str(error)
        text = f"{host}:{port} cannot be used: {why}{whose}"
        return Finding(name, "warning", text, mend, facts)
    return Finding(name, "ok", f"{host}:{port} is free", facts=facts)


def _listener(port: int) -> str | None:
    """``"python (4711)"``: who listens on a port, where the system tells."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.pid is not None
            if listens and connection.laddr.port == port:
                return f"{psutil.Process(connection.pid).name()} ({connection.pid})"
    except psutil.Error:
        return None
    return None


def shm_finding(size: int | None, matters: bool) -> Finding | None:
    """Shared memory; ``matters`` where vLLM or training may run. None where there is none."""
    if size is None:
        return None
    facts = {"bytes": size}
    text = f"/dev/shm has {gigabytes(size)}"
    if size >= LITTLE_SHM:
        return Finding("shared memory", "ok", text, facts=facts)
    mark: Mark = "warning" if matters else "note"
    text += ": little for vLLM on several GPUs and for training's loaders"
    mend = "docker run --shm-size=2g, or --ipc=host"
    return Finding("shared memory", mark, text, mend, facts)
