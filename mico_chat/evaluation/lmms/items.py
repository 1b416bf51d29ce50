"""Files of items as tasks of lmms-eval, which can ask them of any model that it knows.

::

    python -m mico_chat.evaluation.lmms.items data/mini/items/items.jsonl --output data/lmms/mini
    python -m lmms_eval --include_path data/lmms/mini --tasks mini --model mico_chat ...

The folder gets the data (Parquet with the bytes of the files), a task for each skill, and a group
of tasks: those without depth and normal maps, which lmms-eval's chat format lacks. Sounds and clips
are data URIs, which lmms-eval's clients send unchanged (a clip with ``pass_video_url=True``).
"""

import argparse
import base64
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mico_chat.errors import ConfigError, DataError, MicoError, MissingExtraError
from mico_chat.evaluation.metrics.answers import is_right
from mico_chat.evaluation.task import Contents, Item, read_items
from mico_chat.media.file import mime_type

_FUNCTIONS = '''"""The functions that the tasks of this folder call."""

from mico_chat.evaluation.lmms.items import doc_to_messages, doc_to_visual, process_results
'''


def write_tasks(
    files: Sequence[Path], output: Path, *, name: str, limit: int = 0, max_tokens: int = 24
) -> list[str]:
    """Write data and tasks; returns the group's ``name`` and the names of the tasks."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ConfigError(f"name {name!r}: use lower-case letters, digits, - and _")
    whole = Contents([item for file in files for item in read_items(file)])
    tasks: dict[str, list[Item]] = defaultdict(list)
    for item in whole.first(limit).items:
        task = f"{name}_{re.sub(r'[^a-z0-9]+', '_', item.skill.lower()).strip('_')}"
        tasks[task].append(item)
        if item.skill != (first := tasks[task][0].skill):
            both = f"{first!r} and {item.skill!r}"
            raise ConfigError(f"the skills {both} would both become the task {task}")
    if not tasks:
        raise DataError(files[0], None, "the files hold no items")
    output.mkdir(parents=True, exist_ok=True)
    (output / "functions.py").write_text(_FUNCTIONS, encoding="utf-8")
    template = Path(__file__).with_name("task.yaml").read_text(encoding="utf-8")
    lines = [f"group: {name}", "task:"]
    for task, items in tasks.items():
        _write_data(items, output / "data" / f"{task}.parquet")
        text = template.format(task=task, max_tokens=max_tokens)
        (output / f"{task}.yaml").write_text(text, encoding="utf-8")
        if {m.kind for item in items for m in item.media} <= {"image", "audio", "video"}:
            lines.append(f"  - {task}")
    (output / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [name, *tasks]


def _write_data(items: Sequence[Item], path: Path) -> None:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("writing tasks of lmms-eval", "lmms") from error

    text, texts = arrow.string(), arrow.list_(arrow.string())
    media = arrow.list_(arrow.struct([("kind", text), ("bytes", arrow.binary())]))
    columns = [(name, text) for name in ("id", "skill", "message", "target")]
    columns += [(name, texts) for name in ("accept", "choices", "reject")] + [("media", media)]
    rows = [
        {
            "id": item.id,
            "skill": item.skill,
            "message": item.question,
            "target": item.answers[0],
            "accept": item.answers,
            "choices": item.choices,
            "reject": item.reject,
            "media": [{"kind": file.kind, "bytes": file.read()} for file in item.media],
        }
        for item in items
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows, arrow.schema(columns)), path)


def doc_to_messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A document in lmms-eval's chat format: its media, then the question."""
    shown = [{"type": medium["kind"], "url": _url(medium)} for medium in doc["media"]]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": doc["message"]}]}]


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """A document's media for the simple interface: pictures, and dictionaries of other media."""
    return [
        _url(medium) if medium["kind"] == "image" else {"type": medium["kind"], "url": _url(medium)}
        for medium in doc["media"]
    ]


def _url(medium: Mapping[str, Any]) -> Any:
    """A decoded picture, which lmms-eval expects; a data URI of any other file."""
    if medium["kind"] == "image":
        return Image.open(io.BytesIO(medium["bytes"]))
    mime = mime_type(medium["kind"], medium["bytes"])
    return f"data:{mime};base64,{base64.b64encode(medium['bytes']).decode('ascii')}"


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"accuracy": float(is_right(results[0], doc["accept"], doc["choices"], doc["reject"]))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mico_chat.evaluation.lmms.items", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="ITEMS", help="JSONL files")
    add("--output", type=Path, required=True, help="folder to write the tasks to")
    add("--name", default="mini", help="name of the group of tasks")
    add("--limit", type=int, default=0, help="most items of each skill; 0: all of them")
    add("--max-tokens", type=int, default=24)
    given = vars(parser.parse_args(arguments))
    try:
        names = write_tasks(**given)
    except MicoError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{given['output']}: {', '.join(names)}")


if __name__ == "__main__":
    main()
