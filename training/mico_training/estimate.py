"""What a run will need before it is started: memory by part, time, tokens.

One step of the recipe runs on fake tensors (:mod:`mico_chat.checkpoints.footprint`): the modules,
losses, autograd and optimizer are those of training. What several processes share is divided among
them. Time is the step's FLOPs over an assumed throughput, which the estimate names: that of a GPU's
data sheet at the share that training reaches, or of a product measured here.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.distributed.rendezvous import rendezvous

from mico_chat.checkpoints import footprint
from mico_chat.checkpoints.folders import PACKAGED
from mico_chat.checkpoints.footprint import WORKING, LiveMemory, held_bytes, parameter_count
from mico_chat.engine import cpu
from mico_chat.errors import ConfigError, MicoError
from mico_chat.media.kinds import KINDS, Kind
from mico_chat.model.config import MicoTextConfig
from mico_chat.model.mini.things import looked
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.released import SUBTITLE_LENGTH
from mico_chat.model.text_branch import QUESTION_LENGTH, attention_on
from mico_training import build_model
from mico_training.data.mixture import need_of, open_source
from mico_training.health import free_bytes
from mico_training.parallel import BUCKET, layers, mesh_of
from mico_training.parts.chunks import run_by_chunks
from mico_training.parts.set_prediction import SetPrediction
from mico_training.recipe import Recipe, Stage1Run, Stage2Run, Stage3Run, load_recipe
from mico_training.starts import LOCAL
from mico_training.trained import (
    Modes,
    checkpoint_activations,
    freeze,
    parameter_groups,
    train_only,
    trainable_state,
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
"""It holds dense bfloat16 FLOP/s and GB of each GPU, as the makers state them."""

REACHED, REACHED_HERE = 0.4, 0.6
"""The shares that training steps are assumed to reach: of a data sheet's FLOP/s, and of those of a
large product on this machine."""

RECIPES: dict[str, type[Recipe]] = {
    "train-stage1": Stage1Run,
    "train-stage2": Stage2Run,
    "train-stage3": Stage3Run,
}

REHEARSED = 3
"""A step of more chunks is not run on fake tensors, which would take minutes."""

GRADIENTS, OPTIMIZER = "gradients", "optimizer states"
ACTIVATIONS = "activations kept for backward"


@dataclass(frozen=True)
class StepCost:
    """One batch of a run on one process.

    ``weights``: of each part of the model its parameters, bytes, and parameters that train.
    ``peak``: bytes by use at the fullest moment. ``kept``: bytes kept for the backward pass.
    ``layers``: bytes of each layer that is spread as one. ``tokens`` of text and context,
    ``units``: pictures, frames and slices. ``saved``: bytes of a checkpoint.
    """

    weights: dict[str, tuple[int, int, int]]
    peak: Counter[str]
    kept: int
    flops: int
    layers: list[int]
    tokens: int
    units: int
    saved: int


@dataclass(frozen=True)
class Estimate:
    """The needs of a run. ``speed``: FLOP/s of one process's device at its best; ``throughput``:
    those that training is assumed to reach. ``card``: the GB of the GPU, where one was named."""

    recipe: Recipe
    step: StepCost
    processes: int
    speed: float
    throughput: float
    assumed: str
    card: float | None

    @cached_property
    def memory(self) -> dict[str, tuple[float, str]]:
        """The bytes of one process by use, each use with a remark."""
        train, model, step = self.recipe.train, self.recipe.model, self.step
        parallel = train.parallel if self.processes > 1 else "ddp"
        spread = self.processes if parallel in ("fsdp", "zero3") else 1
        split = self.processes if parallel != "ddp" else 1
        if parallel == "hsdp":
            spread = split = mesh_of(train, self.processes)[-1]
        dtypes = {"encoder": model.encoder_dtype, "llm": model.llm_quantization or model.llm_dtype}
        found: dict[str, tuple[float, str]] = {
            name: (size / spread, f"{_count(n)} parameters, {dtypes.get(name, 'float32')}")
            for name, (n, size, _) in step.weights.items()
        }
        whole = sum(size for _, size, _ in step.weights.values())
        trained = sum(n for _, _, n in step.weights.values())
        if spread > 1:
            together = 2 * max(step.layers, default=0) + whole - sum(step.layers)
            remark = "the current layer, the next one, and the weights outside of layers"
            found["put together"] = together, remark
        if parallel.startswith("zero") and train.bf16:
            found["master weights"] = trained * 4 / split, "float32 copies of the trained weights"
        remark = f"of {_count(trained)} parameters, as many as exist at the peak"
        found[GRADIENTS] = step.peak[GRADIENTS] / split, remark
        remark = "AdamW: two numbers for each trained parameter"
        found[OPTIMIZER] = step.peak[OPTIMIZER] / split, remark
        if need_of(self.recipe) == "preference":
            found["reference"] = trained * 4 / spread, "what trains, as it was at the start"
        if parallel.startswith("zero"):
            found["buckets"] = 2 * min(BUCKET, trained) * 4, "being sent"
        again = "the inputs of layers that are computed again" * train.gradient_checkpointing
        if isinstance(self.recipe, Stage1Run) and self.recipe.stage1.chunk is not None:
            again = f"of {self.recipe.stage1.chunk} samples, and what the others are compared by"
        found[ACTIVATIONS] = step.peak[ACTIVATIONS], again
        remark = "includes the weights that are unpacked for use"
        found[WORKING] = step.peak[WORKING], remark * (model.llm_quantization is not None)
        return found

    @property
    def peak(self) -> float:
        return sum(size for size, _ in self.memory.values())

    @property
    def tokens(self) -> int:
        return self.step.tokens * self.recipe.train.accumulation * self.processes

    @property
    def flops(self) -> float:
        return float(self.step.flops) * self.recipe.train.accumulation

    @property
    def seconds(self) -> float:
        return self.flops / self.throughput

    @property
    def disk(self) -> tuple[int, int]:
        """Bytes of all checkpoints, one of them while it is written; bytes that are there for them,
        those of the checkpoints before among them."""
        train, output = self.recipe.train, self.recipe.output
        n = min(train.keep_checkpoints + 1, -(-train.steps // train.save_steps))
        files = (path for path in output.glob("checkpoint-*/**/*") if path.is_file())
        return n * self.step.saved, free_bytes(output) + sum(f.stat().st_size for f in files)

    def check_disk(self) -> None:
        """A ConfigError if the checkpoints will not fit."""
        needed, there = self.disk
        if needed > there:
            raise ConfigError(
                f"{self.recipe.output}: its checkpoints need {needed:,} bytes, but {there:,} are "
                "free on this disk: make room, choose another output, or set a lower "
                f"train.keep_checkpoints (now {self.recipe.train.keep_checkpoints})"
            )

    @cached_property
    def lacking(self) -> str | None:
        """Why the run does not fit into the memory that is free on this machine, if so."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        on_gpu = torch.cuda.is_available() and not self.recipe.train.arguments.get("use_cpu")
        # Each process makes the whole model on the CPU, before it is moved or split.
        whole = sum(size for _, size, _ in self.step.weights.values())
        places = [(here * max(whole, 0 if on_gpu else self.peak), cpu.memory()[0], "memory")]
        if on_gpu:
            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            places.append((self.peak, free, "GPU memory"))
        largest = sorted(self.memory.items(), key=lambda item: -item[1][0])[:3]
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, (size, _) in largest)
        for needs, free, what in places:
            if needs > free:
                return (
                    f"does not fit: it needs {needs / 1e9:.1f} GB of {what} (a process: {parts}), "
                    f"but {free / 1e9:.1f} GB are free"
                )
        return None

    def lines(self) -> list[str]:
        train, fits = self.recipe.train, ""
        if self.card is None:
            fits = self.lacking or "fits into the memory that is free here"
        else:
            # A GPU also holds gaps between the allocator's blocks, and CUDA's context.
            verdict = "fits" if self.peak * 1.05 / 1e9 + 0.6 <= self.card else "does not fit"
            fits = f"a GPU needs about 0.6 GB and 5 % more: the run {verdict} into {self.card:g} GB"
        width = max(map(len, self.memory))
        memory = [
            f"  {name:{width}}  {size / 1e9:8.2f} GB  {remark}".rstrip()
            for name, (size, remark) in (self.memory | {"peak": (self.peak, fits)}).items()
        ]
        shared = f" of each of {self.processes} processes, {train.parallel}"
        units = self.step.units * train.accumulation * self.processes
        each = self.step.units // train.batch_size
        needed, there = self.disk
        return [
            "memory" + (shared if self.processes > 1 else ""),
            *memory,
            "time",
            f"  a step     {self.tokens:,} tokens and {units:,} pictures, frames or slices, "
            f"{each} a sample; {self.flops / 1e12:.3g} TFLOP a process",
            f"  assumed    {self.throughput / 1e12:.3g} TFLOP/s: {self.assumed}",
            f"  a step     {_duration(self.seconds)}",
            f"  the run    {train.steps:,} steps, {train.steps * self.tokens / 1e6:,.1f} M tokens: "
            f"{_duration(train.steps * self.seconds)} if all samples are large ones, "
            "without reading data",
            "disk",
            f"  a checkpoint has {self.step.saved:,} bytes; {train.keep_checkpoints} are kept, and "
            f"one more while it is written: {needed:,} bytes, of {there:,} that are free at "
            f"{self.recipe.output}: {'fits' if needed <= there else 'does not fit'}",
        ]


