"""How well the contrastive space knows real media: each photograph or sound beside all their names.

    mico-chat serve                                # in one terminal
    python -m benchmarks real-media                # in another

The media are the photographs and recordings of the real items: no training sample is drawn from
them. For each, the name with the best score is looked for among the names that the item accepts.
The scores are those of the page's tab Compare.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from benchmarks.harness import Report
from mico_chat.evaluation.task import Item, of_skills, read_items
from mico_ui import routes
from mico_ui.client import DEFAULT_API, Client
from mico_ui.routes import Call, Upload
from mico_world.mini.items import write_real_items

SCORES = ("similarity", "match")
AT_ONCE = 8
"""Media of a request."""


def row_of(client: Client, model: str, skill: str, items: Sequence[Item]) -> list[str]:
    """The row of a skill: for each score the share of media whose best name is a right one."""
    names = list(dict.fromkeys(item.answers[0] for item in items))
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
    shares = [f"{n / len(items):.0%}" for n in right.values()]
    return [skill, str(len(items)), str(len(names)), *shares]


def measure(
    api: Annotated[str, "the server to ask"] = DEFAULT_API,
    items: Annotated[Path, "the folder of the items"] = Path("data/real"),
    limit: Annotated[int, "items of a skill at most: the first ones"] = 59,
) -> Report:
    file = items / "items.jsonl"
    if not file.exists():
        write_real_items(items)
    with Client(api) as client:
        model = client.send(routes.models())[0].id
        known = read_items(file)
        rows = [
            row_of(client, model, skill, of_skills(known, [skill], file)[:limit])
            for skill in ("real photographs", "real sounds")
        ]
    return Report({"rows": rows})
