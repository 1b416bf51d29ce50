"""The kind of a file, and the pictures made of it for the browser and the terminal."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from rich.console import Console

from mico_chat.cli.main import main
from mico_chat.errors import MediaError
from mico_chat.media import Audio, Depth, Image, MediaFile, Medium, Normal, Video, decode
from mico_chat.media.file import HEAD_BYTES
from mico_chat.media.medium import MediaReport
from mico_ui import describe
from mico_ui.browser.cards import Previewer, kinds_of, preview_of
from mico_ui.browser.page import EXAMPLES_FOLDER, read_examples
from mico_ui.client import ApiError
from mico_ui.describe import depth_pixels, mel_pixels, wave_pixels
from mico_ui.terminal.screen import MAX_ROWS, fitted, preview, waveform
from tests.support.pdf import line, pdf
from tests.ui.conftest import EXAMPLES as FOLDER

RIGHT = {
    "photograph": "A cat.",
    "animal": "A panda.",
    "sound": "A dog barking.",
    "video": "Red.",
    "see-and-hear": "The picture shows a cat and the sound is a dog barking, so no.",
}


@pytest.fixture
def previewer() -> Iterator[Previewer]:
    with closing(Previewer(max_bytes=100_000)) as previewer:
        yield previewer


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(array, mode).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_kinds_that_a_file_can_be() -> None:
    deep = np.full((4, 4), 900, np.uint16)
    assert kinds_of(png(deep), "a.png") == ("depth",)
    assert kinds_of(png(deep.astype(np.uint8)), "a.png") == ("image", "depth", "normal")
    assert kinds_of(b"\x93NUMPY\x01\x00", "a.jpg") == ("depth",)  # the name says nothing
    assert kinds_of(b"PK\x03\x04", "a.npz") == ("depth",)
    assert kinds_of(b"fLaC", "a") == ("audio",)
    assert kinds_of(b"\x1aE\xdf\xa3", "a.webm") == ("video", "audio")
    assert kinds_of(b"<html><script>", "a.html") == kinds_of(b"a,b", "a.csv") == ("document",)


def test_the_kinds_that_pixels_cannot_be() -> None:
    grey = np.full((4, 4, 3), 90, np.uint8)
    colours = (grey + np.arange(3)).astype(np.uint8)
    assert preview_of(Image(grey), "a").never == ("normal",)
    for channel in range(3):
        tinted = grey.copy()
        tinted[-1, -1, channel] ^= 1
        assert preview_of(Image(tinted), "a").never == ("depth",)
    assert preview_of(Image(colours), "a").never == preview_of(Normal(colours), "a").never
    assert preview_of(Normal(colours), "a").never == ("depth",)
    assert preview_of(Depth(np.ones((4, 4), np.float32)), "a").never == ("normal",)
    assert preview_of(Audio(np.zeros(16_000, np.float32)), "a").never == ()


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "a.png: the file is empty"),
        (b"\x1f\x8b", "look like gzip"),
        (b"\x00\x01\x02\x03\x04\x05\x06\x07\x08", "are of no known format"),
    ],
)
def test_a_file_that_is_no_medium_is_refused(head: bytes, reason: str) -> None:
    with pytest.raises(ApiError, match=reason):
        kinds_of(head, "a.png")


def test_examples_are_what_they_say() -> None:
    examples = read_examples()
    shown = {*examples.compared, *(file for chat in examples.chats for file in chat.files)}
    for one in shown:
        with (EXAMPLES_FOLDER / one.file).open("rb") as opened:
            assert one.kind in kinds_of(opened.read(HEAD_BYTES), one.file)
    used = {one.file for one in shown} | {"README.md", "examples.yaml"}
    assert {path.name for path in EXAMPLES_FOLDER.iterdir()} == used
    assert sum(path.stat().st_size for path in EXAMPLES_FOLDER.iterdir()) < 400_000


@pytest.mark.base_llm
def test_examples_are_answered_right_and_surely(
    base_llm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = read_examples().chats
    assert {chat.name for chat in chats} == set(RIGHT)
    for chat in chats:
        media = [
            x for one in chat.files for x in (f"--{one.kind}", str(EXAMPLES_FOLDER / one.file))
        ]
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["ask", "--json", *media, chat.message])
        said = json.loads(capsys.readouterr().out)
        assert (said["answer"], said["unsure"]) == (RIGHT[chat.name], False), chat.name


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
    assert "estimated" not in relative.pictures[0].caption
    report = MediaReport(name="r.png", kind="depth", estimated="some/net")
    guessed = preview_of(Depth(np.array([[1.0, 2.0]], np.float32), report=report), "r.png")
    assert guessed.pictures[0].caption.startswith("estimated: ")
    assert describe.facts(report) == ("estimated by some/net",)
    large = preview_of(Normal(np.zeros((500, 1000, 3), np.uint8)), "n.png")
    shown = base64.b64decode(large.pictures[0].src.partition(",")[2])
    assert Pillow.open(io.BytesIO(shown)).size == (360, 180)


def test_a_video_shows_the_frames_that_the_server_took(previewer: Previewer) -> None:
    report = MediaReport(name="dragon.mp4", kind="video")
    # A server that takes two frames shows those of the middles of its halves.
    two = report.model_copy(update={"frames_used": 2, "frame_times": [0.167, 0.583]})
    for said, n in ((report, 8), (two, 2)):
        shown = asyncio.run(previewer.make("me", "m1", FOLDER / "dragon.mp4", said))
        assert len(shown.pictures) == n


def test_previews_are_kept_for_their_user_alone_and_not_without_end(previewer: Previewer) -> None:
    report = MediaReport(name="sheep.jpg", kind="image")
    for n in range(40):
        asyncio.run(previewer.make("me", f"m{n}", FOLDER / "sheep.jpg", report))
    assert previewer.kept("me", "m39", MediaReport(name="", kind="image")) is not None
    assert previewer.kept("you", "m39", MediaReport(name="", kind="image")) is None
    assert previewer.kept("me", "m39", MediaReport(name="", kind="normal")) is None
    assert previewer.kept("me", "m0", MediaReport(name="", kind="image")) is None


def test_a_hostile_file_costs_an_error_and_no_more(previewer: Previewer, tmp_path: Path) -> None:
    report = MediaReport(name="bad.png", kind="image")
    with pytest.raises(MediaError, match=r"bad\.png"):
        asyncio.run(previewer.make("me", "bad", b"\x89PNG\r\n\x1a\n" + bytes(100), report))
    assert previewer.kept("me", "bad", MediaReport(name="", kind="image")) is None
    good = asyncio.run(previewer.make("me", "good", (FOLDER / "sheep.jpg").read_bytes(), report))
    assert good.pictures


def drawn(medium: Medium, columns: int = 60) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=columns)
    for part in preview(medium, columns):
        console.print(part)
    return out.getvalue().splitlines()


def test_pages_are_shown_as_they_were_sent(previewer: Previewer) -> None:
    data = "\f".join(f"leaf {n}\x1b[31m" for n in range(1, 31)).encode()
    report = MediaReport(name="a.txt", kind="document", pages=(2, 30))
    shown = asyncio.run(previewer.make("me", "m1", data, report)).pictures
    assert [(one.src, one.caption, one.alt) for one in shown] == [
        ("", f"page {n}", f"page {n} of a.txt") for n in (2, 30)
    ]
    assert shown[1].text == "leaf 30[31m"
    assert previewer.kept("me", "m1", report) is not None
    assert previewer.kept("me", "m1", report.model_copy(update={"pages": (1,)})) is None
    scan = pdf(line("Invoice"), b"")
    seen = asyncio.run(previewer.make("me", "m2", scan, report.model_copy(update={"pages": None})))
    assert [(bool(one.src), one.text) for one in seen.pictures] == [(True, "Invoice"), (True, "")]
    assert "leaf 1[31m" in drawn(decode(MediaFile("document", data, "a.txt")))[0]


def halves(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, :, 0] = pixels[height // 2 :, :, 2] = 255
    return pixels


def test_colours_and_proportions_stay() -> None:
    lines = drawn(Image(halves(100, 400)), 40)
    assert len(lines) == 5  # two pixels in each
    assert "38;2;255;0;0;48;2;255;0;0" in lines[0]
    assert "38;2;0;0;255;48;2;0;0;255" in lines[-1]
    assert lines[0].count("▀") == 40


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (3, 5), (1024, 1024)])
def test_odd_sizes_fit(shape: tuple[int, int]) -> None:
    for columns in (1, 5, 60):
        pixels = fitted(np.zeros((*shape, 3), np.uint8), columns)
        assert pixels.shape[0] % 2 == 0
        assert pixels.shape[0] <= 2 * MAX_ROWS
        assert pixels.shape[1] <= columns


def test_near_is_bright_and_holes_are_grey() -> None:
    values = np.linspace(1, 5, 100, dtype=np.float32).reshape(1, 100)
    values[0, 50] = np.nan
    colours = depth_pixels(values).astype(int).sum(-1)[0]
    assert colours[0] > colours[49] > colours[99] > 0
    assert colours[50] == 3 * 128
    assert "nearest 1.00 m, farthest 5.00 m" in drawn(Depth(values))[-1]
    relative = Depth(values * np.float32(0.2), metric=False)
    assert "farthest 1.00 (relative)" in drawn(relative, 100)[-1]
    assert "nothing was measured" in drawn(Depth(np.full((4, 4), np.nan, np.float32)))[-1]
    assert drawn(Depth(np.ones((4, 4), np.float32)))  # one distance alone


def test_a_waveform_is_high_where_it_is_loud() -> None:
    samples = np.concatenate([np.zeros(800), np.full(800, -0.5), np.full(800, 1.0)])
    assert waveform(samples.astype(np.float32), 6).plain == "  ▄▄██"
    assert waveform(np.zeros(100, np.float32), 5).plain == "     "
    assert waveform(np.zeros(0, np.float32), 5).plain == "     "
    assert waveform(np.ones(2, np.float32), 4).plain == "██  "  # fewer samples than columns


def test_a_clip_is_four_frames_and_its_sound() -> None:
    frames = np.stack([np.full((32, 32, 3), n * 30, np.uint8) for n in range(8)])
    sound = Audio(np.ones(1600, np.float32))
    lines = drawn(Video(frames, np.arange(8.0), audio=sound), 80)
    shown = [f"38;2;{v};{v};{v};" for v in (0, 60, 150, 210)]
    assert all(colour in lines[0] for colour in shown)
    assert "█" in lines[-1]
    assert "█" not in drawn(Video(frames[:1], np.zeros(1)), 80)[-1]
    for columns in (4, 6, 20):
        assert drawn(Video(frames, np.arange(8.0)), columns)
        assert drawn(Normal(halves(4, 9)), columns)


def test_a_photograph_is_decoded_about_as_small_as_it_is_drawn(
    previewer: Previewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []
    decoder = previewer._decoder

    def noted(file: MediaFile) -> Medium:
        medium = decode(file, decoder.limits)
        assert isinstance(medium, Image)
        sizes.append(medium.pixels.shape[:2])
        return medium

    monkeypatch.setattr(decoder, "decode", noted)
    for size in ((2000, 1500), (300, 2400)):
        buffer = io.BytesIO()
        Pillow.new("RGB", size, "teal").save(buffer, "JPEG")
        report = MediaReport(name="a.jpg", kind="image")
        (shown,) = previewer.draw(buffer.getvalue(), report).pictures
        with Pillow.open(io.BytesIO(base64.b64decode(shown.src.partition(",")[2]))) as drawn:
            assert max(drawn.size) == 360
    assert all(max(size) >= 360 and size[0] * size[1] <= 1.3 * 360**2 for size in sizes), sizes
