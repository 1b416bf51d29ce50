"""A build from files to shards: what is in them, what is left out and why, what is refused."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import yaml
from filelock import FileLock
from webdataset.tariterators import group_by_keys, tar_file_expander

from mico_chat.cli.main import main
from mico_chat.errors import ConfigError, ModelError
from mico_chat.media import Audio, Depth, Image, MediaFile, Video, decode
from mico_corpus.build import BuildResult, build
from mico_corpus.describing.base import Annotation
from mico_corpus.packing.pack import captions_of
from mico_corpus.places import batched
from mico_corpus.rows import Row
from mico_training.data.sources.shards import ShardSource
from tests.mico_corpus.builds import CLIPS, finished, left_behind, make_videos, recipe_of, records
from tests.mico_corpus.clips import Scene, make_video
from tests.mico_corpus.cutting.test_cuts import BAD
from tests.mico_corpus.describing.drawn import drawn

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = {"damaged": "plain03", "unsafe": "plain07"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_videos(tmp_path_factory.mktemp("videos"))
    (folder / "nothing.mp4").touch()
    return folder


@pytest.fixture(scope="module")
def made(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult]:
    output = tmp_path_factory.mktemp("made")
    calls = {"calls": str(output / "calls.txt")}
    return output, build(recipe_of(SPECIAL | calls), [str(videos)], str(output))


def no_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def test_everything_is_in_a_shard_or_has_a_reason(made: tuple[Path, BuildResult]) -> None:
    output, built = made
    assert built.counts == {"empty": 1, "damaged": 1, "unsafe": 1}
    assert (built.clips, built.shards) == (CLIPS - 2, 3)
    assert len(records(output)) == CLIPS - 2
    assert len(finished(output)) == CLIPS
    assert not left_behind(output)


def test_record(made: tuple[Path, BuildResult]) -> None:
    for members in records(made[0]).values():
        record = json.loads(members["json"], parse_constant=no_constant)
        names = ["video.mp4", "image.jpg", "audio.flac", "depth.png"]
        assert record["files"] == names
        assert list(members) == ["json", *names]
        assert re.fullmatch(r"clip number \d+", *record["captions"]["video.mp4"])
        assert record["concepts"] == {"image.jpg": "colours"}
        assert record["subtitle"] == "hello world"
        assert (record["source"], record["licence"]) == ("drawn", "CC0")
        assert Path(record["address"]).exists()
        assert record["seconds"] == pytest.approx(record["end"] - record["start"])
        depth = next(said for said in record["annotations"] if said["role"] == "depth")
        assert depth == {
            "annotator": "told",
            "version": "1",
            "role": "depth",
            "medium": "image",
            "text": "",
        }


def test_training_reads_the_shards(made: tuple[Path, BuildResult]) -> None:
    source = ShardSource(f"{made[0]}/*.tar", "caption")
    assert len(source) == CLIPS - 2
    sample = source[0]
    assert sample.subtitle == "hello world"
    assert sample.captions.keys() == {"video.mp4", "image.jpg", "depth.png"}
    media: dict[str, Any] = {name: decode(file) for name, file in sample.media.items()}
    video, sound = media["video.mp4"], media["audio.flac"]
    assert isinstance(video, Video)
    assert video.frames.shape[1:3] == (32, 42)
    assert video.report is not None
    assert video.report.seconds == pytest.approx(5.0, abs=0.2)
    assert isinstance(video.audio, Audio)
    assert isinstance(sound, Audio)
    for heard in (video.audio, sound):
        assert len(heard.samples) / 16_000 == pytest.approx(5.0, abs=0.2)
        assert abs(heard.samples).max() > 0.1
    assert isinstance(media["image.jpg"], Image)
    assert media["image.jpg"].pixels.shape[:2] == (32, 43)
    assert isinstance(media["depth.png"], Depth)


def test_a_fused_caption_comes_first_and_that_of_the_file_last() -> None:
    said = [
        Annotation("caption", "1", "caption", "video", "A dog."),
        Annotation("caption", "1", "caption", "audio", "A bark."),
        Annotation("fuse", "1", "caption", "video", "It barks."),
    ]
    assert captions_of(drawn(said=said, text="My dog")) == {
        "video.mp4": ["It barks.", "A dog.", "My dog"],
        "audio.flac": ["A bark."],
    }


def test_a_silent_track_is_no_sound(tmp_path: Path) -> None:
    """A model that is asked about silence invents something."""
    make_video(tmp_path / "silent.mp4", [Scene(1, 5.0)], fps=6, sound=0.0)
    build(recipe_of(), [str(tmp_path / "silent.mp4")], str(tmp_path / "made"))
    (members,) = records(tmp_path / "made").values()
    assert list(members) == ["json", "video.mp4", "image.jpg", "depth.png"]


def test_bad_files_end_in_the_report_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, (make, _, _) in BAD.items():
        make(folder / name)
    make_video(folder / "instant.mp4", [Scene(5, 0.1)])
    make_video(folder / "turned.mp4", [Scene(6)], rotation=90)
    make_video(folder / "variable.mp4", [Scene(7)], variable=True)
    built = build(recipe_of(), [str(folder)], str(tmp_path / "made"))
    assert built.clips == 2
    assert built.counts == Counter(reason for _, reason, _ in BAD.values()) + Counter(["too short"])
    report = (tmp_path / "made/build/report.md").read_text().replace("\\", "")
    told = {row[0]: row[-1] for row in table_rows(report)}
    for name, (_, reason, detail) in BAD.items():
        assert re.search(f"{re.escape(name)}: .*{detail}", told[reason])
    assert "instant.mp4, 0.0 to 0.1 s: a scene of 0.10 s" in told["too short"]
    for members in records(tmp_path / "made").values():
        record = json.loads(members["json"])
        video = decode(MediaFile("video", members["video.mp4"]))
        assert isinstance(video, Video)
        turned = record["address"].endswith("turned.mp4")
        assert video.frames.shape[1:3] == ((42, 32) if turned else (32, 42))


def table_rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.split("|")[1:-1]]


def test_webdataset_reads_the_shards(made: tuple[Path, BuildResult]) -> None:
    samples = []
    for shard in made[0].glob("*.tar"):
        with shard.open("rb") as stream:  # webdataset itself leaves files open
            files = tar_file_expander([{"url": str(shard), "stream": stream}])
            samples += list(group_by_keys(files))
    assert {sample["__key__"] for sample in samples} == records(made[0]).keys()
    assert all({"json", "video.mp4", "audio.flac"} <= sample.keys() for sample in samples)


def test_a_finished_build_is_left_as_it_is(made: tuple[Path, BuildResult], videos: Path) -> None:
    output, built = made
    before = records(output)
    asked = (output / "calls.txt").read_text()
    options = SPECIAL | {"calls": str(output / "calls.txt")}
    again = build(recipe_of(options), [str(videos)], str(output))
    assert (again.clips, again.counts) == (built.clips, built.counts)
    assert records(output) == before
    assert (output / "calls.txt").read_text() == asked


def test_a_record_does_not_depend_on_its_neighbours(
    made: tuple[Path, BuildResult], videos: Path, tmp_path: Path
) -> None:
    shards = {"samples": 3, "side": 32, "fps": 6.0}
    build(recipe_of(SPECIAL, shards=shards), [str(videos)], str(tmp_path))
    assert len(list(tmp_path.glob("*.tar"))) == 4
    assert records(tmp_path) == records(made[0])


def test_another_recipe_or_another_source_is_refused(
    made: tuple[Path, BuildResult], videos: Path, tmp_path: Path
) -> None:
    output, options = made[0], SPECIAL | {"calls": str(made[0] / "calls.txt")}
    with pytest.raises(ConfigError, match=r"recipe\.seed 0, not 3.*--output"):
        build(recipe_of(options, seed=3), [str(videos)], str(output))
    with pytest.raises(ConfigError, match=r"sources \['.*videos.*'\], not \['"):
        build(recipe_of(options), [str(tmp_path)], str(output))


def test_a_folder_with_other_shards_is_refused(videos: Path, tmp_path: Path) -> None:
    shard = tmp_path / f"{'0' * 32}.tar"
    shard.touch()
    with pytest.raises(ConfigError, match=f"holds {shard.name}, but no build/recipe.yaml"):
        build(recipe_of(), [str(videos)], str(tmp_path))
    assert shard.exists()


def test_a_folder_belongs_to_one_build_at_a_time(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    with (
        FileLock(tmp_path / "build/lock"),
        pytest.raises(ConfigError, match="another build writes here"),
    ):
        build(recipe_of(), [str(videos)], str(tmp_path))


def test_an_annotator_that_forgets_a_clip_ends_the_run(videos: Path, tmp_path: Path) -> None:
    forgetful = {"use": "tests.mico_corpus.annotators:Forgetful", "batch_size": 4}
    with pytest.raises(ModelError, match="forgetful answered 3 times for 4 clips"):
        build(recipe_of(annotators=[forgetful]), [str(videos)], str(tmp_path))
    assert not left_behind(tmp_path)


def test_a_wrong_annotator_is_refused_at_once(videos: Path, tmp_path: Path) -> None:
    for use, options, wrong in (
        ("nothing", {}, "use: 'nothing' is none of"),
        ("tests.mico_corpus.annotators:Nobody", {}, "cannot be imported"),
        ("tests.mico_corpus.annotators:Told", {"cals": "x"}, "lacks the option 'cals'"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            build(
                recipe_of(annotators=[{"use": use, "options": options}]),
                [str(videos)],
                str(tmp_path),
            )
    assert not list(tmp_path.iterdir())


def test_clips_that_nobody_described(videos: Path, tmp_path: Path) -> None:
    silent = [{"use": "tests.mico_corpus.annotators:Silent"}]
    listed = tmp_path / "list.csv"
    listed.write_text(
        f"path,caption\n{videos / 'plain00.mp4'},colours that move\n{videos / 'plain01.mp4'},\n"
    )
    built = build(recipe_of(annotators=silent), [str(listed)], str(tmp_path / "need"))
    assert (built.clips, built.counts) == (1, {"no caption": 1})
    (members,) = records(tmp_path / "need").values()
    assert json.loads(members["json"])["captions"] == {"video.mp4": ["colours that move"]}
    shards = {"samples": 5, "side": 32, "need_caption": False, "image": False, "audio": False}
    built = build(recipe_of(annotators=silent, shards=shards), [str(listed)], str(tmp_path / "all"))
    assert (built.clips, built.counts) == (2, {})
    assert all(
        members.keys() == {"json", "video.mp4"} for members in records(tmp_path / "all").values()
    )


def test_a_build_at_an_address(made: tuple[Path, BuildResult], videos: Path) -> None:
    output = "memory://build-test/shards"
    built = build(recipe_of(SPECIAL), [str(videos)], output)
    assert built.clips == CLIPS - 2
    memory = fsspec.filesystem("memory")
    theirs = {name.rpartition("/")[2]: memory.cat(name) for name in memory.glob(f"{output}/*.tar")}
    assert theirs == {path.name: path.read_bytes() for path in made[0].glob("*.tar")}
    assert len(ShardSource(f"{output}/*.tar", "caption")) == CLIPS - 2


def test_command(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, output = tmp_path / "recipe.yaml", tmp_path / "shards"
    config.write_text(
        "annotators: [{use: 'tests.mico_corpus.annotators:Told', options: {unsafe: plain07}}]\n"
    )
    command = ["data", "build", "--config", str(config), str(videos), "--output", str(output)]
    with pytest.raises(SystemExit) as end:
        main([*command, "--set", "shards.samples=6", "--set", "shards.side=32", "--workers", "0"])
    told = capsys.readouterr().out
    assert not end.value.code
    assert re.search(r"empty +1\n", told)
    assert re.search(r"unsafe +1\n", told)
    assert f"{CLIPS - 1} clips in 2 shards" in told
    assert f"train-stage1, with `data: [{{path: {output}/*.tar}}]`" in told
    with pytest.raises(SystemExit) as end:
        main([*command, "--set", "shards.sample=6"])
    assert end.value.code == 2
    assert "did you mean 'samples'?" in capsys.readouterr().err


ENCODED = """
import hashlib
import numpy as np
from mico_corpus.packing.encoding import flac, jpeg, mp4
from mico_chat.media import Audio
blocks = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
picture = np.kron(blocks, np.ones((6, 6, 1), np.uint8))[:32, :43]
frames = np.stack([np.roll(picture, i, axis=1) for i in range(30)])
sound = Audio(np.sin(np.arange(80_000) / 9).astype(np.float32) / 3)
files = mp4(frames, 5.0, None), mp4(frames, 5.0, sound), flac(sound), jpeg(frames[0])
print(*(hashlib.sha256(file).hexdigest() for file in files))
"""


def python(code: str, **environment: str) -> str:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "training")))
    env = os.environ | {"PYTHONPATH": paths} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_encoders_read_no_memory_that_they_have_not_written() -> None:
    found = {python(ENCODED, MALLOC_PERTURB_=fill) for fill in ("85", "170")}  # new memory holds it
    assert len(found) == 1


def test_a_build_imports_neither_ray_nor_torch() -> None:
    """Ray need not be installed, and each process would take ten times as long to start."""
    found = python("import sys, mico_corpus.build; print({'ray', 'torch'} & sys.modules.keys())")
    assert found == "set()\n"


def test_batches_take_no_more_than_asked_for() -> None:
    numbers = iter(range(10))
    assert next(batched(numbers, 4)) == [0, 1, 2, 3]
    assert list(numbers) == [4, 5, 6, 7, 8, 9]


def test_several_pictures_a_clip_with_maps_and_captions_of_their_own(
    videos: Path, tmp_path: Path
) -> None:
    lines = [{"video_id": "plain00", "clip": [], "category": "music"}, {"clip": []}]
    listed = videos / "hdvila_part0.jsonl"
    listed.write_text("\n".join(map(json.dumps, lines)))
    shards = {"images": 3, "side": 32, "fps": 6.0}
    annotators = [
        {"use": "tests.mico_corpus.annotators:Seen"},
        {"use": "depth", "options": {"side": 48}},
    ]
    recipe = recipe_of(annotators=annotators, shards=shards, kind="hdvila")
    built = build(recipe, [str(listed)], str(tmp_path))
    assert (built.clips, built.counts) == (1, {"bad row": 1})
    ((members),) = records(tmp_path).values()
    names = ("image.jpg", "image2.jpg", "image3.jpg")
    maps = ["depth.png", "depth2.png", "depth3.png", "normal.png", "normal2.png", "normal3.png"]
    record = json.loads(members["json"])
    assert record["files"] == ["video.mp4", *names, "audio.flac", *maps]
    assert record["category"] == "music"
    for name in names:
        (grey,) = record["captions"][name]
        middle = decode(MediaFile("image", members[name], name))
        assert isinstance(middle, Image)
        assert abs(int(grey.rpartition(" ")[2]) - middle.pixels.mean()) < 8
    assert len({members[name] for name in names}) == 3
    assert members["depth.png"] == b"depth", "the first annotator's map is packed"
    said = {(a["annotator"], a["role"], a["medium"]) for a in record["annotations"]}
    assert {("depth", "depth", f"image{n}") for n in ("", 2, 3)} < said
    sample = ShardSource(f"{tmp_path}/*.tar", "caption")[0]
    assert [m.kind for m in sample.media.values()].count("depth") == 3
    for place in ("", "2", "3"):  # a map has the caption of its own picture
        shown = sample.captions[f"image{place}.jpg"]
        assert (
            sample.captions[f"depth{place}.png"] == sample.captions[f"normal{place}.png"] == shown
        )
    (row,) = (r for r in rows_in(tmp_path / "build/clips.parquet") if not r["reason"])
    assert row["category"] == "music"


def test_a_build_of_an_older_recipe_goes_on(videos: Path, tmp_path: Path) -> None:
    recipe = recipe_of({"calls": str(tmp_path / "calls.txt")})
    output = tmp_path / "out"
    first = build(recipe, [str(videos / "plain00.mp4")], str(output))
    path = output / "build/recipe.yaml"
    kept = yaml.safe_load(path.read_text())
    del kept["recipe"]["kind"], kept["recipe"]["shards"]["images"]
    path.write_text(yaml.safe_dump(kept))
    for name, columns in (
        ("sources.parquet", ["category", "spans", "fault"]),
        ("clips.parquet", []),
    ):
        table = pq.read_table(output / "build" / name)
        pq.write_table(table.drop_columns(columns or ["category"]), output / "build" / name)
    for part in (output / "build/files").glob("*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["category", "spans", "fault"]), part)
    (output / "build/clips.parquet").unlink()
    for part in (output / "build/index").glob("*.parquet"):
        part.unlink()
    again = build(recipe, [str(videos / "plain00.mp4")], str(output))
    assert (again.clips, again.counts) == (first.clips, first.counts) == (1, {})


def rows_in(path: Path) -> list[Row]:
    found: list[Row] = pq.read_table(path).to_pylist()
    return found
