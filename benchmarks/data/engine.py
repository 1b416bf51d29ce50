"""The data engine: clips a second, how it scales, what a row costs, and what a kill costs.

``data-engine-throughput`` builds shards of drawn clips with 0, 1 and 2 workers.
``data-engine-scaling`` runs stages that wait on simulated clusters: nodes of Ray that all lie on
this machine. ``data-engine-rows`` runs stages that do nothing on a manifest of 100,000 rows, and
watches memory. ``data-engine-kill`` kills builds at random moments, starts them again, and compares
the shards with those of a build that was left alone.
"""

import hashlib
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import repeat
from pathlib import Path
from subprocess import DEVNULL
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from benchmarks.data import fake_stages
from benchmarks.harness import Panel, Ratio, Report
from benchmarks.media import clip
from benchmarks.processes import family, memory
from mico_chat.late import late
from mico_corpus.build import build
from mico_corpus.places import Place
from mico_corpus.recipe import BuildRecipe
from mico_corpus.run import run_job

# It brings Ray.
with late():
    from mico_corpus import ray_run

RECIPE = {
    "clips": {"near": -1, "least_motion": 0.0, "threshold": 1e6},  # a clip is a file
    "annotators": [{"use": "benchmarks.data.fake_stages:Numbered"}],
    "shards": {"samples": 20},
}
SECONDS = 6.0
BENDS = 0.8
"""The curve bends where a node does less than this part of what one node does alone."""


def draw_videos(folder: Path, n: int) -> Path:
    folder.mkdir()
    files = [folder / f"{seed:05d}.mp4" for seed in range(n)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(clip, files, range(n), repeat(SECONDS)))
    return folder


# --- clips a second -------------------------------------------------------------------------------


def throughput(clips: int = 200, repeats: int = 3) -> Report:
    cells: list[list[str]] = []
    with TemporaryDirectory() as temporary:
        videos = draw_videos(Path(temporary) / "videos", clips)
        for workers in (0, 1, 2):
            found = []
            for number in range(repeats):
                recipe = BuildRecipe.model_validate(RECIPE | {"workers": workers})
                built = build(recipe, [str(videos)], f"{temporary}/{workers}-{number}")
                assert built.clips == clips, built.counts
                found.append(built.seconds)
            best = min(found)
            cells.append([str(workers), f"{clips / best:.2f}", f"{best:.1f} s"])
    return Report({"cells": cells, "seconds": SECONDS})


# --- a simulated cluster --------------------------------------------------------------------------


