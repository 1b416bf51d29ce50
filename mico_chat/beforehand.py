"""What is known of a model before it is loaded: its name, what it reads, the memory it will need.

Nothing is fetched, and no weights are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mico_chat.adapters.base import shown_kinds
from mico_chat.checkpoints.folders import local_folder, model_folder
from mico_chat.checkpoints.gguf_files import gguf_files
from mico_chat.engine.cpu import memory
from mico_chat.errors import ModelError
from mico_chat.load import EngineOptions, check_device, choose_engine
from mico_chat.media.kinds import KINDS, Kind

if TYPE_CHECKING:
    from mico_chat.model.config import MicoChatConfig

SHARE = 0.8
"""The share of the memory that the models of one service take together by default."""

MICO_CHAT = "mico_chat"
"""The ``model_type`` of this project's own chat models."""


def folder_here(model: str | Path) -> Path | None:
    """The folder of a model, in the hub's cache too; None if it must be fetched first."""
    name = model_folder(model)
    try:
        return local_folder(name, "config.json", local_files_only=True)
    except ModelError:
        return None


def input_modalities(model: str | Path, mmproj: Path | None = None) -> tuple[Kind, ...]:
    """The kinds of media that a model reads; every kind if it is not on this machine."""
    if (files := gguf_files(model, mmproj)) is not None:
        from mico_chat.adapters.mtmd import reads

        return () if files.mmproj is None else shown_kinds(reads(files.mmproj))
    folder = folder_here(model)
    return KINDS if folder is None else modalities_of(folder)


def modalities_of(folder: Path) -> tuple[Kind, ...]:
    """The kinds of media that the model in a folder reads."""
    config = json_of(folder / "config.json")
    if config.get("model_type") == MICO_CHAT:
        return KINDS
    import transformers

    for name in config.get("architectures") or ():
        found: Any = getattr(transformers, name, None)
        if found is not None:
            wanted = found.input_modalities
            named = {wanted} if isinstance(wanted, str) else set(wanted)
            # SmolVLM's class names pictures alone, but its processor takes clips.
            if (folder / "video_preprocessor_config.json").is_file():
                named.add("video")
            if "video_processor" in json_of(folder / "processor_config.json"):
                named.add("video")
            return shown_kinds([kind for kind in KINDS if kind in named])
    return ()


def json_of(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: this is no JSON file to read ({error})") from error
    return content if isinstance(content, dict) else {}


# --- memory ---------------------------------------------------------------------------------------


def usable_bytes(options: EngineOptions) -> int:
    """The memory that the models of a service may take together, where nobody says how much."""
    engine, _ = choose_engine(options)
    gpu = gpu_memory(options) if engine != "llamacpp" else None
    return int(SHARE * (memory()[1] if gpu is None else gpu[1]))


def gpu_memory(options: EngineOptions) -> tuple[int, int] | None:
    """Free bytes and all bytes of the graphics card that would be used; None without one."""
    import torch

    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(options.device or default)
    if device.type != "cuda":
        return None
    found: tuple[int, int] = torch.cuda.mem_get_info(device)
    return found


def needed_bytes(model: str | Path, options: EngineOptions) -> int:
    """The memory that a model will need beside that of the program, by an estimate."""
    if (files := gguf_files(model, options.mmproj)) is not None:
        return files.bytes
    folder = folder_here(model)
    if folder is None:
        return 0  # what it takes is measured when it has been fetched and loaded
    if json_of(folder / "config.json").get("model_type") != MICO_CHAT:
        return weight_bytes(folder)
    import torch

    from mico_chat.checkpoints.configs import chat_config
    from mico_chat.checkpoints.footprint import PROGRAM, Serving, meta_chat
    from mico_chat.checkpoints.gguf_export import DEFAULT_QUANTIZATION

    config = chat_config(folder)
    engine, _ = engine_for(config, options)
    dtype = options.dtype or "bfloat16"
    quantization = DEFAULT_QUANTIZATION if engine == "llamacpp" else None
    needs = Serving.of(meta_chat(config), getattr(torch, dtype))
    precision = options.quantization or quantization or dtype
    if precision not in needs.llm:  # one of vLLM's
        precision = dtype
    return needs.total(engine, precision) - PROGRAM


def weight_bytes(folder: Path) -> int:
    """Bytes of the files with a model's weights, of one of their formats."""
    for pattern in ("*.safetensors", "*.gguf", "*.bin"):
        if found := sum(file.stat().st_size for file in folder.glob(pattern)):
            return found
    return 0


def engine_for(config: MicoChatConfig, options: EngineOptions) -> tuple[str, str]:
    """The engine that would run a chat model, and the reason for it."""
    from mico_chat.checkpoints.gguf_export import QUANTIZATIONS, check_llama
    from mico_chat.errors import ConfigError
    from mico_chat.load import BITSANDBYTES

    if options.device is not None:
        check_device(options.device)
    engine, why = choose_engine(options)
    if engine == "llamacpp":
        try:
            check_llama(config.llm_config)
        except ModelError as error:
            if options.engine != "auto" or options.quantization is not None:
                raise
            engine, why = "transformers", f"llamacpp cannot run this model: {error}"
    known = {"llamacpp": QUANTIZATIONS, "transformers": BITSANDBYTES}.get(engine)
    if options.quantization is not None and known and options.quantization not in known:
        text = f"{engine} has no quantization {options.quantization!r}"
        raise ConfigError(f"{text}; known are {', '.join(known)}")
    return engine, why
