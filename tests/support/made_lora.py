"""Random LoRA folders, written by PEFT as anybody's are."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from benchmarks.processes import memory
from mico_chat.checkpoints.lora import read_lora
from mico_chat.engine.base import Prompt
from tests.engine.tiny_llm import answer, text

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"use_rslora": True, "r": 2},
    {"target_modules": "all-linear", "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 7}},
    {"target_modules": ["lm_head", "o_proj"]},
)
"""Four adapters that differ in all that a config says."""


def lora_folder(llm: Any, folder: Path, seed: int = 1, base: str = "tiny", **changes: Any) -> Path:
    """An adapter of ``llm``, random and strong, which says that it is made for ``base``."""
    torch.manual_seed(seed)
    given = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        **changes,
    }
    config = LoraConfig(init_lora_weights=False, **given)
    adapted = get_peft_model(copy.deepcopy(llm), config)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    file = folder / "adapter_config.json"
    written = {**json.loads(file.read_text("utf-8")), "base_model_name_or_path": base}
    file.write_text(json.dumps(written), "utf-8")
    return folder


def merged(llm: Any, folder: Path) -> Any:
    """A copy of ``llm`` with the adapter in it, by PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(llm), str(folder)).merge_and_unload().eval()


def left_by_twenty(model: Any, folder: Path) -> float:
    """Anonymous memory that twenty loads of an adapter in turn leave, in sizes of the adapter.

    Each is worn by a request before it is unloaded.
    """

    def turn() -> int:
        lora = read_lora("x", folder, "tiny", ["tiny"])
        model.loras.load(lora)
        answer(model, [Prompt((text(5),), lora=lora)])
        model.loras.unload(lora)
        return lora.bytes

    for _ in range(4):  # allocators take the room that they keep
        turn()
    before = memory(["RssAnon", "VmSwap"])
    (size,) = {turn() for _ in range(20)}
    return (memory(["RssAnon", "VmSwap"]) - before) / size
