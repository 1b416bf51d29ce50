"""Hugging Face's Trainer, with these additions:

* the parts of a summed loss (contrastive, matching, caption, tagging, ...) are logged one by one;
* norms, biases, embeddings and single numbers have no weight decay, and the recipe can multiply the
  learning rate of modules;
* frozen modules stay in evaluation mode;
* steps that are not finite are left out (:mod:`mico_training.health`), and no checkpoint has a
  number that is not finite;
* checkpoints hold only the weights that train;
* the same command resumes from the last *complete* checkpoint at the exact sample: the data are one
  list of draws (:mod:`mico_training.data.mixture`), in which the Trainer skips forward.
"""

import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn, cast

import safetensors.torch
import torch
from accelerate.utils import broadcast_object_list
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mico_chat.checkpoints.footprint import Flops
from mico_chat.errors import ConfigError, TrainingError
from mico_chat.model import losses
from mico_training import parallel
from mico_training.data.bad import BadSamples
from mico_training.data.mixture import states
from mico_training.estimate import Estimate
from mico_training.health import IN_A_ROW, Health, only_finite, room, stop_signals
from mico_training.parts import pieces
from mico_training.recipe import EvalRecipe, Recipe, Run, TrainRecipe, changes
from mico_training.records import plot_losses, write_json
from mico_training.trained import Modes, checkpoint_activations, parameter_groups, trainable_state

logger = logging.getLogger(__name__)

OBJECTIVES = (
    *("contrastive", "matching", "caption", "tagging", "region", "concept"),
    *("thing", "box", "distance", "way"),
)
REWARDS = tuple(f"rewards_{name}" for name in ("chosen", "rejected", "accuracy", "margin"))
COMPONENTS = (*(f"{name}_loss" for name in OBJECTIVES), "reward", "greedy_reward", *REWARDS)
WEIGHTS = "model.safetensors"
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"
SAMPLES, DATA = "samples_per_step", "data_states"  # in recipe.json


def training_arguments(recipe: Run) -> TrainingArguments:
    """The recipe as Hugging Face's arguments; a ConfigError names a field that these lack."""
    train = recipe.train
    settings: dict[str, Any] = {
        "output_dir": str(recipe.output),
        "max_steps": train.steps,
        "learning_rate": train.lr,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "warmup_steps": train.warmup_steps,
        **_schedule(train),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "save_strategy": "steps",
        "save_steps": train.save_steps,
        # The one before stays until an asynchronous one is written.
        "save_total_limit": max(1 + (train.checkpoint_format == "async"), train.keep_checkpoints),
        "logging_strategy": "steps",
        "logging_steps": train.log_steps,
        "logging_nan_inf_filter": False,
        "bf16": train.bf16,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": train.seed,
        "dataloader_num_workers": train.workers,
        "dataloader_persistent_workers": train.workers > 0,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        **parallel.parallel_arguments(train),
        "report_to": list(train.report_to),
    }
    for package in train.report_to:
        if package != "none" and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"train.report_to {package}: the package {package} is not installed: pip install "
                f"{package}, or set train.report_to to none"
            )
    if isinstance(recipe, Recipe) and recipe.eval is not None:
        settings |= {
            "eval_strategy": "steps",
            "eval_steps": recipe.eval.every,
            "metric_for_best_model": recipe.eval.metric,
            "greater_is_better": recipe.eval.metric != "loss",
            # Of one checkpoint, Hugging Face would leave the best and delete the last at the end.
            "save_total_limit": max(2, train.keep_checkpoints),
        }
    for name in ("gradient_checkpointing", "activation_checkpointing", "fsdp", "deepspeed"):
        if name in train.arguments:
            key = "parallel" if name in ("fsdp", "deepspeed") else "gradient_checkpointing"
            raise ConfigError(f"train.arguments.{name}: set train.{key} instead")
    if not torch.accelerator.is_available():  # DeepSpeed would search, and complain
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        arguments = TrainingArguments(**(settings | train.arguments))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train: {' '.join(str(error).split())}") from error
    # Models are built whole, and split when they are complete. Hugging Face would split them as it
    # reads them, for DeepSpeed's stage 3, in one process, before it knows of the others.
    unset_hf_deepspeed_config()
    return arguments


