"""``mico-chat doctor``: what this machine can run, what is missing, and the command that fixes it.

The probes (:mod:`mico_chat.cli.probes`) run while this process looks at the machine.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata, util
from pathlib import Path
from typing import Any, TextIO

import psutil
from packaging.requirements import Requirement
from packaging.version import Version
from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mico_chat import __version__
from mico_chat.cli.probes import Finding, Mark, Outcome, gigabytes, run_probes
from mico_chat.engine.cpu import ControlGroups, processor, usable_cores
from mico_chat.errors import ConfigError
from mico_chat.load import BITSANDBYTES, EngineOptions
from mico_chat.media.file import MediaLimits
from mico_chat.settings import Settings, cache_dir

Report = dict[str, list[Finding]]
"""Findings by the heading above them."""

PROBE_S, VLLM_S = 90.0, 180.0
"""Seconds that importing may take on a cold disk and a busy machine."""

LITTLE_DISK = 1_000_000_000
"""Bytes: the mini's base LLM, its converted copy and its GGUF file take half of it."""

LITTLE_SHM = 1 << 30
"""Bytes. vLLM and training's loaders exchange data in /dev/shm, of which Docker gives 64 MB."""

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
}
"""The processor's flags that decide its speed, as /proc/cpuinfo has them."""

REBUILD_LLAMA_CPP = (
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
    "'mico-chat[llamacpp]'"
)
"""Compiles llama.cpp for this machine's processor."""

ENGINES: dict[str, tuple[str, str, str]] = {
    "torch": ("torch", "pip install --force-reinstall torch torchvision", ""),
    "transformers": ("transformers", "pip install --force-reinstall mico-chat", ""),
    "llamacpp": ("llama_cpp", "pip install 'mico-chat[llamacpp]'", "transformers is slower"),
    "vllm": ("vllm", "pip install 'mico-chat[vllm]'", "for GPUs"),
    "bitsandbytes": ("bitsandbytes", "pip install 'mico-chat[quantize]'", "for int8 and nf4"),
}  # fmt: skip
"""The module of each engine, the command that installs it, and a remark where it is missing."""

UNCHECKED_EXTRAS = ("bench", "dev", "llamacpp", "postgres", "quantize", "vllm")
"""Extras for work on the project, and those that the report names among the engines."""


def run(
    model: str | None,
    options: EngineOptions,
    server: tuple[type[BaseSettings], Callable[[], Any]],
    options_variables: set[str],
    *,
    as_json: bool,
    out: TextIO,
) -> int:
    """Examine this machine and print the report; returns the exit code.

    Args:
        model: ``mini``, a folder or a hub name; by default what the settings say.
        options: how the model would be run.
        server: the server's settings and the function that reads them.
        options_variables: variables that options of the command line read.
        as_json: print one object instead of text.
        out: the stream to print on.
    """
    model = model or Settings().model
    report, engine = examine(model, options, server, options_variables)
    findings = [finding for section in report.values() for finding in section]
    ok = all(finding.mark != "problem" for finding in findings)
    if as_json:
        for_programs = {
            title.lower(): [{k: v for k, v in asdict(f).items() if k != "rows"} for f in section]
            for title, section in report.items()
        }
        facts = {"version": __version__, "ok": ok, "model": model, "engine": engine}
        record = facts | {"findings": for_programs}
        print(json.dumps(record, indent=2, ensure_ascii=False), file=out)
    else:
        print_report(report, model, engine, out)
    return int(not ok)


