"""Options that several commands share; extras, logs and the order of media for every command."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, signature
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from mico_chat.engines.table import ENGINE_HELP, QUANTIZATION_HELP, engine_name
from mico_chat.errors import MissingExtraError, RequestError
from mico_chat.late import run
from mico_chat.media.kinds import KINDS, TABLE, Kind
from mico_chat.options import GenerationOptions, options_at
from mico_chat.wire import AnswerDefaults

NAMES = "mini, a folder, a GGUF file, or a hub name."

API, API_KEY = "MICO_API", "MICO_API_KEY"
"""These environment variables hold the address and the key of a running server."""

Model = Annotated[str | None, typer.Option(help=f"{NAMES} Default: MICO_MODEL, or else mini.")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the best one here.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16. Default: what suits the device.")
]
Engine = Annotated[
    str, typer.Option(callback=engine_name, help=f"{ENGINE_HELP}; auto is the fastest here.")
]
Quantization = Annotated[
    str | None, typer.Option(help=f"{QUANTIZATION_HELP}. Default: the engine's own.")
]
LoadIn4bit = Annotated[
    bool, typer.Option("--load-in-4bit", help="Load the language model in 4 bit (nf4).")
]
LoadIn8bit = Annotated[
    bool, typer.Option("--load-in-8bit", help="Load the language model in 8 bit (int8).")
]
Mmproj = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The media projector of a GGUF model. Default: the mmproj file beside it.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that the model brings; read it before."
    ),
]
Media = Sequence[tuple[Kind, Path]]
"""Files, each with its kind, in the order in which they were given; see :func:`takes_media`."""
Output = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")]


ALL_ARGUMENTS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""These are the settings of a command that hands its arguments to another parser."""


def group(help: str) -> typer.Typer:
    return typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None)


class MediaInOrder(TyperCommand):
    """Keeps the order in which media options of different kinds were given.

    The values of one option arrive as one list. The parser's own record of the options it met says
    how these lists interleave.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, met = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["mico_chat.kinds"] = [param.name for param in met if param.name in KINDS]
        return super().parse_args(ctx, args)


def takes_media(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each kind of medium, in the place of its parameter ``media``.

    The parameter gets the kinds and files in the order in which they were given.
    """

    @wraps(command)
    def with_media(ctx: typer.Context, **given: Any) -> None:
        files = {kind: iter(given.pop(kind) or ()) for kind in KINDS}
        media = [(kind, next(files[kind])) for kind in ctx.meta["mico_chat.kinds"]]
        command(ctx, media=media, **given)

    def option(kind: Kind) -> Parameter:
        text = f"Ask about {TABLE[kind].words}. Repeatable."
        shown = typer.Option(f"--{kind}", metavar="FILE", help=text)
        return _parameter(kind, Annotated[list[Path] | None, shown], None)

    return _with(with_media, command, "media", map(option, KINDS))


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a question that ``ask`` takes, in the place of its parameter
    ``options``.

    The parameter gets those that are set: the model may have defaults of its own.
    """
    names = {name: own for name, own, _ in options_at("ask")}
    switches = {own for _, own, field in options_at("ask") if field.annotation is bool}

    @wraps(command)
    def with_options(**given: Any) -> None:
        values = {own: given.pop(name) for name, own in names.items()}
        unset: tuple[Any, ...] = (None, (), [])
        values = {o: v for o, v in values.items() if v not in unset and (v or o not in switches)}
        command(options=GenerationOptions.of(values), **given)

    def option(name: str, field: FieldInfo) -> Parameter:
        text = field.description or ""
        own = " Default: the model's own." if name in AnswerDefaults.model_fields else ""
        help_ = f"{text[:1].upper()}{text[1:]}.{own}"
        if field.annotation is bool:
            shown = typer.Option(f"--{name.replace('_', '-')}", help=help_)
            return _parameter(name, Annotated[bool, shown], False)
        several = get_origin(field.annotation) is tuple
        kind: Any = list[str] if several else field.annotation
        return _parameter(name, Annotated[kind | None, typer.Option(help=help_)], None)

    found = (option(name, field) for name, _, field in options_at("ask"))
    return _with(with_options, command, "options", found)


def _parameter(name: str, annotation: Any, default: Any) -> Parameter:
    kind = Parameter.POSITIONAL_OR_KEYWORD
    return Parameter(name, kind, default=default, annotation=annotation)


def _with(
    called: Callable[..., None],
    command: Callable[..., None],
    name: str,
    parameters: Iterable[Parameter],
) -> Callable[..., None]:
    """``called`` with the signature of ``command``, whose parameter ``name`` is replaced."""
    whole = signature(command)
    found = (
        list(parameters) if one == name else [parameter]
        for one, parameter in whole.parameters.items()
    )
    signed: Any = called
    signed.__signature__ = whole.replace(parameters=list(chain.from_iterable(found)))
    return called


def check_extra(name: str, feature: str, *modules: ModuleType) -> None:
    """Run late modules, and name the extra that is missing if a package is not installed."""
    with extra(name, feature):
        run(*modules)


@contextmanager
def extra(name: str, feature: str) -> Iterator[None]:
    """Name the extra that is missing if a package that the block imports is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or "?"
        if missing.split(".")[0] == "mico_chat":
            raise  # a part of this very package: no extra brings it
        raise MissingExtraError(f"{feature} (module {missing!r})", name) from error


def pair(setting: str) -> tuple[str, str]:
    name, separator, value = setting.partition("=")
    if not separator:
        raise RequestError(f"--set {setting}: expected NAME=VALUE")
    return name, value


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of text whose columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [zip(row, widths, strict=True) for row in rows]
    return "\n".join("  ".join(c.ljust(n) for c, n in line).rstrip() for line in lines)


def log_to_stderr() -> None:
    """Show what the library logs; the commands that only answer stay silent."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "asyncio", "gguf"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
