"""Is the estimate of a training step's memory right? Replicas of the 7B path, measured.

It trains replicas with random weights for a few steps of stage 3, each in a process of its own. It
writes how much the resident memory of each process grew at most, beside the estimate of
:mod:`mico_training.estimate`, which knows the configurations alone.

The process has trained a tiny model before, so that libraries are loaded and kernels compiled. The
growth counts from there to the highest mark while the steps ran; reading the weights, which takes
more for a moment, is left out. glibc is told to give freed blocks back.
"""

import ctypes
import gc
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.data.training import Clock
from benchmarks.harness import Report
from benchmarks.processes import forget_peak, memory
from mico_training.build_model import add_lora, build_chat, hold_encoder
from mico_training.estimate import estimate
from mico_training.recipe import Stage3Run
from mico_training.trained import train_only
from mico_training.trainer import MicoTrainer, training_arguments

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
TOKENS = 256
"""Vocabulary of the replicas' tokenizer; their language models' is larger."""


@dataclass(frozen=True)
class Replica:
    """A model of the 7B path in small, and how it trains."""

    name: str
    encoder: str
    hidden: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    quantization: str | None = None
    again: bool = False
    full: bool = False


REPLICAS = (
    Replica("60 M", "eva02_tiny_patch14_224", 512, 12, 8192, 4, 512),
    Replica("150 M", "eva02_small_patch14_224", 768, 14, 8192, 4, 512, again=True),
    Replica("150 M", "eva02_small_patch14_224", 768, 14, 8192, 4, 512, "nf4"),
    Replica("400 M", "eva02_small_patch14_224", 1024, 24, 32000, 2, 512),
    Replica("400 M", "eva02_small_patch14_224", 1024, 24, 32000, 4, 512, "nf4", again=True),
    Replica("150 M", "eva02_small_patch14_224", 768, 14, 8192, 2, 256, full=True),
)
TINY = Replica("tiny", "eva02_tiny_patch14_224", 64, 2, 512, 2, 64, "nf4", again=True)


def recipe(replica: Replica, folder: Path) -> Stage3Run:
    """Stage 3's recipe for a replica whose language model lies in ``folder/llm``."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    content["output"] = str(folder / "out")
    model, train = content["model"], content["train"]
    model["llm"] = str(folder / "llm")
    model["llm_dtype"] = "float32" if replica.full else "bfloat16"
    model["llm_quantization"] = replica.quantization
    model["options"]["encoder_config.architecture"] = replica.encoder
    train["batch_size"], train["max_length"] = replica.batch, replica.length
    train["gradient_checkpointing"] = replica.again
    if replica.full:
        content["stage3"] = {"full": True, "lora": None}
    return Stage3Run.model_validate(content)


def write_llm(replica: Replica, folder: Path) -> None:
    names = ["<pad>", "<s>", "</s>", *(f"t{n}" for n in range(TOKENS - 3))]
    words = WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>")
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer = Tokenizer(words)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **marks
    ).save_pretrained(folder / "llm")
    config = LlamaConfig(
        vocab_size=replica.vocabulary,
        hidden_size=replica.hidden,
        intermediate_size=replica.hidden * 11 // 4,
        num_hidden_layers=replica.layers,
        num_attention_heads=replica.hidden // 64,
        num_key_value_heads=replica.hidden // 64,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "llm")


def batches(replica: Replica, config: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of the expected sizes: a clip of 8 frames and text in every sample."""
    b, s = replica.batch, replica.length
    while True:
        ids = torch.randint(3, TOKENS, (b, s))
        n = config.context_length("video", 8)
        ids[:, 2 : 2 + n] = config.context_token_id
        labels = ids.clone()
        labels[:, : s // 2] = -100
        yield {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(8 * b, 3, 224, 224),
            "media_kind": torch.full((b,), 2),
            "media_units": torch.full((b,), 8),
            "media_row": torch.arange(b),
        }


def train(replica: Replica, folder: Path) -> dict[str, Any]:
    """Some steps of stage 3; the highest resident memory while they ran, and seconds a step."""
    run = recipe(replica, folder)
    arguments = training_arguments(run)
    chat = build_chat(run.model)
    train_only(chat.model, ["bridge", *(["llm"] if replica.full else [])])
    if run.stage3.lora is not None:
        add_lora(chat.model, run.stage3.lora)
    hold_encoder(chat.model, run.model)
    clock = Clock()
    trainer = MicoTrainer(
        model=chat.model,
        args=arguments,
        train=run.train,
        train_dataset=torch.utils.data.Dataset(),
        data_collator=dict,
        callbacks=[clock],
    )
    made: Any = batches(replica, chat.model.config)
    trainer.get_train_dataloader = lambda: made  # type: ignore[method-assign]
    give_back_memory()
    forget_peak()
    trainer.train()
    (begun, _), (ended, _) = clock.marks[-2:]
    return {"highest": memory(["VmHWM"]), "seconds": ended - begun}


def give_back_memory() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measured(replica: Replica, folder: Path) -> dict[str, Any]:
    """Train a replica in this process, after the tiny one."""
    write_llm(TINY, folder / "tiny")
    train(TINY, folder / "tiny")
    give_back_memory()
    before = memory(["VmRSS"])
    found = train(replica, folder / "replica")
    return found | {"growth": found["highest"] - before}


def row_of(replica: Replica) -> list[str]:
    """A replica's growth in a process of its own, beside its estimate."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(1, spawn) as own_process:
        folder = Path(temporary)
        write_llm(replica, folder / "replica")
        found = own_process.submit(measured, replica, folder).result()
        said = estimate(recipe(replica, folder / "replica"))
    how = "all of it, float32" if replica.full else f"LoRA on {replica.quantization or 'bf16'}"
    return [
        replica.name,
        f"{sum(n for n, _, _ in said.step.weights.values()) / 1e6:.0f} M",
        how + (", layers run again" if replica.again else ""),
        f"{replica.batch} x {replica.length}",
        f"{said.peak / 1e6:.0f}",
        f"{found['growth'] / 1e6:.0f}",
        f"{said.peak / found['growth'] - 1:+.0%}",
        f"{said.seconds:.1f} s",
        f"{found['seconds']:.1f} s",
    ]


def measure(only: Annotated[list[int] | None, "numbers of replicas, from 0"] = None) -> Report:
    os.environ.update(MALLOC)  # the processes that are started inherit it
    rows = []
    for replica in [REPLICAS[n] for n in only] if only else REPLICAS:
        rows.append(row_of(replica))
        print(*rows[-1], flush=True)
    return Report({"rows": rows, "threads": torch.get_num_threads()})
