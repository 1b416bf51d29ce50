"""The table of engines, and the one walk over it that chooses an engine for a model.

A new engine is a class of :class:`~mico_chat.engines.base.EngineRow` and a line here.
"""

from __future__ import annotations

from collections.abc import Iterator

from mico_chat.engines.base import AUTO, EngineOptions, EngineRow
from mico_chat.engines.llamacpp import LlamaCpp
from mico_chat.engines.source import FORMS, Form, Source
from mico_chat.engines.transformers import Transformers
from mico_chat.engines.vllm import Vllm
from mico_chat.errors import ConfigError, ModelError
from mico_chat.late import late

with late():
    from mico_chat.engines import devices

ENGINES: dict[str, EngineRow] = {row.name: row for row in (Vllm(), LlamaCpp(), Transformers())}
"""The engines, in the order in which ``auto`` asks them. The last one is the reference."""

NAMES = (AUTO, *sorted(ENGINES))
ENGINE_HELP = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"
QUANTIZATION_HELP = "; ".join(f"{name}: {ENGINES[name].some_quantizations}" for name in NAMES[1:])


def setting_help(name: str) -> str:
    """The description of a service's setting that is an argument of an engine."""
    row = next(row for row in ENGINES.values() if name in row.settings)
    return f"{row.name}: {row.settings[name]}"


def engine_name(name: str) -> str:
    """A name that a user gives, checked."""
    if name not in NAMES:
        raise ConfigError(f"no engine {name!r}; known are {', '.join(NAMES)}")
    return name


def choose(options: EngineOptions, source: Source | None = None) -> tuple[EngineRow, str]:
    """The engine that runs a model, and the reason; without a model, a chat model of ours.

    Raises:
        ConfigError, MissingExtraError, ModelError: none runs it with these options.
    """
    return next(candidates(options, source))


def candidates(
    options: EngineOptions, source: Source | None = None
) -> Iterator[tuple[EngineRow, str]]:
    """One or more engines that may run a model, the best first, with reasons; see :func:`choose`.

    A later one is for a model that an earlier one refuses when it is loaded.
    """
    form: Form = "chat" if source is None else source.form
    if source is not None and form != "gguf" and options.device is not None:
        devices.check_device(options.device)
    asked = options.engine != AUTO
    gpu = devices.gpu_name(options.device) if form == "chat" and not asked else None
    rows = [_named(options.engine, source)] if asked else _able(form, options.quantization)
    skipped: list[str] = []
    for row in rows:
        why = "asked for" if asked else row.suits(source, options, gpu)
        if why is None:
            continue
        if len(rows) > 1 and not row.installed():
            skipped.append(f"{row.package} is not installed")
            continue
        row.check_installed(f"the {row.name} engine")
        refused = None if source is None else row.why_not(source, options)
        if refused is not None:
            if row is rows[-1] or not rows[-1].takes(options):
                raise ModelError(refused)
            skipped.append(f"not {row.name}: {refused}")
            continue
        row.check(options)
        yield row, "; ".join([why, *skipped])
        if not row.may_refuse or not rows[-1].takes(options):
            return


def readers(form: Form) -> list[EngineRow]:
    """The engines that read models of a form."""
    return [row for row in ENGINES.values() if form in row.forms]


def reference(form: Form) -> str:
    """The name of the engine that computes models of a form as they were trained."""
    return readers(form)[-1].name


def _able(form: Form, quantization: str | None) -> list[EngineRow]:
    able = readers(form)
    return [row for row in able if quantization in row.quantizations] or able


def _named(name: str, source: Source | None) -> EngineRow:
    row = ENGINES[engine_name(name)]
    if source is not None and source.form not in row.forms:
        others = " or ".join(f"--engine {one.name}" for one in readers(source.form))
        form = FORMS[source.form]
        raise ConfigError(f"{source.model}: {row.name} does not read {form}: use {others}")
    return row
