"""Text-only conversations for stage 3: the base LLM's own answers to varied plain requests.

Tuning on media alone makes a language model forget how to chat. So its own greedy answers from
before the tuning are targets too (self-distillation).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
import yaml
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mico_chat.checkpoints.base_llm import base_llm_path

WORDS = Path(__file__).with_name("text_turns.yaml")
GAPS = ("country", "person", "topic", "kind", "adjective")


def requests(n: int, seed: int) -> list[str]:
    """``n`` different requests at most, in random order, the plain ones among them."""
    words: dict[str, list[str]] = yaml.safe_load(WORDS.read_text(encoding="utf-8"))
    rng = random.Random(seed)
    found = dict.fromkeys(words["plain"])
    for _ in range(20 * n):
        if len(found) >= n:
            break
        thing, other = rng.sample(words["thing"], 2)
        gaps = {name: rng.choice(words[name]) for name in GAPS}
        numbers = {"a": rng.randint(1, 20), "b": rng.randint(1, 12)}
        template = rng.choice(words["templates"])
        found[template.format(thing=thing, other=other, **gaps, **numbers)] = None
    texts = list(found)[:n]
    rng.shuffle(texts)
    return texts


def answers(llm_name: str, texts: list[str], batch_size: int, tokens: int) -> Iterator[str]:
    """The LLM's greedy answers, cut at their last whole sentence where they are too long."""
    folder = base_llm_path(llm_name)
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    for start in tqdm(range(0, len(texts), batch_size), desc="text turns", unit="batch"):
        prompts = [
            cast(
                str,
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                ),
            )
            for text in texts[start : start + batch_size]
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            ids = llm.generate(**batch, max_new_tokens=tokens, do_sample=False)
        for row in ids[:, batch["input_ids"].shape[1] :]:
            text = cast(str, tokenizer.decode(row, skip_special_tokens=True)).strip()
            ended = bool((row == tokenizer.eos_token_id).any())
            yield text if ended else text[: text.rfind(".") + 1]


def main(output: Path, n: int = 1500, seed: int = 0, llm: str = "smollm2-135m-instruct") -> None:
    texts = requests(n, seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for text, answer in zip(texts, answers(llm, texts, 64, 64), strict=True):
            if answer:
                turns = [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": answer},
                ]
                file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
