"""Frames and sounds of a part of a file, wherever the file lies."""

import tarfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest

from mico_chat.errors import MediaError, MissingFileError
from mico_chat.media.audio import frames_of as frames_of_stream
from mico_corpus.cutting import container, footage
from mico_corpus.cutting.footage import frames_of, sound_of
from mico_corpus.rows import Row
from tests.mico_corpus.clips import RATE, Scene, make_sound, make_video

OFFSET = {"output_ts_offset": "1.4"}  # as in a broadcast, which starts at any time
FORMS: dict[str, dict[str, Any]] = {
    "a.mp4": {"audio_codec": "aac"},
    "long-gop.mp4": {"gop": 1000, "codec": "mpeg4"},
    "fragmented.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "a.mkv": {},
    "a.webm": {"codec": "libvpx", "audio_codec": "libopus"},
    "a.ts": {"audio_codec": "mp2", "options": OFFSET},
    "a.avi": {"codec": "mpeg4", "audio_codec": "pcm_s16le"},
}
SCENES = [Scene(seed, 2.0, still=True) for seed in range(6)]


def row(path: Path | str, start: float = 0.0, end: float = 12.0, **more: Any) -> Row:
    about = {"address": str(path), "member": "", "offset": 0, "size": 0}
    return about | {"start": start, "end": end} | more


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footage, "_videos", footage._Recent())
    monkeypatch.setattr(footage, "_sounds", footage._Recent())


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return make_video(tmp_path / "a.mp4", SCENES)


def seeds(video: Any) -> list[int]:
    """Which scene each frame is of."""
    height, width = video.frames.shape[1:3]
    known = np.stack([scene.frames(1, (width, height))[0] for scene in SCENES]).astype(int)
    apart = [np.abs(known - frame).mean(axis=(1, 2, 3)) for frame in video.frames]
    assert max(one.min() for one in apart) < 25
    return [int(one.argmin()) for one in apart]


@pytest.mark.parametrize("name", FORMS)
def test_frames_are_the_middles_of_equal_parts(tmp_path: Path, name: str) -> None:
    path = make_video(tmp_path / name, SCENES, **FORMS[name])
    video = frames_of(row(path), 6, 64)
    assert video.frames.shape == (6, 48, 64, 3)
    assert seeds(video) == [0, 1, 2, 3, 4, 5]
    late = 0.2 if name == "a.avi" else 0.11  # AVI starts a frame late
    assert video.times == pytest.approx([1, 3, 5, 7, 9, 11], abs=late)
    part = frames_of(row(path, 4.0, 10.0), 3, 32)
    assert part.frames.shape == (3, 24, 32, 3)
    assert part.times == pytest.approx([1, 3, 5], abs=late)
    assert frames_of(row(path, 6.2, 7.8), 1, 64).times == pytest.approx([0.8], abs=late)


@pytest.mark.parametrize("name", FORMS)
def test_sound_is_that_of_the_part(tmp_path: Path, name: str) -> None:
    path = make_video(tmp_path / name, SCENES, **FORMS[name])
    for start, end in ((0.0, 12.0), (5.0, 8.0), (9.5, 12.0)):
        sound = sound_of(row(path, start, end))
        assert sound is not None
        assert sound.seconds == pytest.approx(end - start, abs=0.1)
        assert np.abs(sound.samples[2000:-2000]).max() == pytest.approx(0.3, abs=0.05)


def beeps(path: Path) -> Path:
    """A sound that is loud in the first half of each second."""
    with av.open(str(path), "w") as out:
        video, track = out.add_stream("libx264", rate=10), out.add_stream("aac", rate=RATE)
        assert isinstance(video, av.VideoStream)
        assert isinstance(track, av.AudioStream)
        video.width, video.height, video.pix_fmt, video.gop_size = 64, 48, "yuv420p", 100
        for picture in Scene(0, still=True).frames(100, (64, 48)):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode(None))
        t = np.arange(10 * RATE) / RATE
        wave = np.where(t % 1 < 0.5, 0.5 * np.sin(2 * np.pi * 400 * t), 0).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
        fifo = av.AudioFifo()
        fifo.write(frame)
        while part := fifo.read(1024, partial=True):
            out.mux(track.encode(part))
        out.mux(track.encode(None))
    return path


