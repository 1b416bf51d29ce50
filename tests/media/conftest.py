"""Files of sounds and clips, limits and a decoder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mico_chat.media import MediaDecoder, MediaLimits
from tests.support.made import write_clip, write_sound

MakeSound = Callable[..., Path]
MakeClip = Callable[..., Path]


@pytest.fixture(scope="session")
def limits() -> MediaLimits:
    return MediaLimits()


@pytest.fixture(scope="session")
def decoder() -> Iterator[MediaDecoder]:
    with MediaDecoder(MediaLimits(timeout_s=20)) as shared:
        yield shared


@pytest.fixture
def make_sound(tmp_path: Path) -> MakeSound:
    def make(name: str, codec: str, **options: Any) -> Path:
        path = tmp_path / name
        write_sound(str(path), codec, **options)
        return path

    return make


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    def make(name: str, codec: str, **options: Any) -> Path:
        path = tmp_path / name
        write_clip(str(path), codec, **options)
        return path

    return make
