"""Data as others leave them: img2dataset's and video2dataset's shards, and files at addresses."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from mico_chat.errors import ConfigError, DataError, MissingProtocolError
from mico_chat.media import MediaFile
from mico_chat.media.file import Remote, TarMember
from mico_training.data.media import FeatureCache
from mico_training.data.mixture import open_source
from mico_training.data.sources.readers import ManifestSource
from mico_training.data.sources.shards import ShardSource
from mico_training.data.sources.written import write_shard
from mico_training.recipe import DataRecipe
from tests.mico_training.scenes import picture, scene, tone

META = {
    "caption": "a red square",
    "url": "https://x/y",
    "status": "success",
    "key": "0",
    "width": 32,
}


def tar(path: Path, *members: tuple[str, bytes], form: int = tarfile.USTAR_FORMAT) -> str:
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 0
            file.addfile(info, io.BytesIO(content))
    return str(path)


def described(source: ShardSource) -> dict[str, Any]:
    samples = [source[n] for n in range(len(source))]
    return {s.id: ({n: m.kind for n, m in s.media.items()}, dict(s.captions)) for s in samples}


FORMS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


@pytest.mark.parametrize("form", FORMS, ids=["ustar", "pax", "gnu"])
def test_shards_of_img2dataset_and_video2dataset_are_read_as_they_are(
    tmp_path: Path, form: int
) -> None:
    far = "folder/" * 20 + "000000003"
    record = scene(0)
    path = tar(
        tmp_path / "00000.tar",
        ("000000000.jpg", picture("red")),
        ("000000000.json", json.dumps(META).encode()),
        ("000000000.txt", b"a square"),
        ("000000001.json", json.dumps(META | {"status": "failed_to_download"}).encode()),
        ("000000002.webp", picture("blue")),
        ("000000002.json", json.dumps(META).encode()),
        (f"{far}.mp4", b"clip" * 5000),
        (f"{far}.flac", tone(200)),
        (f"{far}.txt", "caf\u00e9\n".encode()),
        ("000000004.PNG", picture("blue")),
        ("000000005.wav", tone(300)),
        ("000000005.txt", b""),
        (f"{record.id}.json", record.record().encode()),
        *((f"{record.id}.{name}", content) for name, content in record.files.items()),
        form=form,
    )
    source = ShardSource(path, "caption")
    assert described(source) == {
        "000000000": ({"jpg": "image"}, {"jpg": ("a square",)}),
        "000000002": ({"webp": "image"}, {"webp": ("a red square",)}),
        far: ({"mp4": "video", "flac": "audio"}, {"mp4": ("caf\u00e9",)}),
        record.id: ({"image.png": "image", "audio.wav": "audio"}, dict(record.captions)),
    }
    assert source[0].media["jpg"].read() == picture("red")
    assert source[2].media["mp4"].read() == b"clip" * 5000
    assert source[2].media["flac"].read() == tone(200)
    assert len(ShardSource(path, "conversation")) == 1


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": b"0", "a.json": b"{"}, r"a: the sample has a a\.json that is not JSON"),
        ({"a.jpg": b"0", "a.json": b"[1]"}, r"a\.json that is a list, no object"),
        ({"a.jpg": b"0", "a.txt": b"\xff\xfe"}, r"a: the sample has a a\.txt that is not UTF-8"),
        ({"a.jpg": b"0", "a.json": b'{"caption": 3}'}, "a caption that is int, not a string"),
        ({"a.json": b'{"files": 3}'}, r"a bad a\.json: files: Input should be a valid list"),
        ({"a.json": b'{"files": ["image.jpg"]}'}, r"a: the sample names image\.jpg, which the sh"),
        ({"a.json": b'{"files": ["x.jpg"]}', "a.x.jpg": b"0"}, r"has x\.jpg of an unknown kind"),
        ({"a.json": b'{"files": [], "captions": []}'}, r"a bad a\.json: captions: "),
        ({"a.jpg": b"0", "b.jpg": b"0", "a.txt": b"A."}, "a: .* members that do not stand toge"),
    ],
)
def test_a_bad_member_is_named_by_shard_and_key(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    path = tar(tmp_path / "00000.tar", ("good.jpg", b"0"), ("good.txt", b"G."), *members.items())
    with pytest.raises(DataError, match=message) as error:
        open_source(DataRecipe(path=path, bad="stop"), "caption")
    assert str(error.value).startswith(path)
    assert ShardSource(path, "caption").bad.n == 1
    assert "\n" not in str(error.value)


# --- addresses ------------------------------------------------------------------------------------


@pytest.fixture
def bucket(cache: Path) -> Iterator[Any]:
    """A bucket in memory, at ``memory://bucket``."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_shards_at_an_address_are_those_in_a_folder(
    bucket: Any, shards: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in shards.glob("*.tar"):
        bucket.pipe(f"/bucket/{path.name}", path.read_bytes())
    there = ShardSource("memory://bucket/train-*.tar", "conversation")
    here = ShardSource(str(shards / "*.tar"), "conversation")
    requests = []
    cat = type(bucket).cat_file

    def counted(*arguments: Any) -> bytes:
        requests.append(arguments)
        return bytes(cat(*arguments))

    monkeypatch.setattr(type(bucket), "cat_file", counted)
    assert len(there) == len(here) == 12
    for number in range(12):
        far, near = there[number], here[number]
        assert (far.id, far.turns, far.captions) == (near.id, near.turns, near.captions)
        assert {n: m.read() for n, m in far.media.items()} == {
            n: m.read() for n, m in near.media.items()
        }
    assert len(requests) == 12, "a sample is one request"
    assert len(list((cache / "index").glob("*.index.npz"))) == 2
    monkeypatch.setattr("mico_training.data.sources.shards.scan", None)
    assert len(ShardSource("memory://bucket/train-*.tar", "caption")) == 12
    medium = there[0].media["image.png"]
    features = FeatureCache(cache / "features", "stem")
    pixels = torch.ones(1, 3, 2, 2)
    assert features.fill([medium], lambda _: [pixels], lambda units, _: units) == 1
    torch.testing.assert_close(features[medium], [pixels])