def scaling(
    nodes: str = "1,2,4,8", rows_a_node: int = 400, describe: float = 0.25, pack: float = 0.1
) -> Report:
    """Each node has one GPU, for a model, and two CPUs, for encoders."""
    import ray
    from ray.cluster_utils import Cluster

    counts = [int(n) for n in nodes.split(",")]
    rates: list[float] = []
    for n in counts:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        for _ in range(n):
            cluster.add_node(num_cpus=2, num_gpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            with TemporaryDirectory() as folder:
                place = Place(folder)
                fake_stages.write_manifest(place, rows_a_node * n)
                job = fake_stages.job(describe, pack, actors=n, samples=50, gpus=1.0)
                start = time.perf_counter()
                ray_run.run_job(place, job)
                rates.append(rows_a_node * n / (time.perf_counter() - start))
        finally:
            ray.shutdown()
            cluster.shutdown()
    shares = [rate / n / (rates[0] / counts[0]) for rate, n in zip(rates, counts, strict=True)]
    bend = next((n for n, share in zip(counts, shares, strict=True) if share < BENDS), None)
    most = 1 / max(describe, pack / 2)
    cells = [
        [str(n), f"{rate:.1f}", f"{share:.2f}", f"{rate / (most * n):.2f}"]
        for n, rate, share in zip(counts, rates, shares, strict=True)
    ]
    bends = f"at {bend} nodes" if bend else f"nowhere up to {counts[-1]} nodes"
    name, each = f"a node of a cluster of {counts[-1]} beside one alone", rates[-1] / counts[-1]
    even = [rates[0] / counts[0] * n for n in counts]
    curves = {"measured": (counts, rates), "even": (counts, even)}
    return Report(
        {"cells": cells, "bends": bends, "share": BENDS},
        [Ratio.beside_of(name, each, "rows/s", "one node", rates[0] / counts[0])],
        {"data-engine-scaling": [Panel("nodes", "rows a second", curves)]},
    )


# --- many rows ------------------------------------------------------------------------------------


def rows(n: int = 100_000, workers: int = 2) -> Report:
    cells: list[list[str]] = []
    job = fake_stages.job(0.0, 0.0, actors=1, samples=1000)
    for name in ("one process", f"Ray, {workers} workers"):
        alone = name == "one process"  # without Ray's import
        cluster: Any = nullcontext() if alone else ray_run.cluster(workers, (job,))
        run: Any = run_job if alone else ray_run.run_job
        held, over = list[float](), threading.Event()  # MB of all processes, each second

        def watch(held: list[float] = held, over: threading.Event = over) -> None:
            while not over.wait(1.0 if held else 0.0):
                pids = [one.pid for one in family([os.getpid()])]
                held.append(sum(memory(["Pss"], pid, "smaps_rollup") for pid in pids) / 1e6)

        with TemporaryDirectory() as folder, cluster, ThreadPoolExecutor(1) as thread:
            place = Place(folder)
            fake_stages.write_manifest(place, n)
            thread.submit(watch)
            start = time.perf_counter()
            try:
                run(place, job)
                took = time.perf_counter() - start
            finally:
                over.set()
            tables = place.names(job.output, ".parquet")
            done = sum(place.parquet(table).metadata.num_rows for table in tables)
            assert done == n, (done, n)
        most = " ".join(f"{max(part):.0f}" for part in np.array_split(held, 10) if part.size)
        cells.append([name, f"{took:.1f} s", f"{1e3 * took / n:.2f} ms", most])
    name, each = f"{n:,} rows on Ray", 1e3 * took / n
    return Report({"cells": cells}, [Ratio.bound(name, each, "ms a row", 2.0)])


# --- kills ----------------------------------------------------------------------------------------


def members(folder: Path) -> dict[str, str]:
    """The hash of each member of all shards; a member that is there twice is an error."""
    found: dict[str, str] = {}
    for shard in folder.glob("*.tar"):
        with tarfile.open(shard) as tar:
            for info in tar:
                assert info.name not in found, f"{info.name} is there twice"
                file: Any = tar.extractfile(info)
                found[info.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def kill(clips: int = 200, kills: int = 20, workers: int = 0, seed: int = 0) -> Report:
    """Kill a build again and again until it ends; then begin another, until all kills are done."""
    generator = random.Random(seed)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        videos = draw_videos(folder / "videos", clips)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))

        def built(name: str, seconds: float | None = None) -> None:
            """Build; after ``seconds`` the build is killed, and TimeoutExpired raised."""
            command = [sys.executable, "-m", "mico_chat.cli", "data", "build", str(videos)]
            command += ["--config", str(folder / "recipe.yaml"), "--output", str(folder / name)]
            command += ["--workers", str(workers)]
            subprocess.run(command, stdout=DEVNULL, stderr=DEVNULL, check=True, timeout=seconds)

        began = time.perf_counter()
        built("alone")
        whole = time.perf_counter() - began
        alone = members(folder / "alone")
        done = builds = 0
        while done < kills:
            name = f"killed-{builds}"
            builds += 1
            killed = True
            while killed:
                try:
                    built(name, generator.uniform(0, whole / 4) if done < kills else None)
                    killed = False
                except subprocess.TimeoutExpired:
                    done += 1
            found = members(folder / name)
            assert found == alone, f"{name}: {len(found)} members, not {len(alone)}, or other bytes"
    values = {"whole": whole, "done": done, "builds": builds, "members": len(alone)}
    return Report(values, file=f"data-engine-kill{'-ray' if workers else ''}")
