"""The index and the order: every sample once an epoch on any ranks, and memory that stays flat."""

import multiprocessing
import pickle
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mico_chat.errors import DataError
from mico_chat.media.addresses import Location, fingerprint, matching
from mico_training.data.mixture import Mixture
from mico_training.data.order import LANES, Dealt, shuffled
from mico_training.data.sources import index
from mico_training.data.sources.chosen import Chosen, Kept, share
from mico_training.data.sources.index import Found, Index, Profile, open_index, write_index
from mico_training.data.sources.sample import TrainingSample
from mico_training.data.sources.shards import FORM, ShardSource
from mico_training.data.sources.written import write_shard
from tests.mico_training.scenes import scene

PICTURE = Profile(frozenset({"image"}))
SOUND = Profile(frozenset({"audio"}))


def empty_shards(folder: Path, sizes: list[int]) -> str:
    """Shards of which nothing but the index is there; every third sample has a sound."""
    folder.mkdir(exist_ok=True)
    for number, n in enumerate(sizes):
        shard = folder / f"{number:05d}.tar"
        shard.write_bytes(bytes(number % 7 + 1))
        columns: Any = {
            "start": np.arange(n, dtype="<u8"),
            "size": np.ones(n, dtype="<u4"),
            "profile": (np.arange(n, dtype="<u4") % 3 == 2).astype("<u4"),
        }
        about = {"format": index.FORMAT, "form": FORM, "state": fingerprint(shard), "count": n}
        about |= {"profiles": [PICTURE.json(), SOUND.json()], "bad": 0, "errors": []}
        write_index(shard, fingerprint(shard), about, columns)
    return str(folder / "*.tar")


def never(shard: Location) -> Iterator[Found]:
    raise AssertionError(f"{shard} was read")


# --- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000])
def test_a_shuffled_row_holds_each_number_once(n: int) -> None:
    rows = [[shuffled(place, n, seed, 7) for place in range(n)] for seed in range(3)]
    assert all(sorted(row) == list(range(n)) for row in rows)
    assert n < 5 or rows[0] != rows[1] != list(range(n))


def test_each_number_comes_to_each_place_equally_often() -> None:
    counts = Counter(shuffled(2, 5, seed) for seed in range(4000))
    assert all(700 < counts[number] < 900 for number in range(5))


class Drawn:
    """Where each draw of a mixture is."""

    def __init__(self, mixture: Mixture, draws: int) -> None:
        self.mixture, self.draws = mixture, draws

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, draw: int) -> tuple[int, int, int]:
        return self.mixture.locate(draw)


def taken(drawn: Drawn, ranks: int, batch: int, steps: range) -> list[list[tuple[int, int, int]]]:
    """What each rank takes in some steps, as the loader gives it."""
    dealt = Dealt(drawn, batch, ranks)
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    for step in steps:
        for rank in range(ranks):
            first = (step * ranks + rank) * batch
            found[rank] += [dealt[place] for place in range(first, first + batch)]
    return found


@pytest.mark.parametrize("sizes", [[50] * 8, [70, 3, 0, 41] * 40], ids=["few shards", "in lanes"])
def test_every_sample_comes_once_an_epoch_on_any_number_of_ranks_also_resumed(
    tmp_path: Path, sizes: list[int]
) -> None:
    source = ShardSource(empty_shards(tmp_path, sizes), "caption")
    other = ShardSource(empty_shards(tmp_path / "other", [40] * 3), "caption")
    mixture = Mixture([source, other], [4.0, 1.0], seed=3)
    assert len(source) == sum(sizes)
    n = 3 * sum(sizes) // 84 * 84
    expected = [mixture.locate(draw) for draw in range(n)]
    whole = Counter((s, e, i) for s, e, i in expected if s == 0 and e < 2)
    assert set(whole) == {(0, e, i) for e in range(2) for i in range(len(source))}
    assert set(whole.values()) == {1}
    order = [i for s, e, i in expected if s == 0 and e == 0]
    assert order != [i for s, e, i in expected if s == 0 and e == 1] != sorted(order)
    for ranks, later in ((1, 2), (2, 7), (3, 1), (7, 3)):
        batch = 42  # a step of each rank
        half = n // (2 * batch * ranks)
        before = taken(Drawn(mixture, n), ranks, batch, range(half))
        rest = (n - half * batch * ranks) // later
        resumed = Drawn(mixture, n)
        start = half * batch * ranks  # goes on at this sample, on other ranks
        after = [
            [resumed[start + place * later + rank] for place in range(rest)]
            for rank in range(later)
        ]
        assert sorted(chain(*before, *after)) == sorted(expected[: start + rest * later])