def test_fsspec_may_keep_local_copies(bucket: Any, tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [scene(0)])
    bucket.pipe("/bucket/a.tar", (tmp_path / "a.tar").read_bytes())
    source = ShardSource("simplecache::memory://bucket/*.tar", "caption")
    bucket.rm("/bucket/a.tar")
    assert source[0].media["image.png"].read() == picture("red")


def test_an_index_that_was_copied_with_its_shard_is_used(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.tar", [scene(0), scene(1)])
    assert len(ShardSource(str(tmp_path / "a.tar"), "caption")) == 2
    for path in tmp_path.glob("a.*"):
        bucket.pipe(f"/bucket/{path.name}", path.read_bytes())
    monkeypatch.setattr("mico_training.data.sources.shards.scan", None)
    assert len(ShardSource("memory://bucket/a.tar", "caption")) == 2


def test_manifests_and_media_may_lie_at_addresses(bucket: Any, tmp_path: Path) -> None:
    bucket.pipe("/bucket/media/cat.png", picture("red"))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    record = {"image": "media/cat.png", "caption": "A cat.", "conversations": turns}
    bucket.pipe("/bucket/train.jsonl", f"{json.dumps(record)}\n".encode())
    bucket.pipe("/bucket/llava.json", json.dumps([record]).encode())
    (tmp_path / "here.jsonl").write_text(json.dumps(record | {"image": "cat.png"}))
    for sample in (
        ManifestSource("memory://bucket/train.jsonl", "caption")[0],
        open_source(DataRecipe(path="memory://bucket/llava.json"), "caption")[0],
        open_source(
            DataRecipe(path=f"{tmp_path}/here.jsonl", kind="jsonl", root="memory://bucket/media"),
            "caption",
        )[0],
    ):
        medium = sample.media["image"]
        assert isinstance(medium.source, Remote)
        assert medium.read() == picture("red")
        assert medium.size == len(picture("red"))
        assert sample.conversation[0].files == (medium,)
    missing = MediaFile("image", Remote("memory://bucket/cow.png"), "cow.png")
    with pytest.raises(Exception, match=r"cow\.png: no such file"):
        missing.read()


def test_a_folder_may_lie_at_an_address(bucket: Any) -> None:
    for name, content in (("a/1.png", picture("red")), ("a/.2.png", b"x"), ("a/1.txt", b"A cat.")):
        bucket.pipe(f"/bucket/own/{name}", content)
    for recipe in (
        DataRecipe(path="memory://bucket/own/"),
        DataRecipe(path="memory://bucket/own", kind="folder"),
    ):
        source = open_source(recipe, "caption")
        sample = source[0]
        assert len(source) == 1
        assert sample.captions == {"image": ("A cat.",)}
        assert sample.media["image"].read() == picture("red")


def test_what_is_missing_is_named(cache: Path) -> None:
    with pytest.raises(DataError, match=r"memory://bucket/\*\.tar: this shard does not exist"):
        ShardSource("memory://bucket/*.tar", "caption")
    with pytest.raises(DataError, match=r"memory://bucket/x\.jsonl"):
        ManifestSource("memory://bucket/x.jsonl", "caption")
    with pytest.raises(ConfigError, match=r"nothing reads abc:// .*; use a folder, or .* s3://"):
        ShardSource("abc://bucket/*.tar", "caption")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(MissingProtocolError, match=r"s3://b/\*\.tar needs .* pip install s3fs$"):
        ShardSource("s3://b/*.tar", "caption")


def test_a_part_of_a_tar_holds_no_handle() -> None:
    assert TarMember("memory://bucket/x", 3, 4, b"held").read() == b"held"
    assert TarMember("memory://bucket/x", 3, 4, b"held") == TarMember("memory://bucket/x", 3, 4)
