"""The doctor's probes: whatever may crash, hang or take long runs in a process of its own.

A library that was compiled for another processor ends its process, and vLLM takes seconds to
import. The process writes a line of JSON at the start and at the end of each probe, so that its
parent knows in which probe it died.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Mark = Literal["ok", "note", "warning", "problem"]
"""``note``: information. ``warning``: works, but not as it could. ``problem``: the default path, or
what the user asked for, fails."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    ``fix``: the command that solves the problem, or advice. ``facts``: the finding for programs:
    bytes, counts, names. ``rows``: a table for people.
    """

    name: str
    mark: Mark
    text: str
    fix: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Sequence[str]] = ()


def gigabytes(n_bytes: float) -> str:
    """``"13.5 GB"``, ``"98 MB"``, ``"512 KB"``: decimal, as disks and pages of models have them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if n_bytes >= size * 0.9995:
            n = n_bytes / size
            return f"{n:.1f} {unit}" if n < 100 and unit == "GB" else f"{n:.0f} {unit}"
    return f"{n_bytes:.0f} bytes"


# --- the parent -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a probe found: its facts, or why it failed."""

    facts: Mapping[str, Any] | None = None
    error: str | None = None


# With the parent's import path, and without its main module.
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mico_chat.cli.probes import main; "
    "main(json.loads(sys.argv[2]), json.loads(sys.argv[3]))"
)

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
"""Nothing is fetched, and standard error holds what matters."""


def run_probes(
    names: Sequence[str], asked: Mapping[str, Any], seconds: float
) -> dict[str, Outcome]:
    """The outcomes of probes, which run one after another in one process, by name.

    A process that takes longer than ``seconds`` is killed, with the processes that it started.
    """
    path = [str(Path(entry).absolute()) for entry in sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, *map(json.dumps, (path, list(names), dict(asked)))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | _ENVIRONMENT,
        start_new_session=True,
    )
    death = None
    try:
        said, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        death = f"no answer within {seconds:.0f} s"
        _kill(process)
        said, complaints = process.communicate()
    finally:
        _kill(process)  # also when the user interrupts
    found: dict[str, Outcome] = {}
    running = names[0]
    for record in map(json.loads, said.splitlines()):
        running = record["name"]
        if "facts" in record or "error" in record:
            found[running] = Outcome(record.get("facts"), record.get("error"))
    if running not in found:
        found[running] = Outcome(None, death or _death(process.returncode, complaints))
    for name in names:
        found.setdefault(name, Outcome(None, f"not tried: {running} ended the process"))
    return found


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):  # it may end at this very moment
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _death(code: int, complaints: str) -> str:
    if code < 0:
        with suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
    last = complaints.strip().splitlines()[-1:] or ["it said nothing"]
    return f"ended with status {code}: {last[0]}"


# --- the process ----------------------------------------------------------------------------------


def main(names: list[str], asked: dict[str, Any]) -> None:
    """Run probes and report each on the parent's pipe, where no library can print into it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    for name in names:
        say(name=name)
        try:
            say(name=name, facts=PROBES[name](asked))
        except Exception as error:  # a library may raise anything: that is what is looked for
            lines = str(error).strip().splitlines() or [""]
            say(name=name, error=f"{type(error).__name__}: {lines[0]}".removesuffix(": "))


def probe_torch(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The devices that torch was built for and finds; each card multiplies once."""
    import torch

    build = None
    if torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    there, error = torch.cuda.is_available(), None
    if build is not None and not there:
        try:
            initialise: Any = torch.cuda.init  # its decorator hides its type
            initialise()
        except (AssertionError, RuntimeError) as refused:  # torch has no error of its own for it
            error = str(refused).splitlines()[0]
    threads, kernels = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return {
        "text": f"{torch.__version__}, {kernels} kernels, {threads} thread{'s' * (threads != 1)}",
        "version": torch.__version__,
        "threads": threads,
        "mps": torch.backends.mps.is_available(),
        "gpu_build": build,
        "gpu_error": error,
        "hidden": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpus": [_card(number) for number in range(torch.cuda.device_count())] if there else [],
    }


def _card(number: int) -> dict[str, Any]:
    import torch

    device = torch.device("cuda", number)
    properties = torch.cuda.get_device_properties(device)
    free, error = 0, None
    try:
        free, _ = torch.cuda.mem_get_info(device)
        ones = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        if not bool((ones @ ones == 8).all()):
            error = "a product of ones is wrong"
    except RuntimeError as refused:
        error = str(refused).splitlines()[0]
    return {
        "name": properties.name,
        "total": properties.total_memory,
        "free": free,
        "capability": f"{properties.major}.{properties.minor}",
        "error": error,
    }


