"""The ``mico-chat`` command.

Only the command line prints. Everything heavy, and every other package of the project, is
imported by the command that needs it: ``mico-chat --help`` answers at once, and a package that is
not installed is named together with the command that installs it. An error a user can do
something about is one line on standard error and exit code 2.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from mico_chat import __version__
from mico_chat.cli.formats import convert, export
from mico_chat.cli.keys import keys
from mico_chat.cli.shared import Model, log_to_stderr, other
from mico_chat.cli.usage import unknown_option
from mico_chat.engine.openmp import set_openmp
from mico_chat.errors import ConfigError, MicoError, RequestError
from mico_chat.media.kinds import IN_WORDS, KINDS, Kind

if TYPE_CHECKING:
    from mico_chat.assistant import Assistant
    from mico_chat.media.decoder import Decoder

app = typer.Typer(
    name="mico-chat",
    help="Chat about images, sounds, video clips, depth maps and surface normals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(export, name="export")
app.add_typer(convert, name="convert")
app.add_typer(keys, name="keys")

_CPUS = os.cpu_count() or 1

# A command that hands everything behind its name to another parser, --help included.
_PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps. Default: the best one here.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16. Default: what suits the device.")
]
EngineChoice = Annotated[
    str,
    typer.Option("--engine", help="auto (the fastest here), llamacpp, transformers or vllm."),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="llamacpp: Q8_0, Q4_K_M, Q4_0, F16; transformers: int8, nf4; vllm: awq, gptq, fp8, "
        "and its others. Default: the engine's own."
    ),
]
Config = Annotated[Path, typer.Option("--config", help="The run's recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe. Repeatable."),
]
LoadIn4bit = Annotated[
    bool, typer.Option("--load-in-4bit", help="Load the language model in 4 bit (nf4).")
]
LoadIn8bit = Annotated[
    bool, typer.Option("--load-in-8bit", help="Load the language model in 8 bit (int8).")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only print the memory that the run needs.")
]
Gpu = Annotated[
    str | None,
    typer.Option(help="Estimate for this GPU: rtx-4090, a100-80gb, ... Default: this machine."),
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Estimate for this number of processes. Default: torchrun's."),
]


_OWN = " Default: the model's own."


class _Ordered(TyperCommand):
    """Keeps the order in which media options of different kinds were given.

    The values of one option arrive as one list; the parser's own record of the parameters it met
    tells how those lists interleave.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, met = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta["mico_chat.kinds"] = [param.name for param in met if param.name in KINDS]
        return super().parse_args(ctx, args)


def _in_order(ctx: typer.Context, given: dict[Kind, list[Path] | None]) -> list[tuple[Kind, Path]]:
    values = {kind: iter(paths or []) for kind, paths in given.items()}
    return [(kind, next(values[kind])) for kind in ctx.meta["mico_chat.kinds"]]


def _medium(kind: Kind) -> Any:
    return typer.Option(
        f"--{kind}", metavar="FILE", help=f"Ask about {IN_WORDS[kind]}. Repeatable."
    )


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...


