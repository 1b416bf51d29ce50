"""The sections of the race: each measures one thing and describes it in Markdown."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import overhead
from benchmarks.raw_llama import run_raw
from benchmarks.systems import (
    InVllm,
    LlamaCppServer,
    Ours,
    PlainTransformers,
    Question,
    System,
    clip,
    draw,
    service,
    table,
    timed,
)
from mico_chat.assistant import decode_media
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.batching import BatchingEngine
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import Video

PORT = 8077
ABOUT = {
    "text": "Tell me a long story about a fox, a river and an old bridge. Number {n}.",
    "image": "What is in this picture?",
    "video": "What moves, and which way?",
    "audio": "What do you hear?",
}
AT_ONCE = (1, 2, 4, 8, 16)

Measured = tuple[Any, str]
"""The figures of a section, and the section as Markdown."""


@dataclass
class Bench:
    """The systems and files that the sections share, and how often to measure."""

    llamacpp: Ours
    transformers: Ours
    plain: PlainTransformers
    vllm: InVllm | None
    model: str
    quantization: str
    file: Path
    threads: int
    repeats: int
    folder: Path
    own_process: Executor

    @property
    def engines(self) -> list[Ours | InVllm]:
        own: list[Ours | InVllm] = [self.llamacpp, self.transformers]
        return own if self.vllm is None else [*own, self.vllm]

    def raw(self, prompts: list[list[int]], n: int, *, unified: bool) -> tuple[float, float]:
        """Seconds of llama.cpp's own loop on the same file and threads; see :func:`run_raw`.

        In a process of its own: OpenMP's threads of two loops in one process hold each other up.
        """
        arguments = (self.file, self.threads, prompts, n, unified)
        return self.own_process.submit(run_raw, *arguments).result()


def decoding(bench: Bench) -> Measured:
    """Tokens/s of a prompt of 300 tokens, of one stream while it decodes, and of 8 streams."""
    ids = list(range(1000, 1064))
    prompts = [[token + 64 * stream for token in ids] for stream in range(8)]
    loop, theirs = "llama.cpp loop", "transformers generate"
    long = list(range(1000, 1300))
    found: dict[str, dict[str, list[float]]] = {
        part: defaultdict(list) for part in ("prefill", "one", "many")
    }
    prefill, one, many = found.values()
    for _ in range(bench.repeats + 1):  # the first warms up
        prefill[loop].append(len(long) / bench.raw([long], 1, unified=True)[0])
        prefill[theirs].append(_generate(bench, [long], 1, whole=True) * len(long))
        one[loop].append(_raw(bench, [ids], 128, whole=False))
        one[theirs].append(_generate(bench, [ids], 64, whole=False))
        many[loop].append(_raw(bench, prompts, 64, whole=True))
        many[f"{theirs}, one batch"].append(_generate(bench, prompts, 64, whole=True))
        for system in bench.engines:
            prefill[system.name].append(len(long) / _stamps(system, [long], 1)[0][0])
            stamps = _stamps(system, [ids], 128)[0]
            one[system.name].append((len(stamps) - 1) / (stamps[-1] - stamps[0]))
            last = max(stamps[-1] for stamps in _stamps(system, prompts, 64))
            many[system.name].append(len(prompts) * 64 / last)
    medians = {
        part: {name: statistics.median(values[1:]) for name, values in rates.items()}
        for part, rates in found.items()
    }
    streams = {"prefill": "prompt of 300 tokens", "one": "1", "many": "8"}
    rows = []
    for part, rates in medians.items():
        base = rates[f"{theirs}, one batch" if part == "many" else theirs]
        for name, rate in rates.items():
            shares = [f"{rate / rates[loop]:.2f}", f"{rate / base:.2f}"]
            rows.append([streams[part], name, f"{rate:.0f}", *shares])
    head = ["streams", "system", "tokens/s", "of llama.cpp's own loop", "of transformers"]
    return medians, (
        f"## Decoding\n\n{table(head, rows)}\n\n"
        "One stream: decoding alone, after the first token. 8 streams: 64 tokens in and 64 out "
        "each, prefill included; llama.cpp's own loop in the better of its two cache layouts."
    )


def _raw(bench: Bench, prompts: list[list[int]], n: int, *, whole: bool) -> float:
    """Tokens/s of llama.cpp's own loop, in the better of its cache layouts."""
    best = 0.0
    for unified in (True, False)[: len(prompts)]:
        first, rest = bench.raw(prompts, n, unified=unified)
        tokens = len(prompts) * (n if whole else n - 1)
        best = max(best, tokens / (first + rest if whole else rest))
    return best