def test_a_sound_starts_exactly_where_the_part_does(tmp_path: Path) -> None:
    path = beeps(tmp_path / "a.mp4")
    sound = sound_of(row(path, 3.75, 5.0))
    assert sound is not None
    loud = np.abs(sound.samples.reshape(-1, 100)).max(axis=1) > 0.1
    on, off = (round(t * RATE / 100) for t in (0.25, 0.75))
    assert abs(int(loud.argmax()) - on) <= 1
    assert abs(on + int((~loud[on + 2 :]).argmax()) + 2 - off) <= 1
    whole = sound_of(row(path, 0.0, 10.0))
    assert whole is not None
    same = whole.samples[round(3.75 * RATE) : 5 * RATE]
    assert np.abs(same - sound.samples).max() < 0.02


def test_a_sound_that_begins_late_is_silent_before(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", SCENES[:1], sound=None)
    joined = tmp_path / "b.mkv"
    make_sound(tmp_path / "tone.mkv", 1.0)
    with (
        av.open(str(path)) as pictures,
        av.open(str(tmp_path / "tone.mkv")) as tone,
        av.open(str(joined), "w") as out,
    ):
        video = out.add_stream_from_template(pictures.streams.video[0])
        track = out.add_stream_from_template(tone.streams.audio[0])
        for source, target, delay in ((pictures, video, 0), (tone, track, 1)):
            for packet in source.demux():
                if packet.dts is not None and packet.time_base is not None:
                    packet.pts = (packet.pts or 0) + round(delay / packet.time_base)
                    packet.dts += round(delay / packet.time_base)
                    packet.stream = target
                    out.mux(packet)
    sound = sound_of(row(joined, 0.0, 2.0))
    assert sound is not None
    assert sound.seconds == pytest.approx(2.0, abs=0.02)
    assert np.abs(sound.samples[: RATE - 200]).max() == 0
    assert np.abs(sound.samples[RATE + 200 :]).max() > 0.2


def test_a_rotated_clip_is_upright(tmp_path: Path) -> None:
    plain = make_video(tmp_path / "a.mp4", SCENES[:1])
    turned = make_video(tmp_path / "b.mp4", SCENES[:1], rotation=90)
    video = frames_of(row(turned, end=2.0), 1, 32)
    assert video.frames.shape == (1, 32, 24, 3)
    expected = np.rot90(frames_of(row(plain, end=2.0), 1, 32).frames[0], -1)
    assert np.abs(video.frames[0].astype(int) - expected).max() < 3


def test_a_frame_that_is_shown_long_stands_for_all_of_its_parts(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", [Scene(0, 6.0, still=True)], fps=1)
    video = frames_of(row(path, end=6.0), 12, 64)
    assert video.times.tolist() == [float(i // 2) for i in range(12)]


def test_a_clip_without_sound_has_none(tmp_path: Path, clip: Path) -> None:
    assert sound_of(row(make_video(tmp_path / "b.mp4", SCENES, sound=None))) is None
    assert sound_of(row(clip, 20.0, 22.0)) is None


@pytest.fixture
def tarred(tmp_path: Path, clip: Path) -> Row:
    with tarfile.open(tmp_path / "shard, of:two.tar", "w") as out:
        out.add(clip.with_name("a.mp4"), "0.mp4")
        out.add(clip, "1.mp4")
    with tarfile.open(tmp_path / "shard, of:two.tar") as shard:
        member = shard.getmember("1.mp4")
    where: dict[str, Any] = {"member": "1.mp4", "offset": member.offset_data, "size": member.size}
    return row(tmp_path / "shard, of:two.tar", **where)


def test_a_member_of_a_tar_is_read_in_place(
    tarred: Row, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "_copies", None)
    assert (frames_of(tarred, 6, 64).frames == frames_of(row(clip), 6, 64).frames).all()
    sounds = sound_of(tarred), sound_of(row(clip))
    assert sounds[0] is not None
    assert sounds[1] is not None
    assert (sounds[0].samples == sounds[1].samples).all()
    with pytest.raises(MissingFileError, match=r"its tar has .* bytes; it would end at"):
        frames_of(tarred | {"offset": tarred["offset"] + 10**6, "start": 0.5}, 1, 64)


@pytest.fixture
def bucket(clip: Path, tarred: Row) -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/a.mp4", clip.read_bytes())
    system.pipe("/bucket/a.tar", Path(tarred["address"]).read_bytes())
    yield system
    system.rm("/bucket", recursive=True)


def test_what_lies_at_an_address_is_copied_once_and_removed(
    bucket: Any, clip: Path, tarred: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = container._Copies()
    monkeypatch.setattr(container, "_copies", copies)
    at = row("memory://bucket/a.mp4")
    expected = frames_of(row(clip), 6, 64).frames
    assert (frames_of(at, 6, 64).frames == expected).all()
    inside = tarred | {"address": "memory://bucket/a.tar"}
    assert (frames_of(inside, 6, 64).frames == expected).all()
    (path, other) = copies.paths.values()
    assert path.read_bytes() == other.read_bytes() == clip.read_bytes()
    bucket.rm("/bucket/a.mp4")
    assert frames_of(at, 2, 64).frames.shape[0] == 2  # the copy is still there
    for number in range(container.KEPT_COPIES):
        bucket.pipe(f"/bucket/{number}.mp4", b"x")
        container.stored(row(f"memory://bucket/{number}.mp4"))
    assert len(copies.paths) == container.KEPT_COPIES
    assert not path.exists()
    with pytest.raises(MissingFileError, match=r"bucket/a.mp4: no such file"):
        container.stored(at)
    bucket.pipe("/bucket/a.mp4", clip.read_bytes())


def test_the_annotators_of_a_process_share_what_was_decoded(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, sound = frames_of(row(clip), 4, 64), sound_of(row(clip))
    assert frames_of(row(clip), 4, 64) is first
    assert sound_of(row(clip)) is sound
    assert frames_of(row(clip), 4, 32) is not first
    monkeypatch.setattr(footage, "KEPT_BYTES", 10)
    frames_of(row(clip), 2, 64)
    assert frames_of(row(clip), 4, 64) is not first


def test_few_frames_are_decoded_to_find_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", [Scene(0, 60.0)])
    decoded: list[int] = []

    def counted(*given: Any) -> Iterator[Any]:
        for frame in frames_of_stream(*given):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr("mico_chat.media.video.frames_of", counted)
    frames_of(row(path, 50.0, 51.0), 1, 64)
    assert len(decoded) < 40  # of 600: those from the keyframe, and what the threads had begun
    decoded.clear()
    frames_of(row(path, 0.0, 60.0), 6, 64)
    assert len(set(decoded)) < 240


def test_a_bad_file_is_a_media_error(tmp_path: Path) -> None:
    bad = {
        "gone.mp4": None,
        "empty.mp4": b"",
        "garbage.mp4": bytes(range(256)) * 40,
        "list.m3u8": b"#EXTM3U\n#EXTINF:5,\n/etc/hostname\n",
        "concat.mp4": b"ffconcat version 1.0\nfile good.mp4\n",  # FFmpeg alone would open both
    }
    make_video(tmp_path / "good.mp4")
    for name, data in bad.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        for ask in (lambda one: frames_of(one, 1, 64), sound_of):
            with pytest.raises(MediaError, match=name):
                ask(row(tmp_path / name, end=1.0))
    with pytest.raises(MediaError, match="only sound"):
        frames_of(row(make_sound(tmp_path / "a.mp4")), 1, 64)
