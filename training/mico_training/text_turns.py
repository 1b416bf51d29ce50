"""Text-only conversations for stage 3: the base LLM's own answers to varied plain requests.

Tuning on media alone makes a language model forget to chat. What it is to keep is what it said
before, so its own greedy answers are the targets (self-distillation).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mico_chat.base_llm import base_llm_path

THINGS = [
    "apple",
    "bridge",
    "butterfly",
    "calendar",
    "camera",
    "candle",
    "castle",
    "cloud",
    "compass",
    "computer",
    "desert",
    "dictionary",
    "dolphin",
    "drum",
    "eclipse",
    "elephant",
    "engine",
    "feather",
    "forest",
    "galaxy",
    "garden",
    "glacier",
    "guitar",
    "hammer",
    "hospital",
    "island",
    "jungle",
    "kettle",
    "kite",
    "ladder",
    "library",
    "lighthouse",
    "lion",
    "magnet",
    "map",
    "microscope",
    "mirror",
    "moon",
    "mountain",
    "museum",
    "ocean",
    "owl",
    "painting",
    "piano",
    "planet",
    "poem",
    "pyramid",
    "rainbow",
    "river",
    "robot",
    "school",
    "shark",
    "shadow",
    "spider",
    "star",
    "submarine",
    "telescope",
    "tiger",
    "tornado",
    "train",
    "tree",
    "umbrella",
    "violin",
    "volcano",
    "whale",
    "wheel",
    "window",
    "winter",
    "yogurt",
    "zebra",
]
COUNTRIES = [
    "Argentina",
    "Australia",
    "Austria",
    "Belgium",
    "Brazil",
    "Canada",
    "Chile",
    "China",
    "Cuba",
    "Denmark",
    "Egypt",
    "Finland",
    "France",
    "Germany",
    "Greece",
    "Hungary",
    "Iceland",
    "India",
    "Indonesia",
    "Iran",
    "Ireland",
    "Israel",
    "Italy",
    "Japan",
    "Kenya",
    "Mexico",
    "Morocco",
    "Nepal",
    "Norway",
    "Pakistan",
    "Peru",
    "Poland",
    "Portugal",
    "Russia",
    "Spain",
    "Sweden",
    "Switzerland",
    "Thailand",
    "Turkey",
    "Ukraine",
    "Vietnam",
]
PEOPLE = [
    "Albert Einstein", "Marie Curie", "Isaac Newton", "William Shakespeare", "Leonardo da Vinci",
    "Mozart", "Cleopatra", "Galileo", "Charles Darwin", "Jane Austen", "Nelson Mandela",
    "Alexander the Great", "Beethoven", "Ada Lovelace", "Vincent van Gogh", "Aristotle",
]  # fmt: skip
TOPICS = [
    "gravity",
    "photosynthesis",
    "electricity",
    "democracy",
    "evolution",
    "music",
    "history",
    "money",
    "friendship",
    "sleep",
    "weather",
    "language",
    "water",
    "energy",
    "health",
    "sport",
    "cooking",
    "mathematics",
    "art",
    "science",
    "inflation",
    "recycling",
    "magnetism",
    "atoms",
    "vaccines",
    "earthquakes",
    "poetry",
    "chess",
    "gardening",
]
KINDS = [
    "fruits",
    "animals",
    "colors",
    "countries",
    "vegetables",
    "planets",
    "sports",
    "instruments",
    "tools",
    "flowers",
    "birds",
    "languages",
    "oceans",
    "rivers",
    "metals",
    "jobs",
]
ADJECTIVES = [
    "happy",
    "big",
    "fast",
    "cold",
    "brave",
    "bright",
    "quiet",
    "old",
    "easy",
    "strong",
    "clever",
    "sad",
    "rich",
    "calm",
]

TEMPLATES = [
    "What is a {thing}?", "What is a {thing} used for or known for?", "Describe a {thing} briefly.",
    "Write one sentence about a {thing}.", "Tell me a fun fact about a {thing}.",
    "Use the word {thing} in a sentence.", "Write a short poem about a {thing}.",
    "What is the capital of {country}?", "Where is {country}?", "What language do they speak in {country}?",
    "Name a famous city in {country}.", "Who was {person}?", "Why is {person} famous?",
    "Explain {topic} in simple words.", "Why does {topic} matter?", "Give me one tip about {topic}.",
    "What is {topic}?", "Name three {kind}.", "List five {kind}.", "Give me an example of {kind}.",
    "What is {a} + {b}?", "What is {a} times {b}?", "What comes after {a}?",
    "Give a synonym for {adjective}.", "What is the opposite of {adjective}?",
    "Can you help me with {topic}?", "Is a {thing} bigger than a {other}?",
    "What is the difference between a {thing} and a {other}?",
]  # fmt: skip
PLAIN = [
    "Hello!", "Hi, how are you?", "Who are you?", "What can you do?", "Thank you!", "Good morning.",
    "Tell me a joke.", "Tell me a short story.", "How do I make tea?", "How many days are in a week?",
    "What color is the sky?", "Why is the sky blue?", "How many legs does a spider have?",
    "What do bees make?", "Which planet is the largest?", "What is the boiling point of water?",
    "Who wrote Romeo and Juliet?", "How do plants grow?", "What should I eat for breakfast?",
    "How can I sleep better?", "Write an email that asks for a day off.", "What is the fastest animal?",
    "How many continents are there?", "What do cows drink?", "Which season comes after winter?",
    "What is Python?", "Give me a name for a cat.", "How do I boil an egg?", "What is the largest ocean?",
    "How many minutes are in an hour?", "Translate hello to French.", "What is your name?",
]  # fmt: skip


def requests(n: int, seed: int) -> list[str]:
    """``n`` different requests at most, in random order, the plain ones among them."""
    rng = random.Random(seed)
    found = dict.fromkeys(PLAIN)
    for _ in range(20 * n):
        if len(found) >= n:
            break
        thing, other = rng.sample(THINGS, 2)
        text = rng.choice(TEMPLATES).format(
            thing=thing, other=other, country=rng.choice(COUNTRIES), person=rng.choice(PEOPLE),
            topic=rng.choice(TOPICS), kind=rng.choice(KINDS), adjective=rng.choice(ADJECTIVES),
            a=rng.randint(1, 20), b=rng.randint(1, 12),
        )  # fmt: skip
        found[text] = None
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
    """Write ``n`` conversations as a JSONL manifest."""
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
