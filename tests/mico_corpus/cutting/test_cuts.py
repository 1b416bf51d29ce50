"""A file becomes clips at its scenes, or a row with the reason why it does not."""

import hashlib
import json
import math
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from scenedetect.common import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

from mico_corpus.cutting.cuts import cut
from mico_corpus.cutting.measures import Looks, Scenes
from mico_corpus.cutting.sources import rows_of
from mico_corpus.recipe import BuildRecipe, ClipsRecipe
from mico_corpus.rows import FILE, REASONS, Row
from tests.mico_corpus.clips import Scene, claim_hours, make_sound, make_video

RECIPE = BuildRecipe()
SCENES = (Scene(1, 6.0), Scene(2, 7.0), Scene(3, 2.0))


def of(path: Path | str, **clips: Any) -> Row:
    recipe = BuildRecipe(clips=ClipsRecipe(**clips))
    (row,) = rows_of([str(path)], recipe)
    return checked(cut(row, recipe))


def checked(row: Row) -> Row:
    assert pa.Table.from_pylist([row], FILE).to_pylist()[0].keys() == row.keys()
    assert row["reason"] in ("", *REASONS)
    assert bool(row["reason"]) == bool(row["detail"]) == (not row["clips"])
    assert row["took"] > 0
    return row


def spans(row: Row) -> list[tuple[float, float, str]]:
    return [(clip["start"], clip["end"], clip["reason"]) for clip in row["clips"]]


