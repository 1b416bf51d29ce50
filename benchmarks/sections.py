"""The sections of the race: each measures one thing and describes it in Markdown."""

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, aclosing, closing, suppress
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import overhead
from benchmarks.raw_llama import run_raw, run_steps
from benchmarks.systems import (
    InVllm,
    LlamaCppServer,
    Ours,
    PlainTransformers,
    Question,
    Stamps,
    System,
    clip,
    draw,
    service,
    table,
)
from mico_chat.assistant import decode_media
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.llamacpp_export import gguf_of
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import Video
from mico_chat.media.kinds import Kind

PORT = 8077
ABOUT: dict[Kind | None, str] = {
    None: "Tell me a long story about a fox, a river and an old bridge. Number {n}.",
    "image": "What is in this picture?",
    "video": "What moves, and which way?",
    "audio": "What do you hear?",
}
"""The questions about each kind of medium, and those without one."""

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
    def engines(self) -> list[System]:
        return [self.llamacpp, self.transformers, *([self.vllm] if self.vllm else [])]

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


def _stamps(system: System, prompts: list[list[int]], n: int) -> list[Stamps]:
    if isinstance(system, Ours) and isinstance(system.engine, BatchingEngine):
        system.engine.forget()  # tokens kept from before take time in llama.cpp's attention
    return system.race([Question(ids=ids, n_tokens=n) for ids in prompts])


def _generate(bench: Bench, prompts: list[list[int]], n: int, *, whole: bool) -> float:
    ids = torch.tensor(prompts, device=bench.plain.llm.device)

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


def steps(bench: Bench) -> Measured:
    """llama.cpp's own steps: what more answers, chunks of other sizes, and bfloat16 cost."""
    rows, chunks, length = (1, 2, 4, 8, 16), (8, 16, 63, 64, 128, 512), 1500
    figures: dict[str, Any] = {"rows": rows, "chunks": chunks}
    answers, parts = [], []
    for name in dict.fromkeys((bench.quantization, "BF16")):
        arguments = (gguf_of(bench.model, name), bench.threads, rows, chunks, length)
        decoding, prompts = bench.own_process.submit(run_steps, *arguments).result()
        figures[name] = {"decoding": decoding, "prompts": prompts}
        for n, s in zip(rows, decoding, strict=True):
            answers.append([name, str(n), f"{1e3 * s:.1f}", f"{n / s:.0f}"])
        for n, s in zip(chunks, prompts, strict=True):
            parts.append([name, str(n), f"{1e3 * s / length:.2f}", f"{length / s:.0f}"])
    return figures, (
        "## llama.cpp's own steps\n\nA token for each of some answers in one step:\n\n"
        + table(["weights", "answers", "ms a step", "tokens/s"], answers)
        + f"\n\nA prompt of {length} tokens, in chunks:\n\n"
        + table(["weights", "tokens a chunk", "ms a token", "tokens/s"], parts)
    )


def serving(bench: Bench) -> Measured:
    """First token and tokens/s of each system, input and number of requests at once."""
    with LlamaCppServer.started(bench.file, PORT, bench.threads) as server:
        systems: list[System] = [*bench.engines, bench.plain, server]
        rows = _serving(systems, bench.folder, bench.repeats)
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


