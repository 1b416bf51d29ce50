"""What the doctor finds: findings under headings, each with its mark and what mends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

Mark = Literal["ok", "note", "warning", "problem"]
"""``note``: for the reader alone. ``warning``: works, but not as it could. ``problem``: the default
path, or what was asked for, fails."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    ``mend`` is a command, or what else there is to do. ``rows`` is a small table below it, and
    ``facts`` the same for programs: bytes, counts, names.
    """

    name: str
    mark: Mark
    text: str
    mend: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Sequence[str]] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """A finding from what :meth:`record` gave, as JSON may have carried it."""
        return cls(**record)

    def record(self) -> dict[str, Any]:
        """The finding as JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Section:
    """Findings under a heading."""

    title: str
    findings: Sequence[Finding]


@dataclass(frozen=True)
class Report:
    """All that was found; ``model`` and ``engine`` are those that would be taken."""

    version: str
    model: str
    engine: str | None
    sections: Sequence[Section]

    @property
    def findings(self) -> list[Finding]:
        return [finding for section in self.sections for finding in section.findings]

    def marked(self, mark: Mark) -> list[Finding]:
        """The findings of one mark."""
        return [finding for finding in self.findings if finding.mark == mark]

    @property
    def exit_code(self) -> int:
        """1 where something that was asked for would fail."""
        return int(bool(self.marked("problem")))

    def record(self) -> dict[str, Any]:
        """The report as JSON holds it; the table rows, which are for people, left out."""
        sections = {
            section.title.lower(): [
                {key: value for key, value in finding.record().items() if key != "rows"}
                for finding in section.findings
            ]
            for section in self.sections
        }
        return {
            "version": self.version,
            "ok": self.exit_code == 0,
            "model": self.model,
            "engine": self.engine,
            "findings": sections,
        }


def gigabytes(n_bytes: float) -> str:
    """``"13.5 GB"``, ``"98 MB"``, ``"512 KB"``: decimal, as disks and pages of models have them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if n_bytes >= size * 0.9995:
            n = n_bytes / size
            return f"{n:.1f} {unit}" if n < 100 and unit == "GB" else f"{n:.0f} {unit}"
    return f"{n_bytes:.0f} bytes"
