"""Damaged data: what cannot be read is named, counted and replaced, the same on every way to train.

Each damage of a file is one that a download, a full disk or a broken tool leaves behind.
"""

import gzip
import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mico_chat.errors import DataError, MediaError
from mico_training.data.bad import GoodExamples
from mico_training.data.examples import ContextDataset
from mico_training.data.mixture import Mixture, open_source
from mico_training.data.sources.readers import ManifestSource
from mico_training.data.sources.shards import ShardSource
from mico_training.data.sources.written import Sample, write_shard
from mico_training.recipe import DataRecipe
from mico_training.stages import train_stage1, train_stage2
from tests.mico_training import test_parallel
from tests.mico_training.scenes import picture, tone
from tests.mico_training.test_parallel import run
from tests.mico_training.test_runs import logged, losses, write_recipe


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    noise = random.Random(number).randbytes(32 * 32 * 3)
    Image.frombytes("RGB", (32, 32), noise).save(file, "JPEG")
    return file.getvalue()


HUGE = picture("red")[:16] + struct.pack(">II", 60_000, 60_000) + picture("red")[24:]
WAYS = {
    "image.jpg": {"truncated": jpeg(0)[:400], "empty": b"", "text": b"404 Not Found"},
    "image.png": {"huge": HUGE},
    "audio.wav": {"half": tone(200, 0.2)[:1000]},
    "video.mp4": {"cut": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(40)},
}
"""Media that cannot be decoded, by the names of their files."""
CAUSES = ("damaged JPEG", "is empty", "not a picture", "60000 x 60000", "claims", "damaged MP4")


def one(number: int, name: str = "image.jpg", content: bytes | None = None) -> Sample:
    files = {name: jpeg(number) if content is None else content}
    return Sample(f"s{number:04d}", "train", files, {name: (f"number {number}",)}, ())


def damaged(folder: Path, n: int = 64) -> Path:
    """A shard of ``n`` samples, some of which have a medium that cannot be decoded."""
    bad = [(name, content) for name, ways in WAYS.items() for content in ways.values()]
    samples = [one(number) for number in range(n - len(bad))]
    samples += [one(n - place, *each) for place, each in enumerate(bad, start=1)]
    random.Random(1).shuffle(samples)
    folder.mkdir(exist_ok=True)
    write_shard(folder / "train-000000.tar", samples)
    return folder