def _schedule(train: TrainRecipe) -> dict[str, Any]:
    name, options = train.schedule, {}
    if train.end_lr is not None and name == "linear":
        name, options = "polynomial", {"lr_end": train.end_lr, "power": 1.0}
    elif train.end_lr is not None:
        name, options = "cosine_with_min_lr", {"min_lr": train.end_lr}
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": options | train.schedule_options}


def examples_per_step(arguments: TrainingArguments) -> int:
    """Samples between two updates, over all ranks."""
    per_rank = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return int(per_rank * arguments.world_size)


def draws(arguments: TrainingArguments) -> int:
    """Samples of the whole run, over all ranks."""
    return int(arguments.max_steps) * examples_per_step(arguments)


class MicoTrainer(Trainer):
    """The Trainer of a recipe's ``train`` section; ``options`` are the Trainer's own arguments.

    ``noise`` makes the model's inputs out of the collator's, at every step. ``bad`` counts the bad
    samples of the batches.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        train: TrainRecipe,
        noise: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        bad: BadSamples | None = None,
        **options: Any,
    ) -> None:
        if train.gradient_checkpointing:
            checkpoint_activations(model)
        self.modes = Modes(model)
        parallel.keep_step(model, train.bf16)
        if train.parallel != "ddp":
            parallel.give_a_dimension(model)
        if train.is_split:
            parallel.split(model, args.device.type, train)
        super().__init__(model, args, **options)
        # The Trainer then leaves placement and gradients of the model to the model.
        self.is_distributed_loading_by_transformers = train.is_split
        # A loss is a mean over its batch; accumulation averages the batches.
        self.model_accepts_loss_kwargs = False
        self.recipe, self.noise, self.bad = train, noise, bad
        self.health, self.cost = Health(), cast(Estimate | None, None)
        self.writer = pieces.Writer(waits=train.checkpoint_format != "async")
        self.counted: deque[int] = deque(maxlen=100)  # the FLOPs of some batches
        self.stopping: list[int] = []  # signals
        # These are sums over the steps since the last log, on this process.
        self.sums: dict[str, Tensor | float] = {}
        self.began, self.waited = time.perf_counter(), 0.0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or ``train.arguments.optim``, over :func:`parameter_groups`."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            self.optimizer = kind(parameter_groups(target, self.recipe), **settings)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; sums up its parts for the log."""
        self.modes.set()
        outputs = model(**(inputs if self.noise is None else self.noise(inputs)))
        if model.training:
            self._count(inputs, outputs)
            outputs["loss"] = only_finite(outputs["loss"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _count(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Sum up for the log; nothing here waits for the device."""
        loss = outputs["loss"].detach()
        finite = loss.isfinite()
        found: dict[str, Tensor | float] = {"batches": finite}
        for name in ("loss", *COMPONENTS):
            part = outputs.get(name)
            if part is not None:
                found[name] = part.detach().where(finite, 0.0)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        found["samples"] = self.args.per_device_train_batch_size if ids is None else len(ids)
        if (places := inputs.get("position_ids")) is not None and mask is not None:
            found["samples"] = ((places == 0) & mask.bool()).sum()  # conversations that share rows
        found["tokens"] = 0 if mask is None else mask.sum()
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if math.isinf(self.health.best):
            self.sums.setdefault("loss_at_start", loss)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        # The FLOPs are counted in the first batch behind each log; a compiled layer hides them.
        asked = None if self.cost is None else self.cost.recipe.model
        counts = asked is not None and not (self.sums or asked.llm_compile or asked.compile)
        with Flops() if counts else nullcontext() as counter:
            loss = super().training_step(*arguments, **options)
        if counter is not None:
            self.counted.append(counter.flops)
        # The Trainer adds up what this returns, and would carry one NaN to its end.
        return loss.nan_to_num(0.0, 0.0, 0.0)

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        batches, items = super().get_batch_samples(*arguments, **options)
        self.waited += time.perf_counter() - began
        if self.bad is not None:
            self.bad.take(batches, self.state.global_step + 1)
        return batches, items

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, after which the optimizer takes its step or leaves it out."""
        norm = cast(Any, super())._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.health.guard(self.state.global_step + 1, norm, self.optimizer, model)
        if self.health.in_a_row >= IN_A_ROW:
            self._give_up()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and write the steps' entries into ``log.jsonl``; ends a run whose loss is lost."""
        of_steps = "loss" in logs
        if of_steps and self.sums:
            logs |= self._interval()
            if self.bad is not None:
                logs["bad_samples"] = self.bad.settle()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self._write_log(self.state.log_history[-1:])
        if of_steps:
            self.health.note(logs)
            if self.health.astray:
                self._give_up()

    def _interval(self) -> dict[str, float]:
        """The figures of the steps since the last log, of all processes. All of them call this."""
        self.health.read()
        now = time.perf_counter()
        own = {**self.sums, "waited": self.waited, "asked": max(self.stopping, default=0)}
        row = torch.stack(
            [torch.as_tensor(v, device=self.args.device).float() for v in own.values()]
        )
        rows = self.accelerator.gather(row[None])
        total = dict(zip(own, rows.sum(0).tolist(), strict=True))
        most = dict(zip(own, rows.max(0).values.tolist(), strict=True))
        batches, seconds = total["batches"] or math.nan, now - self.began
        found = {name: total[name] / batches for name in ("loss", *COMPONENTS) if name in own}
        if math.isfinite(total.get("loss_at_start", math.nan)):
            found["loss_at_start"] = total["loss_at_start"] / len(rows)
        found["tokens_per_second"] = total["tokens"] / seconds
        found["samples_per_second"] = total["samples"] / seconds
        if self.cost is not None and self.counted:
            done = fmean(self.counted) * total["batches"]
            found["mfu"] = done / (seconds * self.cost.speed * len(rows))
        found["data_seconds"] = most["waited"]
        found["skipped_steps"] = self.health.skipped
        if most["asked"]:  # a process alone would leave the others waiting
            self.stopping = self.stopping or [int(most["asked"])]
            self.control.should_save = self.control.should_training_stop = True
        self.sums, self.began, self.waited = {}, now, 0.0
        return found

    def _write_log(self, entries: Sequence[Mapping[str, Any]], mode: str = "a") -> None:
        """Steps' entries as JSON Lines; a number that is not finite is null."""
        with (Path(str(self.args.output_dir)) / "log.jsonl").open(mode, encoding="utf-8") as file:
            for entry in entries:
                if {"loss", "eval_loss"} & {*entry}:
                    finite = {
                        name: None
                        if isinstance(value, float) and not math.isfinite(value)
                        else value
                        for name, value in entry.items()
                    }
                    file.write(json.dumps(finite) + "\n")

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        if self.stopping and self.args.world_size == 1:
            self.control.should_log = True  # several processes agree at the next log
        began = time.perf_counter()
        super()._maybe_log_save_evaluate(*arguments, **options)
        self.began += time.perf_counter() - began  # neither evaluation nor saving counts

    def onward(self) -> str:
        """What the same command would do now."""
        checkpoint = last_checkpoint(self.args)
        return "begins anew" if checkpoint is None else f"goes on from {checkpoint}"

    def _give_up(self) -> NoReturn:
        """End a run that harms its model, at the last checkpoint from which steps were finite."""
        health, train = self.health, self.recipe
        lr = self._get_learning_rate()
        losses = [
            e["loss"] for e in self.state.log_history if math.isfinite(e.get("loss", math.nan))
        ]
        what = f"the loss is {losses[-1]:.4g}, " if losses else "no loss was finite, "
        if health.in_a_row:
            what = f"{health.in_a_row} steps in a row were not finite; before them {what}"
            spoiled = f"checkpoint-{health.at - health.in_a_row}"
            folder = Path(str(self.args.output_dir)) / spoiled
            if self.args.should_save and folder.is_dir():
                folder.rename(folder.with_name(f"spoiled-{spoiled}"))
        else:
            what += f"after a best of {health.best:.4g}, "
        raise TrainingError(
            f"step {health.at}: {what}the gradient norm is {health.norm:.4g} and the learning rate "
            f"{lr:.4g}. The same command {self.onward()}; before that, set a lower train.lr (now "
            f"{train.lr:g}), more train.warmup_steps (now {train.warmup_steps}) or a lower "
            f"train.max_grad_norm (now {train.max_grad_norm:g})"
            + (", or train.bf16: false, which has more digits" if train.bf16 else "")
        )

    # --- evaluation: all processes measure the same samples --------------------------------------

    @property
    def held_out(self) -> EvalRecipe | None:
        """The recipe's ``eval``."""
        return getattr(self.eval_dataset, "recipe", None)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The figures of a recipe's ``eval``, or else Hugging Face's own evaluation.

        Training goes on with the draws that it would have without the evaluation.
        """
        if self.held_out is None:
            figures: dict[str, float] = super().evaluate(*args, **kwargs)
            if isinstance(self.model, FSDPModule):
                self.model.reshard()
            return figures
        model, measure = cast(nn.Module, self.model), cast(Any, self.eval_dataset)
        kept, device = dict(self.sums), self.args.device
        model.eval()
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), losses.alone():
            torch.manual_seed(self.args.seed)
            found = {f"eval_{name}": value for name, value in measure(self).items()}
        if isinstance(model, FSDPModule):
            model.reshard()
        self.sums = kept
        both: list[dict[str, float]] = broadcast_object_list([found])  # all processes decide alike
        (found,) = both
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the Trainer; the best model so far is saved at once, and so is one that ends here."""
        is_best = super()._determine_best_metric(metrics, trial)
        if self.held_out is not None:
            ends = self._is_over()
            self.control.should_training_stop |= ends
            self.control.should_save |= ends or (is_best and self.held_out.keep_best)
        return is_best

    def _is_over(self) -> bool:
        """Whether ``eval.patience`` evaluations in a row were no better than the best one."""
        state, patience = self.state, self.held_out and self.held_out.patience
        best = state.best_global_step or 0
        later = sum("eval_loss" in e and e["step"] > best for e in state.log_history)
        if not patience or later < patience or state.global_step >= state.max_steps:
            return False
        said = "stopped at step %d: %d evaluations were no better than that of step %d"
        logger.info(said, state.global_step, later, best)
        return True

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._is_over():  # before this start
            self.control.should_training_stop = True
        else:
            cast(Any, super())._run_epoch(*args, **kwargs)

    # --- checkpoints: what trains, in one file or in pieces -------------------------------------

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        """What trains and the optimizer's states, as far as this process holds them."""
        yield from trainable_state(self.accelerator.unwrap_model(self.model)).items()
        for state in cast(Any, self.optimizer).state.values():
            yield from ((f"the optimizer's {name}", value) for name, value in state.items())

    def check_finite(self) -> None:
        """A TrainingError, on all processes, if a number of what is saved is not finite."""
        bad = [
            name
            for name, value in self._saved()
            if isinstance(value, Tensor) and not parallel.local(value).isfinite().all()
        ]
        if self.accelerator.gather(torch.tensor([len(bad)], device=self.args.device)).any():
            name = bad[0] if bad else "what another process holds"
            raise TrainingError(
                f"step {self.state.global_step}: {name} has a number that is not finite, so it is "
                f"not saved. The same command {self.onward()}; before that, set a lower train.lr"
            )

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """As the Trainer, of a healthy model alone; leaves no half of a checkpoint."""
        health, step, last = self.health, self.state.global_step, self.state.max_steps
        health.read()
        if step >= last and (health.high or health.in_a_row >= min(IN_A_ROW, max(2, last // 4))):
            self._give_up()
        if step < last and (health.high or health.in_a_row):
            logger.warning("step %d is not healthy, so it gets no checkpoint", step)
            return
        self.check_finite()
        if self.bad is not None:
            self.bad.settle()  # a run that goes on from here lists what was bad until here
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
        needed = sum(v.nbytes for _, v in self._saved() if isinstance(v, Tensor))
        with room(folder, needed if self.args.should_save else 0, self.onward):
            self.writer.finish()  # the one before
            try:
                super()._save_checkpoint(*arguments, **options)
            except BaseException:
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights that train. All processes call this; one of them writes.

        Pieces are written with the optimizer's.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if self.recipe.checkpoint_format != "whole":
            return
        state = trainable_state(self.accelerator.unwrap_model(self.model))
        gathered: dict[str, Tensor] = {}
        for name, parameter in state.items():
            value = parallel.whole(parameter)
            if self.args.should_save:
                gathered[name] = value.cpu().contiguous()
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(gathered, folder / WEIGHTS, metadata={"format": "pt"})

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Nothing is deferred: whole gradients of several batches need more memory than traffic."""
        return nullcontext()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.recipe.checkpoint_format != "whole":
            self.writer.write(Path(output_dir), *self._held())
        elif self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.recipe.is_split:
            state = parallel.optimizer_state(self.optimizer)
            if self.args.should_save:
                torch.save(state, Path(output_dir) / OPTIMIZER)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _save_rng_state(self, output_dir: str) -> None:
        """As the Trainer; ``trainer_state.json``, written next, says that all ranks are done."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        apart = checkpoint is not None and pieces.is_in_pieces(Path(checkpoint))
        if checkpoint is None or not (self.recipe.is_split or apart):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        if apart:
            model, optimizer = self._held()
            pieces.read_states(Path(checkpoint), model, optimizer)
            for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = lr
            return
        files: Any = {"map_location": "cpu", "weights_only": True, "mmap": True}
        state = torch.load(Path(checkpoint) / OPTIMIZER, **files)
        parallel.load_optimizer_state(self.optimizer, state)

    def _held(self) -> tuple[nn.Module, Any]:
        """The model and the optimizer themselves, without accelerate's wrappers."""
        optimizer: Any = self.optimizer
        return self.accelerator.unwrap_model(self.model), getattr(optimizer, "optimizer", optimizer)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        prepare: Any = super()._prepare_for_training
        own = self.is_deepspeed_enabled and resume_from_checkpoint is not None
        self.health = Health(self.state.log_history)
        if self.is_world_process_zero():  # without what came after the checkpoint
            self._write_log(self.state.log_history, "w")
        self.began = time.perf_counter()
        prepared = prepare(max_steps, train_dataloader, None if own else resume_from_checkpoint)
        parallel.check_parallel(self.model_wrapped, self.recipe)
        if self.recipe.parallel == "zero3":
            parallel.fetch_by_layer(self.model_wrapped)
        if own:
            parallel.load_deepspeed(self.model_wrapped, Path(resume_from_checkpoint))
            self._load_optimizer_and_scheduler(str(resume_from_checkpoint))
        return prepared

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Read the weights that train; DeepSpeed reads its own files instead."""
        if self.is_deepspeed_enabled:
            return
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        if pieces.is_in_pieces(Path(resume_from_checkpoint)):
            pieces.read_weights(Path(resume_from_checkpoint), target)
            return
        state = safetensors.torch.load_file(Path(resume_from_checkpoint) / WEIGHTS)
        own = trainable_state(target)
        pieces.check_names(Path(resume_from_checkpoint), set(state), set(own))
        for name, value in state.items():
            parallel.assign(own[name], value)

    def _load_best_model(self) -> None:
        """Read the weights that trained; the Trainer would want the frozen ones too."""
        best = str(self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled:
            parallel.load_deepspeed(self.model_wrapped, Path(best))
        self._load_from_checkpoint(best)


def last_checkpoint(arguments: TrainingArguments) -> Path | None:
    """The newest complete checkpoint, or None.

    The Trainer writes ``trainer_state.json`` last, after every rank's files but pieces that are
    written meanwhile. An incomplete folder is skipped here, and written again later.
    """
    found = Path(str(arguments.output_dir)).glob("checkpoint-*")
    numbered = {int(path.name[11:]): path for path in found if path.name[11:].isdigit()}
    for _, path in sorted(numbered.items(), reverse=True):
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_bytes())
            if pieces.is_whole(path):
                return path
        logger.warning("%s is incomplete, so it is not used", path)
    return None


def train(trainer: MicoTrainer, recipe: Run, title: str, cost: Estimate | None = None) -> None:
    """Train to the end, from the last checkpoint if there is one.

    Writes ``log.jsonl`` (every logged step, as the run goes) and, at the end, ``loss.png`` into the
    output folder. A signal ends a run with a checkpoint and a TrainingError.
    """
    output, kept, trainer.cost = recipe.output, recipe.output / "recipe.json", cost
    samples = examples_per_step(trainer.args)
    data = states(recipe.data) if isinstance(recipe, Recipe) else []
    checkpoint = last_checkpoint(trainer.args)
    if checkpoint is not None:
        logger.info("%s: resuming from %s", output, checkpoint.name)
        before = json.loads(kept.read_bytes()) if kept.is_file() else {}
        _check_samples(before.pop(SAMPLES, samples), samples, checkpoint)
        if before.pop(DATA, data) != data:
            said = f"{output}: the data have changed since this run began"
            if not recipe.train.changed_data:
                raise ConfigError(
                    f"{said}; choose another output, or set train.changed_data to true to go on "
                    "with the new data at the same step"
                )
            logger.warning("%s", said)
        with suppress(ValidationError):  # an older version may have had other keys
            before = type(recipe).model_validate(before).model_dump(mode="json")
        changed = ", ".join(changes(before, recipe.model_dump(mode="json")) if before else ())
        if changed:
            logger.warning(
                "these keys of the recipe have changed since this run began: %s", changed
            )
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        content = {SAMPLES: samples, DATA: data} | recipe.model_dump(mode="json")
        write_json(kept, content)  # as a whole: a slower process may be about to read it
    if trainer.bad is not None:
        step = 0 if checkpoint is None else int(checkpoint.name[11:])
        trainer.bad.begin(step, trainer.is_world_process_zero())
    with stop_signals() as trainer.stopping, room(output, 0, trainer.onward):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            trainer.writer.finish()
        except (Exception, KeyboardInterrupt) as error:
            if not trainer.stopping or isinstance(error, TrainingError):
                raise
            raise _stopped(trainer) from error
        if trainer.stopping and trainer.state.global_step < trainer.state.max_steps:
            trainer.accelerator.wait_for_everyone()  # torchrun ends all when one has ended
            raise _stopped(trainer)
        trainer.check_finite()
        held, best = trainer.held_out, trainer.state.best_model_checkpoint
        if held is not None and held.keep_best and best is not None:
            trainer._load_best_model()
            figure = f"eval_{held.metric} {trainer.state.best_metric:.4g}"
            logger.info("%s: the weights are those of %s, by %s", output, Path(best).name, figure)
        if trainer.is_world_process_zero():
            history = cast(Sequence[Mapping[str, float]], trainer.state.log_history)
            plot_losses(history, output / "loss.png", title)


def _stopped(trainer: MicoTrainer) -> TrainingError:
    number, state = trainer.stopping[0], trainer.state
    return TrainingError(
        f"stopped by {signal.Signals(number).name} after step {state.global_step} of "
        f"{state.max_steps}; the same command {trainer.onward()}",
        128 + number,
    )


def _check_samples(before: int, now: int, checkpoint: Path) -> None:
    """A ConfigError if a run would go on at another sample than the one after its last."""
    if before != now:
        raise ConfigError(
            f"{checkpoint} was trained with {before} samples a step, over all processes, but now "
            f"there are {now}: with as many processes as now, set train.batch_size and "
            f"train.accumulation so that batch_size x accumulation x processes is {before}, or "
            "choose another output"
        )
