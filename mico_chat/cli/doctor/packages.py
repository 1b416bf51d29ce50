"""Python and the packages: installed versions against the ranges of our own metadata."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from mico_chat.cli.doctor.finding import Finding, Mark

DISTRIBUTION = "mico-chat"

SHOWN = ("torch", "transformers", "peft", "timm", "av", "safetensors")
"""Versions that are said; the others only where they are wrong."""

SAID_ELSEWHERE = ("bench", "dev", "llamacpp", "postgres", "quantize", "vllm")
"""Extras that are missed by nobody but who works on the project, or said among the engines."""


@dataclass(frozen=True)
class Installed:
    """A requirement and the version that is installed, if any."""

    requirement: Requirement
    version: str | None

    @property
    def fits(self) -> bool:
        """Whether there is one, and it is within the range; a development version counts."""
        return self.version is not None and self.requirement.specifier.contains(
            Version(self.version), prereleases=True
        )

    @property
    def asked(self) -> str:
        """``"av<19,>=15"``, as pip takes it."""
        return f"{self.requirement.name}{self.requirement.specifier}"


def read(requirements: Sequence[str], extra: str = "") -> list[Installed]:
    """The requirements of an extra, or those without one, that hold for this machine."""
    found = []
    for line in requirements:
        requirement = Requirement(line)
        marker = requirement.marker
        own = marker is None or marker.evaluate({"extra": ""})
        if extra and (own or marker is None or not marker.evaluate({"extra": extra})):
            continue
        if not extra and not own:
            continue
        found.append(Installed(requirement, _version(requirement.name)))
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_findings() -> list[Finding]:
    """Python, the core's packages, and each extra."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        text = f"{DISTRIBUTION} is not installed: versions of packages are not checked"
        return [_python(None), Finding("packages", "warning", text, "pip install -e .")]
    requirements = distribution.requires or []
    wanted = distribution.metadata["Requires-Python"]
    extras = distribution.metadata.get_all("Provides-Extra") or []
    return [
        _python(wanted),
        core_finding(read(requirements)),
        *extra_findings({e: read(requirements, e) for e in sorted(extras)}),
    ]


def _python(wanted: str | None) -> Finding:
    text = f"{platform.python_implementation()} {platform.python_version()} in {sys.prefix}"
    facts = {"version": platform.python_version(), "prefix": sys.prefix}
    if wanted and Version(platform.python_version()) not in Requirement(f"x{wanted}").specifier:
        mend = "make a virtual environment with another Python"
        return Finding("Python", "problem", f"{text}; mico-chat needs {wanted}", mend, facts)
    return Finding("Python", "ok", text, facts=facts)


def core_finding(core: Sequence[Installed]) -> Finding:
    """The packages that everything needs: a problem where one is missing."""
    facts = {one.requirement.name: one.version for one in core}
    wrong = [one for one in core if not one.fits]
    if wrong:
        missing = any(one.version is None for one in wrong)
        return Finding(
            "packages", "problem" if missing else "warning", _wrong(wrong), _pip(wrong), facts
        )
    said = (f"{name} {facts[name]}" for name in SHOWN if name in facts)
    return Finding("packages", "ok", ", ".join(said), facts=facts)


def extra_findings(extras: Mapping[str, Sequence[Installed]]) -> list[Finding]:
    """The extras that are there in a line, and those that are not or not as they should be.

    An extra is nobody's problem until a command needs it, and one of which something is missing is
    not there, whatever versions others have brought of the rest.
    """
    found, whole = [], []
    for extra, packages in extras.items():
        missing = [one for one in packages if one.version is None]
        wrong = [one for one in packages if one.version is not None and not one.fits]
        facts = {one.requirement.name: one.version for one in packages}
        if wrong and not missing:
            found.append(Finding(f"[{extra}]", "warning", _wrong(wrong), _pip(wrong), facts))
        elif not missing:
            whole.append(extra)
        elif extra not in SAID_ELSEWHERE:
            text = f"not installed: {', '.join(one.requirement.name for one in missing)}"
            mend = f"pip install '{DISTRIBUTION}[{extra}]'"
            found.append(Finding(f"[{extra}]", "note", text, mend, facts))
    mark: Mark = "ok" if whole else "note"
    there = Finding("extras", mark, ", ".join(whole) or "none", facts={"installed": whole})
    return [there, *found]


def _wrong(packages: Sequence[Installed]) -> str:
    return "; ".join(
        f"{one.requirement.name} is not installed"
        if one.version is None
        else f"{one.requirement.name} {one.version} is installed, tested are "
        f"{one.requirement.specifier}"
        for one in packages
    )


def _pip(packages: Sequence[Installed]) -> str:
    return "pip install " + " ".join(f"'{one.asked}'" for one in packages)
