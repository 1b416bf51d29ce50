"""The data engine: from a folder of videos, or a list of a million, to shards for training."""

import sys
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mico_chat.cli.models import Config, Overrides
from mico_chat.cli.options import check_extra, group, in_columns, log_to_stderr
from mico_chat.errors import ConfigError
from mico_chat.late import late

with late():
    from mico_corpus import build as building
    from mico_corpus import recipe as recipes
    from mico_corpus.looking import look as looking
    from mico_corpus.looking import store
    from mico_corpus.packing import remove as removal
    from mico_corpus.packing import subsets
    from mico_training import recipe as files

data = group("Make training data of your own videos.")


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
    workers: int | None = typer.Option(
        None, min=0, help="Processes, by Ray; 0: this one. Default: the recipe's."
    ),
) -> None:
    """Cut videos into clips, annotate them, and write shards. The same command goes on.

    mico-chat data build --config training/recipes/data-laptop.yaml videos --output shards
    """
    check_extra("data", "mico-chat data build", building, recipes, files)
    log_to_stderr()
    values = list(overrides or [])
    if workers is not None:
        values.append(f"workers={workers}")
    recipe = files.load_recipe(recipes.BuildRecipe, config, values)
    try:
        built = building.build(recipe, sources, output)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {output}", file=sys.stderr)
        raise typer.Exit(130) from None
    print(in_columns([[reason, f"{count:,}"] for reason, count in built.counts.items()]))
    print(f"{built.clips:,} clips in {built.shards:,} shards; this run took {built.seconds:,.0f} s")
    if built.clips:
        pattern = f"{output.rstrip('/')}/*.tar"
        print(f"next: mico-chat train-stage1, with `data: [{{path: {pattern}}}]` in its recipe")


Build = Annotated[str, typer.Argument(metavar="SHARDS", help="The folder or address of a build.")]


@data.command()
def look(
    shards: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A build, shards ('shards/*.tar'), a folder of media, .jsonl, .csv, or LLaVA's "
            ".json; in a folder or at an address.",
        ),
    ],
    port: int = typer.Option(7870, min=0, max=65535, help="Port of the page; 0: any free one."),
    no_open: bool = typer.Option(False, "--no-open", help="Open no browser."),
    html: Path | None = typer.Option(
        None, metavar="FILE", help="Write one page that needs no server instead."
    ),
    clips: int = typer.Option(24, min=1, help="Clips on the page of --html."),
) -> None:
    """Look at samples in the browser: media and texts; also those left out or bad, and why.

    mico-chat data look shards

    mico-chat data look 'shards/*.tar' --html page.html

    mico-chat data look pictures
    """
    check_extra("data", "mico-chat data look", looking)
    for line in store.open_store(shards).about:
        print(line)
    if html is not None:
        print(f"{html}: {looking.write_page(shards, html, clips)} clips")
        return

    def show(url: str) -> None:
        print(f"{url} (end with Ctrl-C)", flush=True)
        if not no_open:
            webbrowser.open(url)

    looking.serve(shards, port, show)


@data.command()
def subset(
    shards: Build,
    sizes: Annotated[
        str, typer.Option(metavar="SIZES", help="Clips of each subset: 1M,10M; the smallest first.")
    ],
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder or address for the subsets.")],
    seed: int = typer.Option(0, help="Another seed takes other clips."),
    samples: int = typer.Option(1000, min=1, help="Clips a shard."),
) -> None:
    """Write subsets, each within the next, with all sources, lengths, media and concepts.

    mico-chat data subset shards --sizes 1M,10M --output subsets
    """
    check_extra("data", "mico-chat data subset", subsets)
    print(subsets.subset(shards, subsets.sizes_of(sizes), seed, output, samples))


@data.command()
def remove(
    shards: Build,
    ids: Path | None = typer.Option(
        None, metavar="FILE", help="Ids: .txt, one a line; .csv or .parquet, with a column id."
    ),
    source: list[str] | None = typer.Option(None, help="All clips of a source. Repeatable."),
    licence: list[str] | None = typer.Option(None, help="All clips with a licence. Repeatable."),
) -> None:
    """Take clips out of finished shards. A later build does not bring them back.

    mico-chat data remove shards --ids withdrawn.txt
    """
    check_extra("data", "mico-chat data remove", removal)
    if ids is None and not source and not licence:
        raise ConfigError("nothing to remove: give --ids FILE, --source NAME or --licence NAME")
    asked = removal.Removal(sources=tuple(source or ()), licences=tuple(licence or ()))
    if ids is not None:
        asked = replace(asked, ids=removal.read_ids(ids))
    done = removal.remove(shards, asked)
    for missing in done.missing:
        print(f"not found: {missing}")
    print(f"{done.clips:,} clips taken out of {done.shards:,} shards", end="")
    print(f"; {done.known:,} of {len(asked.ids):,} ids found" if ids is not None else "")
