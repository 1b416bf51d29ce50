"""Recipes for training."""

from pathlib import Path
from typing import Annotated

import typer

from mico_chat.cli.options import check_extra, group, log_to_stderr
from mico_chat.errors import ConfigError
from mico_chat.late import late

with late():
    from mico_training.data import starter
    from mico_training.data.sources import contents

train = group("Write recipes for training: `train-stage1` to `train-stage3` run them.")


@train.command()
def init(
    stage: Annotated[int, typer.Option(min=1, max=3, help="The stage of training.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="A folder of media, .jsonl, .csv, LLaVA's .json, or .tar shards."
        ),
    ],
    model: str = typer.Option("mini", help="What trains: a name or a folder."),
    output: Path | None = typer.Option(
        None, metavar="FILE", help="The recipe to write. Default: stageN.yaml."
    ),
) -> None:
    """Look at data, and write a recipe for them with a comment on each line.

    mico-chat train init --stage 2 --data pictures
    """
    check_extra("train", "mico-chat train init", starter, contents)
    log_to_stderr()
    file = output or Path(f"stage{stage}.yaml")
    if file.exists():
        raise ConfigError(f"{file} is there already: remove it, or give another --output")
    found = contents.contents(data)
    print("\n".join(found.lines()), flush=True)
    text = starter.starter(stage, found, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    run = f"mico-chat train-stage{stage} --config {file}"
    print(f"{file}: read it; then see what it needs, and run it:\n  {run} --dry-run\n  {run}")