def _stamps(system: Ours | InVllm, prompts: list[list[int]], n: int) -> list[list[float]]:
    """When each token of each of the prompts' answers came, in seconds."""
    if isinstance(system, Ours) and isinstance(system.engine, BatchingEngine):
        system.engine.forget()  # tokens kept from before take time in llama.cpp's attention

    async def one(ids: list[int]) -> list[float]:
        return [time.perf_counter() - start async for _ in system.tokens(ids, n)]

    async def all_of_them() -> list[list[float]]:
        return await asyncio.gather(*(one(ids) for ids in prompts))

    start = time.perf_counter()
    return asyncio.run(all_of_them())


def _generate(bench: Bench, prompts: list[list[int]], n: int, *, whole: bool) -> float:
    ids = torch.tensor(prompts)

    def run(tokens: int) -> float:
        start = time.perf_counter()
        bench.plain.llm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - start

    with torch.inference_mode():
        if whole:
            return len(prompts) * n / run(n)
        return (n - 1) / (run(n) - run(1))


def serving(bench: Bench) -> Measured:
    """First token and tokens/s of each system, input and number of requests at once."""
    with LlamaCppServer.started(bench.file, PORT, bench.threads) as server:
        systems: list[System] = [*bench.engines, bench.plain, server]
        rows = asyncio.run(_serving(systems, bench.folder, bench.repeats))
    cells = [
        [r["input"], str(r["at_once"]), r["system"], f"{r['first']:.2f}", f"{r['rate']:.0f}"]
        for r in rows
    ]
    return rows, (
        "## Serving\n\nRequests at once, 32 tokens each, every medium shown for the first time; "
        "after the warm-up a text question may find its start computed. First token: median "
        "seconds; tokens/s: of all requests together.\n\n"
        + table(["input", "at once", "system", "first token, s", "tokens/s"], cells)
    )


async def _serving(systems: Sequence[System], folder: Path, repeats: int) -> list[dict[str, Any]]:
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
    seed = 0

    def question(kind: str, number: int) -> Question:
        nonlocal seed
        seed += 1
        media = () if kind == "text" else (draw(kind, folder, seed),)
        return Question(ABOUT[kind].format(n=number), media)

    def kinds(system: System) -> list[str]:
        return list(ABOUT) if system.takes_media else ["text"]

    for system in systems:  # warm-up
        for kind in kinds(system):
            await timed(system, question(kind, 0))
    for kind in ABOUT:
        for n in AT_ONCE:
            for repeat in range(repeats):
                for system in [system for system in systems if kind in kinds(system)]:
                    questions = [question(kind, 100 * repeat + i) for i in range(n)]
                    start = time.perf_counter()
                    answers = await asyncio.gather(*(timed(system, one) for one in questions))
                    seconds = time.perf_counter() - start
                    first = statistics.median(tokens[0] for tokens in answers)
                    rate = sum(map(len, answers)) / seconds
                    found[kind, n, system.name].append((first, rate))
    return [
        {
            "input": kind,
            "at_once": n,
            "system": name,
            "first": statistics.median(first for first, _ in values),
            "rate": statistics.median(rate for _, rate in values),
        }
        for (kind, n, name), values in found.items()
    ]