def _serving(systems: Sequence[System], folder: Path, repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seeds = count()

    def questions(kind: Kind | None, first: int, n: int) -> list[Question]:
        media = [[] if kind is None else [draw(kind, folder, next(seeds))] for _ in range(n)]
        return [Question(ABOUT[kind].format(n=first + i), media[i]) for i in range(n)]

    for kind in ABOUT:
        racing = [system for system in systems if kind is None or system.takes_media]
        for system in racing:  # warm-up
            system.race(questions(kind, 0, 1))
        for n in AT_ONCE:
            found = defaultdict(list)
            for repeat in range(repeats):
                for system in racing:
                    found[system.name].append(system.race(questions(kind, 100 * repeat, n)))
            for name, races in found.items():
                firsts = [statistics.median(stamps[0] for stamps in race) for race in races]
                rates = [sum(map(len, race)) / max(map(max, race)) for race in races]
                row: dict[str, Any] = {"input": kind or "text", "at_once": n, "system": name}
                row |= {"first": statistics.median(firsts), "rate": statistics.median(rates)}
                rows.append(row)
    return rows


def followup(bench: Bench) -> Measured:
    """Seconds to the first token of a question about a new picture, and of a second one."""
    found: list[list[float]] = []
    for repeat in range(max(5, bench.repeats) + 1):
        media = [draw("image", bench.folder, 10_000 + repeat)]
        second = "Which colour is it?"
        asked = [Question(text, media, 8) for text in (ABOUT["image"], second)]
        # The first of the seeded questions encodes the picture by itself.
        asked += [Question(second, media, 8, seed=1)] * 2
        found.append([bench.llamacpp.race([question])[0][0] for question in asked])
    first, later, _, seeded = map(statistics.median, zip(*found[1:], strict=True))
    return {"first": first, "second": later, "seeded": seeded}, (
        "## A second question about the same picture\n\n"
        f"First token after {first:.3f} s, of the second question after {later:.3f} s: "
        f"{later / first:.2f} of it. With a seed, which reuses nothing, after {seeded:.3f} s."
    )


def stalls(bench: Bench) -> Measured:
    """The longest gap between tokens of 4 answers while a prompt of 1,500 tokens arrives."""
    found = asyncio.run(_stalls(bench.llamacpp, bench.repeats))
    usual, longest, first, alone = map(statistics.median, zip(*found, strict=True))
    figures = {"usual": usual, "longest": longest, "first": first, "alone": alone}
    return figures, (
        "## A prompt of 1,500 tokens beside 4 running answers\n\n"
        f"A usual step takes {1e3 * usual:.1f} ms. While the prompt is computed the longest pause "
        f"of any answer is {1e3 * longest:.1f} ms, {longest / usual:.1f} usual steps; the prompt's "
        f"first token comes after {first:.2f} s ({alone:.2f} s without the others)."
    )


async def _stalls(system: System, repeats: int) -> list[tuple[float, ...]]:
    """Seconds of each repeat: a usual gap, the longest one, the prompt's first token beside the
    answers, and its first token alone.
    """
    prompt = Question(ids=range(2000, 3500), n_tokens=2)

    async def stamp(stream: int, stamps: Stamps) -> None:
        ids = range(1000 + 50 * stream, 1050 + 50 * stream)
        async with aclosing(system.answer(Question(ids=ids, n_tokens=2000))) as tokens:
            async for _ in tokens:
                stamps.append(time.perf_counter())

    found: list[tuple[float, ...]] = []
    for _ in range(repeats):
        alone = (await system.stamps(prompt))[0]
        running: list[Stamps] = [[] for _ in range(4)]
        tasks = [asyncio.create_task(stamp(n, times)) for n, times in enumerate(running)]
        while min(map(len, running)) < 80:
            await asyncio.sleep(0.01)
        arrived = time.perf_counter()
        first = (await system.stamps(prompt))[0]
        done = time.perf_counter()
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        gaps = [
            (after, after - before) for times in running for before, after in pairwise(times[20:])
        ]
        usual = statistics.median(gap for at, gap in gaps if at < arrived)
        longest = max(gap for at, gap in gaps if arrived <= at <= done)
        found.append((usual, longest, first, alone))
    return found


def growth(bench: Bench) -> Measured:
    """Seconds against prompt tokens, generated tokens and frames, and a line through them."""
    system, decoder = bench.llamacpp, bench.llamacpp.decoder

    def prefill(n: int) -> float:
        return system.race([Question(ids=range(1000, 1000 + n), n_tokens=2)])[0][0]

    def decode(n: int) -> float:
        return system.race([Question("Tell me a story.", n_tokens=n)])[0][-1]

    def encode(n: int) -> float:
        seed = time.time_ns() % 2**31  # a clip that was shown before costs nothing
        path = clip(bench.folder / f"growth-{seed}.mp4", seed)
        (message,) = decode_media(Question("What moves?", [("video", str(path))]).messages, decoder)
        video: Any = message.media[0]
        short = Video(video.frames[:n], video.times[:n])
        start = time.perf_counter()
        asyncio.run(system.assistant.encoder.encode([short]))
        return time.perf_counter() - start

    sizes: dict[str, tuple[Callable[[int], float], Sequence[int]]] = {
        "prompt token": (prefill, (64, 128, 256, 512, 1024, 1536)),
        "generated token": (decode, (16, 32, 64, 128, 256)),
        "video frame": (encode, (1, 2, 4, 6, 8)),
    }
    found, rows = {}, []
    for name, (measure, points) in sizes.items():
        measure(points[0])  # warm-up
        x = [float(n) for n in points]
        y = [statistics.median(measure(n) for _ in range(bench.repeats)) for n in points]
        found[name] = {"x": x, "seconds": y}
        slope, fixed = statistics.linear_regression(x, y)
        r2 = statistics.correlation(x, y) ** 2
        rows.append([name, f"{1e3 * slope:.2f} ms", f"{1e3 * fixed:.0f} ms", f"{r2:.3f}"])
    head = ["what", "a unit costs", "fixed", "R²"]
    return found, f"## Growth of costs\n\n{table(head, rows)}"


def _overhead(bench: Bench) -> Measured:
    engine = EngineOptions("llamacpp", bench.quantization)
    loaded = load_assistant(bench.model, bench.llamacpp.decoder, engine)
    with closing(loaded) as assistant, ExitStack() as stack:
        url = service(stack, "--model", bench.model, "--quantization", bench.quantization)
        return overhead.measure(assistant, url, bench.repeats)


SECTIONS: dict[str, Callable[[Bench], Measured]] = {
    "decoding": decoding,
    "steps": steps,
    "followup": followup,
    "stalls": stalls,
    "growth": growth,
    "serving": serving,
    "overhead": _overhead,
}
