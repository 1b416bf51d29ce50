"""The table of architectures says what differs, what is refused and what has no replica."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import publish
from benchmarks.model.architectures import CASES, MARKS, measure
from mico_chat.assistant import Assistant
from mico_chat.engine.base import Prompt
from mico_chat.errors import ConfigError, RequestError
from tests.support.replicas import ARCHITECTURES


@pytest.fixture
def page(tmp_path: Path) -> Path:
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n", encoding="utf-8")
    return page


def test_equal_answers_of_another_seed_and_size_stand_in_the_page(page: Path) -> None:
    found = measure("glm4v", "janus", "voxtral", "git", seed=3, width=64, page=page)
    compared = (("glm4v", "image"), ("glm4v", "video"), ("janus", "image"))
    rows = [[f"`{name}`", kind, "together", *["equal"] * len(CASES)] for name, kind in compared]
    assert found.values["rows"] == rows
    text = page.read_text(encoding="utf-8")
    assert text.startswith("Before\n<!--")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert "| `glm4v` | video | together | equal | equal | equal | equal | equal |" in text
    assert "--seed 3 --width 64" in text
    assert "voxtral (audio), git." in text
    reason = "LookupError: the library reads Voxtral's conversations by mistral-common alone"
    assert found.values["missing"]["voxtral (audio)"] == reason
    publish([found], "architectures", {}, "x", None)


@pytest.mark.parametrize(
    ("fault", "cell"),
    [
        (RequestError("no\n such | thing"), "400 (1)"),
        (ZeroDivisionError("x"), "500 (1)"),
        (None, "differs (1)"),
    ],
)
def test_what_is_not_equal_is_said(
    monkeypatch: pytest.MonkeyPatch, fault: Exception | None, cell: str
) -> None:
    real = Assistant.prepare

    async def prepare(self: Assistant, ask: Any) -> Any:
        if fault is not None:
            raise fault
        prompt, reports = await real(self, ask)
        *most, last = prompt.segments
        assert isinstance(last, tuple)
        return Prompt((*most, last[1:])), reports

    monkeypatch.setattr(Assistant, "prepare", prepare)
    found = measure("llava")
    assert cell in found.values["rows"][0][3:]
    assert "\n" not in found.values["reasons"][0] + "|"
    assert "|" not in found.values["reasons"][0]


def test_architectures_are_those_of_the_library() -> None:
    assert len(ARCHITECTURES) > 100
    with pytest.raises(ConfigError, match="no architecture nothing reads media"):
        measure("llava", "nothing")
