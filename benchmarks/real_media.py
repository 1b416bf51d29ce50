"""How well the contrastive space knows real media: each photograph or sound beside all their names.

    mico-chat serve                                # in one terminal
    python -m benchmarks.real_media                # in another

The media are those of the model card's everyday items: photographs and recordings of GCompris. No
training sample is drawn from them. For each, the name with the best score is looked for among the
names that the item accepts. The scores are those of the page's tab Compare.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.systems import table
from mico_training.world.items import everyday_items
from mico_ui import routes
from mico_ui.client import DEFAULT_API, Client
from mico_ui.routes import Call, Upload

SCORES = ("similarity", "match")
AT_ONCE = 8
"""Media of a request."""


@dataclass(frozen=True)
class Named:
    kind: Any
    path: Path
    names: tuple[str, ...]


def read_items(folder: Path) -> dict[str, list[Named]]:
    """The everyday items by skill; they are written to ``folder`` first where it lacks them."""
    if not (folder / "items.jsonl").exists():
        everyday_items(folder)
    found: dict[str, list[Named]] = {}
    for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        (medium,) = row["media"]
        named = Named(medium["kind"], folder / medium["path"], tuple(row["accept"]))
        found.setdefault(row["skill"], []).append(named)
    return found


def n_right(client: Client, model: str, items: Sequence[Named]) -> dict[str, int]:
    """Of how many media the best name is a right one, by score."""
    names = list(dict.fromkeys(item.names[0] for item in items))
    documents = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    right = dict.fromkeys(SCORES, 0)
    for start in range(0, len(items), AT_ONCE):
        some = items[start : start + AT_ONCE]
        stored = [client.send(routes.upload(Upload(item.kind, item.path))) for item in some]
        queries = [
            {"type": f"{one.kind}_url", f"{one.kind}_url": {"url": f"media:{one.id}"}}
            for one in stored
        ]
        body = {"model": model, "queries": queries, "documents": documents}
        pairs = client.send(Call("POST", "/v1/score", lambda r: r.json()["data"], body=body))
        for number, item in enumerate(some):
            own = [pair for pair in pairs if pair["query"] == number]
            for score in SCORES:
                best = max(own, key=lambda pair: pair[score])
                right[score] += names[best["document"]] in item.names
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--api", default=DEFAULT_API, help="the server to ask")
    parser.add_argument("--items", type=Path, default=Path("data/everyday"), help="their folder")
    options = parser.parse_args()
    rows = []
    with Client(options.api) as client:
        model = client.send(routes.models())[0].id
        for skill, items in read_items(options.items).items():
            right = n_right(client, model, items)
            shares = [f"{right[score] / len(items):.0%}" for score in SCORES]
            n_names = len({item.names[0] for item in items})
            rows.append([skill, str(len(items)), str(n_names), *shares])
    print(table(["media", "n", "names", *SCORES], rows))


if __name__ == "__main__":
    main()