def examine(
    model: str,
    options: EngineOptions,
    server: tuple[type[BaseSettings], Callable[[], Any]],
    options_variables: set[str],
) -> tuple[Report, str | None]:
    """All findings, and the engine that would run the model."""
    installed = {name for name, (module, *_) in ENGINES.items() if util.find_spec(module)}
    total, free = memory()
    asked = {
        "model": model,
        "options": asdict(options),
        "memory": {"free": free, "most": total},
        "disk_free": shutil.disk_usage(existing(cache_dir())).free,
        "offline": any(map(os.environ.get, ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))),
    }
    # The probes that need torch, whose import takes longest, share a process.
    groups = [["torch", "transformers", "model"], ["llamacpp"], ["vllm"], ["codecs", "decoder"]]
    groups[0] += ["bitsandbytes"] if "bitsandbytes" in installed else []
    groups = [names for names in groups if names[0] in installed or names[0] == "codecs"]
    with ThreadPoolExecutor(len(groups)) as pool:
        seconds = [VLLM_S if "vllm" in names else PROBE_S for names in groups]
        started = pool.map(run_probes, groups, [asked] * len(groups), seconds)
        packages, service = (
            list(package_findings()),
            list(service_findings(server, options_variables)),
        )
        outcomes = {name: found for group in started for name, found in group.items()}
    missing = Outcome(error="torch is not installed")
    torch, check = (outcomes.get(name, missing) for name in ("torch", "model"))
    wanted = {options.engine, *(["bitsandbytes"] if options.quantization in BITSANDBYTES else [])}
    engines = [engine_finding(name, outcomes.get(name), name in wanted) for name in ENGINES]
    failed = Finding("model", "problem", f"{model}: {check.error}", "solve the problem above first")
    found = check.facts or {"engine": None, "findings": [asdict(failed)]}
    return {
        "Machine": [*machine_findings(), *gpu_findings(torch.facts)],
        "Packages": packages,
        "Engines": engines,
        "Service": [
            probe_finding("codecs", outcomes["codecs"], "pip install --force-reinstall av"),
            probe_finding("decoder", outcomes["decoder"], "see the variables MICO_MEDIA_*; "
                          "MICO_MEDIA_MEMORY_MB bounds the decoder's memory"),
            *service,
        ],
        "Model": [Finding(**record) for record in found["findings"]],
    }, found["engine"]  # fmt: skip


# --- the machine ----------------------------------------------------------------------------------


def memory(groups: ControlGroups | None = None) -> tuple[int, int]:
    """Bytes of memory that this process may use, and those that are free."""
    machine, groups = psutil.virtual_memory(), groups or ControlGroups()
    limit, within = groups.memory_limit(), groups.memory_free()
    free = machine.available if within is None else min(machine.available, within)
    return machine.total if limit is None else min(machine.total, limit), free


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def machine_findings() -> Iterator[Finding]:
    """System, processor, memory and disk."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding("system", "note", system)
    name, flags = processor()
    cores, n = os.cpu_count() or 1, usable_cores()
    known = [shown for flag, shown in INSTRUCTIONS.items() if flag in flags]
    text = f"{name}: {n} core{'s' * (n != 1)}" + (f" of {cores}" if n < cores else "")
    text = ", ".join([text, *known])
    facts = {"model": name, "cores": cores, "usable_cores": n, "instructions": known}
    slow = platform.machine() == "x86_64" and "AVX2" not in known
    text += "; without AVX2 every engine is slow, and some builds do not start" if slow else ""
    yield Finding("processor", "warning" if slow else "ok", text, facts=facts)
    total, free = memory()
    text = f"{gigabytes(free)} free of {gigabytes(total)}"
    yield Finding("memory", "ok", text, facts={"total": total, "free": free})
    folder = cache_dir()
    space = shutil.disk_usage(existing(folder)).free
    fix = "MICO_CACHE_DIR=/a/larger/disk, or make room there" if space < LITTLE_DISK else None
    text = f"{gigabytes(space)} free in {folder}" + (": little" if fix else "")
    facts = {"folder": str(folder), "free": space}
    yield Finding("disk", "warning" if fix else "ok", text, fix, facts)


def nvidia_gpus(command: str = "nvidia-smi") -> list[str]:
    """Names of the cards that NVIDIA's own program reports; none where it does not work."""
    query = (command, "--query-gpu=name", "--format=csv,noheader")
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return []
    return result.stdout.split("\n")[:-1] if result.returncode == 0 else []


