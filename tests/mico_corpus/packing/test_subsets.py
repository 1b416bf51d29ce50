"""Nested subsets: each within the next, balanced, and the same from the same build and seed."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chi2

from mico_chat.errors import ConfigError, DataError
from mico_corpus.packing.strata import BETWEEN, counts_at, levels_of, order_of
from mico_corpus.packing.subsets import Classes, read_strata, sizes_of, subset
from mico_corpus.places import Place
from mico_corpus.rows import INDEX, INDEXES, Row
from mico_training.data.sources.shards import ShardSource
from mico_training.data.sources.written import read_shard
from tests.mico_corpus.made import build, said

CLIPS = 40
SIZES = (7, 16, 31)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_every_prefix_has_the_shares_of_the_whole(sizes: list[int]) -> None:
    """Less than one clip off, in each stratum, for each number of clips."""
    total = sum(sizes)
    ends = range(1, total + 1)
    found = np.array(counts_at(sizes, ends))
    assert (found.sum(axis=1) == np.arange(1, total + 1)).all()
    assert (np.diff(found, axis=0) >= 0).all()
    # Whole numbers: |count - size * end / total| < 1
    off = found * total - np.outer(np.arange(1, total + 1), sizes)
    assert (np.abs(off) < total).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(0, 3), st.data())
def test_levels_do_not_depend_on_the_order_of_the_clips(
    strata: list[int], seed: int, data: st.DataObject
) -> None:
    names = [f"stratum {number}" for number in range(7)]
    ends = sorted(data.draw(st.sets(st.integers(1, len(strata)), min_size=1, max_size=4)))
    of = np.array(strata)
    orders = np.array([order_of(f"clip {n}", seed) for n in range(len(of))], np.uint64)
    levels = levels_of(of, orders, names, seed, ends)
    for level, end in enumerate(ends):
        assert (levels <= level).sum() == end
    shuffled = np.array(data.draw(st.permutations(range(len(of)))))
    swapped = [names[n] for n in (3, 4, 5, 6, 0, 1, 2)]
    renamed = (of[shuffled] + 4) % 7
    again = levels_of(renamed, orders[shuffled], swapped, seed, ends)
    assert (again == levels[shuffled]).all()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("whole"), CLIPS, a_shard=9)


@pytest.fixture(scope="module")
def subsets(output: Path) -> Path:
    folder = output.parent / "subsets"
    subset(str(output), SIZES, 0, str(folder), samples=5)
    return folder


def test_a_pattern_names_a_subset(subsets: Path) -> None:
    for level, size in enumerate(SIZES):
        found = {
            s.id
            for n in range(level + 1)
            for p in subsets.glob(f"{n}-*.tar")
            for s in read_shard(p)
        }
        assert len(found) == size
    assert sorted(path.name for path in subsets.glob("0-*.tar")) == ["0-000000.tar", "0-000001.tar"]
    assert len(ShardSource(f"{subsets}/[01]-*.tar", "caption")) == SIZES[1]


def test_samples_are_copied_byte_for_byte(output: Path, subsets: Path) -> None:
    whole = {sample.id: sample for path in output.glob("*.tar") for sample in read_shard(path)}
    copied = [sample for path in subsets.glob("*.tar") for sample in read_shard(path)]
    assert all(whole[sample.id] == sample for sample in copied)
    assert len({sample.id for sample in copied}) == len(copied) == SIZES[-1]
    index = pq.read_table(subsets / "build" / "index")
    assert index.schema.equals(INDEX)
    held = {row["id"]: row["shard"] for row in index.to_pylist()}
    assert held == {
        sample.id: path.name for path in subsets.glob("*.tar") for sample in read_shard(path)
    }
    assert not list((subsets / "build" / "partial").iterdir())


def test_each_stratum_has_its_share(output: Path, subsets: Path) -> None:
    table = pq.read_table(subsets / "subsets.parquet").to_pylist()
    all_of_it = output.parent / "all"
    subset(str(output), [CLIPS], 0, str(all_of_it))
    whole = [row["stratum"] for row in pq.read_table(all_of_it / "subsets.parquet").to_pylist()]
    assert len(set(whole)) >= 4, "sources, and clips with and without sound"
    assert any(
        s == " | image video audio depth normal speech | 4 captions | from 1 words | 5-10 s | films"
        " | square"
        for s in whole
    )
    # Of each class of classes, such as all clips with sound: its share of the next larger subset.
    nodes = {BETWEEN.join(s.split(BETWEEN)[:n]) for s in set(whole) for n in range(1, 8)}
    for level, size in reversed([*enumerate(SIZES)]):
        within = [row["stratum"] for row in table if row["level"] <= level]
        for node in nodes:
            share = sum(s.startswith(node) for s in whole) * size / len(whole)
            assert abs(sum(s.startswith(node) for s in within) - share) < 1
        whole = within
    text = (subsets / "subsets.md").read_text()
    assert "| source | all 40 | 7 (`0-*.tar`) | 16 (`[0-1]-*.tar`) | 31 (`[0-2]-*.tar`) |" in text
    assert "| films | 21 (52.50 %) |" in text


def test_the_same_build_and_seed_give_the_same_clips(output: Path, subsets: Path) -> None:
    def chosen(folder: Path, seed: int, whole: Path) -> dict[str, int]:
        subset(str(whole), SIZES, seed, str(folder), samples=5)
        rows = pq.read_table(folder / "subsets.parquet").to_pylist()
        return {row["id"]: row["level"] for row in rows}

    again = chosen(output.parent / "again", 0, output)
    rows = pq.read_table(subsets / "subsets.parquet").to_pylist()
    assert again == {row["id"]: row["level"] for row in rows}
    other = output.parent / "reordered"
    shutil.copytree(output, other)
    parts = sorted((other / "build" / "index").glob("[0-9]*.parquet"))
    for number, part in enumerate(parts):
        part.rename(part.with_name(f"z{len(parts) - number}.parquet"))
    assert chosen(output.parent / "third", 0, other) == again
    assert chosen(output.parent / "fourth", 1, output) != again


def test_a_run_that_was_interrupted_starts_anew(
    output: Path, subsets: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "subsets"
    shutil.copytree(subsets, folder)
    (folder / "subsets.parquet").unlink()
    (folder / "0-000009.tar").write_bytes(b"of another run")
    subset(str(output), SIZES, 0, str(folder), samples=5)
    names = [sorted(p.name for p in f.rglob("*.*")) for f in (folder, subsets)]
    assert names[0] == [name for name in names[1] if not name.endswith(".index.npz")]
    for path in subsets.glob("*.tar"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_what_cannot_be(output: Path, subsets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a subset of 41 clips is asked for, but .* has 40"):
        subset(str(output), [41], 0, str(tmp_path / "new"))
    for folder in (subsets, output):
        with pytest.raises(ConfigError, match="holds shards already: give another --output"):
            subset(str(output), [4], 0, str(folder))
    with pytest.raises(DataError, match="no build is there"):
        subset(str(tmp_path), [4], 0, str(tmp_path / "new"))
    assert sizes_of("500, 10k,1.5M") == [500, 10_000, 1_500_000]
    for text in ("", "1G", "-3", "0", "10,5", "5,5", "1e3", ",".join(map(str, range(1, 12)))):
        with pytest.raises(ConfigError, match=r"^--sizes"):
            sizes_of(text)
    assert all(a < b for a, b in pairwise(sizes_of("1,2,3")))


N_CATEGORIES = 15


def youtube(n: int, draw: np.random.Generator) -> list[Row]:
    """Clips of 15 categories, the first one the commonest; nearly each is a stratum of its own."""
    shares = 1 / np.arange(1, N_CATEGORIES + 1)
    rows = []
    for number, category in enumerate(draw.choice(N_CATEGORIES, n, p=shares / shares.sum())):
        texts = [" ".join(["word"] * int(draw.integers(1, 40)))] * int(draw.integers(1, 6))
        annotations = [said("a", "caption", "video", text) for text in texts]
        annotations.append(said("a", "tag", "image", f"concept {draw.integers(300)}"))
        about = {"source": f"source {number % 2}", "category": f"category {category}", "text": ""}
        files = ["video.mp4", "audio.flac"][: int(draw.integers(1, 3))]
        times = {"start": 0.0, "end": float(draw.uniform(5, 30))}
        row = {"id": f"{number:08x}", "reason": "", **about, "files": files, **times}
        rows.append(row | {"annotations": annotations})
    return rows


def off(classes: Classes, kept: NDArray[np.bool_]) -> float:
    """Pearson's chi-square of a subset against the shares of the whole."""
    whole = np.bincount(classes.of)
    expected = whole * kept.sum() / len(kept)
    found = np.bincount(classes.of[kept], minlength=len(whole))
    return float(((found - expected) ** 2 / expected).sum())


