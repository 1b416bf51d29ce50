"""The race of the engines, in one run.

Sections: decoding against llama.cpp's own loop, llama.cpp's own steps, a second question about the
same picture, a long prompt beside running answers, growth of costs, serving under load, and the
cost of the service over HTTP. ``--only`` runs some of them. ``--repeats`` says how often each
section measures; medians are shown.
"""

import asyncio
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, aclosing, closing, suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engines import overhead
from benchmarks.engines.raw_llama import memory_bandwidth, run_raw, run_steps
from benchmarks.engines.systems import (
    InVllm,
    LlamaCppServer,
    Ours,
    PlainTransformers,
    Question,
    Stamps,
    System,
)
from benchmarks.harness import Panel, Ratio, Report, line, medians, turns
from benchmarks.media import draw
from benchmarks.processes import service
from mico_chat.adapters.mico import mico_of
from mico_chat.checkpoints.load import load_chat, load_encoder
from mico_chat.engine.base import Preference
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.llamacpp import LlamaCppModel
from mico_chat.engine.llamacpp_export import gguf_of, usual_quantization
from mico_chat.engine.transformers import TransformersModel
from mico_chat.errors import ConfigError
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder, MediaFile
from mico_chat.media.kinds import Kind
from mico_training.estimate import measured_throughput

OWN_REPORT = ("serving", "overhead")
"""Sections that write a report of their own; all others share one."""
PORT = 8077
ABOUT: dict[Kind | None, str] = {
    None: "Tell me a long story about a fox, a river and an old bridge. Number {n}.",
    "image": "What is in this picture?",
    "video": "What moves, and which way?",
    "audio": "What do you hear?",
}
"""The questions about each kind of medium, and those without one."""

AT_ONCE = (1, 2, 4, 8, 16)
LONG = 4000
LONG_PROMPT = f"prompt of {LONG:,} tokens"


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

    def preferring(self, prefer: Preference | None) -> BatchingEngine:
        """Another llama.cpp, which its scheduler lets prefer short pauses or a soon first token."""
        model, adapter = (
            LlamaCppModel(self.file, threads=self.threads),
            self.llamacpp.assistant.adapter,
        )
        tokenizer = mico_of(adapter).processor.tokenizer
        return BatchingEngine(model, tokenizer, (), name=self.llamacpp.name, prefer=prefer)

    def raw(self, prompts: list[list[int]], n: int, *, unified: bool) -> tuple[float, float]:
        """Seconds of llama.cpp's own loop on the same file and threads; see :func:`run_raw`.

        In a process of its own: OpenMP's threads of two loops in one process hold each other up.
        """
        arguments = (self.file, self.threads, prompts, n, unified)
        return self.own_process.submit(run_raw, *arguments).result()


def decoding(bench: Bench) -> Report:
    """Tokens/s of a prompt of 300 tokens, of one stream while it decodes, and of 8 streams."""
    ids = list(range(1000, 1064))
    prompts = [[token + 64 * stream for token in ids] for stream in range(8)]
    loop, theirs, batch = (
        "llama.cpp loop",
        PlainTransformers.name,
        "transformers generate, one batch",
    )
    asked = {"prefill": list(range(1000, 1300)), "long": [1000 + n % 500 for n in range(LONG)]}
    ways: dict[tuple[str, str], Callable[[], float]] = {
        ("one", loop): lambda: _raw(bench, [ids], 128, whole=False),
        ("one", theirs): lambda: _generate(bench, [ids], 64, whole=False),
        ("many", loop): lambda: _raw(bench, prompts, 64, whole=True),
        ("many", batch): lambda: _generate(bench, prompts, 64, whole=True),
    }

    def stamps(system: System, asked: list[list[int]], n: int) -> list[Stamps]:
        if isinstance(system, Ours) and isinstance(system.engine, BatchingEngine):
            system.engine.forget()  # tokens kept from before take time in llama.cpp's attention
        return system.race([Question(ids=ids, n_tokens=n) for ids in asked])

    def prompt(part: str, system: System) -> float:
        return len(asked[part]) / stamps(system, [asked[part]], 1)[0][0]

    def raw(long: list[int]) -> float:
        return len(long) / bench.raw([long], 1, unified=True)[0]

    def generated(long: list[int]) -> float:
        return len(long) * _generate(bench, [long], 1, whole=True)

    for part, long in asked.items():
        ways |= {(part, loop): partial(raw, long), (part, theirs): partial(generated, long)}
        ways |= {(part, one.name): partial(prompt, part, one) for one in bench.engines}

    def one_stream(system: System) -> float:
        (found,) = stamps(system, [ids], 128)
        return (len(found) - 1) / (found[-1] - found[0])

    def streams(system: System) -> float:
        return len(prompts) * 64 / max(one[-1] for one in stamps(system, prompts, 64))

    for system in bench.engines:
        for part, way in (("one", one_stream), ("many", streams)):
            ways[part, system.name] = partial(way, system)
    rates = medians(turns(ways, bench.repeats))
    titles = {"prefill": "prompt of 300 tokens", "long": LONG_PROMPT, "one": "1", "many": "8"}
    rows = []
    for part, title in titles.items():
        base = rates[part, batch if part == "many" else theirs]
        for (at, name), rate in rates.items():
            if at == part:
                shares = [f"{rate / rates[part, loop]:.2f}", f"{rate / base:.2f}"]
                rows.append([title, name, f"{rate:.0f}", *shares])
    ours = bench.llamacpp.name
    others = [name for at, name in rates if at == "many" and name != ours]
    best = max(others, key=lambda name: rates["many", name])
    raced = [
        ("decode of one stream", "one", loop, 1.0),
        ("8 streams of 64 + 64 tokens", "many", best, 1.1),
        ("prompt of 300 tokens", "prefill", "vllm", 1.0),
        (LONG_PROMPT, "long", "vllm", 1.0),
        (f"{LONG_PROMPT}, engine alone", "long", loop, 1.0),
    ]
    ratios = [
        Ratio.beside_of(measure, rates[at, ours], "tokens/s", other, rates[at, other], goal)
        for measure, at, other, goal in raced
        if (at, other) in rates
    ]
    return Report({"rows": rows}, ratios)


