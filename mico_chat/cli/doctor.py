"""``mico-chat doctor``: what this machine can run, what is missing, and the command that fixes it.

The probes (:mod:`mico_chat.cli.probes`) run while this process looks at the machine.
"""

import difflib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import util
from typing import Any, TextIO

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError

from mico_chat import __version__
from mico_chat.cli.findings import ROOM, Finding, Mark, disk_free, gigabytes
from mico_chat.cli.options import API, API_KEY
from mico_chat.cli.probes import run_probe
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engine.cpu import memory, processor, usable_cores
from mico_chat.engines.base import EngineOptions
from mico_chat.engines.table import ENGINES
from mico_chat.errors import ConfigError
from mico_chat.media.file import MediaLimits
from mico_chat.settings import Settings, cache_dir
from mico_server.settings import ServerSettings, read_settings

AT_ONCE = 3
"""Probes that run at the same time: most of them import torch."""

LITTLE_DISK = 1_000_000_000
"""Bytes: the mini's base LLM, its converted copy and its GGUF file take half of it."""

PARTS = {
    "torch": ("torch", "pip install --force-reinstall torch torchvision", ""),
    **{row.name: (row.module, row.install, row.remark) for row in reversed(ENGINES.values())},
    "bitsandbytes": ("bitsandbytes", "pip install 'mico-chat[quantize]'", "for int8 and nf4"),
    "reading": ("rapidocr", "pip install 'mico-chat[reads]'", "text in pictures is not read"),
    "listening": (
        "faster_whisper",
        "pip install 'mico-chat[reads]' && mico-chat setup",
        "speech in recordings is not written down",
    ),
    "decoder": ("av", "pip install --force-reinstall av   # or see MICO_MEDIA_*", ""),
}
"""For each engine, recogniser and the decoder of media: its module, the command that installs the
module, and a remark if the module is optional."""


def run(model: str | None, options: EngineOptions, *, as_json: bool, out: TextIO) -> int:
    """Examine this machine and print the report; returns the exit code."""
    model = model or Settings().model
    report = examine(model, options)
    engine = next(
        (one.facts.get("engine") for one in report["Model"] if one.name == "engine"), None
    )
    ok = all(finding.mark != "problem" for section in report.values() for finding in section)
    if as_json:
        findings = {title.lower(): [*map(asdict, section)] for title, section in report.items()}
        facts = {"version": __version__, "ok": ok, "model": model, "engine": engine}
        print(json.dumps(facts | {"findings": findings}, indent=2, ensure_ascii=False), file=out)
    else:
        print_report(report, model, engine, out)
    return int(not ok)


def examine(model: str, options: EngineOptions) -> dict[str, list[Finding]]:
    """All findings about this machine and a model, by the heading above them."""
    names = ["model", *(name for name, (module, *_) in PARTS.items() if util.find_spec(module))]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {name: pool.submit(run_probe, name, model, asdict(options)) for name in names}
        machine = [*machine_findings(), *variable_findings()]
        outcomes = {name: future.result() for name, future in running.items()}
    makers = {
        row.quantized_by for row in ENGINES.values() if options.quantization in row.quantizations
    }
    wanted = {options.engine, *makers}
    check, torch = outcomes["model"], outcomes.get("torch", {})
    found = [Finding(**record) for record in check.get("findings", ())]
    if "error" in check:
        found = [Finding("model", "problem", check["error"], "solve the problem above first")]
    return {
        "Machine": [*machine, *(gpu_findings(torch) if "gpus" in torch else ())],
        "Engines": [engine_finding(name, outcomes.get(name), name in wanted) for name in PARTS],
        "Model": found,
    }


def machine_findings() -> Iterator[Finding]:
    """Python, processor, memory and the cache's disk."""
    yield Finding("Python", "ok", f"{platform.python_version()} in {sys.prefix}")
    name, flags = processor()
    text = f"{name}: {usable_cores()} of {os.cpu_count()} cores may be used; {platform.platform()}"
    slow = platform.machine() == "x86_64" and "avx2" not in flags
    text += "; without AVX2 every engine is slow, and some builds do not start" if slow else ""
    wide = "avx512f" in flags and llama_cpp.READY_MADE
    text += "; its AVX-512 is used by a compiled llama.cpp, not by the ready-made" if wide else ""
    mark: Mark = "warning" if slow else "note" if wide else "ok"
    yield Finding("processor", mark, text, llama_cpp.COMPILE if wide else None)
    free, total = memory()
    facts = {"total": total, "free": free}
    yield Finding("memory", "ok", f"{gigabytes(free)} free of {gigabytes(total)}", facts=facts)
    cache = cache_dir()
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            space = disk_free(nearest)
    except OSError as error:
        text = f"{nearest} cannot be written to: {error.strerror or error}"
        fix = f"sudo chown -R $USER {nearest}, or MICO_CACHE_DIR=/another/folder"
        yield Finding("cache", "problem", text, fix)
        return
    little = space < LITTLE_DISK
    text = f"{gigabytes(space)} free in {cache}" + (": little" if little else "")
    yield Finding("cache", "warning" if little else "ok", text, ROOM if little else None)


