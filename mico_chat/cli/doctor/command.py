"""``mico-chat doctor``: settings of all packages in, a report on a stream out."""

from __future__ import annotations

import json
from typing import Any, TextIO

from pydantic import ValidationError
from pydantic_settings import SettingsError

from mico_chat.cli.doctor.environment import Source, variables_of
from mico_chat.cli.doctor.examine import Service, examine
from mico_chat.cli.doctor.machine import Machine
from mico_chat.cli.doctor.text import Style, render
from mico_chat.errors import ConfigError
from mico_chat.load import EngineOptions
from mico_chat.settings import Settings, cache_dir


def run(
    model: str | None,
    options: EngineOptions,
    server: Source,
    command: Any,
    *,
    as_json: bool,
    out: TextIO,
) -> int:
    """Examine and print; returns the exit code.

    Args:
        model: ``mini``, a folder or a hub name; by default what the settings say.
        options: how it would be run.
        server: the server's settings, which this package does not know.
        command: the command line, whose options read variables too.
        as_json: one object instead of text.
        out: where to.
    """
    report = examine(
        model or Settings().model,
        options,
        service_of(server),
        Machine.here(cache_dir()),
        variables=variables_of(command),
    )
    if as_json:
        print(json.dumps(report.record(), indent=2, ensure_ascii=False), file=out)
    else:
        print(render(report, Style.of(out)), file=out)
    return report.exit_code


def service_of(server: Source) -> Service:
    """Where the server would listen; its defaults where its settings cannot be read, which the
    report says."""
    try:
        found: Any = server.read()
    except (ConfigError, SettingsError, ValidationError):
        return Service(sources=(server,))
    return Service(found.host, found.port, database_url=found.database_url, sources=(server,))
