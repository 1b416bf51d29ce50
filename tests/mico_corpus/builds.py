"""What tests of builds share: their clips and recipe, and what is in finished shards."""

import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mico_corpus.recipe import BuildRecipe
from tests.mico_corpus.clips import Scene, make_video

CLIPS = 12
TOLD = "tests.mico_corpus.annotators:Told"


def make_videos(folder: Path, n: int = CLIPS) -> Path:
    """Files of one clip each, ``plain00.mp4`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n):
        make_video(folder / f"plain{number:02d}.mp4", [Scene(number, 5.0)], fps=6)
    return folder


def recipe_of(options: dict[str, str] | None = None, **changes: Any) -> BuildRecipe:
    told = {"use": TOLD, "batch_size": 2, "options": options or {}}
    shards = {"samples": 5, "side": 32, "fps": 6.0}
    content = {"source": "drawn", "licence": "CC0", "annotators": [told], "shards": shards}
    return BuildRecipe.model_validate(content | changes)


def records(output: Path) -> dict[str, dict[str, bytes]]:
    """The members of each sample of all shards; each sample is there once."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(output.glob("*.tar")):
        here: dict[str, dict[str, bytes]] = {}
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                opened = tar.extractfile(member)
                assert opened is not None
                assert name not in here.setdefault(key, {})
                here[key][name] = opened.read()
        assert not here.keys() & found.keys()
        found |= here
    return found


def finished(output: Path) -> list[str]:
    """The ids in the parts of the index, in order."""
    return sorted(
        row["id"]
        for part in (output / "build/index").glob("*.parquet")
        for row in pq.read_table(part, columns=["id"]).to_pylist()
    )


def left_behind(output: Path) -> list[str]:
    """Files that a finished build has no use for."""
    known = {
        row["shard"]
        for part in (output / "build/index").glob("*.parquet")
        for row in pq.read_table(part, columns=["shard"]).to_pylist()
    }
    shards = [path.name for path in output.glob("*.tar") if path.name not in known]
    partial = [path.name for path in (output / "build/partial").glob("*")]
    return shards + partial + [path.name for path in output.rglob("*.pending.*")]
