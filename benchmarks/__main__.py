"""Measures the engines side by side in one run; writes tables and plots.

    python -m benchmarks --output benchmarks/results

Sections: decoding against llama.cpp's own loop, serving under load, a second question about the
same picture, a long prompt beside running answers, growth of costs, and the cost of the service
over HTTP. ``--only`` runs some of them. ``--repeats`` says how often each section measures; medians
are shown.
"""

from mico_chat.engine.cpu import set_openmp

if __name__ == "__main__":
    set_openmp()  # the environment of the commands, which torch reads when it is imported

import argparse
import datetime
import multiprocessing
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import overhead
from benchmarks.raw_llama import memory_bandwidth
from benchmarks.sections import AT_ONCE, SECTIONS, Bench
from benchmarks.summary import Ratio, keep
from benchmarks.systems import InVllm, Ours, PlainTransformers, machine
from mico_chat.checkpoints.gguf_files import DEFAULT_QUANTIZATION
from mico_chat.checkpoints.load import load_chat, load_encoder
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.llamacpp import LlamaCppModel
from mico_chat.engine.llamacpp_export import gguf_of
from mico_chat.engine.transformers import TransformersModel
from mico_chat.media import MediaDecoder
from mico_training.estimate import measured_throughput

PACKAGES = ("torch", "transformers", "llama-cpp-python")
OWN_REPORT = ("serving", "overhead")
"""Sections that write a report of their own; all others share one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--model", default="mini")
    parser.add_argument("--quantization", default=DEFAULT_QUANTIZATION)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--vllm-python",
        type=Path,
        default=Path(".venv-vllm/bin/python"),
        help="a Python with vLLM, as `make test-vllm` makes one; without it vLLM is left out",
    )
    parser.add_argument(
        "--vllm-args", default="{}", help='more of its arguments: {"enforce_eager": true}'
    )
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    # A signal that ends this process then also ends the processes that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as stack:
        bench = _bench(options, stack)
        heading = _limits(bench)
        reports: dict[str, list[str]] = defaultdict(lambda: [heading])
        for name in options.only:
            print(f"== {name}", flush=True)
            figures, part = SECTIONS[name](bench)
            print(part, flush=True)
            file = f"{name if name in OWN_REPORT else 'engines'}.md"
            reports[file].append(part)
            (options.output / file).write_text("\n\n".join([*reports[file], ""]), encoding="utf-8")
            if name in RATIOS:
                keep(name, RATIOS[name](figures), options.output, file, PACKAGES)
            if name in PLOTS:
                PLOTS[name](figures).savefig(options.output / f"{name}.png", dpi=110)


def _bench(options: argparse.Namespace, stack: ExitStack) -> Bench:
    threads = torch.get_num_threads()
    file = gguf_of(options.model, options.quantization)
    decoder = stack.enter_context(MediaDecoder(workers=2))
    encoder, processor = load_encoder(options.model)
    chat, _ = load_chat(options.model, dtype=torch.bfloat16)
    vllm = None
    if options.vllm_python.exists() and not {"decoding", "serving"}.isdisjoint(options.only):
        vllm = InVllm(options.vllm_python, options.model, options.vllm_args)
        stack.enter_context(closing(vllm))
    llamacpp = BatchingEngine(
        LlamaCppModel(file, threads=threads), processor.tokenizer, (), name="llamacpp"
    )
    transformers = BatchingEngine(
        TransformersModel(chat.llm), processor.tokenizer, (), name="transformers"
    )
    return Bench(
        Ours(llamacpp, encoder, processor, decoder),
        Ours(transformers, chat, processor, decoder),
        PlainTransformers(chat, processor, decoder),
        vllm,
        options.model,
        options.quantization,
        file,
        threads,
        options.repeats,
        Path(stack.enter_context(tempfile.TemporaryDirectory())),
        stack.enter_context(
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
        ),
    )


def _limits(bench: Bench) -> str:
    """How fast the machine is at best. A prompt needs no logits but the last token's."""
    bandwidth = memory_bandwidth(bench.threads)
    single, half = measured_throughput(half=False), measured_throughput(half=True)
    size, n = bench.file.stat().st_size, bench.repeats
    vllm = f", {bench.vllm.version}" if bench.vllm else ""
    llm = bench.plain.llm
    flops = 2 * (llm.num_parameters() - llm.get_input_embeddings().weight.numel())
    return (
        f"# Engines, {datetime.date.today()}\n\n"
        f"{machine(*PACKAGES)}{vllm}; {bench.threads} threads; model "
        f"{bench.model}, {bench.quantization} ({size / 1e6:.0f} MB). "
        f"{'One measurement each' if n == 1 else f'Medians of {n} repeats'}, all systems in turn."
        f"\n\nLimits of the machine: it reads {bandwidth / 1e9:.1f} GB/s, so a token of one stream "
        f"cannot come faster than {bandwidth / size:.0f} a second; it multiplies "
        f"{single / 1e9:.0f} GFLOP/s in float32 and {half / 1e9:.0f} in bfloat16, so a prompt for "
        f"this language model ({flops / 1e9:.2f} GFLOP a token) cannot exceed "
        f"{half / flops:.0f} tokens/s."
    )


