"""``mico-chat evaluate ITEMS.jsonl``: accuracy per skill, with controls that say whence it comes.

The same questions are asked with their media (``full``), without (``withheld``), with another
item's media of the same kinds (``swapped``), and with one of the encoder's paths switched off
(``without-concepts``, ``without-grid``). A model that looks and listens falls to chance in the
second and the third. ``base-llm`` asks the language model as it was before tuning: what is said
without media should not be worse than that. ``text.jsonl`` beside this file holds plain questions.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mico_chat.assistant import Assistant
from mico_chat.checkpoint import chat_config, model_folder
from mico_chat.engine.base import GenerationOptions
from mico_chat.engine.load import (
    ENGINES,
    MAX_RUNNING,
    EngineOptions,
    asked_quantization,
    load_assistant,
    transformers_engine,
)
from mico_chat.errors import ConfigError, DataError
from mico_chat.evaluation.items import Item, read_items
from mico_chat.evaluation.scoring import is_right
from mico_chat.folders import LLM
from mico_chat.media import MediaLimits, decode
from mico_chat.messages import MediaPart, Message

CONTROLS = ("full", "withheld", "swapped", "without-concepts", "without-grid", "base-llm")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that only items have."""
    group = parser.add_argument_group("items")
    group.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS[:-1]))
    group.add_argument("--skills", nargs="+", help="of these skills alone")
    group.add_argument("--max-tokens", type=int, default=24)
    group.add_argument("--engine", default="transformers", choices=ENGINES, help="what runs it")
    group.add_argument("--quantization", help="int8, nf4 (transformers); Q8_0, .. (llamacpp)")
    group.add_argument("--load-in-4bit", action="store_true", help="--quantization nf4")
    group.add_argument("--load-in-8bit", action="store_true", help="--quantization int8")


def run(
    files: Sequence[Path], options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The evaluation of the items of ``files`` that the command line asks for."""
    quantization = asked_quantization(
        options.quantization, options.load_in_4bit, options.load_in_8bit
    )
    items = [item for path in files for item in read_items(path)]
    if options.skills:
        items = [item for item in items if item.skill in options.skills]
    if not items:
        raise DataError(files[0], None, "no items there")
    if options.limit:
        items = _first_of_each(items, options.limit)
    return evaluate(
        items,
        options.model,
        EngineOptions(
            options.engine,
            quantization,
            options.dtype,
            max_running=options.batch_size,
            context_cache_bytes=0,
        ),
        controls=options.controls,
        max_tokens=options.max_tokens,
    )


def _first_of_each(items: Sequence[Item], limit: int) -> list[Item]:
    taken: dict[str, int] = defaultdict(int)
    kept = []
    for item in items:
        taken[item.skill] += 1
        if taken[item.skill] <= limit:
            kept.append(item)
    return kept


def evaluate(
    items: Sequence[Item],
    model_name: str,
    options: EngineOptions,
    *,
    controls: Sequence[str] = CONTROLS,
    max_tokens: int = 24,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracy per skill and control, and every answer.

    Returns:
        a report ``{"model", "machine", "skills": {skill: {"n": .., control: accuracy}}}`` and one
        record an answer.
    """
    if "base-llm" in controls and chat_config(model_folder(model_name)).base_llm in (None, LLM):
        raise ConfigError("the control base-llm needs a checkpoint whose base_llm is not its own")
    generation = GenerationOptions(max_tokens=max_tokens)
    right: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(controls, 0))
    answers: list[dict[str, Any]] = []
    with ExitStack() as stack:
        assistant = load_assistant(model_name, _InProcess(), options)
        stack.callback(assistant.close)
        model = assistant.encoder.model
        # The untuned LLM comes last, for it replaces the tuned one.
        for control in sorted(controls, key=CONTROLS.index):
            model.use_concepts = control != "without-concepts"
            model.use_grid = control != "without-grid"
            if control == "base-llm":
                assistant = _untuned(assistant, options)
                stack.callback(assistant.close)
            shown = _media_shown(items, control)
            conversations = [[_message(*pair)] for pair in zip(items, shown, strict=True)]
            at_once = options.max_running or MAX_RUNNING
            texts = _answered(assistant, conversations, generation, at_once, control)
            for item, text in zip(items, texts, strict=True):
                ok = is_right(text, item.accept, item.choices)
                right[item.skill][control] += ok
                answers.append(
                    {
                        "id": item.id,
                        "skill": item.skill,
                        "control": control,
                        "message": item.message,
                        "answer": text,
                        "accept": item.accept,
                        "right": ok,
                    }
                )
    counts: dict[str, int] = defaultdict(int)
    for item in items:
        counts[item.skill] += 1
    skills = {
        skill: {"n": counts[skill], **{c: right[skill][c] / counts[skill] for c in controls}}
        for skill in sorted(counts)
    }
    return {"model": str(model_name), "machine": machine(), "skills": skills}, answers


