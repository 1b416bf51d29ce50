"""The ``mico-chat`` command.

Only the command line prints. What is slow to import, and every other package of the project, runs
when a command needs it: ``mico-chat --help`` answers at once, and a package that is not installed
is named together with the command that installs it. An error a user can do
something about is one line on standard error and exit code 2.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import typer
from pydantic import ValidationError

from mico_chat import __version__
from mico_chat import media as decoding
from mico_chat.checkpoints.folders import model_folder
from mico_chat.checkpoints.gguf_files import gguf_files
from mico_chat.cli import hub, models
from mico_chat.cli.data import data
from mico_chat.cli.keys import keys
from mico_chat.cli.options import (
    ALL_ARGUMENTS,
    API,
    API_KEY,
    NAMES,
    Device,
    Dtype,
    Engine,
    LoadIn4bit,
    LoadIn8bit,
    Media,
    MediaInOrder,
    Mmproj,
    Model,
    Quantization,
    TrustRemoteCode,
    check_extra,
    pair,
    takes_media,
    takes_options,
)
from mico_chat.cli.process_list import leave_process_list, without_passwords
from mico_chat.cli.train import train
from mico_chat.engine.cpu import set_openmp
from mico_chat.engines.base import EngineOptions
from mico_chat.engines.table import ENGINE_HELP
from mico_chat.errors import MicoError, RequestError, TrainingError
from mico_chat.late import late
from mico_chat.options import GREEDY, GenerationOptions
from mico_chat.settings import Settings, unknown_option

with late():
    from mico_chat import load
    from mico_chat.cli import aloud
    from mico_chat.cli import ask as asked
    from mico_chat.cli import doctor as examination
    from mico_server import app as service
    from mico_server import settings as server
    from mico_server.fetch import fetcher
    from mico_training.data.language import english
    from mico_ui import agent_tools, local_server
    from mico_ui.browser import serve as page
    from mico_ui.terminal import start, voice
    from mico_ui.terminal import teach as teaching

app = typer.Typer(
    name="mico-chat",
    help="Chat about images, sounds, video clips, depth maps and surface normals.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(models.export, name="export")
app.add_typer(models.convert, name="convert")
app.add_typer(keys, name="keys")
app.add_typer(data, name="data")
app.add_typer(train, name="train")


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


FIRST = """\
mico-chat ui                                      chat in the browser: pictures, sounds, clips
mico-chat chat                                    chat in the terminal
mico-chat ask --image FILE "What is in it?"       one answer

