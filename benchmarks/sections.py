"""What is measured: each function runs one experiment and returns its figures."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.media import clip, draw
from benchmarks.systems import Continues, Ours, Question, System, Timing, timed, together
from mico_chat.assistant import decode_media
from mico_chat.engine.base import GenerationOptions, Prompt
from mico_chat.engine.batching import BatchingEngine

if TYPE_CHECKING:
    from benchmarks.engines import Bench

TEXT = "Tell me a long story about a fox, a river and an old bridge. Number {n}."
ABOUT = {
    "text": TEXT,
    "image": "What is in this picture?",
    "video": "What moves, and which way?",
    "audio": "What do you hear?",
}
AT_ONCE = (1, 2, 4, 8, 16)


async def serving(systems: Sequence[System], folder: Path, repeats: int) -> list[dict[str, Any]]:
    """First token and tokens/s of each system, input and number of requests at once."""
    found: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
    seed = 0
    for system in systems:  # warm-up
        await timed(system, Question(TEXT.format(n=0)))
        if system.takes_media:
            for kind in ("image", "video", "audio"):
                seed += 1
                await timed(system, Question(ABOUT[kind], (draw(kind, folder, seed),)))
    for kind in ABOUT:
        for n in AT_ONCE:
            for repeat in range(repeats):
                for system in systems:
                    if kind != "text" and not system.takes_media:
                        continue
                    questions = []
                    for i in range(n):
                        seed += 1
                        media = () if kind == "text" else (draw(kind, folder, seed),)
                        text = ABOUT[kind].format(n=100 * repeat + i)
                        questions.append(Question(text, media))
                    timings, seconds = await together(system, questions)
                    first = statistics.median(t.first for t in timings)
                    rate = sum(len(t.steps) + 1 for t in timings) / seconds
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


def decoding(bench: Bench) -> dict[str, dict[str, float]]:
    """Tokens/s of a prompt of 300 tokens, of one stream while it decodes, and of 8 streams of
    64 + 64 tokens."""
    ids = list(range(1000, 1064))
    prompts = [[token + 64 * stream for token in ids] for stream in range(8)]
    loop, theirs = "llama.cpp loop", "transformers generate"
    long = list(range(1000, 1300))
    prefill: dict[str, list[float]] = defaultdict(list)
    one: dict[str, list[float]] = defaultdict(list)
    many: dict[str, list[float]] = defaultdict(list)
    for _ in range(bench.repeats + 1):  # the first warms up
        prefill[loop].append(len(long) / bench.raw([long], 1, unified=True)[0])
        prefill[theirs].append(_generate(bench, [long], 1, whole=True) * len(long))
        one[loop].append(_raw(bench, [ids], 128, whole=False))
        one[theirs].append(_generate(bench, [ids], 64, whole=False))
        many[loop].append(_raw(bench, prompts, 64, whole=True))
        many[f"{theirs}, one batch"].append(_generate(bench, prompts, 64, whole=True))
        for system in bench.engines:
            prefill[system.name].append(len(long) / _timed(system, [long], 1)[0][0])
            stamps = _timed(system, [ids], 128)[0]
            one[system.name].append((len(stamps) - 1) / (stamps[-1] - stamps[0]))
            last = max(stamps[-1] for stamps in _timed(system, prompts, 64))
            many[system.name].append(len(prompts) * 64 / last)
    return {
        "prefill": {name: statistics.median(values[1:]) for name, values in prefill.items()},
        "one": {name: statistics.median(values[1:]) for name, values in one.items()},
        "many": {name: statistics.median(values[1:]) for name, values in many.items()},
    }


def _raw(bench: Bench, prompts: list[list[int]], n: int, *, whole: bool) -> float:
    """Tokens/s of llama.cpp's own loop, in the better of its cache layouts."""
    best = 0.0
    for unified in (True, False)[: len(prompts)]:
        first, rest = bench.raw(prompts, n, unified=unified)
        tokens = len(prompts) * (n if whole else n - 1)
        best = max(best, tokens / (first + rest if whole else rest))
    return best


def _timed(system: Continues, prompts: list[list[int]], n: int) -> list[list[float]]:
    """When each token of each of the prompts' answers came, in seconds."""
    if isinstance(system, Ours) and isinstance(system.engine, BatchingEngine):
        system.engine.forget()  # what is kept from before takes time in llama.cpp's attention

    async def one(ids: list[int]) -> list[float]:
        return [time.perf_counter() - start async for _ in system.tokens(ids, n)]

    async def all_of_them() -> list[list[float]]:
        return await asyncio.gather(*(one(ids) for ids in prompts))

    start = time.perf_counter()
    return asyncio.run(all_of_them())


