"""The data engine: from a folder of videos, or a list of a million, to shards for training."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mico_chat.cli.models import Config, Overrides
from mico_chat.cli.options import extra, in_columns, log_to_stderr

data = typer.Typer(
    help="Make training data of your own videos.", no_args_is_help=True, rich_markup_mode=None
)


@data.command()
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Videos, folders, lists (.txt, .csv, .jsonl, .parquet), shards of video2dataset; "
            "paths or addresses such as s3://bucket/videos.",
        ),
    ],
    config: Config,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder or address for the shards.")],
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes, by Ray; 0: this one. Default: the recipe's."),
    ] = None,
) -> None:
    """Cut videos into clips, annotate them, and write shards. The same command goes on.

    mico-chat data build --config training/recipes/data-laptop.yaml videos --output shards
    """
    with extra("data", "mico-chat data build"):
        from mico_training.corpus.build import build as make
        from mico_training.corpus.recipe import BuildRecipe
        from mico_training.recipe import load_recipe
    log_to_stderr()
    values = list(overrides or [])
    if workers is not None:
        values.append(f"workers={workers}")
    recipe = load_recipe(BuildRecipe, config, values)
    try:
        built = make(recipe, sources, output)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {output}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(in_columns([[reason, f"{count:,}"] for reason, count in built.counts.items()]))
    print(f"{built.clips:,} clips in {built.shards:,} shards; this run took {built.seconds:,.0f} s")
    if built.clips:
        pattern = f"{output.rstrip('/')}/*.tar"
        print(f"next: mico-chat train-stage1, with `data: [{{path: {pattern}}}]` in its recipe")


Shards = Annotated[
    str,
    typer.Argument(
        metavar="SHARDS", help="The folder or address of a build, or a pattern: 'shards/*.tar'."
    ),
]


@data.command()
def look(
    shards: Shards,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0: any free one.")
    ] = 7870,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one page that needs no server instead."),
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Clips on the page of --html.")] = 24,
) -> None:
    """Look at clips in the browser: frames, sound, captions, depth; also those left out, and why.

    mico-chat data look shards

    mico-chat data look 'shards/*.tar' --html page.html
    """
    import webbrowser

    with extra("data", "mico-chat data look"):
        from mico_training.corpus.look import serve, write_page
    if html is not None:
        print(f"{html}: {write_page(shards, html, clips)} clips")
        return

    def show(url: str) -> None:
        print(f"{url} (end with Ctrl-C)", flush=True)
        if not no_open:
            webbrowser.open(url)

    serve(shards, port, show)