def of_file(
    command: str, config: Path, overrides: Sequence[str], processes: int, gpu: str | None
) -> tuple[list[str], Estimate | None]:
    """The estimate of a recipe's file for people, and itself; or why there is none, and None."""
    recipe = load_recipe(RECIPES[command], config, overrides)
    try:
        found = estimate(recipe, processes, gpu)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return [f"no estimate: the shapes in this model depend on its values ({error})"], None
    return found.lines(), found


def inputs(command: str, config: Path, overrides: Sequence[str]) -> list[str]:
    """For people: what a run will download, and the samples of its data. Makes their indexes."""
    recipe = load_recipe(RECIPES[command], config, overrides)
    asked, need = recipe.model, need_of(recipe)
    names = {
        "model.encoder_weights": asked.encoder_weights,
        "model.text_weights": asked.text_weights,
    }
    if isinstance(recipe, Stage1Run):
        names["stage1.tokenizer"] = recipe.stage1.tokenizer
    else:
        names["the language model"] = build_model.chat_config(_expected(recipe)).base_llm
    missing = [f"  {key}: {name}, size unknown" for key, name in names.items() if _is_away(name)]
    lines = ["downloads", *(missing or ["  none"]), "data"]
    for source in (*recipe.data, *(recipe.eval.data if recipe.eval is not None else ())):
        try:
            n = len(open_source(source, need))
            lines.append(f"  {source.path}: {n:,} samples with a {need}")
        except MicoError as error:
            lines.append(f"  error: {error}")
    return lines


