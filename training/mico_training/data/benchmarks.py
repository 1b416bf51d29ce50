"""The training split of a benchmark as a manifest that stage 1 reads: ``finetune-*.yaml``'s data.

::

    python -m mico_training.data.benchmarks coco flickr30k --data data

writes ``data/coco/train.jsonl``: a line for each medium, with all its captions, or a line for each
question, with its answers. Items of the data set that cannot be used are counted and reported.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mico_chat.errors import ConfigError, MicoError
from mico_chat.evaluation.datasets import DATASETS
from mico_chat.evaluation.task import TASKS

TRAINED = tuple(
    dict.fromkeys(
        task.dataset for task in TASKS.values() if DATASETS[task.dataset].items is not None
    )
)
"""These are all data sets of publishers; stage 1 reads the data engine's shards as they are."""


def write_manifest(name: str, data: Path) -> tuple[Path, int, int]:
    """Write a training manifest; returns its path, its lines, and the number of items left out.

    Data sets that share a folder (MSRVTT's two splits) have manifests of their own.

    Raises:
        ConfigError: the data set is none of Table 3's.
        DataError: the data set is missing, or none of its items can be used.
    """
    if name not in TRAINED:
        raise ConfigError(f"unknown data set {name!r}; the data sets are {', '.join(TRAINED)}")
    dataset = DATASETS[name]
    contents = dataset.read(data, "train")
    folder = data / dataset.folder
    suffix = name.removeprefix(dataset.folder)
    path = folder / f"train{suffix}.jsonl"
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for item in contents.items:
            (medium,) = item.media
            source = medium.source
            assert isinstance(source, Path), source
            row = {"id": item.id, medium.kind: str(source.relative_to(folder))}
            words: dict[str, object] = {"captions": item.captions}
            if item.question:
                words = {"question": item.question, "answers": item.answers}
            if item.subtitle:
                words["subtitle"] = item.subtitle
            file.write(json.dumps({**row, **words}, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path, len(contents.items), len(contents.broken)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mico_training.data.benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("names", nargs="+", metavar="DATASET", help=", ".join(TRAINED))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    options = parser.parse_args(arguments)
    try:
        for name in options.names:
            path, written, left_out = write_manifest(name, options.data)
            print(f"{path}: {written} lines; {left_out} items cannot be used and were left out")
    except MicoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