@app.command(cls=_Ordered)
def ask(
    ctx: typer.Context,
    question: Annotated[str | None, typer.Argument(help="What to ask about the media.")] = None,
    image: Annotated[list[Path] | None, _medium("image")] = None,
    audio: Annotated[list[Path] | None, _medium("audio")] = None,
    video: Annotated[list[Path] | None, _medium("video")] = None,
    depth: Annotated[list[Path] | None, _medium("depth")] = None,
    normal: Annotated[list[Path] | None, _medium("normal")] = None,
    model: Model = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: answer, usage, media.")
    ] = False,
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Answer every line of a JSONL file: {"id", "message", "image": [paths], ...}. '
            "Relative paths are looked for here, then in the file's folder.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 8,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens. Default: as for chat and serve.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help=f"0: always the likeliest word; higher: more varied.{_OWN}")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help=f"Sample from tokens that have this probability together.{_OWN}"),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help=f"Sample from this many likeliest tokens; 0: all.{_OWN}")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help=f"Leave out tokens below this share of the likeliest's.{_OWN}"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help=f"Above 1: fewer repetitions.{_OWN}")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer before this text. Repeatable.")
    ] = None,
    depth_scale: Annotated[
        float, typer.Option(help="Metres for one unit of a 16-bit depth map.")
    ] = 0.001,
    engine: EngineChoice = "auto",
    quantization: Quantization = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask a question about any mix of media.

    mico-chat ask --image cat.jpg --audio purr.ogg "Do these belong together?"
    """
    from mico_chat.checkpoints.folders import model_folder
    from mico_chat.cli.ask import ask as ask_one
    from mico_chat.cli.ask import ask_batch
    from mico_chat.cli.waiting import Waiting
    from mico_chat.engine import GenerationOptions
    from mico_chat.load import asked_quantization
    from mico_chat.media import MediaDecoder, MediaLimits
    from mico_chat.settings import Settings

    model = model or Settings().model
    model_folder(model)  # a misspelt one is reported at once
    quantized = asked_quantization(quantization, load_in_4bit, load_in_8bit)
    asked = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
    }
    # What is not asked for is not set: the model may have defaults of its own.
    options = GenerationOptions.of({k: value for k, value in asked.items() if value is not None})
    media = _in_order(
        ctx, {"image": image, "audio": audio, "video": video, "depth": depth, "normal": normal}
    )
    with MediaDecoder(MediaLimits()) as decoder:

        def load() -> Assistant:
            return _load(model, decoder, engine, quantized, device, dtype)

        if batch is None:
            if question is None:
                raise RequestError('a question is needed: mico-chat ask --image cat.jpg "What?"')
            ask_one(
                question,
                media,
                decoder=decoder,
                load=load,
                options=options,
                as_json=as_json,
                depth_scale=depth_scale,
                out=sys.stdout,
                waiting=Waiting(sys.stderr),
            )
            return
        if question is not None or media:
            raise RequestError("--batch takes questions and media from its file, not from options")
        failed = ask_batch(
            batch,
            decoder=decoder,
            load=load,
            options=options,
            batch_size=batch_size,
            as_json=as_json,
            depth_scale=depth_scale,
            out=sys.stdout,
            progress=sys.stderr,
        )
    if failed:
        raise RequestError(f"{failed} of the lines of {batch} could not be answered")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def serve(ctx: typer.Context) -> None:
    """Serve the model over HTTP."""
    settings = other("mico_server.settings", "mico-chat serve", "server")
    asked = settings.read_settings(ctx.args)
    if asked.show_settings:
        print(settings.shown_settings(asked))
        return
    run = other("mico_server.run", "mico-chat serve", "server")
    run.main(asked, lambda line: print(line, flush=True))


@app.command(cls=_Ordered)
def chat(
    ctx: typer.Context,
    question: Annotated[
        str | None,
        typer.Argument(help="Answer this one question and end. A pipe's text is added to it."),
    ] = None,
    image: Annotated[list[Path] | None, _medium("image")] = None,
    audio: Annotated[list[Path] | None, _medium("audio")] = None,
    video: Annotated[list[Path] | None, _medium("video")] = None,
    depth: Annotated[list[Path] | None, _medium("depth")] = None,
    normal: Annotated[list[Path] | None, _medium("normal")] = None,
    api: Annotated[
        str | None,
        typer.Option(
            envvar="MICO_API", help="Address of a running server. Default: start one for this chat."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="MICO_API_KEY", help="The key for that server.")
    ] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Continue the last conversation.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="System prompt: instructions for the model.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting: temperature=0.7. Repeatable; /settings lists them.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings for the server that is started.")
    ] = None,
    model: Model = None,
    engine: Annotated[str | None, typer.Option(help="auto, llamacpp, transformers, vllm.")] = None,
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
    run = other("mico_ui.terminal.start", "mico-chat chat", "terminal")
    media = _in_order(
        ctx, {"image": image, "audio": audio, "video": video, "depth": depth, "normal": normal}
    )
    flags = {
        **{"--config": config, "--model": model, "--engine": engine},
        **{"--quantization": quantization, "--device": device, "--dtype": dtype},
    }
    given = [str(word) for flag in flags.items() if flag[1] is not None for word in flag]
    given += ["--load-in-4bit"] * load_in_4bit + ["--load-in-8bit"] * load_in_8bit
    if api is not None and given:
        raise RequestError(f"{given[0]} is for a server that is started here, and --api names one")
    asked = run.ChatCommand(
        question=question,
        media=media,
        api=api,
        key=key,
        serve=given,
        settings=dict(_pair(setting) for setting in settings or ()),
        system=system,
        go_on=go_on,
    )
    if code := run.main(asked):
        raise typer.Exit(code)


def _pair(setting: str) -> tuple[str, str]:
    name, separator, value = setting.partition("=")
    if not separator:
        raise RequestError(f"--set {setting}: expected NAME=VALUE")
    return name, value


@app.command(context_settings=_PASS_ON)
def ui(
    ctx: typer.Context,
    api: Annotated[
        str | None,
        typer.Option(help="Address of a running server. Default: one is started beside the page."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address the page listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page.")] = 7860,
    api_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port of the server beside it. Default: serve's, 8000."
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in without a key.")
    ] = False,
) -> None:
    """Chat in the browser. Options of `mico-chat serve` are passed on to the server it starts.

    mico-chat ui --engine llamacpp

    mico-chat ui --api http://gpu-box:8000
    """
    page = other("mico_ui.browser.serve", "mico-chat ui", "ui")

    def announce(line: str) -> None:
        print(line, flush=True)

    if api is not None:
        if ctx.args or api_port is not None:
            given = " ".join([*ctx.args, *([] if api_port is None else ["--api-port"])])
            raise RequestError(f"--api names a running server, but {given} is for one of our own")
        page.main(api, host, port, announce, insecure=insecure)
        return
    settings = other("mico_server.settings", "mico-chat ui", "server")
    arguments = [*ctx.args, *([] if api_port is None else ["--port", str(api_port)])]
    local_server = other("mico_ui.local_server", "mico-chat ui", "ui")
    own = settings.read_settings(arguments)
    address = local_server.local_url(own.host, own.port)
    secret = local_server.new_secret()
    with local_server.server_beside(arguments, announce, secret):
        page.main(address, host, port, announce, insecure=insecure, secret=secret)


@app.command()
def doctor(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="mini, a folder, or a hub name. Default: MICO_MODEL, or else mini."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, for programs.")
    ] = False,
    engine: EngineChoice = "auto",
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
    from mico_chat.cli.doctor.command import run
    from mico_chat.cli.doctor.environment import Source
    from mico_chat.load import EngineOptions

    settings = other("mico_server.settings", "mico-chat doctor", "server")
    code = run(
        model,
        EngineOptions(engine, quantization, dtype, device),
        Source(settings.ServerSettings, settings.read_settings),
        ctx.find_root().command,
        as_json=as_json,
        out=sys.stdout,
    )
    if code:
        raise typer.Exit(code)


@app.command()
def setup() -> None:
    """Download the mini's base language model, once, and prepare it for llama.cpp."""
    from mico_chat.checkpoints.base_llm import fetch_base_llm

    log_to_stderr()
    print(f"base LLM: {fetch_base_llm()}")
    if importlib.util.find_spec("llama_cpp") is not None:
        from mico_chat.checkpoints.gguf_export import gguf_of

        print(f"GGUF: {gguf_of()}")