FORMS: dict[str, dict[str, Any]] = {
    "a.mp4": {"audio_codec": "aac"},
    "a.mkv": {"gop": 1000},
    "fragmented.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "a.webm": {"codec": "libvpx", "audio_codec": "libopus"},
    "a.ts": {"audio_codec": "mp2", "options": {"output_ts_offset": "1.4"}},
    "several-sounds.mp4": {"sounds": 2},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_cut_at_its_scenes(tmp_path: Path, name: str) -> None:
    path = make_video(tmp_path / name, SCENES, **FORMS[name])
    row = of(path)
    late = 0.031 if name == "a.ts" else 0.001  # its sound starts that much before its pictures
    assert [start for start, _, _ in spans(row)] == pytest.approx([0.0, 6.0, 13.0], abs=late)
    assert [reason for _, _, reason in spans(row)] == ["", "", "too short"]
    assert (row["width"], row["height"], row["has_sound"]) == (64, 48, True)
    assert row["seconds"] == spans(row)[-1][1] == pytest.approx(15, abs=late)
    assert row["fps"] == pytest.approx(10)
    assert row["content"] == hashlib.sha256(path.read_bytes()).hexdigest()
    for clip in row["clips"]:
        assert clip["loudness"] == pytest.approx(20 * math.log10(0.3 / math.sqrt(2)), abs=0.1)
        assert clip["brightness"] == pytest.approx(0.5, abs=0.1)
        assert clip["motion"] > 0.05
        assert len(clip["hash"]) == 8


def test_a_long_scene_is_cut_into_equal_parts(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", [Scene(1, 25.0)])
    found = [(round(start, 3), round(end, 3)) for start, end, _ in spans(of(path, longest=10))]
    assert found == [(0, 8.333), (8.333, 16.667), (16.667, 25)]
    assert len(spans(of(path, longest=25))) == 1


def test_a_variable_rate_keeps_its_times(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", SCENES, variable=True)
    row = of(path)
    assert [start for start, _, _ in spans(row)] == [0.0, 6.0, 13.0]
    assert row["fps"] < 7


def test_a_rotated_file_has_the_size_that_is_shown(tmp_path: Path) -> None:
    plain = of(make_video(tmp_path / "a.mp4"))
    turned = of(make_video(tmp_path / "b.mp4", rotation=90))
    assert (turned["width"], turned["height"]) == (48, 64)
    assert turned["clips"][0]["hash"] != plain["clips"][0]["hash"]


def test_the_same_pictures_have_nearly_the_same_hash(tmp_path: Path) -> None:
    one, two = [Scene(1, still=True)], [Scene(2, still=True)]
    first, again, other = (
        int.from_bytes(of(path)["clips"][0]["hash"])
        for path in (
            make_video(tmp_path / "a.mp4", one),
            make_video(tmp_path / "b.webm", one, size=(192, 144), codec="libvpx", sound=None),
            make_video(tmp_path / "c.mp4", two),
        )
    )
    apart = [(first ^ again).bit_count(), (first ^ other).bit_count()]
    assert apart[0] <= 4
    assert apart[1] > 16


def test_clips_that_show_or_say_nothing_are_named(tmp_path: Path) -> None:
    looks = [Scene(1), Scene(2, still=True), Scene(3, dark=True)]
    path = make_video(tmp_path / "a.mp4", looks, sound=0.001)
    assert [reason for _, _, reason in spans(of(path))] == ["", "still", "dark"]
    lenient = of(path, darkest=0, least_motion=0)
    assert [reason for _, _, reason in spans(lenient)] == ["", "", ""]
    assert spans(of(path, quietest=-40))[0][2] == "silent"
    assert spans(of(path, quietest=-70))[0][2] == ""


def test_no_sound_is_silence_where_sound_is_asked_for(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", sound=None)
    row = of(path)
    assert row["has_sound"] is False
    assert math.isnan(row["clips"][0]["loudness"])
    assert spans(row) == [(0.0, 6.0, "")]
    assert spans(of(path, quietest=-60))[0][2] == "silent"
    digital = make_video(tmp_path / "b.mp4", sound=0.0)
    assert of(digital)["clips"][0]["loudness"] == -120


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(10_000))


def no_index(path: Path) -> None:
    whole = make_video(path.with_name("whole.mp4")).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    path.with_name("whole.mp4").unlink()


def no_frames(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()


def with_cover(path: Path) -> None:
    """A song with a picture on its cover."""
    picture = av.VideoFrame.from_ndarray(Scene(1).frames(1, (64, 48))[0], format="rgb24")
    make_sound(path.with_name("tone.mkv"), codec="libmp3lame")
    with av.open(str(path.with_name("tone.mkv"))) as tone, av.open(str(path), "w") as out:
        track = out.add_stream_from_template(tone.streams.audio[0])
        cover = out.add_stream("png", rate=1)
        assert isinstance(cover, av.VideoStream)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        out.mux(cover.encode(picture))
        out.mux(cover.encode(None))
        for packet in tone.demux():
            if packet.dts is not None:
                packet.stream = track
                out.mux(packet)
    path.with_name("tone.mkv").unlink()


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "empty.mp4": (lambda path: path.touch(), "empty", "0 bytes"),
    "garbage.mp4": (garbage, "broken", "header or index may be damaged"),
    "text.mp4": (lambda path: path.write_text("#EXTM3U\nx.mp4\n"), "broken", "header or index"),
    "cut-off.mp4": (no_index, "broken", "header or index may be damaged"),
    "no-frames.mp4": (no_frames, "broken", "neither pictures nor sound"),
    "encrypted.mp4": (lambda path: make_video(path, encrypted=True), "encrypted", "decrypt"),
    "sound.mp4": (make_sound, "no pictures", "only sound"),
    "cover.mp3": (with_cover, "no pictures", "only sound"),
    "claim.mkv": (
        lambda path: claim_hours(make_video(path)),
        "too long",
        r"header says 36,000 s; the limit is 14,400 s \(clips.longest_file\)",
    ),
    "ten-hours.mp4": (lambda path: hours(path), "too long", "header says 35,401 s"),
}


def hours(path: Path) -> None:
    """Ten hours, of a frame each ten minutes."""
    with av.open(str(path), "w", options={"live": "1"} if path.suffix == ".webm" else {}) as out:
        stream = out.add_stream("libvpx" if path.suffix == ".webm" else "libx264", rate=1)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, picture in enumerate(Scene(1).frames(60, (64, 48))):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = 600 * number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_a_row_with_its_reason(tmp_path: Path, name: str) -> None:
    make, reason, detail = BAD[name]
    make(tmp_path / name)
    row = of(tmp_path / name)
    assert row["reason"] == reason
    assert re.search(detail, row["detail"])


def test_without_a_length_in_its_header_a_file_is_left_as_soon_as_it_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours(tmp_path / "a.webm")
    seen: list[float] = []
    see = Looks.see

    def counted(self: Any, frame: Any, damaged: bool) -> None:
        seen.append(frame.time)
        see(self, frame, damaged)

    monkeypatch.setattr(Looks, "see", counted)
    row = of(tmp_path / "a.webm")
    assert row["reason"] == "too long"
    assert "it runs past" in row["detail"]
    assert max(seen) == 14_400


def test_a_file_that_is_gone_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone.mp4\nmemory://nowhere/gone.mp4\n")
    found = [checked(cut(row, RECIPE)) for row in rows_of([str(tmp_path / "list.txt")], RECIPE)]
    assert [(row["reason"], row["detail"]) for row in found] == [("missing", "no such file")] * 2
    (tmp_path / "folder.mp4").mkdir()
    row = found[0] | {"address": str(tmp_path / "folder.mp4")}
    assert cut(row, RECIPE)["detail"] == "is a folder, not a file"


def test_a_file_that_is_cut_off_gives_the_clips_that_it_holds(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", SCENES, options={"movflags": "faststart"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    row = of(path)
    assert row["reason"] == ""
    assert spans(row)[0] == (0.0, 6.0, "")
    assert row["seconds"] < 12


@pytest.mark.parametrize(("codec", "audio_codec"), [("libx264", "flac"), ("libvpx", "libopus")])
def test_a_clip_with_frames_that_cannot_be_decoded_is_damaged(
    tmp_path: Path, codec: str, audio_codec: str
) -> None:
    path = make_video(tmp_path / "a.mkv", SCENES, codec=codec, audio_codec=audio_codec)
    with av.open(str(path)) as container:
        hit = [p for p in container.demux(video=0) if p.pts is not None and p.pts * p.time_base > 8]
        whole = bytes(hit[5])
    data = path.read_bytes()
    assert data.count(whole) == 1
    path.write_bytes(data.replace(whole, b"\xff" * len(whole)))
    assert [reason for _, _, reason in spans(of(path))] == ["", "damaged", "too short"]


def test_random_damage_never_raises(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for name in ("a.mp4", "a.mkv", "a.avi"):
        codec = "mpeg4" if name == "a.avi" else "libx264"
        sound = "pcm_s16le" if name == "a.avi" else "aac"
        whole = make_video(tmp_path / name, [Scene(1, 2.0)], codec=codec, audio_codec=sound)
        data = whole.read_bytes()
        for _ in range(12):
            bad = bytearray(data)
            for place in draw.integers(0, len(bad), draw.integers(1, 40)):
                bad[place] = draw.integers(256)
            for _ in range(draw.integers(0, 3)):
                bad[draw.integers(min(2000, len(bad)))] = draw.integers(256)
            whole.write_bytes(bad)
            of(whole)


def test_a_bug_is_no_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Looks, "see", wrong)
    with pytest.raises(ZeroDivisionError):
        of(make_video(tmp_path / "a.mp4"))


def test_a_member_of_a_tar_is_as_the_file(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", SCENES)
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        out.add(path, "0.mp4")
    alone, inside = of(path), of(tmp_path / "a.tar")
    for row in (alone, inside):
        del row["took"]
    where = ("id", "address", "member", "offset", "size")
    assert inside["size"] == alone["size"]
    assert {k: v for k, v in inside.items() if k not in where} == {
        k: v for k, v in alone.items() if k not in where
    }


def test_scenes_are_those_that_pyscenedetect_finds(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", [Scene(seed, 2.0) for seed in range(6)], fps=25)
    theirs, ours = AdaptiveDetector(min_scene_len=15), Scenes(min_scene_len=0.6)
    cuts = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            pixels = frame.to_ndarray(format="bgr24")
            found = theirs.process_frame(FrameTimecode(number, 25.0), pixels)
            cuts += [code.seconds for code in found]
            assert ours.process_frame(number / 25, pixels) == [code.seconds for code in found]
            assert ours._frame_score == pytest.approx(theirs._frame_score)
    assert cuts == [2, 4, 6, 8, 10]


def test_the_same_file_gives_the_same_row(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", SCENES)
    one, two = of(path), of(path)
    assert {**one, "took": 0} == {**two, "took": 0}


def test_spans_are_cut_in_place_of_scenes(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", SCENES)
    times = [("0:01", "0:07.5"), ("0:08", "0:09"), ("9", "90"), ("0:00", "0:14"), ("20", "30")]
    clips = [{"clip_id": f"a.{n}.mp4", "span": span} for n, span in enumerate(times)]
    lines = [{"video_id": "a", "clip": clips}, {"clip": clips}]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    recipe = BuildRecipe(kind="hdvila", clips=ClipsRecipe(longest=12.0))
    row, bad = (checked(cut(one, recipe)) for one in rows_of([str(path)], recipe))
    assert spans(row) == [
        (1.0, 7.5, ""),
        (8.0, 9.0, "too short"),
        (9.0, pytest.approx(15.0), ""),
        (0.0, 14.0, "too long"),
        (20.0, 20.0, "too short"),
    ]
    assert (bad["reason"], bad["detail"]) == ("bad row", "the record lacks video_id")
