"""Shards: what is written is read back, the same for any number of workers, split by identity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mico_chat.errors import ConfigError, DataError
from mico_training.data.sources.written import read_shard, write_shard
from mico_world import build, language
from mico_world.sources import SourceError, source, split_of

CONFIG = {
    "things": "shapes",
    "shard_size": 6,
    "train": {"single": 3, "pair": 3, "layers": 2, "motion": 2},
    "validation": {"count": 3, "colour": 2, "scene": 2},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build.main(CONFIG, folder, workers=1, seed=3)
    return folder


def test_shards_are_whole_and_each_split_holds_its_own_identities(built: Path) -> None:
    sizes = {}
    for shard in built.glob("*.tar"):
        wanted = shard.name.split("-")[0]
        samples = list(read_shard(shard))
        sizes[shard.stem] = len(samples)
        for sample in samples:
            assert sample.split == wanted
            assert {split_of(thing["identity"]) for thing in sample.truth["things"]} <= {wanted}
            assert sample.turns
            assert set(sample.captions) <= set(sample.files)
            for turn in sample.turns:
                assert set(turn.media) <= set(sample.files)
                assert any(word in turn.answer.lower() for word in turn.accept)
                assert "{" not in turn.question + turn.answer
    expected = {"train-000000": 6, "train-000001": 4, "validation-000000": 6}
    assert sizes == expected | {"validation-000001": 1}


def test_workers_do_not_change_a_byte(built: Path, tmp_path: Path) -> None:
    build.main(CONFIG, tmp_path, workers=2, seed=3)
    for shard in sorted(built.glob("*.tar")):
        assert (tmp_path / shard.name).read_bytes() == shard.read_bytes()


def test_a_shard_gives_back_its_samples_and_names_one_without_a_medium(tmp_path: Path) -> None:
    make = build.generator("single", build.load_config(CONFIG))
    samples = [build.sample_of(make, "single", "train", i, seed=0) for i in range(2)]
    path = tmp_path / "a.tar"
    assert write_shard(path, samples) == 2
    assert list(read_shard(path)) == samples
    data = path.read_bytes().replace(b'"files": ["image.jpg"]', b'"files": ["image.png"]')
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"lacks image\.png"):
        list(read_shard(path))


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (build.load_config, {"train": {"castles": 3}}, "castles; the generators are beside"),
        (build.load_config, {"training": {}}, "training: Extra inputs"),
        (build.load_config, {"shard_size": 0}, "shard_size"),
        (
            language.Phrases.read,
            "{turns: {}, words: {}, accepted: {l: up}}",
            r"accepted\.l: .*tuple",
        ),
        (language.Phrases.read, "turns: {a: {question: []}}", r"turns\.a\.question: Extra"),
        (language.Phrases.read, "turns: [", "cannot read .*words.yaml"),
    ],
)
def test_a_wrong_table_is_named_with_its_key(
    tmp_path: Path, read: Callable[[Any], object], content: Any, message: str
) -> None:
    if isinstance(content, str):
        (tmp_path / "words.yaml").write_text(content)
        content = tmp_path / "words.yaml"
    with pytest.raises(ConfigError, match=message):
        read(content)


def test_an_unknown_source_is_explained_and_one_in_ten_identities_is_held_out() -> None:
    with pytest.raises(SourceError, match="unknown source 'nothing'"):
        source("nothing")
    held = sum(split_of(f"thing/{i}") == "validation" for i in range(5000))
    assert 400 < held < 600
