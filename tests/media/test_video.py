"""Clips: which frames are taken, how they are found, and the sound track."""

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Stream
from PIL import Image as Pillow

from mico_chat.errors import MediaError
from mico_chat.media import MediaDecoder, MediaFile, MediaLimits, Video, decode
from mico_chat.media.audio import decoded, frames_of, packets_of
from mico_chat.media.video import FrameReader, timeline_of
from tests.support.made import write_pictures

MakeClip = Callable[..., Path]

FORMATS = [
    ("a.mp4", "libx264", "MP4", {}),
    ("fragmented.mp4", "libx264", "MP4", {"movflags": "frag_keyframe+empty_moov"}),
    ("a.mov", "libx264", "MOV", {}),
    ("a.webm", "libvpx", "WebM", {}),
    ("live.webm", "libvpx", "WebM", {"live": "1"}),
    ("a.avi", "mjpeg", "AVI", {}),
    ("mpeg4.avi", "mpeg4", "AVI", {}),
]


def _clip(path: Path | bytes, **limits: float) -> Video:
    video = decode(MediaFile("video", path), MediaLimits.model_validate(limits))
    assert isinstance(video, Video)
    return video


@pytest.mark.parametrize(("name", "codec", "fmt", "options"), FORMATS)
def test_frames_are_spread_evenly_and_show_their_time(
    make_clip: MakeClip, name: str, codec: str, fmt: str, options: dict[str, str]
) -> None:
    video = _clip(make_clip(name, codec, container_options=options), max_frames=6)
    assert video.frames.shape == (6, 48, 64, 3)
    # 3 s at 20 frames a second: interval centres, to a frame; AVI starts one frame late.
    assert video.times == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75], abs=0.101)
    brightness = video.frames[:, 24:, 32:].mean(axis=(1, 2, 3))
    assert brightness == pytest.approx(20 + 200 * video.times / 3, abs=8)
    report = video.report
    assert report.format == fmt
    assert report.seconds == pytest.approx(3, abs=0.06)
    assert report.frames_total in (60, 61)
    assert report.frames_used == 6
    assert report.frame_times == pytest.approx(video.times, abs=0.001)
    assert "6 of" in report.cut[0]
    assert report.audio_used is None
    assert video.audio is None