def probe_transformers(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A forward of a tiny random language model in bfloat16, on the device that is taken."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = model(torch.arange(8, device=device)[None]).logits
    if not bool(logits.isfinite().all()):
        raise ArithmeticError("a tiny model's logits are not finite numbers")
    return {"text": f"{transformers.__version__} computes on {device}", "device": device}


def probe_bitsandbytes(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A product with a 4-bit matrix, against the same in float32."""
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64, bias=False)
    layers: Any = bitsandbytes.nn  # which lacks types
    packed = layers.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    packed.load_state_dict(plain.state_dict())
    packed = packed.to(device)  # which quantizes
    numbers = torch.randn(4, 128)
    with torch.inference_mode():
        exact = plain(numbers)
        found = packed(numbers.to(device=device, dtype=torch.bfloat16)).float().cpu()
    error = float((found - exact).norm() / exact.norm())
    if not error < 0.3:  # nf4's own is about 0.1; a wrong kernel's is 1 and more, or no number
        raise ArithmeticError(f"an nf4 product is wrong by {error:.0%}")
    return {"text": f"{bitsandbytes.__version__} computes in 4 bit on {device}", "error": error}


_FEATURES = {
    "AVX2": "AVX2",
    "AVX512": "AVX-512",
    "AVX512_BF16": "AVX-512 bf16",
    "AMX_INT8": "AMX",
    "NEON": "NEON",
    "SVE": "SVE",
    "OPENMP": "OpenMP",
}
"""The features of llama.cpp's build that decide its speed, by llama.cpp's names."""


def probe_llamacpp(asked: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's library starts, and reports the processor that it was compiled for."""
    import llama_cpp

    from mico_chat.checkpoints.llama_log import llama_cpp_errors

    with llama_cpp_errors():
        llama_cpp.llama_backend_init()
        said = llama_cpp.llama_print_system_info().decode(errors="replace")
    built = [_FEATURES[name] for name in re.findall(r"(\w+) = 1\b", said) if name in _FEATURES]
    gpu = ", and for a GPU" if llama_cpp.llama_supports_gpu_offload() else ""
    text = f"{llama_cpp.__version__} starts, built for {', '.join(built) or 'any processor'}{gpu}"
    return {"text": text, "features": built}


def probe_vllm(asked: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM imports, and knows a device to run on."""
    import vllm
    import vllm.platforms

    device = str(vllm.platforms.current_platform.device_type)
    if not device:
        raise RuntimeError("it finds no device that it was built for")
    return {"text": f"{vllm.__version__} imports, for {device}", "device": device}


CODECS = {
    "h264": "H.264",
    "hevc": "H.265",
    "vp9": "VP9",
    "av1": "AV1",
    "aac": "AAC",
    "mp3": "MP3",
    "opus": "Opus",
    "vorbis": "Vorbis",
    "flac": "FLAC",
}
"""Decoders by FFmpeg's names: those of phones, browsers and music."""


def probe_codecs(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The usual decoders that FFmpeg's libraries inside PyAV have."""
    import av
    from av.codec.codec import UnknownCodecError

    missing = []
    for name, shown in CODECS.items():
        try:
            av.Codec(name, "r")
        except UnknownCodecError:
            missing.append(shown)
    there = ", ".join(shown for shown in CODECS.values() if shown not in missing)
    return {"text": f"PyAV {av.__version__} has {there}", "missing": missing}


def probe_decoder(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A made picture and a made sound through the decoder's own process, within its limits."""
    import numpy as np
    from PIL import Image as Pillow

    from mico_chat.media import Audio, Image, MediaDecoder, MediaFile, MediaLimits

    started, rate = time.perf_counter(), 16_000
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    samples = (np.sin(np.arange(rate // 4) / 6) * 20_000).astype("<i2")
    picture, sound = io.BytesIO(), io.BytesIO()
    Pillow.fromarray(pixels).save(picture, "png")
    with wave.open(sound, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", ""))
        writer.writeframes(samples.tobytes())
    with MediaDecoder(MediaLimits()) as decoder:
        seen = decoder.decode(MediaFile("image", picture.getvalue(), "made.png"))
        heard = decoder.decode(MediaFile("audio", sound.getvalue(), "made.wav"))
    if not isinstance(seen, Image) or not np.array_equal(seen.pixels, pixels):
        raise ArithmeticError("the decoded pixels of a PNG are not those that were written")
    if not isinstance(heard, Audio) or abs(len(heard.samples) - len(samples)) > rate // 100:
        raise ArithmeticError("a decoded WAV has another length than the written one")
    seconds = time.perf_counter() - started
    text = f"starts, and decodes a picture and a sound, in {seconds:.1f} s"
    return {"text": text, "seconds": seconds}


def probe_model(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The findings of ``asked["model"]``, and the engine that would run it."""
    from mico_chat.cli.model_check import ModelCheck

    check = ModelCheck(asked)
    findings = [asdict(finding) for finding in check.findings()]
    return {"findings": findings, "engine": check.engine}


PROBES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "torch": probe_torch,
    "transformers": probe_transformers,
    "bitsandbytes": probe_bitsandbytes,
    "llamacpp": probe_llamacpp,
    "vllm": probe_vllm,
    "codecs": probe_codecs,
    "decoder": probe_decoder,
    "model": probe_model,
}
"""Each takes the parent's request and gives facts that JSON holds; ``text`` is for people."""