def _generate(bench: Bench, prompts: list[list[int]], n: int, *, whole: bool) -> float:
    """Tokens/s of Hugging Face's generate on one batch."""
    llm = bench.plain.llm
    ids = torch.tensor(prompts)

    def run(tokens: int) -> float:
        start = time.perf_counter()
        llm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - start

    with torch.inference_mode():
        if whole:
            return len(prompts) * n / run(n)
        return (n - 1) / (run(n) - run(1))


async def followup(system: Ours, folder: Path, repeats: int) -> dict[str, float]:
    """Seconds to the first token of a question about a new picture, and of a second one."""
    first, second = [], []
    for repeat in range(repeats + 1):
        media = (draw("image", folder, 10_000 + repeat),)
        first.append((await timed(system, Question("What is in this picture?", media, 8))).first)
        second.append((await timed(system, Question("Which colour is it?", media, 8))).first)
    return {"first": statistics.median(first[1:]), "second": statistics.median(second[1:])}


async def stalls(system: Ours, repeats: int) -> dict[str, float]:
    """The longest gap between tokens of 4 answers while a prompt of 1,500 tokens arrives."""
    engine = system.engine
    usual, longest, first, alone = [], [], [], []
    for repeat in range(repeats):
        prompt = Prompt((tuple(range(2000, 3500)),), f"alone {repeat}")
        alone.append(await _first(engine, prompt))
        stamps: list[list[float]] = [[] for _ in range(4)]
        tasks = [asyncio.create_task(_stamp(engine, n, times)) for n, times in enumerate(stamps)]
        while min(map(len, stamps)) < 80:
            await asyncio.sleep(0.01)
        arrived = time.perf_counter()
        prompt = Prompt((tuple(range(2000, 3500)),), f"beside {repeat}")
        first.append(await _first(engine, prompt))
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
    return {
        "usual": statistics.median(usual),
        "longest": statistics.median(longest),
        "first": statistics.median(first),
        "alone": statistics.median(alone),
    }


async def _stamp(engine: Any, stream: int, stamps: list[float]) -> None:
    """Note when each token of an answer comes."""
    start = Prompt((tuple(range(1000 + 50 * stream, 1050 + 50 * stream)),), "streams")
    async for _ in engine.generate(start, GenerationOptions(max_tokens=2000)):
        stamps.append(time.perf_counter())


async def _first(engine: Any, prompt: Prompt) -> float:
    start = time.perf_counter()
    first = 0.0
    async for _ in engine.generate(prompt, GenerationOptions(max_tokens=2)):
        first = first or time.perf_counter() - start
    return first


async def growth(system: Ours, folder: Path, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds against prompt tokens, generated tokens and frames."""
    engine = system.engine

    async def prefill(n: int) -> float:
        return await _first(engine, Prompt((tuple(range(1000, 1000 + n)),), str(time.time_ns())))

    async def decode(n: int) -> float:
        timing: Timing = await timed(system, Question("Tell me a story.", n_tokens=n))
        return timing.total

    async def encode(n: int) -> float:
        seed = time.time_ns() % 2**31  # a clip that was shown before costs nothing
        path = clip(folder / f"growth-{seed}.mp4", seed)
        question = Question("What moves?", (("video", path),))
        (message,) = decode_media(question.messages, system.decoder)
        (video,) = message.media
        start = time.perf_counter()
        await system.assistant.encoder.encode([_cut(video, n)])
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


def _cut(video: Any, n: int) -> Any:
    """The first ``n`` frames of a clip."""
    from mico_chat.media import Video

    return Video(video.frames[:n], video.times[:n])


async def soak(system: Ours, folder: Path, requests: int = 500) -> dict[str, Any]:
    """Requests of which most go away at a random point; what is held before and after."""
    rng = random.Random(0)
    pictures = [draw("image", folder, 20_000 + i) for i in range(8)]

    async def one(number: int) -> bool:
        media = (pictures[number % 8],) if number % 3 else ()
        question = Question(f"Tell me about it, {number}.", media, rng.randint(1, 24))
        task = asyncio.create_task(timed(system, question))
        await asyncio.wait([task], timeout=rng.expovariate(2.0))
        gone = task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return gone

    async def some(first: int, last: int) -> int:
        gone = 0
        for start in range(first, last, 20):
            batch = await asyncio.gather(*(one(i) for i in range(start, min(last, start + 20))))
            gone += sum(batch)
        return gone

    await some(0, 100)  # warm-up: buffers grow to their size
    system.settle()
    before, rss_before = system.counts(), _rss()
    cancelled = await some(0, requests)
    system.settle()
    return {
        "requests": requests,
        "cancelled": cancelled,
        "before": before,
        "after": system.counts(),
        "rss_before": rss_before,
        "rss_after": _rss(),
    }


def _rss() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