def listed(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "out/bad-samples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def counted(folder: Path) -> list[float]:
    return [entry["bad_samples"] for entry in logged(folder)]


def recipe_of(folder: Path, shards: Path, model: Path, source: Any = None, **train: Any) -> Path:
    data = [{"path": str(shards / "train-*.tar"), "most_bad": 0.5} | (source or {})]
    small = {"steps": 20, "batch_size": 4, "save_steps": 10, "log_steps": 5}
    return write_recipe(folder, shards, model, train=small | train, data=data)


def test_a_run_goes_on_over_damaged_media_and_says_which(tmp_path: Path, tiny_chat: Path) -> None:
    recipe = recipe_of(tmp_path, damaged(tmp_path / "data"), tiny_chat)
    train_stage2(recipe)
    found = listed(tmp_path)
    assert len({(line["data"], line["number"]) for line in found}) == len(found) == len(CAUSES)
    for cause in CAUSES:
        (line,) = (line for line in found if cause in line["cause"])
        assert line["sample"] in line["cause"]
        assert 1 <= line["step"] <= 20
    assert counted(tmp_path) == [
        sum(line["step"] <= step for line in found) for step in (5, 10, 15, 20)
    ]
    with pytest.raises(DataError, match=r"train-\*\.tar: s00.*: .*\.(jpg|png|wav|mp4): "):
        train_stage2(recipe, [f"output={tmp_path}/stopped", "data.0.bad=stop", "train.workers=1"])
    with pytest.raises(DataError, match=r"are bad, more than 5 .* data\.0\.most_bad .*jsonl lists"):
        train_stage2(recipe, [f"output={tmp_path}/few", "data.0.most_bad=0.01"])


def test_a_run_ends_where_nothing_can_be_read(tmp_path: Path, tiny_chat: Path) -> None:
    write_shard(tmp_path / "train-0.tar", [one(number, "image.jpg", b"") for number in range(40)])
    recipe = recipe_of(tmp_path, tmp_path, tiny_chat, {"most_bad": 1.0})
    with pytest.raises(DataError, match=r"16 samples in a row are bad, the first: s00\d\d: train"):
        train_stage2(recipe, ["train.workers=1"])


def go_on(recipe: Path, output: Path) -> None:
    """Train again from the checkpoint in the middle."""
    (output / "checkpoint-20/trainer_state.json").unlink()
    train_stage2(recipe)


@pytest.mark.parametrize("grouped", [False, True])
def test_workers_and_a_resumed_run_list_and_learn_the_same(
    tmp_path: Path, tiny_chat: Path, grouped: bool
) -> None:
    shards = damaged(tmp_path / "data")
    train_stage2(recipe_of(tmp_path / "whole", shards, tiny_chat, group_by_length=grouped))
    again = recipe_of(tmp_path / "again", shards, tiny_chat, group_by_length=grouped, workers=2)
    train_stage2(again)
    assert {line["step"] > 10 for line in listed(tmp_path / "again")} == {False, True}
    with (tmp_path / "again/out/bad-samples.jsonl").open("a") as file:
        file.write('{"data": 0, "numb')  # a kill left a part of a line
    go_on(again, tmp_path / "again/out")
    assert listed(tmp_path / "again") == listed(tmp_path / "whole")
    assert counted(tmp_path / "again") == counted(tmp_path / "whole")
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_list_what_one_does(tmp_path: Path, tiny_chat: Path) -> None:
    shards = damaged(tmp_path / "data")
    for ranks in (1, 2):
        path = recipe_of(tmp_path / str(ranks), shards, tiny_chat, batch_size=4 // ranks)
        run(ranks, train_stage2, path)
    assert listed(tmp_path / "1") == listed(tmp_path / "2")
    assert counted(tmp_path / "1") == counted(tmp_path / "2")


def test_cached_features_skip_the_same_samples(tmp_path: Path, tiny_pretraining: Path) -> None:
    shards = damaged(tmp_path / "data")
    train = ["train.freeze=[encoder.stem]"]
    for name, options in (("pixels", []), ("cached", [f"features.cache={tmp_path}/features"])):
        train_stage1(recipe_of(tmp_path / name, shards, tiny_pretraining), [*train, *options])
    assert len(listed(tmp_path / "cached")) == len(CAUSES)
    assert listed(tmp_path / "pixels") == listed(tmp_path / "cached")


def test_the_bad_sample_of_a_joint_context_is_its_own(tmp_path: Path) -> None:
    for name, kind in (("a", "image.jpg"), ("b", "audio.wav")):
        write_shard(tmp_path / f"{name}.tar", [one(n, kind, b"0") for n in range(4)])
    sources = [ShardSource(str(tmp_path / f"{name}.tar"), "caption") for name in "ab"]
    mixture = Mixture(sources, [1.0, 1.0], 0)

    class Collator:
        def prepare(self, example: Any) -> Any:
            for medium in example.media:
                if medium.name == "b.tar/s0002.audio.wav":
                    raise MediaError(medium.name, "is damaged")
            return example

    sound = GoodExamples(ContextDataset(mixture, 400, 0.0, 1.0), mixture, Collator())
    bad = [one for draw in range(400) for one in sound[draw][1]]
    assert len(bad) > 50
    assert {(one.data, one.number, one.sample) for one in bad} == {(1, 2, "s0002")}
    assert [sound[draw] for draw in range(20)] == [sound[draw] for draw in range(20)]


# --- damaged shards -------------------------------------------------------------------------------


def noise(data: bytes, start: int, n: int) -> bytes:
    return data[:start] + random.Random(start).randbytes(n) + data[start + n :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "noise": lambda data: noise(data, len(data) // 2, 3_000),
    "20 KB": lambda data: noise(data, len(data) // 3 + 77, 20_000),
    "hole": lambda data: data[:40_000] + bytes(9_000) + data[49_000:],
    "start": lambda data: noise(data, 0, 3_000),
    "header": lambda data: noise(data, data.index(b"s0030.image.jpg"), 100),
    "cut": lambda data: data[: len(data) // 2 + 100],
    "no end": lambda data: data[: data.index(b"s0040.json")],
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "pax"])
@pytest.mark.parametrize("way", DAMAGES)
def test_a_damaged_shard_gives_what_is_whole_and_says_what_is_not(
    tmp_path: Path, way: str, form: int
) -> None:
    shard, whole = tmp_path / "train.tar", [one(number) for number in range(60)]
    with tarfile.open(shard, "w", format=form, pax_headers={"comment": "made"}) as tar:
        for sample in whole:
            for name, data in ({"json": sample.record().encode()} | sample.files).items():
                info = tarfile.TarInfo(f"{sample.id}.{name}")
                info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 0
                tar.addfile(info, io.BytesIO(data))
    before, original = shard.read_bytes(), ShardSource(str(shard), "caption")
    assert original.bad.n == 0
    after = DAMAGES[way](before)
    shard.write_bytes(after)
    source = ShardSource(str(shard), "caption")
    assert 1 <= source.bad.n <= 4
    found = {(read := source[number]).id: read for number in range(len(source))}
    lost = 0
    for number, written in enumerate(whole):
        if written.id in found:
            (medium,) = found[written.id].media.values()
            assert medium.read() == written.files["image.jpg"]
        else:
            _, start, size = original.index.place(number)
            lost += after[start : start + size] == before[start : start + size]
    assert lost <= 2  # beside the damage
    assert len(found) > 18
    recipe = DataRecipe(path=str(shard), bad="stop")
    with pytest.raises(
        DataError, match=r"train\.tar: (bytes \d+ to \d+ are no|it |s00\d\d: the sam)"
    ):
        open_source(recipe, "caption")


def test_what_is_no_tar_at_all_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [one(0)])
    for content in (gzip.compress((tmp_path / "a.tar").read_bytes()), b"<html>" * 5000, b""):
        (tmp_path / "train.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"train\.tar: this is not a tar file"):
            ShardSource(str(tmp_path / "train.tar"), "caption")


# --- wrong lines ----------------------------------------------------------------------------------


def test_wrong_lines_are_left_out_until_they_are_mended(tmp_path: Path, tiny_chat: Path) -> None:
    path = tmp_path / "train-0.jsonl"
    for name in ("cat.jpg", "dog.jpg"):
        (tmp_path / name).write_bytes(jpeg(1))
    good = [json.dumps({"image": name, "caption": "An animal."}) for name in ("cat.jpg", "dog.jpg")]
    gone = json.dumps({"image": "cow.jpg", "caption": "A cow."})
    long = json.dumps({"image": "x" * 300, "caption": "A name."})
    path.write_text("\n".join([good[0], "{", gone, long, "[" * 100_000, good[1]]))
    kind = {"path": str(path), "kind": "jsonl"}
    recipe = recipe_of(tmp_path, tmp_path, tiny_chat, kind, steps=2, save_steps=2, log_steps=2)
    train_stage2(recipe)
    assert [line["sample"] for line in listed(tmp_path)] == [f"{path}:{n}" for n in (2, 3, 4, 5)]
    assert {line["step"] for line in listed(tmp_path)} == {0}
    assert logged(tmp_path)[0]["bad_samples"] == 4
    with pytest.raises(DataError, match=r"train-0\.jsonl:2: not JSON"):
        train_stage2(recipe, ["data.0.bad=stop"])
    assert len(ManifestSource(path, "caption")) == 2
    (tmp_path / "cow.jpg").write_bytes(jpeg(2))
    source = ManifestSource(path, "caption")
    assert (len(source), source.bad.n) == (3, 3)
    path.write_text("\n".join(["{"] * 1_200 + good))
    assert (source := ManifestSource(path, "caption")).bad.n == 1_200
    assert len(source.bad.errors) == 1_000
    with pytest.raises(DataError, match=r"1200 of its 1202 samples are bad"):
        train_stage2(recipe, [f"output={tmp_path}/more/out"])
    assert listed(tmp_path / "more")[-1]["sample"] == "200 more"


# --- the soak -------------------------------------------------------------------------------------


@pytest.mark.soak
def test_two_thousand_steps_over_damaged_data(
    tmp_path: Path, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 % of 1,200 samples are damaged in eleven ways; one rank and two list the same."""
    data = damaged(tmp_path / "data", 800)  # six ways
    tarred = [*(one(number) for number in range(800, 1_000)), one(900)]  # a duplicate key
    write_shard(data / "train-000001.tar", tarred)
    shard = (data / "train-000001.tar").read_bytes()
    place = shard.index(b"s0830.image.jpg")
    (data / "train-000001.tar").write_bytes(noise(shard, place, 100))
    lines = [{"image": "cat.jpg", "caption": f"number {number}"} for number in range(200)]
    (data / "cat.jpg").write_bytes(jpeg(1))
    (data / "text.jpg").write_bytes(b"<html>")
    lines[7] |= {"caption": " "}
    lines[70] |= {"image": "missing.jpg"}
    lines[170] |= {"image": "text.jpg"}
    texts = [json.dumps(line) for line in lines]
    (data / "train.jsonl").write_text("\n".join([*texts[:99], texts[99][:20], *texts[100:]]))
    both = [{"path": str(data / "train-*.tar"), "most_bad": 0.02, "ratio": 5}]
    both += [{"path": str(data / "train.jsonl"), "kind": "jsonl", "most_bad": 0.02}]
    monkeypatch.setattr(test_parallel, "PATIENCE", 1_000)
    for ranks in (1, 2):
        train = {"steps": 2_000, "batch_size": 2 // ranks, "save_steps": 500, "log_steps": 100}
        path = write_recipe(tmp_path / str(ranks), data, tiny_chat, train=train, data=both)
        run(ranks, train_stage2, path)
    found = listed(tmp_path / "1")
    assert found == listed(tmp_path / "2")
    causes = [*CAUSES, "'caption' is empty", "no such file", "not JSON", "text.jpg: not a picture"]
    causes += ["are no tar", "s0830: the sample stands in front", "s0900: the sample has members"]
    for cause in causes:
        assert len([line for line in found if cause in line["cause"]]) >= 1, cause
    assert len(found) == len(causes)
    assert counted(tmp_path / "1") == counted(tmp_path / "2")
    assert counted(tmp_path / "1")[-1] == len(causes)
