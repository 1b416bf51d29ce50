"""Readers name what is wrong; truths give regions; cached features are what the stem gave."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mico_chat.errors import DataError
from mico_chat.media import MediaFile
from mico_chat.model.mini.regions import WHOLE
from mico_training.data.media import FeatureCache, stem_fingerprint
from mico_training.data.mixture import open_source
from mico_training.data.sources.readers import ManifestSource
from mico_training.data.sources.sample import WAYS, Region, region_batch, regions_of
from mico_training.data.sources.shards import ShardSource
from mico_training.data.sources.written import Turn, write_shard
from mico_training.recipe import DataRecipe
from tests.mico_training.scenes import scene


def test_a_sample_comes_back_as_written(shards: Path) -> None:
    source = ShardSource(str(shards / "train-*.tar"), "conversation")
    assert len(source) == 12
    sample, written = source[7], scene(7)
    assert sample.id == written.id
    assert sample.turns == written.turns
    assert sample.captions == written.captions
    for name, medium in sample.media.items():
        assert medium.read() == written.files[name]
    assert [medium.kind for medium in sample.media.values()] == ["image", "audio"]


def test_the_index_is_used_and_a_changed_shard_is_indexed_again(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    write_shard(path, [scene(0)])
    assert len(ShardSource(str(path), "caption")) == 1
    index = tmp_path / "train-000000.tar.index.npz"
    written = index.stat().st_mtime_ns
    assert len(ShardSource(str(path), "caption")) == 1
    assert index.stat().st_mtime_ns == written
    write_shard(path, [scene(0), scene(1)])
    assert len(ShardSource(str(path), "caption")) == 2


def test_skills_filter_samples_and_questions(shards: Path) -> None:
    source = ShardSource(str(shards / "train-*.tar"), "conversation", ("colour",))
    assert [turn.skill for turn in source[0].turns] == ["colour"]
    assert len(ShardSource(str(shards / "train-*.tar"), "conversation", ("motion",))) == 0


def test_shard_errors_name_the_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this shard does not exist"):
        ShardSource(str(tmp_path / "*.tar"), "caption")
    (tmp_path / "text.tar").write_text("not a tar")
    with pytest.raises(DataError, match=r"text\.tar: this is not a tar file that can be read"):
        ShardSource(str(tmp_path / "text.tar"), "caption")
    turn = Turn("What?", "That.", "name", ("video.mp4",))
    write_shard(tmp_path / "bad.tar", [replace(scene(0), turns=(turn,))])
    with pytest.raises(DataError, match=r"bad\.tar: scene000: .* a question about video\.mp4"):
        open_source(DataRecipe(path=str(tmp_path / "bad.tar"), bad="stop"), "conversation")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat.jpg", "dog.jpg", "purr.ogg"):
        (tmp_path / name).write_bytes(b"0")
    return tmp_path


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


QUESTION = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "That."}


def test_jsonl_gives_captions_and_conversations(folder: Path) -> None:
    media = {"image": ["cat.jpg", "dog.jpg"], "audio": "purr.ogg"}
    marked = {"role": "user", "content": "<image>\n<image>\n<audio>\nWhose sound?"}
    part = {"type": "text", "text": "What is it?"}
    path = lines(
        folder / "train.jsonl",
        {"image": "cat.jpg", "caption": "A cat."},
        "",
        media | {"messages": [marked, ANSWER]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"image": "cat.jpg", "messages": [{"role": "user", "content": [part]}, ANSWER]},
    )
    captions = ManifestSource(path, "caption")
    assert len(captions) == 1
    assert captions[0].captions == {"image": ("A cat.",)}
    source = ManifestSource(path, "conversation")
    told, plain, unmarked = (source[n].conversation for n in range(3))
    assert [m.path for m in told[0].files] == [
        folder / n for n in ("cat.jpg", "dog.jpg", "purr.ogg")
    ]
    assert told[0].text.strip() == "Whose sound?"
    assert plain[1].text == "Hello."
    # A medium without a marker is shown first.
    assert [type(part).__name__ for part in unmarked[0].content] == ["MediaFile", "TextPart"]


def test_jsonl_captions_each_medium(folder: Path) -> None:
    media = {"image": ["cat.jpg", "dog.jpg"], "audio": "purr.ogg"}
    captions = {"image2": "A dog.", "audio": ["Purring.", "A purr."]}
    path = lines(folder / "train.jsonl", media | {"captions": captions})
    sample = ManifestSource(path, "caption")[0]
    assert sample.captions == {"image2": ("A dog.",), "audio": ("Purring.", "A purr.")}
    both = [{"caption": "A cat.", "captions": given} for given in (captions, ["Two cats."])]
    path = lines(folder / "both.jsonl", *(media | words for words in both))
    named, listed = (ManifestSource(path, "caption")[n].captions for n in range(2))
    assert named == {"image": ("A cat.",), **sample.captions}
    assert listed == {"image": ("A cat.", "Two cats.")}
    heard = ManifestSource(path, "caption", kinds=frozenset({"audio"}))[0]
    assert (list(heard.media), list(heard.captions)) == (["audio"], ["audio"])
    assert len(ManifestSource(path, "caption", kinds=frozenset({"video"}))) == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a sample is an object, not list"),
        ({"image": "cat.jpg"}, "lacks all of 'caption', 'messages'"),
        ({"image": "cow.jpg", "caption": "A cow."}, r"image cow\.jpg: no such file"),
        ({"image": 3, "caption": "A cow."}, "'image' is neither a string nor a list"),
        ({"image": "cat.jpg", "caption": " "}, "'caption' is empty"),
        ({"caption": "A cow."}, "has a caption but no medium"),
        ({"image": "cat.jpg", "captions": {"audio": "Purr."}}, "of 'audio', but its media are: im"),
        ({"captions": {"image": "A cow."}}, "of 'image', but its media are: none"),
        ({"image": "cat.jpg", "captions": {"image": 3}}, "'image' is neither a string nor a list"),
        ({"image": "cat.jpg", "captions": {"image": [""]}}, "'image' is empty"),
        ({"image": "cat.jpg", "captions": 3}, "'captions' is neither a string nor a list"),
        ({"image": "cat.jpg", "captions": {}}, "lacks all of 'caption', 'messages'"),
        ({"messages": [QUESTION]}, "with an answer; they are user"),
        ({"messages": [ANSWER, QUESTION]}, "with an answer; they are assistant, user"),
        ({"messages": [{"role": "dog", "content": "x"}]}, "'dog' is none of"),
        (
            {"messages": [{"role": "user", "content": "<image> ?"}, ANSWER]},
            "1 <image> markers but 0",
        ),
        ({"messages": [{"role": "user"}, ANSWER]}, "turn 1 has no text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(folder: Path, record: Any, message: str) -> None:
    path = lines(folder / "train.jsonl", {"image": "cat.jpg", "caption": "A cat."}, record)
    recipe = DataRecipe(path=str(path), kind="jsonl", bad="stop")
    with pytest.raises(DataError, match=message) as error:
        open_source(recipe, "caption")
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)
    source = ManifestSource(path, "caption")
    assert (len(source), source.bad.n) == (1, 1)


def test_llava_json(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    path = folder / "llava.json"
    path.write_text(json.dumps([{"id": "7", "image": "cat.jpg", "conversations": turns}]))
    assert open_source(DataRecipe(path=str(path)), "conversation")[0].id == "7"
    path.write_text(json.dumps([{"image": "cow.jpg", "conversations": turns}]))
    with pytest.raises(DataError, match=r"llava\.json:1: image cow\.jpg"):
        open_source(DataRecipe(path=str(path), bad="stop"), "conversation")


# --- the feature cache ---------------------------------------------------------------------------

FINGERPRINT = "abc"


def units(medium: MediaFile) -> list[Tensor]:
    """Units whose pixels tell the medium; a sound stands for a video with a sound track."""
    value = torch.tensor([float(sum(medium.read()) % 1000)])
    pixels = value.reshape(1, 1, 1, 1).expand(2, 3, 8, 8)
    return [pixels, pixels[:1] + 1] if medium.kind == "audio" else [pixels]


def stem(pixels: Tensor) -> Tensor:
    return pixels[:, :2, :7, :7] / 8


def of_kind(pixels: Tensor, is_sound: Tensor) -> Tensor:
    """A stem that tells sounds apart."""
    return stem(pixels) * torch.where(is_sound, -1.0, 1.0).view(-1, 1, 1, 1)


@pytest.fixture
def media(shards: Path) -> list[MediaFile]:
    source = ShardSource(str(shards / "*.tar"), "caption")
    return [m for i in range(len(source)) for m in source[i].media.values()]


def check(cache: FeatureCache, medium: MediaFile) -> None:
    expected = [stem(part) * (-1 if medium.kind == "audio" else 1) for part in units(medium)]
    torch.testing.assert_close(cache[medium], expected, rtol=1e-3, atol=1e-3)


def test_features_come_back(media: list[MediaFile], tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, FINGERPRINT)
    assert cache.fill(media, units, of_kind, batch_size=5) == 24
    assert cache.fill(media, units, of_kind) == 0
    for medium in media:
        check(cache, medium)


def test_a_killed_run_loses_only_the_shard_that_it_was_in(
    media: list[MediaFile], tmp_path: Path
) -> None:
    FeatureCache(tmp_path, FINGERPRINT).fill(media[:7], units, of_kind, batch_size=2)
    (file,) = (tmp_path / FINGERPRINT).glob("*.safetensors")
    file.with_suffix(".1234").write_bytes(b"a part of the next shard")
    fresh = FeatureCache(tmp_path, FINGERPRINT)
    assert fresh.fill(media, units, of_kind, batch_size=2) == 24 - 7
    for medium in media:
        check(fresh, medium)


def test_another_stem_is_another_cache(media: list[MediaFile], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 1)
    before = stem_fingerprint(module, "224")
    assert before == stem_fingerprint(module, "224") != stem_fingerprint(module, "64")
    nn.init.zeros_(module.weight)
    assert stem_fingerprint(module, "224") != before
    FeatureCache(tmp_path, FINGERPRINT).fill(media[:2], units, of_kind)
    with pytest.raises(DataError, match="its features are not in"):
        FeatureCache(tmp_path, "def")[media[0]]


def test_files_outside_shards_are_refused(tmp_path: Path) -> None:
    medium = MediaFile("image", tmp_path / "cat.jpg", "cat.jpg")
    with pytest.raises(DataError, match="only media of shards can have cached"):
        FeatureCache(tmp_path, FINGERPRINT).fill([medium], units, of_kind)


def thing(name: str, x: float, y: float = 0.5, **more: Any) -> dict[str, Any]:
    return {"name": name, "x": x, "y": y, "width": 0.2, "height": 0.1, **more}


def words(kind: Any, *things: dict[str, Any]) -> list[set[str]]:
    return [set(region.words) for region in regions_of(kind, {"things": list(things)})]


def test_colour_side_and_number_are_bound_to_each_thing() -> None:
    cup, hat, other = thing("cup", 0.2, colour="red"), thing("hat", 0.8), thing("cup", 0.5)
    first, second, third, whole = words("image", cup, hat, other)
    assert first == {"red", "left", "two"}
    assert second == {"right", "one"}
    assert third == {"middle", "two"}
    assert whole == {"three"}


def test_a_box_lies_within_its_thing() -> None:
    (region, whole) = regions_of("image", {"things": [thing("cup", 0.5)]})
    left, top, right, bottom = region.box
    assert 0.4 < left < right < 0.6
    assert 0.45 < top < bottom < 0.55
    assert set(whole.box) == {WHOLE}


def test_above_and_below_are_words_for_two_things() -> None:
    high, low, _ = words("image", thing("cup", 0.5, 0.2), thing("hat", 0.5, 0.8))
    assert {"above", "top"} <= high
    assert {"below", "bottom"} <= low
    assert not {"left", "right"} & (high | low)


def test_depth_has_nearness_but_no_colour() -> None:
    near, far = thing("cup", 0.2, depth=1.0, colour="red"), thing("hat", 0.8, depth=2.0)
    first, second, _ = words("depth", near, far)
    assert "nearer" in first
    assert "far" in second
    assert "red" not in first
    # Nearly equal depths are not told apart.
    alike, other, _ = words("depth", thing("a", 0.2, depth=1.0), thing("b", 0.8, depth=1.05))
    assert not {"nearer", "far"} & (alike | other)


def test_a_clips_things_have_their_ways() -> None:
    things = [thing("ball", 0.2, way="left", colour="red"), thing("cup", 0.8, way="still")]
    ball, cup, whole = regions_of("video", {"things": things})
    assert (ball.way, cup.way, whole.way) == ("left", "still", "")
    assert "red" in ball.words
    batch = region_batch([[ball, cup, whole]], lambda word: [1])
    assert batch is not None
    assert [WAYS[int(way)] if way >= 0 else "" for way in batch.way] == ["left", "still", ""]


def test_sounds_and_foreign_truths_have_no_regions() -> None:
    assert regions_of("audio", {"things": [thing("bell", 0.5)]}) == ()
    assert regions_of("image", {}) == ()
    assert regions_of("image", {"things": ["cup"]}) == ()
    assert regions_of("image", {"things": [{"name": "cup"}]}) == ()
    assert regions_of("image", {"belong": True, "thing": "cup"}) == ()


def test_a_batch_numbers_media_and_leaves_wordless_regions_out() -> None:
    known = {"red": [3], "left": [4, 5], "cup": [6]}
    box = (0.0, 0.0, 1.0, 1.0)
    found = [
        [Region(box, "cup", ("red",))],
        [],
        [Region(box, "", ("nowhere",))],
        [Region(box, "", ("left", "red"))],
    ]
    batch = region_batch(found, lambda word: known.get(word, []))
    assert batch is not None
    assert batch.medium.tolist() == [0, 3]
    assert batch.words.tolist() == [[3, -1, -1], [4, 5, 3]]
    assert batch.names.tolist() == [[6], [-1]]
    assert region_batch([[], []], lambda word: [1]) is None
    assert torch.equal(batch.inputs()["region_box"][0], torch.tensor(box))