def _answered(
    assistant: Assistant,
    conversations: Sequence[Sequence[Message]],
    generation: GenerationOptions,
    batch_size: int,
    control: str,
) -> Iterator[str]:
    """Answers in order, ``batch_size`` at the same time: their media must fit into memory."""
    for start in tqdm(range(0, len(conversations), batch_size), desc=control, unit="batch"):
        batch = conversations[start : start + batch_size]
        yield from (answer.text for answer in assistant.answer_all(batch, generation))


def _untuned(assistant: Assistant, options: EngineOptions) -> Assistant:
    """The assistant with the base LLM as it was before tuning, in the transformers engine."""
    from transformers import AutoModelForCausalLM

    from mico_chat.base_llm import base_llm_path

    model = assistant.encoder.model
    path = base_llm_path(model.config.base_llm)
    assistant.engine.close()
    llm = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    model.attach_llm(llm.to(model.device).eval())
    engine = transformers_engine(model, assistant.processor, options)
    return Assistant(engine, assistant.encoder, assistant.processor, name=assistant.name)


class _InProcess:
    """Decodes in this process: evaluation media are the user's own."""

    def __init__(self) -> None:
        self.limits = MediaLimits()

    def decode(self, kind: Any, source: Any, *, name: str = "", depth_scale: float = 0.001) -> Any:
        """See :class:`mico_chat.media.decoder.Decoder`."""
        name = name or str(source)
        return decode(kind, source, name=name, limits=self.limits, depth_scale=depth_scale)


def _message(item: Item, shown: Item) -> Message:
    parts = [MediaPart(medium.kind, medium.path) for medium in shown.media]
    return Message.user(*parts, item.message)


def _media_shown(items: Sequence[Item], control: str) -> list[Item]:
    """For each item, the item whose media are shown with its question."""
    if control == "withheld":
        return [item.model_copy(update={"media": ()}) for item in items]
    if control != "swapped":
        return list(items)
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[(item.skill, *(m.kind for m in item.media))].append(i)
    shown = list(items)
    for members in groups.values():
        for place, i in enumerate(members):
            others = members[place + 1 :] + members[:place]
            different = [j for j in others if items[j].accept != items[i].accept]
            # Any other medium where answers are closed: its truth must not be told by the swap.
            pool = others if items[i].choices else different
            if pool:
                shown[i] = items[pool[(7 * place) % len(pool)]]
    return shown


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    skills: dict[str, dict[str, float]] = report["skills"]
    controls = [key for key in next(iter(skills.values())) if key != "n"]
    lines = ["| skill | n | " + " | ".join(controls) + " |", "|---|---|" + "---|" * len(controls)]
    for skill, row in skills.items():
        cells = " | ".join(f"{100 * row[c]:.0f} %" for c in controls)
        lines.append(f"| {skill} | {int(row['n'])} | {cells} |")
    return "\n".join(lines)


def machine() -> str:
    """What a figure was measured on."""
    import torch
    import transformers

    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