@app.command()
def assemble(
    encoder: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="The encoder's folder: of stage 1, converted, or a chat model's."
        ),
    ],
    llm: Annotated[
        str, typer.Option(metavar="NAME", help="Any causal language model: folder or hub name.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    chat_template: Annotated[
        str | None,
        typer.Option(help="vicuna_v1.1, or a Jinja file. Default: the language model's own."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Such as bridge.hidden_size=512, bridge.frame_grid=2. Repeatable.",
        ),
    ] = None,
) -> None:
    """Make a chat model out of an encoder and a language model; train its bridge next.

    mico-chat assemble --encoder mico-g --llm lmsys/vicuna-7b-v1.5 --output mico-chat-7b
    """
    from mico_chat.checkpoints.assemble import assemble as write

    log_to_stderr()
    given = {key: _number(value) for key, value in map(_pair, options or ())}
    written = write(encoder, llm, output, options=given, chat_template=chat_template)
    print(f"{written}: next, align its bridge: mico-chat train-stage2")


def _number(text: str) -> Any:
    """A value of the command line as JSON has it, or else as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@app.command()
def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="mini, a folder, or a hub name.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="Of the language model: float32, bfloat16, float16, or as stored.")
    ] = "auto",
) -> None:
    """Write a model as one folder that works anywhere: adapter merged, language model in llm/.

    mico-chat merge runs/stage3 --output mico-chat-7b
    """
    from mico_chat.checkpoints.merge import merge as write
    from mico_chat.load import DTYPES

    log_to_stderr()
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"no dtype {dtype!r}; known are auto, {', '.join(DTYPES)}")
    written = write(model, output, dtype)
    size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    print(f"{written}: {size / 1e6:.1f} MB")


@app.command("train-stage1")
def train_stage1(
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    gpu: Gpu = None,
    processes: Processes = None,
) -> None:
    """Pretrain encoder, context and text branch."""
    _train("stage1_pretrain", config, overrides or [], dry_run, gpu, processes)


@app.command("train-stage2")
def train_stage2(
    config: Config,
    overrides: Overrides = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    dry_run: DryRun = False,
    gpu: Gpu = None,
    processes: Processes = None,
) -> None:
    """Align the bridge with a frozen language model."""
    values = [*(overrides or []), *_quantized(load_in_4bit, load_in_8bit)]
    _train("stage2_align", config, values, dry_run, gpu, processes)


@app.command("train-stage3")
def train_stage3(
    config: Config,
    overrides: Overrides = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    dry_run: DryRun = False,
    gpu: Gpu = None,
    processes: Processes = None,
) -> None:
    """Tune bridge and LoRA on conversations."""
    values = [*(overrides or []), *_quantized(load_in_4bit, load_in_8bit)]
    _train("stage3_instruct", config, values, dry_run, gpu, processes)


@app.command()
def finetune(config: Config, overrides: Overrides = None) -> None:
    """Fine-tune on any modality: tables, series, graphs, spectra, thermal pictures, ...

    Ends with a table: the encoder, the same with random blocks, and simple baselines.

    mico-chat finetune --config training/recipes/modality-diabetes.yaml
    """
    other("sklearn", "mico-chat finetune", "modalities")
    command = other("mico_training.research.finetune.fit", "mico-chat finetune", "train")
    report = other("mico_training.research.finetune.report", "mico-chat finetune", "train")
    log_to_stderr()
    print(report.markdown(command.main(config, overrides or [])), end="")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="What finetune wrote.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Samples, as those of training.")],
    device: Device = None,
) -> None:
    """Predict with a fine-tuned model; prints CSV.

    mico-chat predict runs/modality-diabetes patients.csv
    """
    from mico_training.research.modalities.model import predict as write

    write(model, file, sys.stdout, device)


@app.command()
def world(
    config: Annotated[Path, typer.Option(help="What to build: samples of each sort, a YAML file.")],
    output: Annotated[Path, typer.Option(help="Folder for the shards.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = _CPUS,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same shards.")] = 0,
) -> None:
    """Make training data: paired media, captions, and questions with exact answers."""
    build = other("mico_training.world.build", "mico-chat world", "train")
    log_to_stderr()
    build.main(config, output, workers, seed)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def evaluate(ctx: typer.Context) -> None:
    """Measure what a model can do: the paper's tasks, or skill by skill.

    mico-chat evaluate msrvtt-retrieval clothov2-captioning --model mico-g --data data

    mico-chat evaluate mini-skills --base-url http://127.0.0.1:8000/v1 --model NAME
    """
    command = other("mico_chat.cli.evaluate", "mico-chat evaluate", "eval")
    if code := command.main(ctx.args):
        raise typer.Exit(code)


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _quantized(load_in_4bit: bool, load_in_8bit: bool) -> list[str]:
    """The flags as values of a recipe."""
    from mico_chat.load import asked_quantization

    quantization = asked_quantization(None, load_in_4bit, load_in_8bit)
    return [] if quantization is None else [f"model.llm_quantization={quantization}"]


def _train(
    stage: str,
    config: Path,
    overrides: list[str],
    dry_run: bool,
    gpu: str | None,
    processes: int | None,
) -> None:
    """Print what the run will need, then run it."""
    estimate = other("mico_training.estimate", "training", "train")
    log_to_stderr()
    if processes is None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("RANK", "0") == "0":
        lines = estimate.of_file(stage, config, overrides, processes, gpu)
        print("\n".join(lines), file=sys.stdout if dry_run else sys.stderr, flush=True)
    if not dry_run:
        other(f"mico_training.{stage}", "training", "train").main(config, overrides)


def _load(
    model: str,
    decoder: Decoder,
    engine: str,
    quantization: str | None,
    device: str | None,
    dtype: str | None,
) -> Assistant:
    from mico_chat.load import EngineOptions, load_assistant

    options = EngineOptions(engine, quantization, dtype, device)
    return load_assistant(model, decoder, options, similarity=False)


def _quiet_libraries() -> None:
    """Keep other libraries' bars, advice and deprecations off a user's terminal.

    What the user has set stays as it is.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It advises a package for a faster kernel whenever peft looks whether it is there.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; ``argv`` without the program's name, by default the process's own."""
    from pydantic import ValidationError

    _quiet_libraries()
    set_openmp()
    try:
        given = None if argv is None else list(argv)
        code = app(args=given, prog_name="mico-chat", standalone_mode=False)
        sys.exit(code or 0)
    except _UsageError as error:
        _fail_of_usage(error)
    except typer.Abort:
        sys.exit(1)
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
    """One line, where click prints the usage too."""
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


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