def test_a_shard_is_read_by_one_rank(tmp_path: Path) -> None:
    source = ShardSource(empty_shards(tmp_path, [64] * 256), "caption")
    drawn = Drawn(Mixture([source], [1.0], seed=0), len(source))
    readers: dict[int, set[int]] = defaultdict(set)
    for rank, places in enumerate(taken(drawn, 8, 32, range(len(source) // 256))):
        for _, _, place in places:
            readers[place // 64].add(rank)
    assert len(readers) == 256
    assert sum(len(ranks) > 1 for ranks in readers.values()) <= LANES


def test_a_step_of_one_rank_that_accumulates_has_the_batches_of_many_ranks() -> None:
    many = Dealt(range(48), 4, 3)
    assert [many[place] for place in range(12)] == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert sorted(many[place] for place in range(48)) == list(range(48))


# --- some of the samples --------------------------------------------------------------------------


def test_the_kept_numbers_are_found_in_order() -> None:
    generator = np.random.default_rng(0)
    runs = [generator.random(n) < 0.3 for n in (700, 1, 0, 4096, 13)]
    kept = Kept(runs)
    expected = np.flatnonzero(np.concatenate(runs))
    assert [kept[place] for place in range(len(kept))] == expected.tolist()
    assert [kept.below(n) for n in (0, 5, 512, 4810)] == [
        int((expected < n).sum()) for n in (0, 5, 512, 4810)
    ]


@pytest.mark.parametrize("run", [64, 1_000_000])
def test_a_smaller_share_lies_within_a_larger_one(
    run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mico_training.data.sources.chosen.RUN", run)
    source = [TrainingSample(str(number), {}) for number in range(1000)]
    parts = [Chosen(source, Kept(share(1000, part))) for part in (0.0001, 0.1, 0.5)]
    assert [len(part) for part in parts] == [1, 100, 500]
    ids = [{part[n].id for n in range(len(part))} for part in parts]
    assert ids[0] < ids[1] < ids[2]


# --- the index ------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 10 samples are joined in a file."""
    monkeypatch.setattr(index, "IN_MEMORY", 10)


@pytest.mark.usefixtures("small")
def test_a_joined_index_is_that_in_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = matching(empty_shards(tmp_path, [4, 0, 9, 1]))
    joined = open_index(files, never, FORM)
    assert isinstance(joined.start, np.memmap)
    assert open_index(files, never, FORM).place(5) == (list(files)[2], 1, 1)
    copy = pickle.loads(pickle.dumps(joined))
    assert isinstance(copy.size, np.memmap)
    assert len(pickle.dumps(joined)) < 4000
    monkeypatch.setattr(index, "IN_MEMORY", 1000)
    (folder,) = (path for path in (cache / "index").iterdir() if path.is_dir())
    folder.rename(cache / "aside")
    whole = open_index(files, never, FORM)
    assert not isinstance(whole.start, np.memmap)
    for one in (joined, copy):
        assert [one.place(n) for n in range(14)] == [whole.place(n) for n in range(14)]
        assert [run.tolist() for run in one.offering(lambda p: p == SOUND)] == [
            run.tolist() for run in whole.offering(lambda p: p == SOUND)
        ]


def scanning(pattern: str, answers: Any) -> None:
    read: list[str] = []

    def scan(shard: Location) -> Iterator[Found]:
        read.append(str(shard))
        yield 0, 1, PICTURE

    answers.put((len(open_index(matching(pattern), scan, FORM)), read))


@pytest.mark.usefixtures("cache")
def test_processes_share_the_work_out(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.tar").write_bytes(b"0")
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    work = [fork.Process(target=scanning, args=(f"{tmp_path}/*.tar", answers)) for _ in range(3)]
    for process in work:
        process.start()
    found = [answers.get(timeout=60) for _ in work]
    for process in work:
        process.join()
    assert [n for n, _ in found] == [20, 20, 20]
    assert sorted(chain(*(read for _, read in found))) == sorted(
        str(tmp_path / f"{number}.tar") for number in range(20)
    )


def test_an_index_goes_to_the_cache_if_it_cannot_be_written_beside(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = tmp_path / "train.tar"
    write_shard(shard, [scene(0), scene(1)])
    monkeypatch.setattr(index, "_beside", lambda file: tmp_path / "lacking" / "file" / "x.npz")
    (tmp_path / "lacking").write_text("a file where a folder should be")
    assert len(ShardSource(str(shard), "caption")) == 2
    assert len(list((cache / "index").glob("*.npz"))) == 1
    monkeypatch.setattr("mico_training.data.sources.shards.scan", never)
    assert ShardSource(str(shard), "caption")[1].id == "scene001"


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    shard = tmp_path / "train.tar"
    write_shard(shard, [scene(0)])
    for content in (b"", b"PK\x03\x04 no archive", b"\x93NUMPY"):
        (tmp_path / "train.tar.index.npz").write_bytes(content)
        assert len(ShardSource(str(shard), "caption")) == 1


def test_a_shard_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "train.tar"
    write_shard(shard, [scene(0), scene(1)])
    source = ShardSource(str(shard), "caption")
    shard.write_bytes(shard.read_bytes()[:2048])
    with pytest.raises(DataError, match=r"train\.tar: the sample at byte \d+ cannot be read"):
        source[1]


@pytest.mark.usefixtures("cache")
def test_a_million_samples_need_no_object_each(tmp_path: Path) -> None:
    pattern = empty_shards(tmp_path, [10_000] * 130)
    mixture = Mixture([ShardSource(pattern, "caption")], [1.0], seed=0)  # joins the index
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        source = ShardSource(pattern, "caption", kinds=frozenset({"image"}))
        mixture = Mixture([Chosen(source, Kept(share(len(source), 0.5)))], [1.0], seed=0)
        found = {mixture.locate(draw)[2] for draw in range(2000)}
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 866_710
    assert len(found) == 2000
    assert after - before < 4e6  # a list of numbers would have 28 MB
    assert peak - before < 40e6  # a run of a million hashes at a time
    assert isinstance(source.index, Index)
    assert isinstance(source.index.profile, np.memmap)