def _is_away(name: str | None) -> bool:
    """Whether a name is the hub's, or timm's, and the cache holds no weights or words of it."""
    if name is None or name in PACKAGED or name.startswith(LOCAL) or Path(name).exists():
        return False
    hub = name.rpartition(":")[2]
    repository = repo_folder_name(repo_id=hub if "/" in hub else f"timm/{hub}", repo_type="model")
    held = (Path(HF_HUB_CACHE) / repository).glob("snapshots/*/*")
    return not any(path.suffix in (".safetensors", ".bin") or "vocab" in path.name for path in held)


def check_memory(found: Estimate) -> None:
    """A ConfigError if a run cannot fit into this machine's memory.

    Unless the recipe says how large its samples are, they may be a picture and a few words each.
    """
    recipe, expect = found.recipe, found.recipe.expect
    if found.lacking and not expect.model_fields_set & {"units", "slices", "length"}:
        least: dict[str, Any] = {"units": 1, "slices": 0}
        if not isinstance(recipe, Stage1Run):
            config = build_model.chat_config(_expected(recipe))
            least["length"] = config.context_length("image", 1) + 16
        recipe = recipe.model_copy(update={"expect": expect.model_copy(update=least)})
        found = replace(found, recipe=recipe, step=rehearse(recipe))
    if found.lacking:
        raise ConfigError(
            f"the run {found.lacking}; set a smaller train.batch_size, "
            "train.gradient_checkpointing: true, model.llm_dtype: bfloat16, --load-in-4bit or, on "
            "several GPUs, train.parallel: fsdp; expect.units and expect.length say how large the "
            "samples are; --ignore-memory starts the run anyway"
        )


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """An error of the first process in this block ends the others too, without a word of theirs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, rank, _ = next(iter(rendezvous("env://")))
    starts = False
    try:
        yield
        starts = True
    finally:
        if rank == 0:
            store.set("mico-chat starts", str(starts))
    if store.get("mico-chat starts") != b"True":
        raise SystemExit(2)


def estimate(recipe: Recipe, processes: int = 1, gpu: str | None = None) -> Estimate:
    """The needs of a run of any stage; reads configurations, and no weights or data.

    ``gpu`` is a name in :data:`GPUS`; by default the speed of this machine is measured.
    """
    if gpu is None:
        precision = "bfloat16" if recipe.train.bf16 else "float32"
        speed, share, card = measured_throughput(recipe.train.bf16), REACHED_HERE, None
        assumed = f"{share:.0%} of the speed of a matrix product in {precision} on this machine"
    elif gpu in GPUS:
        (speed, card), share = GPUS[gpu], REACHED
        assumed = f"{share:.0%} of the {speed / 1e12:g} that {gpu}'s data sheet states"
    else:
        raise ConfigError(f"unknown GPU {gpu!r}; the GPUs are {', '.join(GPUS)}")
    return Estimate(
        recipe, rehearse(recipe, gpu is not None), processes, speed, speed * share, assumed, card
    )


def measured_throughput(half: bool) -> float:
    """FLOP/s of a product of large matrices, the best of some in half a second."""
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a = torch.ones(side, side, dtype=torch.bfloat16 if half else torch.float32, device=device)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < 0.5:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # which waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def rehearse(recipe: Recipe, on_gpu: bool = False) -> StepCost:
    """One step's cost; ``on_gpu``: with the attention that the text branch has on a GPU.

    A step of many chunks is found from those of two and three, as each chunk costs the same.
    """
    train, chunk = recipe.train, recipe.stage1.chunk if isinstance(recipe, Stage1Run) else None
    if chunk is None or train.batch_size <= REHEARSED * chunk:
        return _rehearsed(recipe, on_gpu)
    sizes = (train.model_copy(update={"batch_size": n * chunk}) for n in (2, 3))
    two, three = (_rehearsed(recipe.model_copy(update={"train": few}), on_gpu) for few in sizes)

    def at(of_two: int, of_three: int) -> int:
        return of_two + round((of_three - of_two) * (train.batch_size / chunk - 2))

    peak = Counter({use: at(two.peak[use], size) for use, size in three.peak.items()})
    kept, flops = at(two.kept, three.kept), at(two.flops, three.flops)
    # With more chunks, the fullest moment has all that is kept, and the gradients of it.
    peak[ACTIVATIONS] = max(peak[ACTIVATIONS], kept)
    peak[WORKING] += kept - three.kept
    tokens, units = at(two.tokens, three.tokens), at(two.units, three.units)
    return replace(two, peak=peak, kept=kept, flops=flops, tokens=tokens, units=units)


def _rehearsed(recipe: Recipe, on_gpu: bool) -> StepCost:
    train = recipe.train
    model = pretraining(recipe) if isinstance(recipe, Stage1Run) else _chat(recipe)
    step: Any = SetPrediction(cast(Any, model)) if _finds_things(recipe) else model
    if isinstance(model, MicoForPretraining) and (on_gpu or torch.cuda.is_available()):
        model.text.attention = attention_on(torch.device("cuda"))
    if train.gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    Modes(model).set()
    mode = footprint.fake(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, train), lr=train.lr, fused=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights, live = {}, LiveMemory()
    with live:
        for name, n, tensors in _parts(model):
            live.name(name, tensors)
            of_part = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
            weights[name] = n, held_bytes(tensors), of_part
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # its states are there from the second step on
        optimizer.zero_grad()
        states = [v for own in optimizer.state.values() for v in own.values()]
        states = [value for value in states if isinstance(value, Tensor)]
        live.name(OPTIMIZER, states)
        live.forget_the_past()
        flops = kept = 0
        for batch in range(min(train.accumulation, 2)):
            inputs, length, units = _batch(recipe, model, mode)
            live.name(WORKING, (x for x in inputs.values() if isinstance(x, Tensor)))
            with torch.autocast("cpu", torch.bfloat16) if train.bf16 else contextlib.nullcontext():
                loss = step(**inputs)["loss"]
            del inputs
            held = live.name_others(ACTIVATIONS)
            loss.backward()
            del loss
            flops, kept = (flops, kept) if batch else (live.flops, held)
        live.name(GRADIENTS, (parameter.grad for parameter in trained))
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=False)
        optimizer.step()
    sizes = [held_bytes(layer.parameters()) for layer in layers(model)]
    tokens, units = train.batch_size * length, train.batch_size * units
    saved = held_bytes([*trainable_state(model).values(), *states])
    return StepCost(weights, live.peak(), kept, flops, sizes, tokens, units, saved)


def _parts(model: nn.Module) -> Iterator[tuple[str, int, list[Tensor]]]:
    adapter = {id(p): p for name, p in model.named_parameters() if "lora_" in name}
    for name, module in model.named_children():
        tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
        lora = sum(tensor.numel() for tensor in tensors if id(tensor) in adapter)
        own = [tensor for tensor in tensors if id(tensor) not in adapter]
        yield name, parameter_count(module) - lora, own
    if adapter:
        yield "lora", sum(p.numel() for p in adapter.values()), [*adapter.values()]


def _chat(recipe: Recipe) -> nn.Module:
    asked = _expected(recipe)
    config = build_model.chat_config(asked)
    dtype = build_model.DTYPES[asked.llm_dtype if config.base_llm is not None else "float32"]
    model, llm = footprint.meta_chat(config), footprint.meta_llm(config.llm_config, dtype)
    if asked.llm_quantization is not None:
        footprint.quantize(llm, asked.llm_quantization)
    model.attach_llm(llm)
    with torch.device("meta"):
        if isinstance(recipe, Stage2Run):
            train_only(model, recipe.stage2.trainable)
        elif isinstance(recipe, Stage3Run):
            stage = recipe.stage3
            train_only(model, [*stage.trainable, *(["llm"] if stage.full else [])])
            if not stage.full and stage.lora is not None:
                build_model.add_lora(model, stage.lora, build_model.folder_of(asked))
        freeze(model, recipe.train.freeze)
        build_model.hold_encoder(model, asked)
        return model


def pretraining(recipe: Stage1Run) -> nn.Module:
    """Stage 1's model with its objectives, but for those of regions and names."""
    text = MicoTextConfig()
    if recipe.stage1.tokenizer is None and recipe.expect.model is None:
        text.vocab_size = recipe.stage1.vocabulary
    with torch.device("meta"):
        model = MicoForPretraining(build_model.pretraining_config(_expected(recipe), text))
    model.objective_weights = recipe.stage1.weights.model_dump()
    model.config.mask_probability = recipe.stage1.mask_probability
    freeze(model, recipe.train.freeze)
    if recipe.features is not None and model.encoder.stem is not None:
        model.encoder.stem.requires_grad_(False)
    if recipe.stage1.chunk is not None:
        run_by_chunks(model, recipe.stage1.chunk)
    return model