def _plot_serving(rows: list[dict[str, Any]]) -> Figure:
    inputs = list(dict.fromkeys(row["input"] for row in rows))
    figure = Figure(figsize=(3.4 * len(inputs), 6.4), layout="constrained")
    grid: Any = figure.subplots(2, len(inputs), squeeze=False)
    for key, title, line in zip(
        ("rate", "first"), ("tokens/s", "first token, s"), grid, strict=True
    ):
        line[0].set_ylabel(title)
        for name, axes in zip(inputs, line, strict=True):
            points: dict[str, list[tuple[int, float]]] = defaultdict(list)
            for row in rows:
                if row["input"] == name:
                    points[row["system"]].append((row["at_once"], row[key]))
            for system, pairs in points.items():
                axes.plot(*zip(*pairs, strict=True), marker="o", label=system)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(AT_ONCE, map(str, AT_ONCE))
            axes.grid(alpha=0.3)
    for name, top, bottom in zip(inputs, *grid, strict=True):
        top.set_title(name)
        bottom.set_xlabel("requests at once")
    grid[0][0].legend(fontsize=8)
    return figure


def _plot_growth(curves: dict[str, dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(3.6 * len(curves), 3.2), layout="constrained")
    for place, (name, curve) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), place + 1)
        slope, fixed = statistics.linear_regression(curve["x"], curve["seconds"])
        axes.plot(curve["x"], [fixed + slope * x for x in curve["x"]], color="0.6")
        axes.plot(curve["x"], curve["seconds"], "o")
        axes.set_xlabel(f"{name}s")
        axes.set_ylabel("seconds" if place == 0 else "")
        axes.set_title(f"{1e3 * slope:.2f} ms a {name}", fontsize=10)
        axes.grid(alpha=0.3)
    return figure


def _decoding_ratios(rates: dict[str, dict[str, float]]) -> list[Ratio]:
    """Of llama.cpp's engine; beside 8 streams stands the best of the others."""
    loop, ours = "llama.cpp loop", "llamacpp"
    one, many, prefill = rates["one"], rates["many"], rates["prefill"]
    best = max((name for name in many if name != ours), key=many.__getitem__)
    found = [
        ("decode of one stream", one, loop, 1.0),
        ("8 streams of 64 + 64 tokens", many, best, 1.1),
    ]
    if "vllm" in prefill:
        found.append(("prompt of 300 tokens", prefill, "vllm", 1.0))
    return [
        Ratio.beside_of(measure, rate[ours], "tokens/s", beside, rate[beside], goal)
        for measure, rate, beside, goal in found
    ]


def _followup_ratios(seconds: dict[str, float]) -> list[Ratio]:
    name, beside = "first token of a second question about a picture", "the first question"
    first, second = seconds["first"], seconds["second"]
    return [Ratio.beside_of(name, second, "s", beside, first, 0.15, at_most=True)]


def _stalls_ratios(found: dict[str, float]) -> list[Ratio]:
    pause = "longest pause beside a prompt of 1,500 tokens"
    first = "first token of a prompt of 1,500 tokens beside 4 answers"
    usual, alone = found["usual"], found["alone"]
    return [
        Ratio.beside_of(pause, found["longest"], "s", "a usual step", usual, 2.0, at_most=True),
        Ratio.beside_of(first, found["first"], "s", "alone", alone, 2.0, at_most=True),
    ]


def _serving_ratios(rows: list[dict[str, Any]]) -> list[Ratio]:
    rates = {r["system"]: r["rate"] for r in rows if (r["input"], r["at_once"]) == ("image", 16)}
    name, beside = "16 pictures at once", "transformers"
    return [Ratio.beside_of(name, rates["llamacpp"], "tokens/s", beside, rates[beside], 1.2)]


def _overhead_ratios(found: dict[str, dict[str, list[float]]]) -> list[Ratio]:
    """The slowest way in a stream to the first text, the slowest of all at 16 answers."""
    base, ratios = overhead.BASE, []
    for part, name in (("first", "first text"), ("picture", "first text about a picture")):
        ways = {way: 1e3 * statistics.median(values) for way, values in found[part].items()}
        later = max(value for way, value in ways.items() if way != base) - ways[base]
        measure = f"{name} over HTTP, later than in process"
        ratios.append(Ratio(measure=measure, value=later, unit="ms", goal=5.0, at_most=True))
    rates = {way: statistics.median(values) for way, values in found["rate"].items()}
    rate = min(value for way, value in rates.items() if way != base)
    measure = "16 answers over HTTP"
    return [*ratios, Ratio.beside_of(measure, rate, "tokens/s", base, rates[base], 0.95)]


RATIOS: dict[str, Callable[[Any], list[Ratio]]] = {
    "decoding": _decoding_ratios,
    "followup": _followup_ratios,
    "stalls": _stalls_ratios,
    "serving": _serving_ratios,
    "overhead": _overhead_ratios,
}
PLOTS: dict[str, Callable[[Any], Figure]] = {"serving": _plot_serving, "growth": _plot_growth}

if __name__ == "__main__":
    main()