def followup(bench: Bench) -> Measured:
    """Seconds to the first token of a question about a new picture, and of a second one."""

    async def measure() -> tuple[list[float], list[float]]:
        first: list[float] = []
        second: list[float] = []
        for repeat in range(max(5, bench.repeats) + 1):
            media = (draw("image", bench.folder, 10_000 + repeat),)
            for text, times in ((ABOUT["image"], first), ("Which colour is it?", second)):
                times.append((await timed(bench.llamacpp, Question(text, media, 8)))[0])
        return first, second

    first, second = (statistics.median(times[1:]) for times in asyncio.run(measure()))
    return {"first": first, "second": second}, (
        "## A second question about the same picture\n\n"
        f"First token after {first:.3f} s, of the second question after {second:.3f} s: "
        f"{second / first:.2f} of it."
    )


def stalls(bench: Bench) -> Measured:
    """The longest gap between tokens of 4 answers while a prompt of 1,500 tokens arrives."""
    found = asyncio.run(_stalls(bench.llamacpp.engine, bench.repeats))
    usual, longest, first, alone = (statistics.median(values) for values in found)
    figures = {"usual": usual, "longest": longest, "first": first, "alone": alone}
    return figures, (
        "## A prompt of 1,500 tokens beside 4 running answers\n\n"
        f"A usual step takes {1e3 * usual:.1f} ms. While the prompt is computed the longest pause "
        f"of any answer is {1e3 * longest:.1f} ms, {longest / usual:.1f} usual steps; the prompt's "
        f"first token comes after {first:.2f} s ({alone:.2f} s without the others)."
    )


async def _stalls(engine: Any, repeats: int) -> tuple[list[float], ...]:
    async def stamp(stream: int, stamps: list[float]) -> None:
        start = Prompt((tuple(range(1000 + 50 * stream, 1050 + 50 * stream)),), "streams")
        async for _ in engine.generate(start, GenerationOptions(max_tokens=2000)):
            stamps.append(time.perf_counter())

    usual, longest, first, alone = [], [], [], []
    for repeat in range(repeats):
        alone.append(await _first(engine, range(2000, 3500), f"alone {repeat}"))
        stamps: list[list[float]] = [[] for _ in range(4)]
        tasks = [asyncio.create_task(stamp(n, times)) for n, times in enumerate(stamps)]
        while min(map(len, stamps)) < 80:
            await asyncio.sleep(0.01)
        arrived = time.perf_counter()
        first.append(await _first(engine, range(2000, 3500), f"beside {repeat}"))
        done = time.perf_counter()
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        gaps = [
            (after, after - before) for times in stamps for before, after in pairwise(times[20:])
        ]
        usual.append(statistics.median(gap for at, gap in gaps if at < arrived))
        longest.append(max(gap for at, gap in gaps if arrived <= at <= done))
    return usual, longest, first, alone


async def _first(engine: Any, ids: range, salt: str) -> float:
    """Seconds to the first token after ids that no other prompt of the salt begins with."""
    start = time.perf_counter()
    first = 0.0
    async for _ in engine.generate(Prompt((tuple(ids),), salt), GenerationOptions(max_tokens=2)):
        first = first or time.perf_counter() - start
    return first


def growth(bench: Bench) -> Measured:
    found = asyncio.run(_growth(bench.llamacpp, bench.folder, bench.repeats))
    rows = []
    for name, curve in found.items():
        slope, fixed = statistics.linear_regression(curve["x"], curve["seconds"])
        r2 = statistics.correlation(curve["x"], curve["seconds"]) ** 2
        rows.append([name, f"{1e3 * slope:.2f} ms", f"{1e3 * fixed:.0f} ms", f"{r2:.3f}"])
    head = ["what", "a unit costs", "fixed", "R²"]
    return found, f"## Growth of costs\n\n{table(head, rows)}"


