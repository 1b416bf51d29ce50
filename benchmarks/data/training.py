"""Training steps beside other projects' loops: the same model, batch, data and machine.

Stage 1 beside open_clip's training program, in samples a second: the same ViT of timm, the same
pictures, text towers of the same width and depth. Stages 2 and 3 beside a plain Hugging Face
Trainer, in tokens a second: the model's own modules and data, the samples in their order, padded to
the longest of a batch, logits at every place, as LLaVA and nanoVLM train. Padding does not count.
Packed rows stand beside our own padded ones, whose batches are sorted by length.
Data are made here; every system runs in a process of its own, and they take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import yaml
from transformers import Trainer, TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from benchmarks.engines.systems import DEVICE
from benchmarks.harness import Ratio, Report, turns
from benchmarks.media import jpeg, soft_colours
from mico_chat.checkpoints.folders import base_llm_path
from mico_chat.engine.cpu import usable_cores
from mico_training import stages
from mico_training.build_model import add_lora, build_chat, hold_encoder
from mico_training.data.batches import ChatCollator
from mico_training.data.examples import CaptionDataset
from mico_training.data.media import MediaLoader
from mico_training.data.mixture import open_mixture
from mico_training.data.talk.conversations import ConversationDataset
from mico_training.recipe import Stage2Run, Stage3Run, load_recipe
from mico_training.trained import train_only
from mico_training.trainer import draws, training_arguments

VIT = "vit_small_patch16_224"
WIDTH, LAYERS, HEADS = 384, 12, 6  # of the text towers, as in open_clip's ViT-S-16
BATCH, STEPS, SKIPPED = 16, 8, 2
SAMPLES = BATCH * STEPS
TALK_BATCH, TALK_STEPS = 8, 10
WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))["words"].split()
LOOPS = {
    "stage 1": ("mico-chat train-stage1, contrastive alone", "open_clip", "samples"),
    "stage 2": ("mico-chat train-stage2", "Trainer, captions", "tokens"),
    "stage 3": ("mico-chat train-stage3", "Trainer, conversations", "tokens"),
    "stage 2, packed": ("train-stage2, train.packing", "train-stage2, sorted by length", "tokens"),
    "stage 3, packed": ("train-stage3, train.packing", "train-stage3, sorted by length", "tokens"),
}
PACKED: dict[str, Any] = {"packing": True, "group_by_length": False}


def sentence(generator: np.random.Generator, words: int) -> str:
    return " ".join(generator.choice(np.array(WORDS), words)).capitalize() + "."


def write_data(folder: Path) -> None:
    """Captioned pictures, as JSON Lines and as a table, and conversations about them.

    Captions have 6 to 20 words. Answers have a median of 30 and a long tail, one to three turns.
    """
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    lines: dict[str, list[dict[str, Any]]] = {"captions": [], "talk": []}
    listed = ["filepath\ttitle"]
    for number in range(SAMPLES):
        picture = jpeg(soft_colours(generator, (320, 240)), 75)
        caption = sentence(generator, int(generator.integers(6, 21)))
        name = f"pictures/{number}.jpg"
        (folder / name).write_bytes(picture)
        lines["captions"].append({"image": name, "caption": caption})
        listed.append(f"{folder / name}\t{caption}")
        turns = []
        for _ in range(generator.integers(1, 4)):
            length = int(np.clip(generator.lognormal(np.log(30), 0.9), 3, 150))
            turns.append({"role": "user", "content": sentence(generator, 10)})
            turns.append({"role": "assistant", "content": sentence(generator, length)})
        lines["talk"].append({"image": name, "messages": turns})
    (folder / "captions.tsv").write_text("\n".join(listed) + "\n", encoding="utf-8")
    for name, records in lines.items():
        text = "\n".join(map(json.dumps, records))
        (folder / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")


# --- the systems, each called in a process of its own --------------------------------------------


def recipe(stage: str, folder: Path, **train: Any) -> Path:
    """The recipe of a stage as a file."""
    stage = stage.partition(",")[0]
    number = stage[-1]
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))[stage]
    content["train"] |= train
    content["output"] = str(folder / f"out-{number}")
    source = folder / ("talk.jsonl" if number == "3" else "captions.jsonl")
    content["data"] = [{"path": str(source), "kind": "jsonl"}]
    if number == "1":
        content["train"] |= {"batch_size": BATCH, "steps": STEPS}
    else:
        content["model"]["llm"] = str(base_llm_path("smollm2-135m-instruct"))
        content["train"] |= {"batch_size": TALK_BATCH, "steps": TALK_STEPS}
    path = folder / f"{stage.replace(' ', '')}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


class Clock(TrainerCallback):
    """Notes seconds and tokens at the end of each step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.append((time.perf_counter(), int(state.num_input_tokens_seen)))

    def rate(self, samples: int | None = None) -> float:
        """What a second brings after the first steps: samples, or tokens."""
        (begun, before), (ended, after) = self.marks[SKIPPED - 1], self.marks[-1]
        steps = len(self.marks) - SKIPPED
        return (steps * samples if samples else after - before) / (ended - begun)


def ours(stage: str, folder: Path, **train: Any) -> float:
    """A stage as its command runs it."""
    clock = Clock()
    callbacks: list[Any] = DEFAULT_CALLBACKS
    callbacks.append(clock)
    written = recipe(stage, folder, **train)
    getattr(stages, f"train_{written.stem}")(written)
    return clock.rate(BATCH if stage == "stage 1" else None)