def _numbers(path: Path, **chosen: Any) -> list[int]:
    """The places, among all frames of a clip in display order, of 7 frames taken from it."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with MediaDecoder(MediaLimits(max_frames=7)) as decoder:
        video = decoder.decode(MediaFile("video", path, **chosen))
    assert isinstance(video, Video)
    found = []
    for taken in video.frames:
        apart = [np.abs(frame.astype(int) - taken).mean() for frame in frames]
        found.append(int(np.argmin(apart)))
        assert min(apart) < 1
    return found


@pytest.mark.parametrize(("name", "codec", "fmt", "options"), FORMATS)
def test_segments_take_the_middle_frame_of_equal_runs(
    make_clip: MakeClip, name: str, codec: str, fmt: str, options: dict[str, str]
) -> None:
    path = make_clip(name, codec, container_options=options)
    # 60 frames: 4 runs of 9, then 3 of 8.
    off = np.subtract(_numbers(path, sampling="segments"), [4, 13, 22, 31, 39, 47, 55])
    assert np.abs(off).max() <= (name == "mpeg4.avi")  # whose index has an entry of no frame


def test_a_seed_draws_a_frame_of_each_run(make_clip: MakeClip) -> None:
    path = make_clip("a.mp4", "libx264")
    drawn = [_numbers(path, seed=seed) for seed in range(4)]
    assert _numbers(path, seed=2, sampling="segments") == drawn[2]
    starts = [0, 9, 18, 27, 36, 44, 52, 60]
    for numbers in drawn:
        assert all(a <= n < b for n, a, b in zip(numbers, starts, starts[1:], strict=False))
    assert all(len(set(numbers)) > 1 for numbers in zip(*drawn, strict=True))
    report = decode(MediaFile("video", path, seed=1)).report
    assert report.cut == ["8 of 60 frames are used, drawn at random"]


@pytest.mark.parametrize(
    ("name", "codec", "sound"),
    [("a.mp4", "libx264", "aac"), ("a.webm", "libvpx", "libopus"), ("a.avi", "mjpeg", "pcm_s16le")],
)
def test_the_sound_track_comes_along(
    make_clip: MakeClip, name: str, codec: str, sound: str
) -> None:
    video = _clip(make_clip(name, codec, sound=sound))
    assert video.audio is not None
    assert video.audio.seconds == pytest.approx(3, abs=0.1)
    assert video.report.audio_used is True
    assert (video.report.sample_rate, video.report.channels) == (48_000, 2)
    short = _clip(make_clip(name, codec, sound=sound), max_seconds=1)
    assert short.audio is not None
    assert short.audio.seconds == 1
    assert short.report.seconds == pytest.approx(3, abs=0.1)
    assert "only the first 1.0 s" in short.report.cut[-1]


@pytest.mark.parametrize(
    ("n", "keyframe_every", "most", "options"),
    [(600, 10, 100, {}), (200, 1000, 200, {"sc_threshold": "0"})],
)
def test_seeking_decodes_little_of_a_clip_and_nothing_twice(
    make_clip: MakeClip,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    keyframe_every: int,
    most: int,
    options: dict[str, str],
) -> None:
    decoded = []

    def counted(*given: Any) -> Iterator[Any]:
        for frame in frames_of(*given):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr("mico_chat.media.video.frames_of", counted)
    path = make_clip("a.mp4", "libx264", n=n, keyframe_every=keyframe_every, options=options)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        timeline = timeline_of(container, stream, path.stat().st_size)
        assert timeline is not None
        reader = FrameReader(container, stream, timeline)
        shown = [reader.at(tick) for tick in timeline.centres(4)]
    assert all(frame is not None for frame in shown)
    assert 4 <= len(decoded) <= most


def test_a_clip_of_fewer_frames_gives_all_it_has(make_clip: MakeClip) -> None:
    video = _clip(make_clip("a.mp4", "libx264", n=3, fps=10))
    assert video.times == pytest.approx([0, 0.1, 0.2], abs=0.01)
    assert video.report.cut == []
    assert len(_clip(make_clip("one.webm", "libvpx", n=1)).frames) == 1


def test_rotation_is_honoured(make_clip: MakeClip) -> None:
    data = bytearray(make_clip("a.mp4", "libx264").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    # A phone held upright: turn 90 degrees clockwise to show (ISO 14496-12, 8.3.2).
    quarter = (0, 0x10000, 0, -0x10000, 0, 0, 48 << 16, 0, 0x40000000)
    data[matrix : matrix + 36] = struct.pack(">9i", *quarter)
    video = _clip(bytes(data))
    assert video.frames.shape[1:] == (64, 48, 3)
    assert (video.report.width, video.report.height) == (48, 64)
    red = video.frames[0].astype(int)
    assert red[4, -4, 0] - red[4, -4, 1] > 100  # the top left corner is now top right


def test_large_frames_are_scaled_down(make_clip: MakeClip) -> None:
    video = _clip(make_clip("a.mp4", "libx264", n=10, size=(320, 160)), max_side=80)
    assert video.frames.shape[1:] == (40, 80, 3)
    assert "scaled down from 320 x 160 to 80 x 40 pixels" in video.report.cut
    with pytest.raises(MediaError, match=r"320 x 160 pixels is 51200 pixels, more than .* 50000 "):
        _clip(make_clip("b.mp4", "libx264", n=10, size=(320, 160)), max_pixels=50_000)


def test_a_clip_cut_off_gives_the_frames_it_holds(make_clip: MakeClip) -> None:
    path = make_clip(
        "a.mp4", "mpeg4", n=100, size=(128, 96), container_options={"movflags": "faststart"}
    )
    data = path.read_bytes()
    video = _clip(data[: len(data) * 6 // 10])
    assert len(video.frames) == 8
    assert video.report.seconds is not None
    assert 0.5 < video.report.seconds < 4.5
    assert video.times.max() < video.report.seconds


@pytest.mark.parametrize("missing", ["index", "streams"])
def test_an_mp4_without_index_or_streams_is_an_error(make_clip: MakeClip, missing: str) -> None:
    data = make_clip("a.mp4", "libx264").read_bytes()
    ftyp = int.from_bytes(data[:4], "big")
    empty_moov = struct.pack(">I4s", 8 + 108, b"moov") + struct.pack(">I4s", 108, b"mvhd")
    mvhd = struct.pack(">IIIII", 0, 0, 0, 1000, 0) + bytes(80)
    bad = data[: ftyp + 400] if missing == "index" else data[:ftyp] + empty_moov + mvhd
    with pytest.raises(MediaError) as caught:
        decode(MediaFile("video", bad, "bad.mp4"))
    assert str(caught.value).startswith("bad.mp4: ")
    assert ("damaged MP4" if missing == "index" else "no streams") in caught.value.reason


@pytest.mark.skipif(
    not hasattr(Stream, "index_entries"), reason="PyAV before 17 tells no index: time ends it"
)
def test_an_index_of_more_frames_than_bytes_is_an_error(
    make_clip: MakeClip, decoder: MediaDecoder
) -> None:
    data = bytearray(make_clip("a.mp4", "libx264", n=6).read_bytes())
    many = struct.pack(">I", 1_000_000)
    for name, at, value in (
        (b"stsz", 8, struct.pack(">I", 1) + many),
        (b"stts", 12, many),
        (b"stsc", 16, many),
    ):
        start = data.index(name) + at
        data[start : start + len(value)] = value
    with pytest.raises(MediaError, match=r"its index lists 1,000,000 pieces of data in a file of"):
        decoder.decode(MediaFile("video", bytes(data)))


def test_frames_of_many_sizes_become_the_firsts() -> None:
    pictures = []
    for size in ((64, 48), (20, 90), (300, 10)):
        stream = io.BytesIO()
        Pillow.new("RGB", size, (200, 100, 50)).save(stream, "JPEG")
        pictures.append(stream.getvalue())
    clip = io.BytesIO()
    write_pictures(clip, pictures, "avi")
    video = _clip(clip.getvalue())
    assert video.frames.shape == (3, 48, 64, 3)
    assert np.abs(video.frames.astype(int) - (200, 100, 50)).max() < 8
    assert (video.report.width, video.report.height, video.report.cut) == (64, 48, [])


def test_an_empty_packet_is_no_damage() -> None:
    """Theora writes one for a frame that is like the one before it; so can NUT, for any codec."""
    clip = io.BytesIO()
    with av.open(clip, "w", format="nut") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(0, 250, 10):
            pixels = np.full((48, 64, 3), shade, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                empty = av.Packet(0)
                empty.stream, empty.time_base = stream, packet.time_base
                empty.pts, empty.dts = packet.pts, packet.dts
                container.mux(empty if shade == 100 else packet)
        container.mux(stream.encode(None))
    clip.seek(0)
    damage: list[Exception] = []
    with av.open(clip, "r") as container:
        packets = packets_of(container, [container.streams.video[0]], damage)
        assert sum(len(decoded(packet, damage)) for packet in packets) == 24
    assert not damage


def test_sound_only_is_no_video(make_sound: Callable[..., Path]) -> None:
    with pytest.raises(MediaError, match="has sound but no video; attach it as audio"):
        _clip(make_sound("a.mp4", "aac"))


def test_an_undecodable_sound_track_costs_the_sound_only(make_clip: MakeClip) -> None:
    data = make_clip("a.mp4", "libx264", sound="aac").read_bytes()
    video = _clip(data.replace(b"mp4a", b"xxxx").replace(b"esds", b"free"))
    assert video.audio is None
    assert video.report.audio_used is False
    assert any(words.startswith("the sound track is not used: ") for words in video.report.cut)
    assert np.isfinite(video.times).all()