async def _growth(system: Ours, folder: Path, repeats: int) -> dict[str, dict[str, list[float]]]:
    async def prefill(n: int) -> float:
        return await _first(system.engine, range(1000, 1000 + n), str(time.time_ns()))

    async def decode(n: int) -> float:
        return sum(await timed(system, Question("Tell me a story.", n_tokens=n)))

    async def encode(n: int) -> float:
        seed = time.time_ns() % 2**31  # a clip that was shown before costs nothing
        path = clip(folder / f"growth-{seed}.mp4", seed)
        question = Question("What moves?", (("video", path),))
        (message,) = decode_media(question.messages, system.decoder)
        video: Any = message.media[0]
        short = Video(video.frames[:n], video.times[:n])
        start = time.perf_counter()
        await system.assistant.encoder.encode([short])
        return time.perf_counter() - start

    sizes: dict[str, tuple[Callable[[int], Any], Sequence[int]]] = {
        "prompt token": (prefill, (64, 128, 256, 512, 1024, 1536)),
        "generated token": (decode, (16, 32, 64, 128, 256)),
        "video frame": (encode, (1, 2, 4, 6, 8)),
    }
    found = {}
    for name, (measure, points) in sizes.items():
        await measure(points[0])
        seconds = [statistics.median([await measure(n) for _ in range(repeats)]) for n in points]
        found[name] = {"x": [float(n) for n in points], "seconds": seconds}
    return found


def soak(bench: Bench) -> Measured:
    """Requests of which most go away at a random point; what is held before and after."""
    system, rng = bench.llamacpp, random.Random(0)
    pictures = [draw("image", bench.folder, 20_000 + i) for i in range(8)]

    async def one(number: int) -> bool:
        media = (pictures[number % 8],) if number % 3 else ()
        question = Question(f"Tell me about it, {number}.", media, rng.randint(1, 24))
        task = asyncio.create_task(timed(system, question))
        await asyncio.wait([task], timeout=rng.expovariate(2.0))
        gone = task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return gone

    async def some(n: int) -> int:
        batches = [await asyncio.gather(*map(one, range(i, i + 20))) for i in range(0, n, 20)]
        return sum(map(sum, batches))

    def held() -> tuple[dict[str, int], int]:
        while (stats := system.engine.stats()).running or stats.waiting:
            time.sleep(0.01)
        cache = system.assistant.context_cache
        counts = {
            "running": stats.running,
            "waiting": stats.waiting,
            "cached media": cache.entries,
            "cached bytes": cache.bytes,
        }
        with open("/proc/self/statm", encoding="ascii") as file:
            return counts, int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    asyncio.run(some(100))  # warm-up: buffers grow to their size
    before, rss_before = held()
    cancelled = asyncio.run(some(500))
    after, rss_after = held()
    figures = {"requests": 500, "cancelled": cancelled, "before": before, "after": after}
    return figures | {"rss_before": rss_before, "rss_after": rss_after}, (
        f"## Requests that go away\n\n500 requests, {cancelled} of them given up at a random "
        f"point. Before: {before}. After: {after}. Resident memory {rss_before / 1e6:.0f} MB "
        f"before, {rss_after / 1e6:.0f} MB after ({100 * (rss_after / rss_before - 1):+.1f} %)."
    )


def _overhead(bench: Bench) -> Measured:
    engine = EngineOptions("llamacpp", bench.quantization)
    with ExitStack() as stack:
        assistant = load_assistant(bench.model, bench.llamacpp.decoder, engine)
        stack.enter_context(closing(assistant))
        url = service(stack, "--model", bench.model, "--quantization", bench.quantization)
        return overhead.measure(assistant, url, bench.repeats)


SECTIONS: dict[str, Callable[[Bench], Measured]] = {
    "decoding": decoding,
    "followup": followup,
    "stalls": stalls,
    "growth": growth,
    "soak": soak,
    "serving": serving,
    "overhead": _overhead,
}
