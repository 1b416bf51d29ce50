"""What a run will need before it is started: memory by part, time, tokens.

Memory is that of a rehearsed step (:mod:`mico_training.rehearsal`); what several processes share is
divided among them. Time is the step's FLOPs over a throughput, which is said: that of a named GPU's
data sheet at the share that training reaches, or of a product measured here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from mico_chat.errors import ConfigError
from mico_training.live_memory import WORKING
from mico_training.parallel import BUCKET
from mico_training.recipe import (
    Parallel,
    Recipe,
    Stage1Run,
    Stage2Run,
    Stage3Run,
    load_recipe,
)
from mico_training.rehearsal import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    Rehearsed,
    rehearse,
)

GPUS = {
    "rtx-3090": (71e12, 24),
    "rtx-4090": (165e12, 24),
    "l4": (121e12, 24),
    "a10g": (70e12, 24),
    "l40s": (362e12, 48),
    "a100-40gb": (312e12, 40),
    "a100-80gb": (312e12, 80),
    "h100-80gb": (989e12, 80),
    "h200": (989e12, 141),
}
"""Dense bfloat16 FLOP/s and GB, as the makers state them."""

REACHED = 0.4
"""Of a data sheet's FLOP/s, what training steps are assumed to reach."""

REACHED_HERE = 0.6
"""Of a large product's FLOP/s on this machine, what training steps are assumed to reach."""


@dataclass(frozen=True)
class Line:
    """A part of the memory: what it is, a remark, bytes in one process."""

    name: str
    remark: str
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """What a run needs; memory of one process at its fullest moment."""

    memory: tuple[Line, ...]
    processes: int
    parallel: Parallel
    steps: int
    tokens: int
    units: int
    flops: float
    throughput: float
    assumed: str
    card: float | None

    @property
    def peak(self) -> float:
        """Bytes of one process."""
        return sum(line.bytes for line in self.memory)

    @property
    def seconds(self) -> float:
        """Of one step."""
        return self.flops / self.throughput

    def lines(self) -> Iterator[str]:
        """The estimate in words."""
        shared = f", {self.parallel}" if self.processes > 1 else ""
        yield f"memory of each of {self.processes} processes{shared}" if shared else "memory"
        width = max(len(line.name) for line in self.memory)
        for line in self.memory:
            yield f"  {line.name:{width}}  {line.bytes / 1e9:8.2f} GB  {line.remark}".rstrip()
        yield f"  {'peak':{width}}  {self.peak / 1e9:8.2f} GB  {self._fits()}".rstrip()
        yield "time"
        yield (
            f"  a step     {self.tokens:,} tokens and {self.units:,} pictures, frames or slices; "
            f"{self.flops / 1e12:.3g} TFLOP a process"
        )
        yield f"  assumed    {self.throughput / 1e12:.3g} TFLOP/s: {self.assumed}"
        yield f"  a step     {_duration(self.seconds)}"
        yield (
            f"  the run    {self.steps:,} steps, {self.steps * self.tokens / 1e6:,.1f} M tokens: "
            f"{_duration(self.steps * self.seconds)}, without reading data"
        )

    def _fits(self) -> str:
        if self.card is None:
            return ""
        # What PyTorch's allocator leaves between its blocks, and CUDA's own context.
        needed = self.peak * 1.05 / 1e9 + 0.6
        verdict = "fits" if needed <= self.card else "does not fit"
        return f"a GPU needs about 0.6 GB and 5 % more: the run {verdict} into {self.card:g} GB"