The first answer fetches a language model of 93 MB, once. mico-chat --help lists all commands."""


@app.callback(invoke_without_command=True)
def _every_command(
    ctx: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    if ctx.invoked_subcommand is None:
        print(FIRST)


@app.command(cls=MediaInOrder)
@takes_options
@takes_media
def ask(
    ctx: typer.Context,
    question: str | None = typer.Argument(None, help="What to ask about the media."),
    media: Media = (),
    model: Model = None,
    as_json: bool = typer.Option(
        False, "--json", help="Print one JSON object: answer, usage, media."
    ),
    batch: Path | None = typer.Option(
        None,
        metavar="FILE",
        help='Answer every line of a JSONL file: {"id", "message", "image": [paths], ...}. '
        "Relative paths are looked for here, then in the file's folder.",
    ),
    batch_size: int = typer.Option(8, min=1, help="Questions answered at once."),
    options: GenerationOptions = GREEDY,
    engine: Engine = "auto",
    quantization: Quantization = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    mmproj: Mmproj = None,
) -> None:
    """Ask a question about any mix of media.

    mico-chat ask --image cat.jpg --audio purr.ogg "Do these belong together?"
    """
    name = model or Settings().model
    if gguf_files(name, mmproj) is None:
        model_folder(name)  # a misspelt one is reported at once
    quantized = load.asked_quantization(quantization, load_in_4bit, load_in_8bit)
    how = EngineOptions(
        engine,
        quantized,
        dtype,
        device,
        trust_remote_code=trust_remote_code,
        mmproj=mmproj,
        depth_model=(Settings().depth_model or "mini") if options.estimate_depth else None,
    )
    with decoding.MediaDecoder(decoding.MediaLimits()) as decoder:
        asking = asked.Asking(
            decoder,
            lambda media: asked.with_taught(
                load.load_assistant(name, decoder, how, similarity=False, begin=media)
            ),
            options,
            as_json,
            sys.stdout,
        )
        if batch is None:
            if question is None:
                raise RequestError('a question is needed: mico-chat ask --image cat.jpg "What?"')
            asking.one(question, media, asked.Waiting(sys.stderr))
            return
        if question is not None or media:
            raise RequestError("--batch takes questions and media from its file, not from options")
        failed = asking.file(batch, batch_size, progress=sys.stderr)
    if failed:
        raise RequestError(f"{failed} of the lines of {batch} could not be answered")


@app.command()
def say(
    text: str = typer.Argument(help="What to say; - reads it from standard input."),
    output: Path | None = typer.Option(
        None, metavar="FILE", help="A .wav, .mp3, .opus, .flac, .aac or .pcm file. Default: a pipe."
    ),
    voice: str | None = typer.Option(None, help="A voice. Default: MICO_VOICE, or else heart."),
    speed: float = typer.Option(1.0, min=0.25, max=4.0, help="1 is the voice's own."),
) -> None:
    """Read a text aloud, in English.

    mico-chat say "It is **5 km** to the station." --output hello.mp3
    """
    aloud.say(text, output, voice, speed)


@app.command()
def listen(
    file: Path = typer.Argument(help="A recording, or a video."),
    language: str | None = typer.Option(None, help="Its language, such as en. Default: found out."),
) -> None:
    """Write down what is said in a recording.

    mico-chat listen talk.m4a
    """
    for line in aloud.listen(file, language):
        print(line, flush=True)


@app.command(context_settings=ALL_ARGUMENTS, add_help_option=False)
def serve(ctx: typer.Context) -> None:
    """Serve the model over HTTP."""
    check_extra("server", "mico-chat serve", server)
    settings = server.read_settings(ctx.args)
    if settings.show_settings:
        print(server.shown_settings(settings))
        return
    check_extra("server", "mico-chat serve", service)
    service.main(settings, partial(print, flush=True), ctx.obj)


@app.command(cls=MediaInOrder)
@takes_media
def chat(
    ctx: typer.Context,
    question: str | None = typer.Argument(
        None, help="Answer this one question and end. A pipe's text is added to it."
    ),
    media: Media = (),
    api: str | None = typer.Option(
        None, envvar=API, help="Address of a running server. Default: start one for this chat."
    ),
    key: str | None = typer.Option(None, envvar=API_KEY, help="The key for that server."),
    go_on: bool = typer.Option(False, "--continue", help="Continue the last conversation."),
    system: str | None = typer.Option(None, help="System prompt: instructions for the model."),
    settings: list[str] | None = typer.Option(
        None,
        "--set",
        metavar="NAME=VALUE",
        help="A setting: temperature=0.7. Repeatable; /settings lists them.",
    ),
    config: Path | None = typer.Option(
        None, help="TOML file with settings for the server that is started."
    ),
    model: Model = None,
    engine: str | None = typer.Option(None, help=f"{ENGINE_HELP}."),
    quantization: Quantization = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Chat in the terminal, about any mix of media.

    mico-chat chat

    echo "What is it?" | mico-chat chat --image cat.jpg
    """
    check_extra("terminal", "mico-chat chat", start)
    passed_on = ("config", "model", "engine", "quantization", "device", "dtype")
    flags = {f"--{name}": ctx.params[name] for name in passed_on}
    if api is not None:
        flags.pop("--model")  # one of those that it serves
    given = [str(word) for flag in flags.items() if flag[1] is not None for word in flag]
    given += ["--load-in-4bit"] * load_in_4bit + ["--load-in-8bit"] * load_in_8bit
    if api is not None and given:
        raise RequestError(f"{given[0]} is for a server that is started here, and --api names one")
    command = start.ChatCommand(
        question=question,
        media=media,
        api=api,
        key=key,
        serve=given,
        settings=dict(map(pair, settings or ())),
        system=system,
        go_on=go_on,
        model=None if api is None else model,
    )
    if code := start.main(command):
        raise typer.Exit(code)


