"""What a file is taken for, and the pictures that are made of it."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from mico_chat.errors import MediaError
from mico_chat.media import Depth, Normal
from mico_chat.media.file import HEAD_BYTES
from mico_chat.media.medium import MediaReport
from mico_ui.browser.cards import Picture, Previewer, kinds_of, preview_of
from mico_ui.browser.page import EXAMPLES_FOLDER as FOLDER
from mico_ui.browser.page import read_examples
from mico_ui.client import ApiError
from mico_ui.pictures import mel_pixels, wave_pixels


@pytest.fixture
def previewer() -> Iterator[Previewer]:
    previewer = Previewer(max_bytes=200_000)
    yield previewer
    previewer.close()


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


def size_of(picture: Picture) -> tuple[int, int]:
    data = picture.src.split(",", 1)[1]
    return Pillow.open(io.BytesIO(base64.b64decode(data))).size


def test_what_a_file_is_taken_for() -> None:
    deep = np.full((4, 4), 900, np.uint16)
    assert kinds_of(png(deep), "a.png") == ("depth",)
    assert kinds_of(png(deep.astype(np.uint8)), "a.png") == ("image", "depth", "normal")
    assert kinds_of(b"\x93NUMPY\x01\x00", "a.jpg") == ("depth",)  # the name says nothing
    assert kinds_of(b"PK\x03\x04", "a.npz") == ("depth",)
    assert kinds_of(b"fLaC", "a") == ("audio",)
    assert kinds_of(b"\x1aE\xdf\xa3", "a.webm") == ("video", "audio")


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "a.png: the file is empty"),
        (b"<html><script>", "look like HTML"),
        (b"%PDF-1.7", "look like PDF"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07\x08", "are of no known format"),
    ],
)
def test_what_is_no_medium_is_refused_in_words(head: bytes, reason: str) -> None:
    with pytest.raises(ApiError, match=reason):
        kinds_of(head, "a.png")


def test_examples_are_what_they_say() -> None:
    examples = read_examples()
    shown = {*examples.compared, *(file for chat in examples.chats for file in chat.files)}
    for one in shown:
        with (FOLDER / one.file).open("rb") as opened:
            assert one.kind in kinds_of(opened.read(HEAD_BYTES), one.file)
    used = {one.file for one in shown} | {"README.md", "examples.yaml"}
    assert {path.name for path in FOLDER.iterdir()} == used
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 400_000


def test_a_rising_tone_rises_in_the_mel_picture() -> None:
    time = np.arange(32_000) / 16_000
    tone = np.sin(2 * np.pi * (200 + 1500 * time) * time).astype(np.float32)
    mel = mel_pixels(tone, 16_000).astype(int).sum(axis=2)
    loudest = mel.argmax(axis=0)  # rows from the top
    assert loudest[20] > loudest[len(loudest) // 2] > loudest[-40]


def test_a_wave_is_as_high_as_it_is_loud_and_odd_sounds_have_pictures() -> None:
    sound = np.concatenate([np.zeros(8000), np.tile([0.9, -0.9], 4000)]).astype(np.float32)
    inked = (wave_pixels(sound) != 255).any(axis=2).sum(axis=0)
    assert inked[:200].max() <= 2
    assert inked[300:].min() > 60
    for odd in (np.zeros(0, np.float32), np.zeros(3, np.float32), np.ones(100_000, np.float32)):
        assert wave_pixels(odd).shape == (72, 480, 3)
        assert mel_pixels(odd, 16_000).shape == (96, 480, 3)


def test_facts_of_depth() -> None:
    metric = preview_of(Depth(np.array([[0.5, 4.0], [np.nan, 1.0]], np.float32)), "room.npy")
    assert metric.facts[0] == "nearest 0.50 m, farthest 4.00 m"
    assert "25%" in metric.facts[1]
    relative = preview_of(Depth(np.array([[0.0, 1.0]], np.float32), metric=False), "r.png")
    assert "(relative)" in relative.facts[0]
    large = preview_of(Normal(np.zeros((500, 1000, 3), np.uint8)), "n.png")
    assert size_of(large.pictures[0]) == (360, 180)


def test_a_video_shows_the_frames_that_the_server_took(previewer: Previewer) -> None:
    path = FOLDER / "dragon.mp4"

    def captions(report: MediaReport) -> list[str]:
        preview = asyncio.run(previewer.make("me", "m1", path, report))
        return [picture.caption for picture in preview.pictures]

    assert len(captions(MediaReport(name="dragon.mp4", kind="video"))) == 8
    # A server that takes two frames shows those of the middles of its halves.
    two = MediaReport(name="dragon.mp4", kind="video", frames_used=2, frame_times=[0.167, 0.583])
    assert len(captions(two)) == 2


def test_previews_are_kept_for_their_user_alone_and_not_without_end(previewer: Previewer) -> None:
    report = MediaReport(name="sheep.jpg", kind="image")
    for n in range(40):
        asyncio.run(previewer.make("me", f"m{n}", FOLDER / "sheep.jpg", report))
    assert previewer.kept("me", "m39", "image") is not None
    assert previewer.kept("you", "m39", "image") is None
    assert previewer.kept("me", "m39", "normal") is None
    assert previewer.kept("me", "m0", "image") is None


def test_a_hostile_file_costs_an_error_and_no_more(previewer: Previewer, tmp_path: Path) -> None:
    report = MediaReport(name="bad.png", kind="image")
    with pytest.raises(MediaError, match=r"bad\.png"):
        asyncio.run(previewer.make("me", "bad", b"\x89PNG\r\n\x1a\n" + bytes(100), report))
    assert previewer.kept("me", "bad", "image") is None
    good = asyncio.run(previewer.make("me", "good", (FOLDER / "sheep.jpg").read_bytes(), report))
    assert good.pictures
