"""Measures the engines side by side in one run; writes tables and plots.

    python -m benchmarks --output benchmarks/results

Sections: decoding against llama.cpp's own loop, serving under load, a second question about the
same picture, a long prompt beside running answers, growth of costs, requests that go away, and what
the service over HTTP costs beside all that.
``--only`` runs some of them, ``--repeats`` says how often each is measured (medians are shown).
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import multiprocessing
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import torch
import transformers

from benchmarks.http_client import address_of
from benchmarks.overhead import AT_ONCE, BASE, N_TOKENS, first_tokens, rates, ways
from benchmarks.plots import plot_growth, plot_serving
from benchmarks.raw_llama import matmul_flops, memory_bandwidth, run_raw
from benchmarks.sections import decoding, followup, growth, serving, soak, stalls
from benchmarks.systems import (
    LlamaCppServer,
    Ours,
    PlainTransformers,
    System,
    llama_cpp_server,
)
from benchmarks.vllm_process import InVllm
from mico_chat.checkpoints.gguf_export import DEFAULT_QUANTIZATION, gguf_of
from mico_chat.checkpoints.load import load_chat, load_encoder
from mico_chat.engine.batching import BatchingEngine
from mico_chat.engine.cores import processor
from mico_chat.engine.llamacpp import LlamaCppModel
from mico_chat.engine.scheduler import Model
from mico_chat.engine.transformers import TransformersModel
from mico_chat.load import EngineOptions, load_assistant
from mico_chat.media import MediaDecoder
from mico_ui.local_server import local_server

PORT = 8077

VLLM_PYTHON = Path(".venv-vllm/bin/python")


@dataclass
class Bench:
    """What the sections share: systems, files, and how often to measure."""

    llamacpp: Ours
    transformers: Ours
    plain: PlainTransformers
    model: str
    quantization: str
    file: Path
    threads: int
    repeats: int
    folder: Path
    results: dict[str, Any]

    own_process: Executor
    vllm: InVllm | None = None

    @property
    def engines(self) -> list[Ours | InVllm]:
        """This project's engines that are here."""
        own: list[Ours | InVllm] = [self.llamacpp, self.transformers]
        return own if self.vllm is None else [*own, self.vllm]

    def raw(self, prompts: list[list[int]], n: int, *, unified: bool) -> tuple[float, float]:
        """Seconds of llama.cpp's own loop on the same file and threads; see :func:`run_raw`.

        In a process of its own: OpenMP's threads of two loops in one process hold each other up.
        """
        arguments = (self.file, self.threads, prompts, n, unified)
        return self.own_process.submit(run_raw, *arguments).result()