def nvidia_gpus(command: str = "nvidia-smi") -> str:
    """The names of the cards that NVIDIA's own program reports."""
    query = (command, "--query-gpu=name", "--format=csv,noheader")
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(result.stdout.splitlines())


def gpu_findings(torch: Mapping[str, Any]) -> Iterator[Finding]:
    """The graphics cards by the facts of torch's probe, or why torch cannot use a card."""
    reinstall = PARTS["torch"][1]
    for gpu in torch["gpus"]:
        if gpu["error"] is None:
            text = f"{gpu['name']}: {gigabytes(gpu['free'])} free of {gigabytes(gpu['total'])}"
            yield Finding("GPU", "ok", text, facts=gpu)
        else:
            text = f"{gpu['name']}: torch cannot compute on it: {gpu['error']}"
            yield Finding("GPU", "problem", text, reinstall, gpu)
    if torch["mps"]:
        yield Finding("GPU", "ok", "Apple's, by Metal (--device mps)")
    elif not torch["gpus"] and (cards := nvidia_gpus()):
        fix = "update the driver; unset CUDA_VISIBLE_DEVICES; in a container: docker run --gpus all"
        text = f"{cards} is there, but torch ({torch['build'] or 'a CPU build'}) cannot use it"
        yield Finding("GPU", "warning", text, fix if torch["build"] else reinstall)
    elif not torch["gpus"]:
        yield Finding("GPU", "note", "none: everything is computed on the processor")


def engine_finding(name: str, outcome: Mapping[str, Any] | None, wanted: bool) -> Finding:
    """Whether an engine works: the outcome of its probe, or None if the engine is not installed.

    ``wanted``: the user asked for the engine by name.
    """
    _, fix, remark = PARTS[name]
    essential = wanted or not remark
    if outcome is None:
        text = "not installed" + (f"; {remark}" if remark else "")
        return Finding(name, "problem" if essential else "note", text, fix)
    if "error" not in outcome:
        return Finding(name, "warning" if outcome.get("exposed") else "ok", outcome["text"])
    text = f"does not work: {outcome['error']}"
    if name in ENGINES and (repair := ENGINES[name].repair) is not None:
        return Finding(name, "problem", text, repair)
    return Finding(name, "problem" if essential else "warning", text, fix)


def variable_findings() -> Iterator[Finding]:
    """Variables that cannot be read or that nothing reads, or else the names of those set."""
    known, bad = {API, API_KEY}, []
    for settings, read in (
        (Settings, Settings),
        (MediaLimits, MediaLimits),
        (ServerSettings, read_settings),
    ):
        prefix = settings.model_config["env_prefix"]
        known |= {f"{prefix}{name}".upper() for name in settings.model_fields}
        try:
            read()
        except ValidationError as error:
            for one in error.errors():
                name = f"{prefix}{'.'.join(map(str, one['loc']))}".upper()
                text = f"{name}: {one['msg']}, got {one['input']!r}"
                bad.append(Finding("variables", "problem", text, f"unset {name}"))
        except (ConfigError, SettingsError) as error:
            bad.append(Finding("variables", "problem", " ".join(str(error).split())))
    given = sorted(name for name in os.environ if name.upper().startswith("MICO_"))
    for name in given:
        if name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), sorted(known), n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            fix = f'export {close[0]}="${name}"; unset {name}' if close else f"unset {name}"
            bad.append(Finding("variables", "warning", f"nothing reads {name}{meant}", fix))
    text = ", ".join(given) or "none is set"
    yield from bad or [Finding("variables", "ok", text, facts={"names": given})]


_COLOURS: dict[Mark, str] = {"note": "blue", "ok": "green", "warning": "yellow", "problem": "red"}


def print_report(
    report: Mapping[str, Sequence[Finding]], model: str, engine: str | None, out: TextIO
) -> None:
    """Print the findings below their headings, each fix on a line of its own to be copied."""
    findings = [finding for section in report.values() for finding in section]
    width = max((len(finding.name) for finding in findings), default=0)
    for title, section in report.items():
        typer.secho(title, out, bold=True)
        for one in section:
            typer.secho(f"  {one.mark:7}  ", out, nl=False, fg=_COLOURS[one.mark])
            typer.echo(f"{one.name:{width}}  {one.text}", out)
            if one.fix is not None:
                typer.echo(f"           -> {one.fix}", out)
        typer.echo(file=out)
    if all(finding.mark != "problem" for finding in findings):
        here = f"works here with the engine {engine}" if engine else "is not on this machine yet"
        typer.secho(f"{model} {here}.", out, fg=_COLOURS["ok" if engine else "note"])
    marks: tuple[Mark, ...] = ("problem", "warning")
    for mark in marks:
        if names := list(dict.fromkeys(one.name for one in findings if one.mark == mark)):
            kind = mark + "s" * (len(names) > 1)
            typer.secho(f"{len(names)} {kind}: {', '.join(names)}.", out, fg=_COLOURS[mark])