def estimate(recipe: Recipe, processes: int = 1, gpu: str | None = None) -> Estimate:
    """What a run of a recipe needs, of configurations alone.

    Args:
        recipe: any stage's.
        processes: how many will run it.
        gpu: a name in :data:`GPUS`; default: this machine, whose speed is measured in a second.

    Raises:
        ConfigError: a GPU that is not listed, or what is wrong with the recipe.
    """
    card = None
    if gpu is None:
        throughput = measured_throughput(recipe.train.bf16) * REACHED_HERE
        precision = "bfloat16" if recipe.train.bf16 else "float32"
        assumed = (
            f"{REACHED_HERE:.0%} of the speed of a matrix product in {precision} on this machine"
        )
    else:
        if gpu not in GPUS:
            raise ConfigError(f"unknown GPU {gpu!r}; the GPUs are {', '.join(GPUS)}")
        sheet, card = GPUS[gpu]
        throughput = sheet * REACHED
        assumed = f"{REACHED:.0%} of the {sheet / 1e12:g} that {gpu}'s data sheet states"
    step = rehearse(recipe)
    batches = recipe.train.accumulation * processes
    return Estimate(
        memory=tuple(_memory(step, recipe, processes)),
        processes=processes,
        parallel=recipe.train.parallel,
        steps=recipe.train.steps,
        tokens=step.tokens * batches,
        units=step.units * batches,
        flops=float(step.flops) * recipe.train.accumulation,
        throughput=throughput,
        assumed=assumed,
        card=card,
    )


RECIPES: dict[str, type[Recipe]] = {
    "stage1_pretrain": Stage1Run,
    "stage2_align": Stage2Run,
    "stage3_instruct": Stage3Run,
}
"""By the module that runs it."""


def of_file(
    stage: str, config: Path, overrides: Sequence[str], processes: int, gpu: str | None
) -> list[str]:
    """The estimate of a recipe's file in words, or why there is none.

    Raises:
        ConfigError: what is wrong with the recipe.
    """
    recipe = load_recipe(RECIPES[stage], config, overrides)
    try:
        return list(estimate(recipe, processes, gpu).lines())
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return [f"no estimate: the shapes in this model depend on its values ({error})"]


def measured_throughput(half: bool) -> float:
    """FLOP/s of a product of 2048 x 2048 matrices, the best of some in half a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if half else torch.float32
    a = torch.ones(side, side, dtype=dtype, device=device)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.5:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _memory(step: Rehearsed, recipe: Recipe, processes: int) -> Iterator[Line]:
    """What one process holds: the rehearsed peak, divided where it is shared."""
    parallel = recipe.train.parallel if processes > 1 else "ddp"
    spread = processes if parallel == "fsdp" else 1
    split = processes if parallel != "ddp" else 1
    for name, part in step.weights.items():
        yield Line(name, _precision(name, part.parameters, recipe), part.bytes / spread)
    if spread > 1:
        together = 2 * step.layer_bytes + step.other_bytes
        yield Line(
            "put together",
            "the current layer, the next one, and the weights outside of layers",
            together,
        )
    trained = sum(part.trainable for part in step.weights.values())
    if parallel == "zero2" and recipe.train.bf16:
        yield Line("master weights", "float32 copies of the trained weights", trained * 4 / split)
    there = f"of {_count(trained)} parameters, as many as exist at the peak"
    yield Line(GRADIENTS, there, step.peak.get(GRADIENTS, 0) / split)
    yield Line(
        OPTIMIZER,
        "AdamW: two numbers for each trained parameter",
        step.peak.get(OPTIMIZER, 0) / split,
    )
    if parallel == "zero2":
        yield Line("buckets", "being sent", 2 * min(BUCKET, trained) * 4)
    again = (
        "the inputs of layers that are computed again"
        if recipe.train.gradient_checkpointing
        else ""
    )
    yield Line(ACTIVATIONS, again, step.peak.get(ACTIVATIONS, 0))
    yield Line(LOGITS, "", step.peak.get(LOGITS, 0))
    named = {*step.weights, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS}
    rest = sum(size for name, size in step.peak.items() if name not in named)
    remark = (
        "includes the weights that are unpacked for use" if recipe.model.llm_quantization else ""
    )
    yield Line(WORKING, remark, rest)


def _precision(name: str, parameters: int, recipe: Recipe) -> str:
    """How many parameters a part has, and in which precision it is held."""
    model = recipe.model
    held = {"encoder": model.encoder_dtype, "llm": model.llm_quantization or model.llm_dtype}
    return f"{_count(parameters)} parameters, {held.get(name, 'float32')}"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"