def _expected(recipe: Recipe) -> Any:
    """The recipe's model, or what its folder will be where that is still to be made."""
    name = recipe.expect.model
    if name is None or build_model.folder_of(recipe.model) is not None:
        return recipe.model
    options = recipe.model.options | recipe.expect.options
    return recipe.model.model_copy(update={"name": name, "options": options})


def large_media(recipe: Recipe) -> list[tuple[Kind, int]]:
    """Kinds and numbers of units of a large sample's media: a picture or clip, and a sound."""
    expect, units, slices = recipe.expect, recipe.expect.units, recipe.expect.slices
    if isinstance(recipe, Stage1Run) and units is None:
        units, most = recipe.stage1.most_units, recipe.stage1.most_slices
        slices = (units if most is None else most) if slices is None else slices
    units = 8 if units is None else units
    found: list[tuple[Kind, int]] = [("image" if units == 1 else "video", units)]
    media = [(kind, n) for kind, n in [*found, ("audio", slices or 0)] if n > 0]
    if not media:
        raise ConfigError(f"expect: {expect.units} units and {expect.slices} slices are no medium")
    return media


def _batch(recipe: Recipe, model: Any, mode: Any) -> tuple[dict[str, Any], int, int]:
    # A pair is two rows. Its media are encoded twice: once for the reference, whose other work is
    # not counted.
    b = recipe.train.batch_size * (2 if need_of(recipe) == "preference" else 1)
    expect, encoder = recipe.expect, model.encoder
    media = large_media(recipe)
    units = sum(n for _, n in media)
    cached = recipe.features is not None and encoder.stem is not None
    side = encoder.grid if cached else model.config.encoder_config.image_size
    with mode:
        pixels = torch.empty(b * units, encoder.stem.out_dim if cached else 3, side, side)
    length = expect.length or recipe.train.max_length
    if isinstance(recipe, Stage1Run):
        length = recipe.stage1.text_length
    ids = torch.full((b, length), 5)
    batch: dict[str, Any] = {
        "stem_features" if cached else "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "media_kind": torch.tensor([KINDS.index(kind) for kind, _ in media]).repeat(b),
        "media_units": torch.tensor([n for _, n in media]).repeat(b),
        "media_row": torch.arange(b).repeat_interleave(len(media)),
    }
    if isinstance(recipe, Stage1Run):
        if recipe.stage1.questions:
            asked = torch.full((b, QUESTION_LENGTH), 5)
            batch |= {"question_ids": asked, "question_mask": torch.ones_like(asked)}
            length += QUESTION_LENGTH
        if recipe.stage1.subtitles:
            said = torch.full((b, SUBTITLE_LENGTH), 5)
            batch |= {"subtitle_ids": said, "subtitle_mask": torch.ones_like(said)}
            length += SUBTITLE_LENGTH
        return batch, length, units
    placeholders = sum(model.config.context_length(kind, n) for kind, n in media)
    if placeholders >= length:
        raise ConfigError(f"{units} units take {placeholders} tokens, but a sample has {length}")
    ids[:, :placeholders] = model.config.context_token_id
    if model.things is not None:
        grid, things = model.parts
        parts = (grid, replace(things, look=_look_at_all))
        batch["see"] = partial(model.context_tokens, parts=parts)
    learnt = max(1, int(length * expect.learnt))
    batch["labels"] = torch.full_like(ids, -100)
    words = torch.arange(b * learnt).view(b, learnt) % model.get_input_embeddings().num_embeddings
    batch["labels"][:, -learnt:] = words
    if recipe.train.packing:  # large samples have rows of their own
        batch["position_ids"] = torch.arange(length).repeat(b, 1)
    return batch, length, units


def _look_at_all(encoder: Any, seen: Any, pixels: Tensor, picture: Tensor, _: Tensor) -> Tensor:
    """Closer looks at whole pictures: which boxes are looked at depends on the weights."""
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(len(picture), 4)
    return looked(encoder, seen, pixels, picture, whole)


def _finds_things(recipe: Recipe) -> bool:
    return isinstance(recipe, Stage2Run) and recipe.stage2.objective == "things"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 3600:,.0f} h ({seconds / 86400:.1f} days)"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"
