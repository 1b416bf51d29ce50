"""What the doctor finds, one line of its report each; bytes in words."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Mark = Literal["ok", "note", "warning", "problem"]
"""A ``note`` informs. With a ``warning`` it works, but not as well as it could. With a ``problem``
the default way to use mico-chat, or the way that the user asked for, fails."""

ROOM = "MICO_CACHE_DIR=/a/larger/disk, or make room there"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    ``fix``: the command that solves the problem, or advice. ``facts``: the finding for programs:
    bytes, counts, names.
    """

    name: str
    mark: Mark
    text: str
    fix: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def gigabytes(n_bytes: float) -> str:
    """``"13.5 GB"``, ``"98 MB"``, ``"512 KB"``: decimal, as disks and pages of models have them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if n_bytes >= size * 0.9995:
            n = n_bytes / size
            return f"{n:.1f} {unit}" if n < 100 and unit == "GB" else f"{n:.0f} {unit}"
    return f"{n_bytes:.0f} bytes"


def disk_free(folder: Path) -> int:
    """Free bytes where a folder is, or will be made."""
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
