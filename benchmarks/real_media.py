"""How well the contrastive space knows real media: each photograph or sound beside all their names.

    mico-chat serve                                # in one terminal
    python -m benchmarks.real_media                # in another

The media are those of the model card's everyday items: photographs and recordings of GCompris. No
training sample is drawn from them. For each, the name with the best score is looked for among the
names that the item accepts. The scores are those of the page's tab Compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.systems import table
from mico_chat.evaluation.task import Item, read_items
from mico_training.world.items import everyday_items
from mico_ui import routes
from mico_ui.client import DEFAULT_API, Client
from mico_ui.routes import Call, Upload

SCORES = ("similarity", "match")
AT_ONCE = 8
"""Media of a request."""


def names_of(items: Sequence[Item]) -> list[str]:
    """The first name that each item accepts, each name once."""
    return list(dict.fromkeys(item.answers[0] for item in items))


def n_right(client: Client, model: str, items: Sequence[Item]) -> dict[str, int]:
    """The number of media whose best name is a right one, by score."""
    names = names_of(items)
    documents = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    right = dict.fromkeys(SCORES, 0)
    for start in range(0, len(items), AT_ONCE):
        some = items[start : start + AT_ONCE]
        queries = []
        for item in some:
            (file,) = item.media
            stored = client.send(routes.upload(Upload(file.kind, Path(file.name))))
            kind = f"{stored.kind}_url"
            queries.append({"type": kind, kind: {"url": f"media:{stored.id}"}})
        body = {"model": model, "queries": queries, "documents": documents}
        pairs = client.send(Call("POST", "/v1/score", lambda r: r.json()["data"], body=body))
        for number, item in enumerate(some):
            own = [pair for pair in pairs if pair["query"] == number]
            for score in SCORES:
                best = max(own, key=lambda pair: pair[score])
                right[score] += names[best["document"]] in item.answers
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--api", default=DEFAULT_API, help="the server to ask")
    parser.add_argument("--items", type=Path, default=Path("data/everyday"), help="their folder")
    options = parser.parse_args()
    rows = []
    file = options.items / "items.jsonl"
    if not file.exists():
        everyday_items(options.items)
    with Client(options.api) as client:
        model = client.send(routes.models())[0].id
        for skill, alike in groupby(read_items(file), lambda item: item.skill):
            items = list(alike)
            right = n_right(client, model, items)
            shares = [f"{right[score] / len(items):.0%}" for score in SCORES]
            rows.append([skill, str(len(items)), str(len(names_of(items))), *shares])
    print(table(["media", "n", "names", *SCORES], rows))


if __name__ == "__main__":
    main()
