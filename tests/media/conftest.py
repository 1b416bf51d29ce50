"""Files of sounds and clips, limits and a decoder."""

from collections.abc import Callable, Iterator
from functools import partial
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


def _made(write: Callable[..., None], folder: Path, name: str, codec: str, **options: Any) -> Path:
    write(str(folder / name), codec, **options)
    return folder / name


@pytest.fixture
def make_sound(tmp_path: Path) -> MakeSound:
    return partial(_made, write_sound, tmp_path)


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    return partial(_made, write_clip, tmp_path)