class Plain(torch.nn.Module):
    """A chat model, with the language model's own loss."""

    main_input_name = "input_ids"

    def __init__(self, chat: Any) -> None:
        super().__init__()
        self.chat = chat

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any, **media: Any) -> Any:
        embeds = self.chat.embed_prompt(input_ids, media)
        return self.chat.llm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)


def plain_trainer(stage: str, folder: Path) -> float:
    """The same model and data under a plain Trainer."""
    kind: Any = Stage2Run if stage == "stage 2" else Stage3Run
    run = load_recipe(kind, recipe(stage, folder))
    arguments = training_arguments(run)
    chat = build_chat(run.model)
    train_only(chat.model, ["bridge"])
    mixture = open_mixture(run.data, "caption" if kind is Stage2Run else "conversation", 0)
    examples: Any = CaptionDataset(mixture, draws(arguments), 0.0)
    if kind is Stage3Run:
        add_lora(chat.model, run.stage3.lora)
        examples = ConversationDataset(mixture, draws(arguments), run.stage3.max_turns)
    hold_encoder(chat.model, run.model)
    loader, clock = MediaLoader(chat.processor.preprocessing), Clock()
    Trainer(
        model=Plain(chat.model),
        args=arguments,
        train_dataset=examples,
        data_collator=ChatCollator(chat.processor, loader, run.train.max_length),
        callbacks=[clock],
    ).train()
    return clock.rate()


def open_clip(stage: str, folder: Path) -> float:
    """open_clip's training program, with its tokenizer and its 77 places of text."""
    import open_clip as library  # the extra "bench" installs it
    from open_clip_train import train
    from open_clip_train.main import main as program

    tower = {"context_length": 77, "vocab_size": 49408}
    sizes = {"width": WIDTH, "heads": HEADS, "layers": LAYERS}
    vision = {"timm_model_name": VIT, "timm_model_pretrained": False, "timm_pool": "token"}
    vision |= {"timm_proj": "linear", "image_size": 224}
    config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": tower | sizes}
    (folder / "beside.json").write_text(json.dumps(config), encoding="utf-8")
    library.add_model_config(folder / "beside.json")
    ended: list[float] = []
    whole = train.backward

    def marked(*arguments: Any) -> None:
        """A step's backward pass; the optimizer's step stands between two marks."""
        whole(*arguments)
        ended.append(time.perf_counter())

    train.backward = marked
    program(
        [
            *("--train-data", str(folder / "captions.tsv"), "--dataset-type", "csv"),
            *("--batch-size", str(BATCH), "--epochs", "1"),
            *("--model", "beside", "--precision", "amp_bf16", "--device", DEVICE, "--workers", "1"),
            *("--logs", str(folder / "logs"), "--save-frequency", "0", "--warmup", "10"),
            *("--lr", "1e-4", "--grad-clip-norm", "1.0"),
        ]
    )
    return (len(ended) - SKIPPED) * BATCH / (ended[-1] - ended[SKIPPED - 1])


# --- the race ------------------------------------------------------------------------------------

SYSTEMS = {"ours": ours, "open_clip": open_clip, "trainer": plain_trainer}
SYSTEMS |= {"packed": partial(ours, **PACKED)}
RACES = {"stage 1": ("ours", "open_clip"), "stage 2": ("ours", "trainer")}
RACES |= {"stage 3": RACES["stage 2"]}


def rate_of(system: str, stage: str, folder: Path) -> float:
    """What a system does a second, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "training", "--one", system, "--stage", stage]
    env = os.environ | {"OMP_NUM_THREADS": str(usable_cores())}
    with tempfile.TemporaryDirectory(dir=folder) as own:
        for path in folder.iterdir():
            if not path.samefile(own):
                (Path(own) / path.name).symlink_to(path)
        command += ["--data", own]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{system}, {stage}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    print(stage, system, done.stdout.split()[-1], flush=True)
    return float(done.stdout.split()[-1])


def measure(
    repeats: int = 3,
    stage: Annotated[str | None, f"one of {', '.join(LOOPS)}"] = None,
    one: Annotated[str | None, f"one of {', '.join(SYSTEMS)}, on --data"] = None,
    data: Path | None = None,
) -> Iterator[Report]:
    if one is not None and stage is not None and data is not None:
        print(SYSTEMS[one](stage, data), flush=True)
        return
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as temporary:
        write_data(Path(temporary))
        ways = {
            (name, system): partial(rate_of, system, name, Path(temporary))
            for name in LOOPS
            for system in RACES.get(name, ("packed", "ours"))
            if stage in (None, name)
        }
        found = turns(ways, repeats, warm=0)
    for name in dict.fromkeys(name for name, _ in found):
        our_name, their_name, unit = LOOPS[name]
        both = [rates for (at, _), rates in found.items() if at == name]
        ours, theirs = map(statistics.median, both)
        cells = [f"{statistics.median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in both]
        ratio = f"{ours / theirs:.2f}"
        rows.append([name, f"{unit}/s", our_name, cells[0], their_name, cells[1], ratio])
        measured = f"training, {name}", ours, f"{unit}/s", their_name, theirs, 1.2
        ratios.append(Ratio.beside_of(*measured))
    sizes = {"vit": VIT, "layers": LAYERS, "width": WIDTH, "batch": BATCH, "talk_batch": TALK_BATCH}
    yield Report({"rows": rows, **sizes}, ratios)
