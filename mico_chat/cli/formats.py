"""``mico-chat convert`` and ``mico-chat export``: other projects' weights in, other formats out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mico_chat.cli.shared import Model, log_to_stderr
from mico_chat.errors import ModelError

export = typer.Typer(
    help="Write a model for another program.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

convert = typer.Typer(
    help="Make a model folder from another project's weights.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@export.command()
def gguf(
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
    model: Model = None,
    quantization: Annotated[
        str, typer.Option(help="F32, F16, BF16, Q8_0, Q4_K_M or Q4_0.")
    ] = "Q8_0",
) -> None:
    """Write the language model, its adapter merged, as a GGUF file for llama.cpp.

    mico-chat export gguf --model mini --quantization Q8_0 --output mini.gguf
    """
    from mico_chat.checkpoints.gguf_export import export_gguf
    from mico_chat.settings import Settings

    log_to_stderr()
    written = export_gguf(model or Settings().model, output, quantization)
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")


@convert.command()
def mico(
    source: Annotated[
        Path, typer.Argument(metavar="CKPT", help="model_step_N.pt, or the folder it came in.")
    ],
    output: Annotated[Path, typer.Option(help="The folder to write; with --to-mico also a .pt.")],
    to_mico: Annotated[
        bool, typer.Option("--to-mico", help="The other way round: CKPT is a model folder.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="The text branch's, a folder or hub name: google-bert/bert-base-uncased."
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side. Default: the checkpoint's.")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frame embeddings of videos. Default: the checkpoint's."),
    ] = None,
    slices: Annotated[
        int | None,
        typer.Option(min=1, help="Frame embeddings of sounds. Default: the checkpoint's."),
    ] = None,
    num_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads of the encoder. Default: its width / 88."),
    ] = None,
    text_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads of the text branch. Default: its width / 64."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Compare with the original's numbers: safetensors, in.*, out.*."
        ),
    ] = None,
) -> None:
    """Convert the released MiCo checkpoint to a folder of stage 1, or back.

    mico-chat convert mico MiCo-g --tokenizer google-bert/bert-base-uncased --output mico-g
    """
    from mico_chat.checkpoints.released import ConvertOptions, convert_released

    if to_mico:
        from mico_chat.checkpoints.released import write_released

        print(f"{output}: {write_released(source, output)}")
        return
    options = ConvertOptions(image_size, frames, slices, tokenizer, num_heads, text_heads)
    print(f"{output}: {convert_released(source, output, options)}")
    if tokenizer is None:
        print("without a tokenizer; --tokenizer names the one its captions were written in")
    if compare is not None:
        _compare(output, compare)


def _compare(folder: Path, expected: Path) -> None:
    """Print how far a converted model is from the original, output by output.

    Raises:
        ModelError: an output differs by more than rounding.
    """
    from mico_chat.checkpoints.released_check import WITHIN, differences

    found = dict(differences(folder, expected))
    for name, difference in found.items():
        print(f"{name:16} {difference:.1e}")
    worst = max(found, key=found.__getitem__)
    if not found[worst] <= WITHIN:
        raise ModelError(f"{folder}: {worst} is off by {found[worst]:.1e}, more than {WITHIN:.0e}")
