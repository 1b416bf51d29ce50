"""A build that was killed goes on: each clip once, the same bytes, nothing finished done again."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mico_chat.cli.main import main
from mico_corpus import build as building
from mico_corpus.build import build
from mico_corpus.places import Place
from mico_corpus.recipe import BuildRecipe
from tests.mico_corpus.annotators import Told
from tests.mico_corpus.builds import CLIPS, finished, left_behind, make_videos, recipe_of, records

ROOT = Path(__file__).resolve().parents[2]
MOMENT = 2 * (4 + 12 + 3 + 2) + 1
"""The first part of the index is there: 4 files, 12 cuts, 3 questions and 2 files are passed."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a build that nothing interrupted."""
    output = tmp_path_factory.mktemp("undisturbed")
    build(recipe_of(), [str(videos)], str(output))
    return output


@pytest.fixture(scope="module")
def undisturbed(whole: Path) -> dict[str, dict[str, bytes]]:
    return records(whole)


class Run:
    """Builds of one output folder in processes of their own, killed at chosen moments."""

    def __init__(self, folder: Path, videos: Path) -> None:
        self.output, self.videos = folder / "shards", videos
        self.calls = folder / "calls.txt"
        self.recipe = folder / "recipe.json"
        self.recipe.write_text(recipe_of({"calls": str(self.calls)}).model_dump_json())
        self.again: list[str] = []

    def __call__(self, moment: int) -> int:
        """Run to a moment, 0 for the end; the exit status."""
        before, known = len(self._asked()), set(finished(self.output))
        paths = (ROOT, ROOT / "training")
        command = [sys.executable, "-m", "tests.mico_corpus.killed", str(moment)]
        code = subprocess.run(
            [*command, self.recipe, self.output, self.videos],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
            stdout=subprocess.DEVNULL,
            timeout=300,
        ).returncode
        self.again += [clip for clip in self._asked()[before:] if clip in known]
        return code

    def _asked(self) -> list[str]:
        return self.calls.read_text().split() if self.calls.exists() else []


def whole_again(output: Path, undisturbed: dict[str, dict[str, bytes]]) -> None:
    assert records(output) == undisturbed
    assert len(finished(output)) == CLIPS
    assert not left_behind(output)


@pytest.mark.slow
def test_a_kill(videos: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    run = Run(tmp_path, videos)
    assert run(MOMENT) == -signal.SIGKILL
    assert 0 < len(finished(run.output)) < CLIPS
    assert run(0) == 0
    whole_again(run.output, undisturbed)
    assert not run.again


@pytest.mark.parametrize(
    ("name", "after"), [("tar", False), ("tar", True), ("parquet", True)]
)  # a part of the index that is not named leaves what a named shard does
def test_an_end_beside_the_writing_of_a_file(
    name: str,
    after: bool,
    videos: Path,
    undisturbed: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Power fails before or after the second shard, or the second part of the index, is named."""
    count = 0

    def put(self: Place, file: Path, target: str) -> None:
        nonlocal count
        chosen = target.endswith(name) and (name == "tar" or "index" in target)
        count += chosen
        if chosen and count == 2 and not after:
            raise KeyboardInterrupt
        real(self, file, target)
        if chosen and count == 2:
            raise KeyboardInterrupt

    real = Place.put
    with monkeypatch.context() as patched:
        patched.setattr(Place, "put", put)
        with pytest.raises(KeyboardInterrupt):
            build(recipe_of(), [str(videos)], str(tmp_path))
    assert len(finished(tmp_path)) == (10 if (name, after) == ("parquet", True) else 5)
    build(recipe_of(), [str(videos)], str(tmp_path))
    whole_again(tmp_path, undisturbed)


def test_what_no_row_names_is_removed_and_nothing_else(
    videos: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    ours = {path.name for path in tmp_path.glob("*.tar")}
    index = tmp_path / "build/index"
    part = next(index.glob("*.parquet"))
    pending = tmp_path / "build/index-checkpoint/0123_000001.pending.parquet"
    unfinished = index / "0123_000001-0.parquet"
    stray, foreign = tmp_path / f"{'0' * 32}.tar", tmp_path / "holiday.tar"
    partial = tmp_path / "build/partial/half"
    for path in (pending, unfinished, stray, foreign, partial):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(part.read_bytes()[:100])
    build(recipe_of(), [str(videos)], str(tmp_path))
    assert {path.name for path in tmp_path.glob("*.tar")} == ours | {foreign.name}
    assert not any(path.exists() for path in (pending, unfinished, stray, partial))
    assert len(finished(tmp_path)) == CLIPS


def test_an_interrupt_says_how_to_go_on(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, output = tmp_path / "recipe.yaml", tmp_path / "shards"
    config.write_text(recipe_of().model_dump_json())  # JSON is YAML
    command = ["data", "build", "--config", str(config), str(videos), "--output", str(output)]
    asked = iter(range(100))
    real = Told.__call__

    def interrupted(self: Told, clips: list[object]) -> object:
        if next(asked) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, clips)  # type: ignore[arg-type]

    # A shell lets its background jobs ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Told, "__call__", interrupted)
            with pytest.raises(SystemExit) as end:
                main(command)
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(finished(output)) == 5
    assert not left_behind(output)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert not end.value.code
    assert len(finished(output)) == CLIPS


# --- with Ray -------------------------------------------------------------------------------------

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray for all tests of this file, as its start takes seconds."""
    from mico_corpus import ray_run

    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("RAY_ADDRESS", raising=False)
        with ray_run.cluster(1, building.jobs(recipe_of(), "nowhere")):
            yield


@needs_ray
@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_ray_goes_on_with_a_run_without_it_and_the_other_way_round(
    cluster: None, videos: Path, undisturbed: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    run = Run(tmp_path, videos)
    assert run(MOMENT) == -signal.SIGKILL
    known = finished(run.output)
    before = len(run._asked())
    recipe = BuildRecipe.model_validate_json(run.recipe.read_text())
    built = build(recipe.model_copy(update={"workers": 1}), [str(videos)], str(run.output))
    assert built.clips == CLIPS
    whole_again(run.output, undisturbed)
    assert not set(run._asked()[before:]) & set(known)
    part = max(
        (run.output / "build/index").glob("*.parquet"), key=lambda path: path.stat().st_mtime
    )
    lost = pq.read_table(part, columns=["id"]).num_rows
    part.rename(part.with_suffix(".gone"))
    again = build(recipe, [str(videos)], str(run.output))
    assert (again.clips, lost > 0) == (CLIPS, True)
    assert records(run.output) == undisturbed
