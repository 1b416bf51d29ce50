"""Installed versions against ranges."""

from __future__ import annotations

from importlib import metadata

import pytest

from mico_chat.cli.doctor.packages import (
    Installed,
    core_finding,
    extra_findings,
    package_findings,
    read,
)

VERSIONS = {"av": "14.2.0", "torch": "2.13.0+cpu", "timm": "2.0.0.dev1"}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in VERSIONS:
            raise metadata.PackageNotFoundError(name)
        return VERSIONS[name]

    monkeypatch.setattr(metadata, "version", version)


REQUIRES = [
    "av<19,>=15",
    "torch<3,>=2.8",
    "absent>=1,<2 ; extra == 'train'",
    "torch>=2.8 ; extra == 'train'",
    "elsewhere>=1 ; platform_machine == 'pdp11' and extra == 'train'",
    "nowhere>=1 ; sys_platform == 'beos'",
]


def test_which_requirements_hold_here() -> None:
    assert [one.requirement.name for one in read(REQUIRES)] == ["av", "torch"]
    assert [one.requirement.name for one in read(REQUIRES, "train")] == ["absent", "torch"]


def test_a_version_outside_its_range() -> None:
    found = core_finding(read(REQUIRES))
    assert found.mark == "warning"
    assert "av 14.2.0 is installed, tested are <19,>=15" in found.text
    assert "torch" not in found.text  # a local version is in the range
    assert found.mend == "pip install 'av<19,>=15'"


def test_a_package_that_is_missing() -> None:
    found = core_finding(read(["numpy>=2,<3", "torch>=2.8"]))
    assert (found.mark, found.text) == ("problem", "numpy is not installed")


def test_packages_as_they_should_be() -> None:
    found = core_finding(read(["torch>=2.8"]))
    assert (found.mark, found.text, found.facts) == (
        "ok", "torch 2.13.0+cpu", {"torch": "2.13.0+cpu"},
    )  # fmt: skip


def test_extras() -> None:
    extras = {
        "eval": read(["torch>=2.8"]),
        "train": read(["torch>=2.8", "absent>=1"]),
        "ui": read(["av>=15", "torch>=2.8"]),
        "lmms": read(["av>=15", "absent>=1"]),
        "vllm": read(["vllm>=1"]),
    }
    whole, train, ui, lmms = extra_findings(extras)
    assert (whole.mark, whole.text) == ("ok", "eval")
    assert (train.mark, train.text) == ("note", "not installed: absent")
    assert train.mend == "pip install 'mico-chat[train]'"
    assert (ui.mark, ui.mend) == ("warning", "pip install 'av>=15'")
    assert (lmms.mark, lmms.text) == ("note", "not installed: absent")


def test_a_development_version_counts() -> None:
    (timm,) = read(["timm>=1,<3"])
    assert isinstance(timm, Installed)
    assert timm.fits


def test_not_installed_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", none)
    python, packages = package_findings()
    assert python.mark == "ok"
    assert (packages.mark, packages.mend) == ("warning", "pip install -e .")


def test_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        requires = ("torch>=2.8",)

        class metadata:
            @staticmethod
            def get_all(key: str) -> None:
                return None

            def __class_getitem__(cls, key: str) -> str:
                return ">=4"

    monkeypatch.setattr(metadata, "distribution", lambda name: Distribution)
    assert package_findings()[0].mark == "problem"