def test_a_subset_has_the_shares_of_15_categories_as_no_plain_draw_has(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    n, sizes = 6000, (300, 600, 1800)
    Place(str(tmp_path)).write_rows(f"{INDEXES}/0.parquet", INDEX, youtube(n, draw))
    strata = read_strata(Place(str(tmp_path)), 0)
    assert len(strata.names) > 0.95 * n
    levels = levels_of(strata.of, strata.orders, strata.names, 0, sizes)
    # One of a thousand plain draws is as near to the shares as this.
    near = chi2.ppf(0.001, N_CATEGORIES - 1)
    categories = strata.classes["category"]
    for level, size in enumerate(sizes):
        assert off(categories, levels <= level) < near
        plain = [np.isin(np.arange(n), draw.choice(n, size, replace=False)) for _ in range(100)]
        assert sum(off(categories, kept) < near for kept in plain) <= 1
        for name in ("media", "captions", "words", "length"):
            kind = strata.classes[name]
            median = float(np.median([off(kind, kept) for kept in plain]))
            assert off(kind, levels <= level) < 1.5 * median, name
        nearer = [off(strata.classes["captions"], kept) for kept in plain]
        assert np.mean(np.array(nearer) < off(strata.classes["captions"], levels <= level)) < 0.2


def test_an_older_build_has_subsets_too(output: Path, tmp_path: Path) -> None:
    """Its tables have no categories."""
    older = tmp_path / "older"
    shutil.copytree(output, older)
    for part in (older / "build" / "index").glob("*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["category"]), part)
    subset(str(older), [7], 0, str(tmp_path / "new"))
    assert pq.read_table(tmp_path / "new" / "build" / "index").schema.equals(INDEX)
