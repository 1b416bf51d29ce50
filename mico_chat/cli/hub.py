"""The commands for the models of this machine: ``pull``, ``list``, ``rm``, ``ps``."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mico_chat.checkpoints import hub
from mico_chat.checkpoints.folders import MODELS, is_packaged
from mico_chat.cli.findings import disk_free, gigabytes
from mico_chat.cli.options import API, API_KEY, check_extra, in_columns
from mico_chat.engine.cpu import memory
from mico_chat.engines.base import EngineOptions
from mico_chat.engines.source import Source, is_ours
from mico_chat.errors import ConfigError, MicoError, ModelError
from mico_chat.late import late
from mico_chat.media.kinds import KINDS

with late():
    from mico_chat import load
    from mico_chat.checkpoints import push as pushing
    from mico_chat.engines import devices
    from mico_ui import client, routes

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]

ROOM = 1.15
"""Memory that a model takes for each byte of its weights, with the keys and values of a chat."""


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A hub name; owner/model:Q4_K_M for one file of a GGUF repository."
        ),
    ],
    yes: Yes = False,
) -> None:
    """Download a model from the hub, once; from then on it loads without a network.

    Its size, and whether it fits this machine, are told before. A download that breaks off goes on
    when the command is given again.

    mico-chat pull Qwen/Qwen2.5-Omni-3B

    mico-chat pull ggml-org/Qwen2.5-Omni-3B-GGUF:Q4_K_M
    """
    if is_packaged(name):
        raise ConfigError(f"{name} comes with mico-chat; `mico-chat setup` brings what it needs")
    if Path(name).is_dir():
        raise ConfigError(f"{name} is a folder on this machine already; pull takes a hub name")
    planned = hub.plan(name)
    if not planned.missing:
        print(f"{name} is here already: {gigabytes(planned.total)}")
        return
    print(_announced(planned), flush=True)
    print(_fit(planned), flush=True)
    _check_disk(planned)
    asked = sys.stdin.isatty() and sys.stdout.isatty() and not yes
    if asked and not typer.confirm("Download it?", default=True):
        raise typer.Exit(1)
    folder = hub.fetch(planned, _bars())
    print(f"{name} is here: mico-chat serve --model {name}   ({folder})")


def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A model's folder, or mini.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="owner/model on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Let nobody else see it.")] = False,
    license: Annotated[str, typer.Option(help="Its licence, as the hub calls it.")] = "unknown",
    card: Annotated[list[Path] | None, typer.Option(help="A file to show in the card.")] = None,
) -> None:
    """Upload a model to the hub, with a model card, or with the README.md of its folder.

    mico-chat push runs/stage3 me/my-model --card recipe.yaml --card results.md --private
    """
    print(f"{name} is at {pushing.push(folder, name, license, card or (), private)}")


def _announced(planned: hub.Plan) -> str:
    n, here = len(planned.files), len(planned.here)
    gguf = [file for file in planned.files if file.endswith(".gguf")]
    which = f" ({', '.join(gguf)})" if gguf else f" in {n} files"
    rest = f"; {gigabytes(planned.missing)} of it are still to come" if here else ""
    return f"{planned.name.repo}: {gigabytes(planned.total)}{which}{rest}"


def _fit(planned: hub.Plan) -> str:
    """Whether the model fits the memory, by the doctor's estimate or by its weights."""
    needed = int(ROOM * planned.weights)
    if is_ours(planned.model_type):
        with suppress(MicoError):  # its language model may not be here yet
            hub.fetch_config(planned.name)
            needed = load.needed_bytes(planned.name.repo, EngineOptions())
    is_gguf = any(file.endswith(".gguf") for file in planned.files)
    gpu = None if is_gguf else devices.gpu_memory(None)
    held_in, (free, most) = ("memory", memory()) if gpu is None else ("the GPU", gpu)
    takes = f"running it takes about {gigabytes(needed)}, and {held_in} has"
    takes += f" {gigabytes(free)} free of {gigabytes(most)}"
    if needed <= free:
        return f"fits: {takes}"
    smaller = "a smaller quantization" if is_gguf else "--quantization nf4, or a smaller model"
    return f"does not fit as it is: {takes}; try {smaller}"


