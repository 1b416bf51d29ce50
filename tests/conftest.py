"""Fixtures that every test may use."""

from __future__ import annotations

import wave
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
    from mico_chat.model.processing import MicoChatProcessor

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that the library uses."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MICO_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def chat() -> MicoChatForConditionalGeneration:
    """The tiny chat model."""
    from tests.support.tiny import chat_model

    return chat_model()


@pytest.fixture(scope="module")
def processor(chat: MicoChatForConditionalGeneration) -> MicoChatProcessor:
    from tests.support.tiny import processor_for

    return processor_for(cast(Any, chat.config))


@pytest.fixture(scope="session")
def base_llm_folder() -> Path:
    """The mini's base language model, which ``mico-chat setup`` brings."""
    from mico_chat.checkpoints.folders import DEFAULT, base_llm_path
    from mico_chat.errors import ModelError

    try:
        return Path(base_llm_path(DEFAULT))
    except ModelError as error:
        pytest.skip(str(error))


TALK = "Please close the window before you go to sleep."


@pytest.fixture(scope="session")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of :data:`TALK`, for tests that listen to it with Whisper."""
    from mico_chat.reading import speech
    from mico_chat.settings import cache_dir

    if not (speech.installed() and speech.folder().is_dir()):
        pytest.skip("Whisper is not there: pip install 'mico-chat[reads]' && mico-chat setup")
    if not (cache_dir() / "sources" / "espeakng-loader").is_dir():
        pytest.skip("espeak-ng is not in the cache folder (mico_world.sources)")
    import numpy as np

    from mico_world.sounds.recordings import _speak

    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((_speak("en-us", TALK) * 32_000).astype(np.int16).tobytes())
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process works long after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say last which part was not tested, and what to install for it."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("not tested")
    for reason, n in reasons.most_common():
        terminalreporter.write_line(f"{n:5}  {reason}")