def _raw(bench: Bench, prompts: list[list[int]], n: int, *, whole: bool) -> float:
    """Tokens/s of llama.cpp's own loop, in the better of its cache layouts."""
    best = 0.0
    for unified in (True, False)[: len(prompts)]:
        first, rest = bench.raw(prompts, n, unified=unified)
        tokens = len(prompts) * (n if whole else n - 1)
        best = max(best, tokens / (first + rest if whole else rest))
    return best


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


def steps(bench: Bench) -> Report:
    """llama.cpp's own steps: what more answers, chunks of other sizes, and bfloat16 cost."""
    rows, chunks, length = (1, 2, 4, 8, 16), (8, 16, 63, 64, 128, 512), 1500
    answers, parts = [], []
    for name in dict.fromkeys((bench.quantization, "BF16")):
        arguments = (gguf_of(bench.model, name), bench.threads, rows, chunks, length)
        decoding, prompts = bench.own_process.submit(run_steps, *arguments).result()
        for n, s in zip(rows, decoding, strict=True):
            answers.append([name, str(n), f"{1e3 * s:.1f}", f"{n / s:.0f}"])
        for n, s in zip(chunks, prompts, strict=True):
            parts.append([name, str(n), f"{1e3 * s / length:.2f}", f"{length / s:.0f}"])
    return Report({"answers": answers, "parts": parts, "length": length})


def serving(bench: Bench) -> Report:
    """First token and tokens/s of each system, input and number of requests at once."""
    found: dict[tuple[str, int, str], dict[str, float]] = {}
    seeds = count()

    def questions(kind: Kind | None, first: int, n: int) -> list[Question]:
        media = [[] if kind is None else [draw(kind, bench.folder, next(seeds))] for _ in range(n)]
        return [Question(ABOUT[kind].format(n=first + i), media[i]) for i in range(n)]

    with ExitStack() as stack:
        systems: list[System] = [*bench.engines, bench.plain]
        if find_spec("llama_cpp") is not None:
            server = LlamaCppServer.started(bench.file, PORT, bench.threads)
            systems.append(stack.enter_context(server))
        for kind in ABOUT:
            racing = {one.name: one for one in systems if kind is None or one.takes_media}
            for system in racing.values():  # warm-up
                system.race(questions(kind, 0, 1))
            for n in AT_ONCE:
                races: dict[str, list[list[Stamps]]] = {name: [] for name in racing}
                for number in range(bench.repeats):
                    for name, system in racing.items():
                        races[name].append(system.race(questions(kind, 100 * number, n)))
                for name, raced in races.items():
                    firsts = [statistics.median(one[0] for one in race) for race in raced]
                    rates = [sum(map(len, race)) / max(map(max, race)) for race in raced]
                    first, rate = statistics.median(firsts), statistics.median(rates)
                    found[kind or "text", n, name] = {"first token, s": first, "tokens/s": rate}
    cells = [
        [kind, str(n), name, *(f"{one['first token, s']:.2f}", f"{one['tokens/s']:.0f}")]
        for (kind, n, name), one in found.items()
    ]
    pair = bench.llamacpp.name, bench.transformers.name
    ours, theirs = (found["image", 16, name]["tokens/s"] for name in pair)
    ratio = Ratio.beside_of("16 pictures at once", ours, "tokens/s", pair[1], theirs, 1.2)
    panels = []
    for label in ("tokens/s", "first token, s"):
        for wanted in dict.fromkeys(asked for asked, _, _ in found):
            curves: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
            for (asked, n, name), one in found.items():
                if asked == wanted:
                    curves[name][0].append(n)
                    curves[name][1].append(one[label])
            panels.append(Panel("requests at once", label, curves, wanted, log="2y"))
    return Report({"rows": cells}, [ratio], {"serving": panels})