def _check_disk(planned: hub.Plan) -> None:
    free = disk_free(planned.cache)
    if planned.missing > free:
        raise ModelError(
            f"{planned.name.repo}: {gigabytes(planned.missing)} are to be downloaded, but the disk "
            f"of {planned.cache} has {gigabytes(free)} free: remove models (mico-chat list, "
            "mico-chat rm NAME), or set HF_HOME=/a/larger/disk"
        )


def _bars() -> type[Any]:
    """The class of the hub library's progress bars: they are shown on a terminal alone."""
    from tqdm.auto import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return tqdm if sys.stderr.isatty() else Silent


def list_models(as_json: AsJson = False) -> None:
    """List the models on this machine: packaged ones, and those in the hub's shared cache."""
    found = [*_packaged(), *map(_listed, hub.cached_models())]
    if as_json:
        print(json.dumps({"models": [vars(one) for one in found]}, indent=2))
        return
    rows = [
        (one.name, gigabytes(one.bytes), _reads(one.reads), _ago(one.last_used), one.note)
        for one in found
    ]
    print(in_columns([("NAME", "SIZE", "READS", "LAST USED", ""), *rows]))


@dataclass(frozen=True)
class Listed:
    """A model on this machine; ``last_used`` is in seconds since 1970."""

    name: str
    bytes: int
    reads: Sequence[str]
    last_used: float | None
    partial: bool
    note: str


def _packaged() -> list[Listed]:
    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    return [
        Listed(folder.name, size(folder), KINDS, None, False, "comes with mico-chat")
        for folder in sorted(MODELS.glob("*/"))
    ]


def _listed(model: hub.CachedModel) -> Listed:
    kinds: Sequence[str] = ()
    with suppress(MicoError):  # a config that cannot be read
        if model.folder is not None:
            kinds = Source.of_folder(model.name, model.folder).input_modalities
    note = f"partial; mico-chat pull {model.name}" if model.partial else ""
    return Listed(model.name, model.bytes, kinds, model.last_used, model.partial, note)


def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `mico-chat list` has it.")],
    yes: Yes = False,
) -> None:
    """Delete a model from the hub's cache, for other tools too. On a terminal it asks first."""
    if is_packaged(name):
        raise ConfigError(f"{name} comes with mico-chat and stays: pip uninstall mico-chat")
    if Path(name).is_dir():
        raise ConfigError(f"{name} is a folder outside the hub's cache: delete it yourself")
    asked = sys.stdin.isatty() and sys.stdout.isatty() and not yes
    if asked and not typer.confirm(f"Delete {name}, for other tools too?"):
        raise typer.Exit(1)
    print(f"{name} is deleted: {gigabytes(hub.remove(name).bytes)}")


def ps(
    url: str | None = typer.Option(
        None, envvar=API, help="Address of the server. Default: port 8000 here."
    ),
    key: str | None = typer.Option(None, envvar=API_KEY, help="The key for that server."),
    as_json: AsJson = False,
) -> None:
    """Show the models of a running service: which are loaded, how large they are, who uses them."""
    check_extra("terminal", "mico-chat ps", client, routes)
    try:
        with client.Client(url or client.DEFAULT_API, key) as service:
            models = service.send(routes.models())
    except client.ApiError as error:
        raise ModelError(str(error)) from error
    if as_json:
        print(json.dumps({"models": [one.model_dump(mode="json") for one in models]}, indent=2))
        return
    rows = [
        (
            model.id,
            model.status.value,
            gigabytes(model.status.bytes) if model.status.bytes else "-",
            str(model.status.requests),
            _ago(model.status.last_used),
            _reads(model.modalities),
            "; ".join([model.status.reason] if model.status.reason else model.notes),
        )
        for model in models
    ]
    heads = ("NAME", "STATUS", "MEMORY", "REQUESTS", "LAST USED", "READS", "")
    print(in_columns([heads, *rows]))


def _reads(kinds: Sequence[str]) -> str:
    return ", ".join(("text", *kinds))


def _ago(seconds: float | None) -> str:
    if not seconds:
        return "-"
    past = max(time.time() - seconds, 0)
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if past >= size:
            n = int(past // size)
            return f"{n} {unit}{'s' * (n > 1)} ago"
    return "just now"
