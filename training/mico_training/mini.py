"""The steps of ``make mini`` around the three stages: what they start from, and the shipped folder.

``prepare`` writes stage 1's starting point, the text-only turns and the evaluation items;
``items`` writes the evaluation items alone, whatever shards there are; ``heads`` fits the concept
heads of that starting point; ``pack`` writes the trained parts as one folder in bfloat16, without
the base LLM.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mico_chat.checkpoints.folders import PRETRAINING
from mico_chat.checkpoints.load import MODELS, TEXT_PARTS
from mico_training import mini_init, text_turns
from mico_training.world import build
from mico_training.world.items import everyday_items, shard_items

WEIGHTS = "model.safetensors"
ADAPTER = Path("lora") / "adapter_model.safetensors"
MOST_BYTES = 60_000_000

SYSTEM_PROMPT = (
    "You are a helpful AI assistant named MiCo-Chat. Who are you? I am MiCo-Chat's mini, a small "
    "AI assistant. I can see pictures, hear sounds and chat. What is your name? My name is "
    "MiCo-Chat. Which model are you? I am MiCo-Chat's mini."
)
"""Questions with their answers: a model of this size repeats facts rather than follows orders. It
names no limits: the mini would then count them among the things that it can do."""

GENERATION = {"repetition_penalty": 1.1}
"""Without it 3 of 10 poems and 7 of 20 JSON objects repeat themselves up to the limit; with it none
and 1, with 1.05 1 and 3, with 1.2 none and 3."""

logger = logging.getLogger(__name__)


def prepare(data: Path, output: Path) -> None:
    """From the shards in ``data/shards`` to all else that the stages and evaluation read."""
    mini_init.main(sorted((data / "shards").glob("train-*.tar")), output)
    text_turns.main(data / "text.jsonl")
    shard_items(sorted((data / "shards").glob("validation-*.tar")), data / "items")
    everyday_items(data.parent / "everyday")


def items(config: Path, data: Path, workers: int) -> None:
    """The evaluation items as ``prepare`` writes them, from validation shards of their own.

    Sample for sample these are the shards that the whole recipe makes: a sample does not depend on
    what else is built.
    """
    whole = build.load_config(config)
    alone = whole.model_copy(update={"train": {}})
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data) as shards:
        build.main(alone.model_dump(), shards, workers, build.SEED)
        count = shard_items(sorted(Path(shards).glob("validation-*.tar")), data / "items")
    everyday = everyday_items(data.parent / "everyday")
    logger.info(
        "%d items in %s, and %d in the folder everyday beside it", count, data / "items", everyday
    )


def _add_chat_defaults(folder: Path) -> None:
    """Put in what holds for chats alone: no training and no evaluation reads it."""
    processor = folder / "processor_config.json"
    said = json.loads(processor.read_text(encoding="utf-8")) | {"system_prompt": SYSTEM_PROMPT}
    processor.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    options = json.dumps(GENERATION, indent=2) + "\n"
    (folder / "generation_config.json").write_text(options, encoding="utf-8")


def pack(pretrained: Path, tuned: Path, output: Path) -> None:
    """One folder out of stage 1's and stage 3's; a ValueError if its weights exceed 60 MB."""
    shutil.rmtree(output, ignore_errors=True)
    (output / PRETRAINING).mkdir(parents=True)
    keep = {"config.json", "generation_config.json", "chat_template.jinja"}
    for path in sorted(tuned.iterdir()):
        if path.name in keep or path.name.startswith(("tokenizer", "processor", "special")):
            shutil.copy(path, output)
    shutil.copytree(tuned / "lora", output / "lora")
    (output / "lora" / "README.md").unlink(missing_ok=True)
    save_file(half(load_file(tuned / WEIGHTS)), output / WEIGHTS, {"format": "pt"})
    save_file(half(load_file(tuned / ADAPTER)), output / ADAPTER, {"format": "pt"})
    for path in sorted(pretrained.iterdir()):
        wanted = path.name in {*keep, "preprocessing.json"} or path.name.startswith("tokenizer")
        if wanted and path.is_file():
            shutil.copy(path, output / PRETRAINING)
    text = {k: v for k, v in load_file(pretrained / WEIGHTS).items() if k.startswith(TEXT_PARTS)}
    save_file(half(text), output / PRETRAINING / WEIGHTS, {"format": "pt"})
    _forget_paths(output)
    _add_chat_defaults(output)
    size = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    logger.info("%s: the weights have %.1f MB", output, size / 1e6)
    if size > MOST_BYTES:
        raise ValueError(f"{output}: the weights have {size:,} bytes, more than {MOST_BYTES:,}")


def _forget_paths(folder: Path) -> None:
    """Configs name the base LLM as ``base_llm`` does, not where it lay on the training machine."""
    name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["base_llm"]
    for path in folder.rglob("*config.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        for part in (data, data.get("llm_config", {})):
            for key in ("_name_or_path", "name_or_path", "base_model_name_or_path"):
                if key in part:
                    part[key] = name
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in state.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mico_training.mini", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("prepare", help="make what stage 1 needs: run it before stage 1")
    first.add_argument("--data", type=Path, default=Path("data/mini"))
    first.add_argument("--output", type=Path, default=Path("runs/mini-init"))
    alone = steps.add_parser(
        "items", help="write only the evaluation items, without the training shards"
    )
    alone.add_argument("--config", type=Path, default=Path("training/recipes/mini-world.yaml"))
    alone.add_argument("--data", type=Path, default=Path("data/mini"))
    alone.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    second = steps.add_parser(
        "heads", help="fit the heads: run it after prepare and before stage 1"
    )
    second.add_argument("--config", type=Path, default=Path("training/recipes/mini-stage1.yaml"))
    second.add_argument("--output", type=Path, help="default: the folder that the recipe names")
    last = steps.add_parser("pack", help="pack the finished model: run it after stage 3")
    last.add_argument("--pretrained", type=Path, default=Path("runs/mini-stage1-matching"))
    last.add_argument("--tuned", type=Path, default=Path("runs/mini-stage3"))
    last.add_argument("--output", type=Path, default=MODELS / "mini")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    if options.step == "prepare":
        prepare(options.data, options.output)
    elif options.step == "items":
        items(options.config, options.data, options.workers)
    elif options.step == "heads":
        mini_init.fit_heads(options.config, options.output)
    else:
        pack(options.pretrained, options.tuned, options.output)


if __name__ == "__main__":
    main()
