"""A stage 1 folder as a MiCo checkpoint again: the way back of ``released``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mico_chat.checkpoints.folders import check_new, whole_folder
from mico_chat.checkpoints.released_layout import (
    SOURCE_FILE,
    TIED,
    UNUSED_FILE,
    ZEROS,
    as_theirs,
    released_name,
    todays_name,
    unused_shapes,
)
from mico_chat.errors import ModelError
from mico_chat.model.config import MicoConfig, MicoTextConfig


def write_released(folder: Path, output: Path) -> str:
    """Write a stage 1 folder as a MiCo checkpoint; returns what was left out, in a sentence.

    Args:
        folder: one that :func:`convert_released` made, or stage 1 from one.
        output: a ``.pt`` file, or a folder that then holds ``ckpt/`` and ``log/hps.json``.

    Raises:
        ConfigError: an output that exists.
        ModelError: a model that the release's layout cannot hold.
    """
    check_new(output)
    try:
        config = MicoConfig.from_pretrained(folder)
        state = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: not a stage 1 folder: {str(error).splitlines()[0]}") from error
    text = config.text_config
    if not isinstance(text, MicoTextConfig) or text.frames is None:
        raise ModelError(
            f"{folder}: all kinds share one projection, but a MiCo checkpoint has one for "
            "each branch; only a model that was converted from a MiCo checkpoint can be "
            "written"
        )
    tensors: dict[str, Tensor] = {}
    for own, tensor in state.items():
        name = released_name(own)
        if name is not None:
            tensors[name] = as_theirs(own, tensor)
        elif own.startswith(ZEROS) and bool(tensor.any()):
            raise ModelError(
                f"{folder}: {own} is not zero, and a MiCo checkpoint has no place for it; "
                f"train with freeze: [{', '.join(prefix.rstrip('.') for prefix in ZEROS)}]"
            )
        elif not own.startswith(ZEROS):
            raise ModelError(f"{folder}: a MiCo checkpoint has no place for {own}")
    tensors |= {alias: tensors[name] for alias, name in TIED.items()}
    if (folder / UNUSED_FILE).is_file():
        tensors |= load_file(folder / UNUSED_FILE)
    missing = sorted(set(unused_shapes(state)) - set(tensors))
    record: dict[str, Any] = {"names": [], "hps": {}, "file": "model_step_0.pt"}
    if (folder / SOURCE_FILE).is_file():
        record = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    spelt = {todays_name(key): key for key in record["names"]}
    order = [name for name in spelt if name in tensors]
    order += [name for name in tensors if name not in spelt]
    content = {spelt.get(name, name): tensors[name] for name in order}
    if output.suffix in (".pt", ".pth", ".bin"):
        output.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, output)
    else:
        with whole_folder(output) as made:
            (made / "ckpt").mkdir()
            (made / "log").mkdir()
            torch.save(content, made / "ckpt" / record["file"])
            hps = json.dumps(record["hps"], indent=1)
            (made / "log" / "hps.json").write_text(hps + "\n", encoding="utf-8")
    left = f"; without {', '.join(missing)}, which this folder lacks" if missing else ""
    return f"{len(content)} tensors{left}"
