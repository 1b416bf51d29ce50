"""The page of all keys: ``python -m mico_training.recipe_page > docs/recipes.md``."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import yaml

from mico_training.recipe import Stage1Run, Stage2Run, Stage3Run

Schema = dict[str, Any]

HEAD = """# Every key of a recipe

`python -m mico_training.recipe_page > docs/recipes.md` writes this page from the recipes' types.
`mico-chat train init` writes a recipe for your data; [training.md](training.md) explains the
stages. `--set train.lr=1e-4` replaces a value, which is YAML. An unknown key is an error. A key
without a default is needed, if its section is there.
"""
COLUMNS = "| key | type | unit | default | meaning | example |\n|---|---|---|---|---|---|\n"
NAMED = """
## Names of a model

`model.name` is a folder, `mini`, which is the model that is shipped with its weights, or one of
these names. They are sizes of a new model, whose own parts start at random:

| name | encoder | language model |
|---|---|---|
"""
TYPES = {"integer": "whole number", "boolean": "true or false", "string": "text"}
TYPES |= {"array": "list", "object": "mapping"}
LIMITS = {"exclusiveMinimum": "above", "minimum": "at least"}
LIMITS |= {"exclusiveMaximum": "below", "maximum": "at most"}


def page() -> str:
    """The page in Markdown: a table for each section of the three stages' recipes."""
    runs = [run.model_json_schema() for run in (Stage1Run, Stage2Run, Stage3Run)]
    known = {name: part for run in runs for name, part in run["$defs"].items()}
    keys = {name: key for run in runs for name, key in run["properties"].items()}
    top = {"description": "Each stage has one section of its own.", "properties": keys}
    lines = [HEAD]
    for path, part in _sections("", top, known):
        lines.append(f"\n## {path or 'The sections'}\n\n{_text(part['description'])}\n\n{COLUMNS}")
        lines += [_row(key, value) for key, value in part["properties"].items()]
    lines.append(NAMED)
    named = files("mico_chat.model").joinpath("named_configs.yaml").read_text(encoding="utf-8")
    for name, config in yaml.safe_load(named)["mico_chat"].items():
        encoder, llm = config.get("encoder_config", {}), config["llm_config"]
        backbone = encoder.get("stem") or encoder.get("architecture", "eva_giant_patch14_clip_224")
        width = f"{llm['num_hidden_layers']} layers, {llm['hidden_size']} wide"
        lines.append(f"| `{name}` | {backbone} | {config.get('base_llm', width)} |\n")
    return "".join(lines)


def _sections(path: str, part: Schema, known: Schema) -> Iterator[tuple[str, Schema]]:
    yield path, part
    for key, value in part["properties"].items():
        for inner in re.findall(r'"#/\$defs/(\w+)"', json.dumps(value)):
            yield from _sections(f"{path}.{key}".lstrip("."), known[inner], known)


def _row(key: str, value: Schema) -> str:
    """Key, type, unit, default, meaning, and an example: without one of its own, the default."""
    units = (way["unit"] for way in (value, *value.get("anyOf", ())) if "unit" in way)
    default = _yaml(value["default"]) if "default" in value else ""
    example = _yaml(value["examples"][0]) if "examples" in value else default
    if "$ref" in json.dumps(value):  # the section's own table says more
        default, example = default if default == "null" else "", ""
    example = "" if example in ("", "null") else f"{key}: {example}"
    key, default, example = (text and f"`{text}`" for text in (key, default, example))
    cells = (key, _type(value), next(units, ""), default, _text(value["description"]), example)
    return f"| {' | '.join(cells)} |\n"


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _type(value: Schema) -> str:
    """A type in words, with its choices and limits: "whole number, above 0"."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(map(_type, value["anyOf"])))
    kind = str(value.get("format") or value.get("type", "section"))
    words = " or ".join(f"`{one}`" for one in value.get("enum", ())) or TYPES.get(kind, kind)
    words += f": {_type(value['items'])}" if "items" in value else ""
    return ", ".join([words, *(f"{LIMITS[n]} {value[n]:g}" for n in LIMITS if n in value)])


def _text(text: str) -> str:
    """reStructuredText as a line of Markdown."""
    return " ".join(re.sub(r":\w+:`\.?([^`]+)`", r"``\1``", text).replace("``", "`").split())


if __name__ == "__main__":
    print(page(), end="")