def gpu_findings(torch: Mapping[str, Any] | None) -> Iterator[Finding]:
    """The graphics cards by the facts of torch's probe, and why torch cannot use a card."""
    cards = ", ".join(nvidia_gpus())
    if torch is None:
        yield Finding("GPU", "note", cards or "not known: torch does not work")
        return
    for number, gpu in enumerate(torch["gpus"]):
        text = (
            f"{gpu['name']}: {gigabytes(gpu['free'])} free of {gigabytes(gpu['total'])}, "
            f"compute capability {gpu['capability']}, {torch['gpu_build']}"
        )
        fix = None
        if gpu["error"] is not None:
            text += f"; torch {torch['version']} does not compute on it: {gpu['error']}"
            fix = "pip install --upgrade torch torchvision   # a build for this card"
        yield Finding(f"GPU {number}", "problem" if fix else "ok", text, fix, gpu)
    if torch["gpus"]:
        return
    if torch["mps"]:
        yield Finding("GPU", "ok", "Apple's, by Metal (--device mps)", facts={"mps": True})
    elif not cards:
        yield Finding("GPU", "note", "none: everything is computed on the processor")
    elif torch["gpu_build"] is None:
        text = f"{cards} is there, but torch {torch['version']} is a CPU build"
        yield Finding("GPU", "warning", text, "pip install --force-reinstall torch torchvision")
    elif torch["hidden"] is not None:
        text = f"{cards} is there, but CUDA_VISIBLE_DEVICES={torch['hidden']!r} hides it"
        yield Finding("GPU", "warning", text, "unset CUDA_VISIBLE_DEVICES")
    else:
        build = f"torch {torch['version']} ({torch['gpu_build']})"
        why = torch["gpu_error"] or "it does not say why"
        fix = "update the driver; in a container: docker run --gpus all"
        yield Finding("GPU", "warning", f"{cards} is there, but {build} cannot use it: {why}", fix)


# --- packages and engines -------------------------------------------------------------------------


def package_findings() -> Iterator[Finding]:
    """Python, and the installed versions against the ranges of our own metadata."""
    version = platform.python_version()
    python = f"{platform.python_implementation()} {version} in {sys.prefix}"
    try:
        own = metadata.distribution("mico-chat")
    except metadata.PackageNotFoundError:
        yield Finding("Python", "ok", python)
        text = "mico-chat is not installed: versions of packages are not checked"
        yield Finding("packages", "warning", text, "pip install -e .")
        return
    wanted = own.metadata["Requires-Python"]
    if wanted and Version(version) not in Requirement(f"x{wanted}").specifier:
        fix = "make a virtual environment with another Python"
        yield Finding("Python", "problem", f"{python}; mico-chat needs {wanted}", fix)
    else:
        yield Finding("Python", "ok", python, facts={"version": version, "prefix": sys.prefix})
    requires = own.requires or []
    yield from requirement_findings("packages", requires, "")
    whole = []
    for extra in sorted(own.metadata.get_all("Provides-Extra") or []):
        for finding in requirement_findings(f"[{extra}]", requires, extra):
            if finding.mark == "ok":
                whole.append(extra)
            else:
                yield finding
    yield Finding("extras", "ok", ", ".join(whole) or "none", facts={"installed": whole})