@app.command(context_settings=ALL_ARGUMENTS)
def talk(
    ctx: typer.Context,
    api: str | None = typer.Option(
        None, envvar=API, help="Address of a running server. Default: start one for this talk."
    ),
    key: str | None = typer.Option(None, envvar=API_KEY, help="The key for that server."),
    go_on: bool = typer.Option(False, "--continue", help="Continue the last conversation."),
    headphones: bool = typer.Option(
        False, "--headphones", help="Listen while it speaks, so that speech interrupts it."
    ),
) -> None:
    """Talk by microphone and loudspeaker. Enter interrupts an answer, Ctrl-C ends.

    Options of `mico-chat serve` are passed on to the server that it starts.

    mico-chat talk --headphones --model mini
    """
    check_extra("talk", "mico-chat talk", start, voice)
    if api is not None and ctx.args:
        raise RequestError(f"--api names a running server, but {ctx.args[0]} is for one of our own")
    how: Any = "headphones" if headphones else "loudspeaker"
    command = start.ChatCommand(api=api, key=key, serve=ctx.args, go_on=go_on, talk=how)
    if code := start.main(command):
        raise typer.Exit(code)


@app.command()
def teach(
    name: str | None = typer.Argument(None, help="The name of what the files show."),
    files: list[Path] | None = typer.Argument(None, help="1 to 5 pictures, or as many sounds."),
    listed: bool = typer.Option(False, "--list", help="Print the names; the default."),
    rename: tuple[str, str] | None = typer.Option(None, metavar="OLD NEW", help="Rename one."),
    forget: str | None = typer.Option(None, metavar="NAME", help="Forget one."),
    export: Path | None = typer.Option(None, help="Write all of them to a JSON file."),
    import_: Path | None = typer.Option(None, "--import", help="Read such a file."),
    corrections: Path | None = typer.Option(
        None, metavar="DIR", help="Write the answers that names corrected, with their media."
    ),
    api: str | None = typer.Option(
        None, envvar=API, help="Address of a running server. Default: start one for this."
    ),
    key: str | None = typer.Option(None, envvar=API_KEY, help="The key for that server."),
) -> None:
    """Teach the model names of your own things, at once, by a few pictures or sounds.

    mico-chat teach Bella bella1.jpg bella2.jpg bella3.jpg
    """
    check_extra("terminal", "mico-chat teach", teaching)
    asked: dict[str, Any] = {"rename": rename, "forget": forget, "export": export}
    asked |= {"name": name, "files": files or (), "import_": import_, "listed": listed}
    asked["corrections"] = corrections and (corrections, english.answer_of)
    for line in teaching.run(api, key, **asked):
        print(line)


@app.command(context_settings=ALL_ARGUMENTS)
def ui(
    ctx: typer.Context,
    api: str | None = typer.Option(
        None, help="Address of a running server. Default: one is started beside the page."
    ),
    host: str = typer.Option("127.0.0.1", help="Address the page listens on."),
    port: int = typer.Option(7860, min=0, max=65535, help="Port of the page."),
    api_port: int | None = typer.Option(
        None, min=1, max=65535, help="Port of the server beside it. Default: serve's, 8000."
    ),
    insecure: bool = typer.Option(False, "--insecure", help="Let other machines in without a key."),
    origin: list[str] | None = typer.Option(
        None, help="Address of the page behind a proxy: https://chat.example.org."
    ),
) -> None:
    """Chat in the browser. Options of `mico-chat serve` are passed on to the server it starts.

    mico-chat ui --model mini

    mico-chat ui --api http://gpu-box:8000
    """
    check_extra("ui", "mico-chat ui", page, local_server)
    announce = partial(print, flush=True)
    if api is not None:
        if ctx.args or api_port is not None:
            given = " ".join([*ctx.args, *([] if api_port is None else ["--api-port"])])
            raise RequestError(f"--api names a running server, but {given} is for one of our own")
        page.main(api, host, port, announce, insecure=insecure, origins=origin or ())
        return
    check_extra("server", "mico-chat ui", server)
    arguments = [*ctx.args, *([] if api_port is None else ["--port", str(api_port)])]
    own = server.read_settings(arguments)
    with local_server.server_beside(arguments, announce) as secret:
        address = local_server.local_url(own.host, own.port)
        secure: dict[str, Any] = {"insecure": insecure, "origins": origin or ()}
        page.main(address, host, port, announce, secret=secret, **secure)