def main() -> None:
    """Run the sections and write what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--model", default="mini")
    parser.add_argument("--quantization", default=DEFAULT_QUANTIZATION)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--vllm-python",
        type=Path,
        default=VLLM_PYTHON,
        help="a Python with vLLM, as `make test-vllm` makes one; where it is missing, so is vLLM",
    )
    parser.add_argument(
        "--vllm-args", default="{}", help='more of its arguments: {"enforce_eager": true}'
    )
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    # So that it ends the processes it has started, whoever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as stack:
        bench = _bench(options, stack)
        parts = [_machine(bench, options)]
        for name in options.only:
            print(f"== {name}", flush=True)
            parts.append(SECTIONS[name](bench))
            print(parts[-1], flush=True)
            _write(options.output, parts, bench.results)


def _write(folder: Path, parts: list[str], results: dict[str, Any]) -> None:
    """What was measured so far."""
    (folder / "engines.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    text = json.dumps(results, indent=1)
    (folder / "engines.json").write_text(text + "\n", encoding="utf-8")
    if "serving" in results:
        plot_serving(results["serving"], folder)
    if "growth" in results:
        plot_growth(results["growth"], folder)


def _bench(options: argparse.Namespace, stack: ExitStack) -> Bench:
    threads = torch.get_num_threads()
    file = gguf_of(options.model, options.quantization)
    decoder = stack.enter_context(MediaDecoder(workers=2))
    encoder, processor = load_encoder(options.model)
    chat, _ = load_chat(options.model, dtype=torch.bfloat16)

    def batching(name: str, model: Model) -> BatchingEngine:
        return BatchingEngine(model, processor.tokenizer, (), name=name)

    llamacpp = batching("llamacpp", LlamaCppModel(file, threads=threads))
    vllm = None
    if options.vllm_python.exists() and not {"decoding", "serving"}.isdisjoint(options.only):
        vllm = stack.enter_context(
            closing(InVllm(options.vllm_python, options.model, options.vllm_args))
        )
    return Bench(
        Ours(llamacpp, encoder, processor, decoder),
        Ours(batching("transformers", TransformersModel(chat.llm)), chat, processor, decoder),
        PlainTransformers(chat, processor, decoder),
        options.model,
        options.quantization,
        file,
        threads,
        options.repeats,
        Path(stack.enter_context(tempfile.TemporaryDirectory())),
        {},
        stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))),
        vllm,
    )


def _machine(bench: Bench, options: argparse.Namespace) -> str:
    bandwidth = memory_bandwidth(bench.threads)
    flops = {dtype: matmul_flops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    size = bench.file.stat().st_size
    n = options.repeats
    repeats = "One measurement each" if n == 1 else f"Medians of {n} repeats"
    bench.results["machine"] = {"bandwidth": bandwidth, "file_bytes": size}
    return "\n".join(
        [
            f"# Engines, {datetime.date.today()}",
            "",
            f"{processor()[0]}, {bench.threads} threads; Python {platform.python_version()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}, llama-cpp-python "
            f"{llama_cpp.__version__}; model {options.model}, {options.quantization} "
            f"({size / 1e6:.0f} MB). {repeats}, all systems in turn.",
            "",
            f"Limits of the machine: it reads {bandwidth / 1e9:.1f} GB/s, so a token of one stream "
            f"cannot come faster than {bandwidth / size:.0f} a second; it multiplies "
            f"{flops[torch.float32] / 1e9:.0f} GFLOP/s in float32 and "
            f"{flops[torch.bfloat16] / 1e9:.0f} in bfloat16, so a prefill of this language model "
            f"(0.27 GFLOP a token) cannot exceed {flops[torch.bfloat16] / 0.27e9:.0f} tokens/s.",
        ]
    )


def _serving(bench: Bench) -> str:
    with llama_cpp_server(bench.file, PORT, bench.threads) as url:
        systems: list[System] = [
            *bench.engines,
            bench.plain,
            LlamaCppServer(url),
        ]
        rows = asyncio.run(serving(systems, bench.folder, bench.repeats))
    bench.results["serving"] = rows
    lines = [
        "## Serving",
        "",
        "Requests at once, 32 tokens each, every medium shown for the first time; after the "
        "warm-up a text question may find its start computed. "
        "First token: median seconds; tokens/s: of all requests together.",
        "",
        "| input | at once | system | first token, s | tokens/s |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['input']} | {row['at_once']} | {row['system']} | {row['first']:.2f} | "
        f"{row['rate']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _decoding(bench: Bench) -> str:
    found = decoding(bench)
    bench.results["decoding"] = found
    prefill, one, many = found["prefill"], found["one"], found["many"]
    return "\n".join(
        [
            "## Decoding",
            "",
            "| streams | system | tokens/s | of llama.cpp's own loop | of transformers |",
            "|---|---|---|---|---|",
            *(
                f"| {n} | {name} | {rate:.0f} | {rate / row['llama.cpp loop']:.2f} | "
                f"{rate / row[base]:.2f} |"
                for n, row, base in (
                    ("prompt of 300 tokens", prefill, "transformers generate"),
                    (1, one, "transformers generate"),
                    (8, many, "transformers generate, one batch"),
                )
                for name, rate in row.items()
            ),
            "",
            "One stream: decoding alone, after the first token. 8 streams: 64 tokens in and 64 out "
            "each, prefill included; llama.cpp's own loop in the better of its two cache layouts.",
        ]
    )


def _followup(bench: Bench) -> str:
    found = asyncio.run(followup(bench.llamacpp, bench.folder, max(5, bench.repeats)))
    bench.results["followup"] = found
    return (
        "## A second question about the same picture\n\n"
        f"First token after {found['first']:.3f} s, of the second question after "
        f"{found['second']:.3f} s: {found['second'] / found['first']:.2f} of it."
    )


def _stalls(bench: Bench) -> str:
    found = asyncio.run(stalls(bench.llamacpp, bench.repeats))
    bench.results["stalls"] = found
    return (
        "## A prompt of 1,500 tokens beside 4 running answers\n\n"
        f"A usual step takes {1e3 * found['usual']:.1f} ms. While the prompt is computed the "
        f"longest pause of any answer is {1e3 * found['longest']:.1f} ms, "
        f"{found['longest'] / found['usual']:.1f} usual steps; the prompt's first token comes "
        f"after {found['first']:.2f} s ({found['alone']:.2f} s without the others)."
    )


def _growth(bench: Bench) -> str:
    found = asyncio.run(growth(bench.llamacpp, bench.folder, bench.repeats))
    bench.results["growth"] = found
    lines = ["## Growth of costs", "", "| what | a unit costs | fixed | R² |", "|---|---|---|---|"]
    for name, curve in found.items():
        slope, fixed = statistics.linear_regression(curve["x"], curve["seconds"])
        r2 = statistics.correlation(curve["x"], curve["seconds"]) ** 2
        lines.append(f"| {name} | {1e3 * slope:.2f} ms | {1e3 * fixed:.0f} ms | {r2:.3f} |")
    return "\n".join(lines)


def _soak(bench: Bench) -> str:
    found = asyncio.run(soak(bench.llamacpp, bench.folder))
    bench.results["soak"] = found
    before, after = found["before"], found["after"]
    return (
        "## Requests that go away\n\n"
        f"{found['requests']} requests, {found['cancelled']} of them given up at a random point. "
        f"Before: {before}. After: {after}. Resident memory {found['rss_before'] / 1e6:.0f} MB "
        f"before, {found['rss_after'] / 1e6:.0f} MB after "
        f"({100 * (found['rss_after'] / found['rss_before'] - 1):+.1f} %)."
    )


def _overhead(bench: Bench) -> str:
    engine = EngineOptions("llamacpp", bench.quantization)
    with ExitStack() as stack:
        assistant = load_assistant(bench.model, bench.llamacpp.decoder, engine)
        stack.enter_context(closing(assistant))
        flags = ["--engine", "llamacpp", "--model", bench.model]
        flags += ["--quantization", bench.quantization, "--data-dir", str(bench.folder)]
        address = address_of(stack.enter_context(local_server(flags)))
        found = ways(assistant, address)
        # A first token is soon there, and its time scatters: many for one round of the rest.
        n = 10 * bench.repeats
        texts = asyncio.run(first_tokens(found, n, pictures=False))
        pictures = asyncio.run(first_tokens(found, n, pictures=True))
        speeds = asyncio.run(rates(found, bench.repeats))
    bench.results["overhead"] = {"first": texts, "picture": pictures, "rate": speeds}
    lines = [
        "## The service over the engine",
        "",
        "An assistant in the benchmark's own process against `mico-chat serve` over loopback HTTP, "
        f"in turns. First text: medians of {n} questions, one at a time, that share no beginning; "
        f"with a picture of 200 kB that was never shown. Tokens/s: {AT_ONCE} answers of {N_TOKENS} "
        f"tokens at once, median of {bench.repeats} rounds.",
        "",
        "| way | first text, ms | with a picture, ms | tokens/s | of in process |",
        "|---|---|---|---|---|",
    ]
    for name, values in speeds.items():
        first, picture = (_more(times, name) for times in (texts, pictures))
        rate = statistics.median(values)
        share = rate / statistics.median(speeds[BASE])
        lines.append(f"| {name} | {first} | {picture} | {rate:.0f} | {share:.3f} |")
    return "\n".join(lines)


def _more(seconds: dict[str, list[float]], name: str) -> str:
    """Median milliseconds, and how many more than in process."""
    if name not in seconds:
        return ""
    value, base = (1e3 * statistics.median(seconds[way]) for way in (name, BASE))
    return f"{value:.1f}" if name == BASE else f"{value:.1f} ({value - base:+.1f})"


SECTIONS: dict[str, Callable[[Bench], str]] = {
    "decoding": _decoding,
    "followup": _followup,
    "stalls": _stalls,
    "growth": _growth,
    "soak": _soak,
    "serving": _serving,
    "overhead": _overhead,
}
