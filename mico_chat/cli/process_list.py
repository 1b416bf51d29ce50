"""Passwords out of the process list, which all users of a machine can read, and out of errors.

``ps`` shows the words of a command for as long as it runs, those of ``--database-url
postgresql://user:password@host/name`` too. So a command that finds a password among its words
starts again in the same process without them. The address is then in the environment, which the
process's own user alone can read, and which the processes that it starts inherit.
"""

import os
import re
import sys
from collections.abc import Sequence

_VARIABLES = {
    "--database-url": "MICO_SERVER_DATABASE_URL",
    "--rate-limit-store": "MICO_SERVER_RATE_LIMIT_STORE",
}
"""Options with an address that may hold a password, and the variables that mean the same."""

_PASSWORD = re.compile(r"(?s):.*:.*@|password=")


def leave_process_list() -> None:
    """Start this command again without the passwords that it has among its words, if any."""
    words, moved = without_addresses(sys.argv[1:])
    n_before = len(sys.orig_argv) - len(sys.argv) + 1
    # A program that has set sys.argv itself shows its own words in the list, and none of these.
    if moved and os.name == "posix" and sys.orig_argv[n_before:] == sys.argv[1:]:
        command = [sys.executable, *sys.orig_argv[1:n_before], *words]
        os.execve(sys.executable, command, os.environ | moved)


def without_addresses(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words without the options that hold a password, and these options as variables."""
    kept, moved, place = list(words), dict[str, str](), 1
    while words and words[0] in ("serve", "ui", "keys") and place < len(kept):
        option, joined, value = kept[place].partition("=")
        value = value if joined else "".join(kept[place + 1 : place + 2])
        if option in _VARIABLES and _PASSWORD.search(value):
            moved[_VARIABLES[option]] = value
            del kept[place : place + (1 if joined else 2)]
        else:
            place += 1
    return kept, moved


def without_passwords(text: str) -> str:
    """A message in which no address shows its password."""
    text = re.sub(r"(?s)\b((?:postgres|redis)\w*://[^:/@\s]*):.*@", r"\1:***@", text)
    return re.sub(r"(?<=password=)[^&\s'\"]+", "***", text)
