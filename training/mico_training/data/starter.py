"""``mico-chat train init``: looks at data, and writes a recipe with a comment on each line.

The comments are the meanings of the keys (:mod:`mico_training.recipe`). The batch is the largest
that fits into this machine's memory by the estimate of one step.
"""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from pydantic import BaseModel

from mico_chat.engine import cpu
from mico_chat.errors import ConfigError
from mico_training.build_model import folder_of
from mico_training.data.sources.contents import Contents
from mico_training.data.sources.sample import Need
from mico_training.estimate import estimate
from mico_training.recipe import ModelRecipe, Recipe, Stage1Run, Stage2Run, Stage3Run, models_in

NEEDS = {"caption": "captions", "conversation": "conversations or questions"}
STAGES: dict[int, tuple[type[Recipe], Need, float, int, int]] = {
    1: (Stage1Run, "caption", 3e-4, 32, 10),
    2: (Stage2Run, "caption", 5e-4, 16, 3),
    3: (Stage3Run, "conversation", 2e-4, 8, 3),
}
"""Of each stage: recipe, texts, learning rate, samples in a step on a CPU (a GPU takes four times
as many), and times that each sample is seen."""
HALF = {"amx_bf16", "avx512_bf16"}
"""A processor with one of these multiplies in bfloat16."""


def starter(stage: int, found: Contents, model: str) -> str:
    """The text of a recipe of one stage for data, a model and this machine.

    Raises:
        ConfigError: no sample has the texts of the stage; it says what would help.
    """
    kind, need, lr, in_step, times = STAGES[stage]
    n = found.serving(need)
    if not n:
        others = [f", or use --stage {one}" for one in STAGES if found.serving(STAGES[one][1])]
        raise ConfigError(
            f"{found.path}: no sample has {NEEDS[need]}, which stage {stage} needs; add them "
            f"(docs/data.md shows how){''.join(others[:1])}"
        )
    on_gpu, cores = torch.cuda.is_available(), cpu.usable_cores()
    in_step = min(4 * in_step if on_gpu else in_step, n)
    unit = 100 if times * n > 80 * in_step else 10
    steps = unit * -(-times * n // in_step // unit)
    fast = torch.cuda.is_bf16_supported() if on_gpu else HALF & cpu.processor()[1]
    train: dict[str, Any] = {"lr": lr, "steps": steps, "batch_size": in_step, "accumulation": 1}
    train |= {"warmup_steps": -(-steps // 20), "schedule": "cosine", "bf16": bool(fast)}
    train |= {"save_steps": steps // 10 if unit == 100 else 5, "log_steps": unit // 10}
    train |= {"workers": min(8, cores // 2)}
    values: dict[str, Any] = {"model": {"name": model}, "output": f"runs/stage{stage}"}
    values |= {"data": [{"path": found.path, "kind": found.form}], "train": train}
    if stage == 1 and folder_of(ModelRecipe(name=model)) is not None:
        train["lr"] = lr / 10  # its weights have learnt already
    if stage == 3 and found.serving("preference") == n:  # for a model that answers already
        train["lr"], values["stage3"] = 1e-5, {"dpo": {"beta": 0.1}}
    halves = [in_step >> half for half in range(in_step.bit_length())]
    for again, batch in product((False, True), halves):
        train |= {"batch_size": batch, "accumulation": in_step // batch}
        train["gradient_checkpointing"] = again
        needs = estimate(kind.model_validate(values))
        if needs.lacking is None:
            break
    about = [
        f"Stage {stage}, by `mico-chat train init`; docs/recipes.md has all keys.",
        *found.lines(),
        f"{n:,} samples serve this stage; each is seen about {steps * in_step / n:.1f} times.",
        f"A process needs about {needs.peak / 1e9:.1f} GB {needs.lacking or '(it is free here)'}.",
    ]
    return "\n".join([*(f"# {line}" for line in about), *_lines(kind, values), ""])


def _lines(section: type[BaseModel], values: dict[str, Any], before: str = "") -> Iterator[str]:
    """YAML, each line with the first sentence of its key's meaning."""
    for key, value in values.items():
        field = section.model_fields[key]
        meaning = " ".join((field.description or "").split()).partition(". ")[0]
        about = f"  # {meaning.rstrip('.').replace('``', '')}."
        if isinstance(value, dict | list):
            yield f"{before}{key}:{about}"
            (inner,) = models_in(field.annotation)
            for one in [value] if isinstance(value, dict) else value:
                lines = list(_lines(inner, one, before + "  " * (1 + isinstance(value, list))))
                if isinstance(value, list):
                    lines[0] = f"{before}  - {lines[0].strip()}"
                yield from lines
        else:
            yield f"{before}{key}: {json.dumps(value)}{about}"