def requirement_findings(name: str, requires: Sequence[str], extra: str) -> Iterator[Finding]:
    """What is missing or outside its range of an extra, or of the packages that all need."""
    versions: dict[str, str | None] = {}
    missing, wrong = [], []
    for requirement in map(Requirement, requires):
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if always if extra else not always:
            continue
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        try:
            version = versions[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            versions[requirement.name] = None
            missing.append(requirement)
        else:  # a development version counts
            if not requirement.specifier.contains(Version(version), prereleases=True):
                wrong.append(requirement)
    said = [f"{one.name} is not installed" for one in missing]
    said += [f"{r.name} {versions[r.name]} is installed, tested are {r.specifier}" for r in wrong]
    if not said:
        yield Finding(name, "ok", f"{len(versions)} packages, all as tested", facts=versions)
    elif not extra:
        fix = "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one in missing + wrong)
        yield Finding(name, "problem" if missing else "warning", "; ".join(said), fix, versions)
    elif not missing or extra not in UNCHECKED_EXTRAS:
        fix = f"pip install 'mico-chat[{extra}]'"
        yield Finding(name, "note" if missing else "warning", "; ".join(said), fix, versions)


def probe_finding(name: str, outcome: Outcome, fix: str, mark: Mark = "problem") -> Finding:
    """What a probe has found, or a finding of ``mark`` where it failed."""
    if outcome.facts is None:
        return Finding(name, mark, f"does not work: {outcome.error}", fix)
    facts = dict(outcome.facts)
    if facts.get("missing"):
        text = f"{facts['text']}; missing are {', '.join(facts['missing'])}"
        return Finding(name, "warning", text, fix, facts)
    return Finding(name, "ok", facts.pop("text"), facts=facts)


def engine_finding(name: str, outcome: Outcome | None, wanted: bool) -> Finding:
    """Whether an engine works. ``wanted``: the user asked for it by name."""
    _, fix, remark = ENGINES[name]
    if outcome is None:
        text = "not installed" + (f"; {remark}" if remark and not wanted else "")
        essential = wanted or not remark
        return Finding(name, "problem" if essential else "note", text, fix)
    if name == "llamacpp":  # auto would take it, so it must work
        found = probe_finding(name, outcome, REBUILD_LLAMA_CPP)
        if outcome.error == "killed by SIGILL":
            text = f"{found.text} (it was compiled for another processor)"
            return Finding(name, "problem", text, REBUILD_LLAMA_CPP)
        has = [shown for flag, shown in INSTRUCTIONS.items() if flag in processor()[1]]
        built = (outcome.facts or {"features": has})["features"]
        for unused in ({"AVX2", "AVX-512"} & set(has)) - set(built):
            text = f"{found.text}; the processor has {unused} too, which would be faster"
            return Finding(name, "warning", text, REBUILD_LLAMA_CPP, found.facts)
        return found
    optional = name in ("vllm", "bitsandbytes") and not wanted
    found = probe_finding(name, outcome, fix, "warning" if optional else "problem")
    threads, cores = found.facts.get("threads", 0), usable_cores()
    if threads > cores:
        text = f"{found.text}, but only {cores} may run at a time: they wait for each other"
        return Finding(name, "warning", text, f"export OMP_NUM_THREADS={cores}", found.facts)
    return found


# --- the service ----------------------------------------------------------------------------------


def service_findings(
    server: tuple[type[BaseSettings], Callable[[], Any]], options_variables: set[str]
) -> Iterator[Finding]:
    """Folder, variables, ports, database and shared memory."""
    yield folder_finding(cache_dir())
    yield from variable_findings(server, options_variables)
    host, port, database = "127.0.0.1", 8000, ""
    with_settings = readable(server[1])
    if with_settings is not None:  # else the variables' findings say why
        host, port = with_settings.host, with_settings.port
        database = with_settings.database_url or ""
    yield port_finding("API port", host, port, "mico-chat serve")
    yield port_finding("page's port", "127.0.0.1", 7860, "mico-chat ui")
    if util.find_spec("asyncpg"):
        yield Finding("PostgreSQL", "ok", f"driver asyncpg {metadata.version('asyncpg')}")
    else:
        wanted = database.startswith("postgres")
        text = "its driver is not installed" + (
            "" if wanted else "; conversations are kept in SQLite"
        )
        fix = "pip install 'mico-chat[postgres]'"
        yield Finding("PostgreSQL", "problem" if wanted else "note", text, fix)
    shm = Path("/dev/shm")
    if shm.is_dir() and (size := shutil.disk_usage(shm).total) < LITTLE_SHM:
        matters = util.find_spec("vllm") or util.find_spec("webdataset")
        text = f"/dev/shm has {gigabytes(size)}: little for vLLM on GPUs and training's loaders"
        fix = "docker run --shm-size=2g, or --ipc=host"
        yield Finding("shared memory", "warning" if matters else "note", text, fix)


def readable(read: Callable[[], Any]) -> Any:
    """Settings, or None where they cannot be read."""
    try:
        return read()
    except (ConfigError, SettingsError, ValidationError):
        return None


def variable_findings(
    server: tuple[type[BaseSettings], Callable[[], Any]], options_variables: set[str]
) -> Iterator[Finding]:
    """Variables that cannot be read, those that nothing reads, or else those that are set."""
    given = sorted(name for name in os.environ if name.upper().startswith("MICO_"))
    known, found = set(options_variables), False
    for settings, read in ((Settings, Settings), (MediaLimits, MediaLimits), server):
        prefix = str(settings.model_config["env_prefix"])
        known |= {f"{prefix}{name}".upper() for name in settings.model_fields}
        try:
            read()
        except ValidationError as error:
            found = True
            for one in error.errors():
                name = f"{prefix}{'.'.join(map(str, one['loc']))}".upper()
                text = f"{name}: {one['msg']}, got {one['input']!r}"
                yield Finding("variables", "problem", text, f"unset {name}")
        except (ConfigError, SettingsError) as error:
            found = True
            yield Finding("variables", "problem", " ".join(str(error).split()))
    for name in given:
        if name.upper() not in known:
            found = True
            close = difflib.get_close_matches(name.upper(), sorted(known), n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            fix = f'export {close[0]}="${name}"; unset {name}' if close else f"unset {name}"
            yield Finding("variables", "warning", f"nothing reads {name}{meant}", fix)
    if not found:
        said = ", ".join(given) or "none is set"
        yield Finding("variables", "ok", said, facts={"names": given})


def folder_finding(cache: Path) -> Finding:
    """Whether the cache folder can be written to, or made."""
    nearest = existing(cache)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        text = f"{nearest} cannot be written to: {error.strerror or error}"
        fix = f"sudo chown -R $USER {nearest}, or MICO_CACHE_DIR=/another/folder"
        return Finding("cache", "problem", text, fix)
    text = str(cache) if nearest == cache else f"{cache}, which the first use makes"
    return Finding("cache", "ok", text, facts={"folder": str(cache)})


def port_finding(name: str, host: str, port: int, command: str) -> Finding:
    """Whether a port can be listened on. Often our own server has taken it."""
    facts: dict[str, Any] = {"host": host, "port": port}
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        text = f"{host}:{port} cannot be used: {why}{_listener(port)}"
        fix = f"{command} --port {port + 1}, or end the program that listens there"
        return Finding(name, "warning", text, fix, facts)
    return Finding(name, "ok", f"{host}:{port} is free", facts=facts)


def _listener(port: int) -> str:
    """``", by python (4711)"``: the program that listens on a port, where the system says it."""
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.pid and one.laddr.port == port:
                return f", by {psutil.Process(one.pid).name()} ({one.pid})"
    except psutil.Error:
        pass
    return ""


# --- the report -----------------------------------------------------------------------------------

_COLOURS: dict[Mark, str] = {"ok": "green", "note": "dim", "warning": "yellow", "problem": "red"}


def print_report(report: Report, model: str, engine: str | None, out: TextIO) -> None:
    """Print the findings below their headings, each fix on a line of its own to be copied."""
    terminal = out.isatty()
    width = min(shutil.get_terminal_size((100, 24)).columns, 100) if terminal else 100
    page = Console(
        file=io.StringIO(), width=max(60, width), force_terminal=terminal, highlight=False
    )
    names = max((len(f.name) for section in report.values() for f in section), default=0)
    by_mark: dict[Mark, list[str]] = {"problem": [], "warning": []}
    for title, findings in report.items():
        page.print(Text(title, style="bold"))
        for finding in findings:
            by_mark.setdefault(finding.mark, []).append(finding.name)
            line = Table.grid(padding=(0, 2, 0, 0))
            for column_width in (9, names, None):
                line.add_column(width=column_width)
            mark = Text(f"  {finding.mark}", style=_COLOURS[finding.mark])
            line.add_row(mark, Text(finding.name), Text(finding.text))
            page.print(line)
            if finding.rows:
                table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
                for row in finding.rows:
                    table.add_row("", *map(Text, row))
                page.print(table)
            if finding.fix is not None:
                page.print(Text(f"           -> {finding.fix}"), soft_wrap=True)
        page.print()
    marks: tuple[Mark, ...] = ("problem", "warning")
    for kind in marks:
        if named := by_mark[kind]:
            said = (
                f"{len(named)} {kind}{'s' * (len(named) > 1)}: {', '.join(dict.fromkeys(named))}."
            )
            page.print(Text(said, style=_COLOURS[kind]), soft_wrap=True)
        elif kind == "problem":
            here = (
                f"works here with the engine {engine}" if engine else "is not on this machine yet"
            )
            page.print(Text(f"{model} {here}.", style=_COLOURS["ok" if engine else "note"]))
    text = page.file.getvalue()  # type: ignore[attr-defined]
    encoding = out.encoding or "utf-8"
    out.write(text.encode(encoding, "replace").decode(encoding))