def followup(bench: Bench) -> Report:
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
    name, beside = "first token of a second question about a picture", "the first question"
    ratio = Ratio.beside_of(name, later, "s", beside, first, 0.15, at_most=True)
    return Report({"first": first, "second": later, "seeded": seeded}, [ratio])


def stalls(bench: Bench) -> Report:
    """The longest gap between tokens of 4 answers while a prompt of 1,500 tokens arrives, for each
    preference. A goal is of the preference that is for it: both cannot hold at once."""
    rows, ratios = [], []
    for prefer in (None, *get_args(Preference)):
        with closing(bench.preferring(prefer)) as engine:
            system = copy(bench.llamacpp)
            system.engine = engine
            found = asyncio.run(_stalls(system, bench.repeats))
        usual, longest, first, alone = map(statistics.median, zip(*found, strict=True))
        steps = f"{longest / usual:.1f}"
        ms = (f"{1e3 * usual:.1f}", f"{1e3 * longest:.1f}", steps)
        rows.append([prefer or "neither", *ms, f"{first:.2f}", f"{alone:.2f}"])
        with_ = f", --prefer {prefer}" if prefer else ""
        pause = f"longest pause beside a prompt of 1,500 tokens{with_}"
        start = f"first token of a prompt of 1,500 tokens beside 4 answers{with_}"
        short, soon = (2.0 if prefer == one else None for one in get_args(Preference))
        ratios += [
            Ratio.beside_of(pause, longest, "s", "a usual step", usual, short, at_most=True),
            Ratio.beside_of(start, first, "s", "alone", alone, soon, at_most=True),
        ]
    return Report({"rows": rows}, ratios)


async def _stalls(system: System, repeats: int) -> list[tuple[float, ...]]:
    """Of each repeat a usual gap, the longest one, and when the prompt's first token came beside
    the answers and alone, in seconds."""
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


def growth(bench: Bench) -> Report:
    """Seconds against prompt tokens and generated tokens, and a line through them.

    The benchmark ``frames`` has those of frames.
    """

    def prefill(n: int) -> float:
        return bench.llamacpp.race([Question(ids=range(1000, 1000 + n), n_tokens=2)])[0][0]

    def decode(n: int) -> float:
        return bench.llamacpp.race([Question("Tell me a story.", n_tokens=n)])[0][-1]

    sizes: dict[str, tuple[Callable[[int], float], Sequence[int]]] = {
        "prompt token": (prefill, (64, 128, 256, 512, 1024, 1536)),
        "generated token": (decode, (16, 32, 64, 128, 256)),
    }
    panels, rows = [], []
    for name, (measure, points) in sizes.items():
        measure(points[0])  # warm-up
        y = [statistics.median(measure(n) for _ in range(bench.repeats)) for n in points]
        slope, fixed, r2 = line(points, y)
        rows.append([name, f"{1e3 * slope:.2f} ms", f"{1e3 * fixed:.0f} ms", f"{r2:.3f}"])
        curves = {f"{1e3 * slope:.2f} ms a {name}": (points, y)}
        panels.append(Panel(f"{name}s", "seconds", curves, fit=True))
    return Report({"rows": rows}, plots={"growth": panels})


def over_http(bench: Bench) -> Report:
    engine = EngineOptions(bench.llamacpp.name, bench.quantization)
    loaded = load_assistant(bench.model, bench.llamacpp.decoder, engine)
    with closing(loaded) as assistant, ExitStack() as stack:
        url = service(stack, "--model", bench.model, "--quantization", bench.quantization)
        return overhead.measure(assistant, url, bench.repeats)


SECTIONS: dict[str, Callable[[Bench], Report]] = {
    "decoding": decoding,
    "steps": steps,
    "followup": followup,
    "stalls": stalls,
    "growth": growth,
    "serving": serving,
    "overhead": over_http,
}


