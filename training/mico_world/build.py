"""Builds shards: so many samples of each generator, in random order, by several processes.

Sample ``i`` of a generator depends on (seed, generator, i, split) alone: other samples and the
number of processes do not change it. Validation shards hold only identities that train shards lack.
"""

import importlib
import json
import logging
import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from mico_chat.errors import ConfigError
from mico_training.data.sources.written import Sample, Split, write_shard
from mico_training.data.table import Table
from mico_world.things.catalogue import Catalogue, catalogue, shape_things

logger = logging.getLogger(__name__)

SEED = 0
"""The mini's own data have this seed, and it is the default."""

Generator = Callable[[np.random.Generator, Split], Sample]

# Name: the module, the function, and whether the function takes the catalogue of things.
GENERATORS: dict[str, tuple[str, str, bool]] = {
    "single": ("pictures.pictures", "make_single", True),
    "colour": ("pictures.pictures", "make_colour", True),
    "count": ("pictures.pictures", "make_count", True),
    "pair": ("pictures.pictures", "make_pair", True),
    "scene": ("pictures.pictures", "make_scene", True),
    "beside": ("pictures.pictures", "make_beside", True),
    "place": ("pictures.pictures", "make_place", True),
    "layers": ("rooms.rooms", "make_layers", True),
    "real": ("pictures.labelled", "make", False),
    "motion": ("motion.motion", "make_motion", True),
    "rooms": ("rooms.rooms", "make", False),
    "sounds": ("sounds.sounds", "make", False),
    "sound_pairs": ("sounds.sounds", "make_pair", False),
}


class BuildConfig(Table):
    things: Literal["all", "shapes"] = "all"
    shard_size: int = Field(default=500, ge=1)
    train: dict[str, int] = Field(default_factory=dict)
    validation: dict[str, int] = Field(default_factory=dict)


def load_config(config: str | Path | dict[str, Any]) -> BuildConfig:
    if isinstance(config, dict):
        parsed = BuildConfig.of(config, "world configuration")
    else:
        parsed = BuildConfig.read(Path(config))
    if unknown := sorted({*parsed.train, *parsed.validation} - GENERATORS.keys()):
        known = ", ".join(sorted(GENERATORS))
        raise ConfigError(f"unknown generator {', '.join(unknown)}; the generators are {known}")
    return parsed


def things_of(config: BuildConfig) -> Catalogue:
    return catalogue() if config.things == "all" else Catalogue(shape_things())


def generator(name: str, config: BuildConfig) -> Generator:
    module, function, composes = GENERATORS[name]
    make = getattr(importlib.import_module(f"mico_world.{module}"), function)
    return partial(make, things=things_of(config)) if composes else make


def sample_of(make: Generator, name: str, split: Split, index: int, seed: int) -> Sample:
    words = [seed, zlib.crc32(name.encode()), index, 0 if split == "train" else 1]
    rng = np.random.default_rng(np.random.SeedSequence(words))
    return replace(make(rng, split), id=f"{name}-{split}-{index:07d}")


def main(config: str | Path | dict[str, Any], output: str | Path, workers: int, seed: int) -> None:
    """Write ``train-000000.tar`` ... and ``validation-000000.tar`` ... into ``output``.
    ``output/world.json`` records the configuration, the seed and the number of samples."""
    parsed = load_config(config)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    if any(GENERATORS[n][2] for n in (*parsed.train, *parsed.validation)):
        things_of(parsed)  # fetches and decodes once, before the workers start
    jobs = [*_jobs(parsed, "train", folder, seed), *_jobs(parsed, "validation", folder, seed)]
    total = sum((*parsed.train.values(), *parsed.validation.values()))
    with tqdm(total=total, unit="sample", desc="world") as bar:
        if workers <= 1:
            for job in jobs:
                bar.update(job())
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                for done in as_completed(map(pool.submit, jobs)):
                    bar.update(done.result())
    summary = {"seed": seed, "samples": total, "config": parsed.model_dump()}
    (folder / "world.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    logger.info("%d samples in %d shards in %s", total, len(jobs), folder)


def _write(
    path: Path, samples: list[tuple[str, int]], split: Split, config: BuildConfig, seed: int
) -> int:
    makers = {name: generator(name, config) for name, _ in samples}
    return write_shard(path, (sample_of(makers[n], n, split, i, seed) for n, i in samples))


def _jobs(
    config: BuildConfig, split: Split, folder: Path, seed: int
) -> Iterator[Callable[[], int]]:
    """One call for each shard of ``split``, which writes it and returns its number of samples."""
    counts = config.train if split == "train" else config.validation
    wanted = [(name, i) for name, n in sorted(counts.items()) for i in range(n)]
    order = np.random.default_rng([seed, len(wanted)]).permutation(len(wanted))
    mixed = [wanted[int(i)] for i in order]
    for number, start in enumerate(range(0, len(mixed), config.shard_size)):
        path = folder / f"{split}-{number:06d}.tar"
        yield partial(_write, path, mixed[start : start + config.shard_size], split, config, seed)
