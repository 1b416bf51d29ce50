"""The engines: does each load, and does it compute?

The probes run in processes of their own (:mod:`.probe`): a library that was compiled for another
processor ends its process, and vLLM takes seconds to import. Each computes something small of the
kind that it is there for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata, util
from typing import Any

from mico_chat.cli.doctor.children import Outcome
from mico_chat.cli.doctor.finding import Finding, Mark

REBUILD_LLAMA_CPP = (
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
    "'mico-chat[llamacpp]'"
)
"""Compiles it for the processor that it is on."""

LLAMA_CPP = {
    "AVX2": "AVX2",
    "AVX512": "AVX-512",
    "AVX512_BF16": "AVX-512 bf16",
    "AMX_INT8": "AMX",
    "NEON": "NEON",
    "SVE": "SVE",
    "OPENMP": "OpenMP",
}
"""What matters of the features that llama.cpp was built with."""

NF4_ERROR = 0.3
"""Of random numbers, relative: nf4's own is about 0.1; a kernel that is wrong has 1 and more."""


# --- probes ---------------------------------------------------------------------------------------


def probe_torch(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What torch is built for and what it finds; each card multiplies once."""
    import torch

    build = None
    if torch.version.cuda is not None:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        build = f"ROCm {torch.version.hip}"
    there = torch.cuda.is_available()
    error = None
    if build is not None and not there:
        try:
            initialise: Any = torch.cuda.init  # its decorator hides its type
            initialise()
        except (AssertionError, RuntimeError) as refused:  # torch has no error of its own for it
            error = str(refused).splitlines()[0]
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "openmp": torch.backends.openmp.is_available(),
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
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(device=device, dtype=torch.bfloat16)
    with torch.inference_mode():
        logits = model(torch.arange(8, device=device)[None]).logits
    if logits.shape != (1, 8, 64) or not bool(logits.isfinite().all()):
        raise ArithmeticError("a tiny model's logits are not finite numbers")
    return {"version": transformers.__version__, "device": device}


def probe_bitsandbytes(asked: Mapping[str, Any]) -> dict[str, Any]:
    """A product with a 4-bit matrix, against the same in float32."""
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64, bias=False)
    layers: Any = bitsandbytes.nn  # which says nothing of its types
    packed = layers.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    packed.load_state_dict(plain.state_dict())
    packed = packed.to(device)  # which quantizes
    numbers = torch.randn(4, 128)
    with torch.inference_mode():
        exact = plain(numbers)
        found = packed(numbers.to(device=device, dtype=torch.bfloat16)).float().cpu()
    error = float((found - exact).norm() / exact.norm())
    if not error < NF4_ERROR:  # nor if it is no number
        raise ArithmeticError(f"an nf4 product is wrong by {error:.0%}")
    return {"version": bitsandbytes.__version__, "device": device, "error": error}


def probe_llamacpp(asked: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's library starts, and tells what it was compiled for."""
    import llama_cpp

    from mico_chat.checkpoints.llama_log import llama_cpp_errors

    with llama_cpp_errors():
        llama_cpp.llama_backend_init()
        said = llama_cpp.llama_print_system_info().decode(errors="replace")
    return {
        "version": llama_cpp.__version__,
        "features": re.findall(r"(\w+) = 1\b", said),
        "gpu": bool(llama_cpp.llama_supports_gpu_offload()),
    }


def probe_vllm(asked: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM imports, and knows a device to run on."""
    # By name: it is in few environments, and ships no type information.
    vllm = import_module("vllm")
    device = str(import_module("vllm.platforms").current_platform.device_type)
    if not device:
        raise RuntimeError("it finds no device that it was built for")
    return {"version": str(vllm.__version__), "device": device}


# --- findings -------------------------------------------------------------------------------------


def is_installed(module: str) -> bool:
    """Whether a module can be found; not whether it can be imported."""
    return util.find_spec(module) is not None


def torch_finding(outcome: Outcome, usable_cores: int) -> Finding:
    """torch, and whether it starts more threads than may run."""
    if outcome.facts is None:
        mend = "pip install --force-reinstall torch torchvision"
        return Finding("torch", "problem", f"does not work: {outcome.error}", mend)
    facts = outcome.facts
    threads = facts["threads"]
    text = f"{facts['version']}, {facts['kernels']} kernels, {threads} thread{'s' * (threads != 1)}"
    if not facts["openmp"]:
        text += ", no OpenMP"
    if threads > usable_cores:
        text += f", but only {usable_cores} may run at a time: they wait for each other"
        return Finding("torch", "warning", text, f"export OMP_NUM_THREADS={usable_cores}", facts)
    return Finding("torch", "ok", text, facts=facts)


def transformers_finding(outcome: Outcome) -> Finding:
    """The reference, which encoder and bridge need with every engine."""
    if outcome.facts is None:
        mend = "pip install --force-reinstall mico-chat"
        return Finding("transformers", "problem", f"does not work: {outcome.error}", mend)
    text = f"{outcome.facts['version']} computes on {outcome.facts['device']}"
    return Finding("transformers", "ok", text, facts=outcome.facts)


def llamacpp_finding(
    outcome: Outcome | None, wanted: bool, instructions: Sequence[str] = ()
) -> Finding:
    """``wanted``: asked for by name. Where it is installed, ``auto`` may take it: it must work.

    ``instructions``: the processor's, by :data:`mico_chat.cli.doctor.machine.INSTRUCTIONS`.
    """
    if outcome is None:
        text = "not installed; the slower transformers engine answers instead"
        mark: Mark = "problem" if wanted else "note"
        mend = "pip install 'mico-chat[llamacpp]'"
        return Finding("llamacpp", mark, "not installed" if wanted else text, mend)
    if outcome.facts is None:
        text = f"does not work: {outcome.error}"
        if outcome.signal == "SIGILL":
            text += " (it was compiled for another processor)"
        return Finding("llamacpp", "problem", text, REBUILD_LLAMA_CPP)
    facts = outcome.facts
    said = [shown for feature, shown in LLAMA_CPP.items() if feature in facts["features"]]
    text = f"{facts['version']} starts" + (f", built for {', '.join(said)}" if said else "")
    if facts["gpu"]:
        text += ", and for a GPU"
    unused = [name for name in ("AVX2", "AVX-512") if name in instructions and name not in said]
    if unused:
        text += f"; the processor has {unused[0]} too, which would be faster"
        return Finding("llamacpp", "warning", text, REBUILD_LLAMA_CPP, facts)
    return Finding("llamacpp", "ok", text, facts=facts)


def vllm_finding(outcome: Outcome | None, wanted: bool) -> Finding:
    """``wanted``: asked for by name."""
    mend = "pip install 'mico-chat[vllm]'"
    if outcome is None:
        mark: Mark = "problem" if wanted else "note"
        return Finding("vllm", mark, "not installed; for GPUs", mend)
    if outcome.facts is None:
        mark = "problem" if wanted else "warning"
        return Finding("vllm", mark, f"does not work: {outcome.error}", mend)
    text = f"{outcome.facts['version']} imports, for {outcome.facts['device']}"
    return Finding("vllm", "ok", text, facts=outcome.facts)


def bitsandbytes_finding(outcome: Outcome | None, wanted: bool) -> Finding:
    """``wanted``: a quantization of its was asked for."""
    mend = "pip install 'mico-chat[quantize]'"
    if outcome is None:
        mark: Mark = "problem" if wanted else "note"
        return Finding("bitsandbytes", mark, "not installed; for int8 and nf4", mend)
    if outcome.facts is None:
        mark = "problem" if wanted else "warning"
        return Finding("bitsandbytes", mark, f"does not work: {outcome.error}", mend)
    facts = outcome.facts
    text = f"{facts['version']} computes in 4 bit on {facts['device']}"
    return Finding("bitsandbytes", "ok", text, facts=facts)


def postgres_finding(wanted: bool) -> Finding:
    """``wanted``: the settings name such a database."""
    name = "PostgreSQL"
    if not is_installed("asyncpg"):
        mark: Mark = "problem" if wanted else "note"
        text = "its driver is not installed; conversations are kept in SQLite"
        mend = "pip install 'mico-chat[postgres]'"
        return Finding(name, mark, "its driver is not installed" if wanted else text, mend)
    return Finding(name, "ok", f"driver asyncpg {metadata.version('asyncpg')}")
