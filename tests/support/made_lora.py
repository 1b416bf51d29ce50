"""Random LoRA folders, written by PEFT as anybody's are."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model


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