@app.command(context_settings=ALL_ARGUMENTS)
def mcp(
    ctx: typer.Context,
    root: list[Path] | None = typer.Option(None, help="A folder the agent may read. Repeatable."),
    http: int | None = typer.Option(None, metavar="PORT", help="Serve at 127.0.0.1:PORT/mcp."),
    api: str | None = typer.Option(None, envvar=API, help="A running server. Default: start one."),
    key: str | None = typer.Option(None, envvar=API_KEY, help="The key for that server."),
) -> None:
    """Give an agent eyes and ears: tools of the Model Context Protocol (MCP), over stdio.

    Options of `mico-chat serve` are passed on to the server that it starts.

    mico-chat mcp --root ~/Pictures --model mini
    """
    check_extra("mcp", "mico-chat mcp", server, fetcher, agent_tools)
    if api is not None and ctx.args:
        raise RequestError(f"--api names a running server, but {ctx.args[0]} is for one of our own")
    if http is not None and root:
        raise RequestError("--root is for stdio: over HTTP an agent sends addresses and data URIs")
    fetch = fetcher.Fetcher.of(server.read_settings(ctx.args)).fetch
    agent_tools.run(None if api is None else (api, key), ctx.args, fetch, root or (), http)


@app.command()
def doctor(
    model: str | None = typer.Argument(None, help=f"{NAMES} Default: MICO_MODEL, or else mini."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object, for programs."),
    engine: Engine = "auto",
    quantization: Quantization = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Check this machine: what it has, which engines work, what a model needs, and what is wrong.

    Each problem comes with the command that solves it. Downloads and changes nothing. The exit
    code is 1 if something that you asked for would fail.

    mico-chat doctor

    mico-chat doctor ./mico-chat-7b --quantization nf4
    """
    check_extra("server", "mico-chat doctor", examination)
    options = EngineOptions(engine, quantization, dtype, device)
    if code := examination.run(model, options, as_json=as_json, out=sys.stdout):
        raise typer.Exit(code)


app.command()(hub.pull)
app.command()(hub.push)
app.command("list")(hub.list_models)
for _command in (hub.rm, hub.ps, models.setup, models.assemble, models.merge, models.train_stage1):
    app.command()(_command)
for _stage, _help in (
    ("train-stage2", "Align the bridge with a frozen language model."),
    ("train-stage3", "Tune bridge and LoRA on conversations."),
):
    app.command(_stage, help=_help)(models.train_chat)
for _other in (models.finetune, models.tune, models.predict, models.world):
    app.command()(_other)
app.command(context_settings=ALL_ARGUMENTS, add_help_option=False)(models.evaluate)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _quiet_libraries() -> None:
    """Hide other libraries' progress bars, advice and deprecations, unless the user shows them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes advises a package for a faster kernel whenever peft looks for bitsandbytes.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def main(argv: Sequence[str] | None = None, local_secret: str | None = None) -> None:
    """Entry point; ``argv`` without the program's name, by default the process's own.

    ``local_secret`` is for ``serve``: a request with it needs no key.
    """
    if argv is None:
        leave_process_list()
    _quiet_libraries()
    set_openmp()
    try:
        sys.exit(
            app(args=argv, prog_name="mico-chat", standalone_mode=False, obj=local_secret) or 0
        )
    except _UsageError as error:
        _fail_of_usage(error)
    except typer.Abort:
        sys.exit(1)
    except TrainingError as error:
        _fail(str(error), error.code)
    except MicoError as error:
        _fail(str(error))
    except ValidationError as error:
        # Settings from the environment; options and recipes raise errors of their own.
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        _fail(f"{error.title}: {name}: {first['msg']}, got {first['input']!r}")


_UsageError: Any = typer.BadParameter.__base__
"""Of click, or of the copy of it that newer releases of typer bring."""


def _fail_of_usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(error.exit_code)
    command = error.ctx.command_path if error.ctx is not None else "mico-chat"
    name = getattr(error, "option_name", None)
    if name is not None and error.message.startswith("No such option"):
        flags = [] if error.cmd is None else [flag for p in error.cmd.params for flag in p.opts]
        _fail(str(unknown_option(name, [*flags, "--help"], command)))
    message = error.format_message().rstrip(".")
    _fail(f"{message[:1].lower()}{message[1:]}; see `{command} --help`")


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {' '.join(without_passwords(message).split())}", file=sys.stderr)
    sys.exit(code)
