"""Graphics cards: those that torch can use, and why it cannot use one that is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mico_chat.cli.doctor.finding import Finding, gigabytes
from mico_chat.cli.doctor.machine import Machine


def gpu_findings(machine: Machine, torch: Mapping[str, Any] | None) -> list[Finding]:
    """One finding a card, or one that there is none; ``torch`` are the facts of its probe."""
    if torch is None:
        return [Finding("GPU", "note", _cards(machine) or "not known: torch does not work")]
    found = [_usable(number, gpu, torch, machine) for number, gpu in enumerate(torch["gpus"])]
    if found:
        return found
    if torch["mps"]:
        return [Finding("GPU", "ok", "Apple's, by Metal (--device mps)", facts={"mps": True})]
    if not machine.gpus:
        return [Finding("GPU", "note", "none: everything is computed on the processor")]
    return [_unusable(machine, torch)]


def _usable(number: int, gpu: Mapping[str, Any], torch: Mapping[str, Any], machine: Machine) -> Any:
    name = "GPU" if len(torch["gpus"]) == 1 else f"GPU {number}"
    driver = f", driver {machine.gpus[0].driver}" if machine.gpus else ""
    text = (
        f"{gpu['name']}: {gigabytes(gpu['free'])} free of {gigabytes(gpu['total'])}, "
        f"compute capability {gpu['capability']}, {torch['gpu_build']}{driver}"
    )
    if gpu["error"] is not None:
        text += f"; torch {torch['version']} does not compute on it: {gpu['error']}"
        mend = "pip install --upgrade torch torchvision   # a build for this card"
        return Finding(name, "problem", text, mend, dict(gpu))
    return Finding(name, "ok", text, facts=dict(gpu))


def _unusable(machine: Machine, torch: Mapping[str, Any]) -> Finding:
    cards = _cards(machine)
    facts = {"names": [gpu.name for gpu in machine.gpus], "driver": machine.gpus[0].driver}
    if torch["gpu_build"] is None:
        text = f"{cards} is there, but torch {torch['version']} is a CPU build"
        mend = "pip install --force-reinstall torch torchvision"
        return Finding("GPU", "warning", text, mend, facts)
    if torch["hidden"] is not None:
        text = f"{cards} is there, but CUDA_VISIBLE_DEVICES={torch['hidden']!r} hides it"
        return Finding("GPU", "warning", text, "unset CUDA_VISIBLE_DEVICES", facts)
    text = (
        f"{cards} is there, but torch {torch['version']} ({torch['gpu_build']}) cannot use it: "
        f"{torch['gpu_error'] or 'it does not say why'}"
    )
    mend = (
        f"update the driver ({machine.gpus[0].driver}), or install a torch for an older CUDA; "
        "in a container: docker run --gpus all"
    )
    return Finding("GPU", "warning", text, mend, facts)


def _cards(machine: Machine) -> str:
    return ", ".join(f"{gpu.name} ({gigabytes(gpu.total)})" for gpu in machine.gpus)