def measure(
    model: str = "mini",
    quantization: Annotated[str | None, "by default the model's own"] = None,
    repeats: int = 3,
    vllm_python: Annotated[
        Path, "a Python with vLLM, as `make test-vllm` makes one; without it vLLM is left out"
    ] = Path(".venv-vllm/bin/python"),
    vllm_args: Annotated[str, 'more of its arguments: {"enforce_eager": true}'] = "{}",
    only: Annotated[list[str] | None, f"some of the sections: {', '.join(SECTIONS)}"] = None,
) -> Iterator[Report]:
    names = only or list(SECTIONS)
    if unknown := set(names) - SECTIONS.keys():
        raise ConfigError(f"--only {' '.join(unknown)}: the sections are {', '.join(SECTIONS)}")
    if not vllm_python.exists() or {"decoding", "serving"}.isdisjoint(names):
        vllm_python = Path()
    # A signal that ends this process then also ends the processes that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as stack:
        bench = _bench(stack, model, quantization, repeats, vllm_python, vllm_args)
        values = _limits(bench)
        for name in names:
            file = name if name in OWN_REPORT else "engines"
            found = SECTIONS[name](bench)
            limits = ideals(values)
            ratios = [
                one.model_copy(update={"limit": limits.get(one.measure)}) for one in found.ratios
            ]
            whole = {**values, **found.values}
            yield replace(found, values=whole, ratios=ratios, part=name, file=file)


def _bench(
    stack: ExitStack,
    model: str,
    quantization: str | None,
    repeats: int,
    vllm_python: Path,
    vllm_args: str,
) -> Bench:
    quantization = quantization or usual_quantization(model)
    threads, file = torch.get_num_threads(), gguf_of(model, quantization)
    decoder = stack.enter_context(MediaDecoder(workers=2))
    encoder, processor = load_encoder(model)
    chat, _ = load_chat(model, dtype=torch.bfloat16)
    vllm = None
    if vllm_python.is_file():
        vllm = stack.enter_context(closing(InVllm(vllm_python, model, vllm_args)))

    def ours(name: str, made: Any, media: Any) -> Ours:
        engine = BatchingEngine(made, processor.tokenizer, (), name=name)
        return Ours(engine, media, processor, decoder)

    spawn = multiprocessing.get_context("spawn")
    own_process = ProcessPoolExecutor(1, spawn, max_tasks_per_child=1)
    return Bench(
        llamacpp=ours("llamacpp", LlamaCppModel(file, threads=threads), encoder),
        transformers=ours("transformers", TransformersModel(chat.llm), chat),
        plain=PlainTransformers(chat, processor, decoder),
        vllm=vllm,
        model=model,
        quantization=quantization,
        file=file,
        threads=threads,
        repeats=repeats,
        folder=Path(stack.enter_context(tempfile.TemporaryDirectory())),
        own_process=stack.enter_context(own_process),
    )


def _limits(bench: Bench) -> dict[str, Any]:
    """How fast the machine is at best. A prompt needs no logits but the last token's."""
    llm = bench.plain.llm
    adapter = bench.transformers.assistant.adapter
    kind, file = draw("image", bench.folder, 20_000)
    shown = bench.transformers.decoder.decode(MediaFile(kind, file))
    with FlopCounterMode(display=False) as counter:
        (block,) = adapter.encode([adapter.prepare(shown, [kind])])
    return {
        "picture": counter.get_total_flops(),
        "picture_tokens": len(block),
        # Both products of attention, for a token and each token before it.
        "attention": 4 * llm.config.num_hidden_layers * llm.config.hidden_size,
        "bandwidth": memory_bandwidth(bench.threads),
        "single": measured_throughput(half=False),
        "half": measured_throughput(half=True),
        "flops": 2 * (llm.num_parameters() - llm.get_input_embeddings().weight.numel()),
        "size": bench.file.stat().st_size,
        "threads": bench.threads,
        "vllm": f"{bench.vllm.version}; " if bench.vllm else "",
    }


def ideals(limits: Mapping[str, Any]) -> dict[str, float]:
    """What each measure cannot exceed on this machine. A step reads the weights from memory, and
    multiplies them in bfloat16 with each token, whichever takes longer."""
    read: float = limits["size"] / limits["bandwidth"]
    token: float = limits["flops"] / limits["half"]
    attended = limits["attention"] * LONG / 2 / limits["half"]
    picture = limits["picture"] / limits["half"] + limits["picture_tokens"] * token

    def step(n: int) -> float:
        return max(read, n * token)

    return {
        "decode of one stream": 1 / step(1),
        "8 streams of 64 + 64 tokens": 8 * 64 / (8 * 64 * token + 64 * step(8)),
        "prompt of 300 tokens": 1 / token,
        LONG_PROMPT: 1 / (token + attended),
        f"{LONG_PROMPT}, engine alone": 1 / (token + attended),
        "16 pictures at once": 16 * 32 / (16 * picture + 32 * step(16)),
        "first token of a prompt of 1,500 tokens beside 4 answers": 1500 * token,
        "longest pause beside a prompt of 1,500 tokens": step(4),
    }
