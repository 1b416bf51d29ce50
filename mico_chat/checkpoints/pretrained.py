"""MicoChatForConditionalGeneration: a chat model that reads and writes Hugging Face folders.

Importing this module registers the class with transformers' Auto classes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME

from mico_chat.checkpoints.folders import LLM, LORA, generation_of, llm_source, local_folder
from mico_chat.model.chat import MicoChat
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.processing import MicoChatProcessor


class MicoChatForConditionalGeneration(MicoChat):
    """A chat model whose language model may lie elsewhere and may have an adapter (``lora/``)."""

    config_class = MicoChatConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """As in Hugging Face, with the base LLM and the ``lora`` adapter where the folder has one.

        ``llm_dtype`` is the precision of a base LLM where it differs from the rest (``dtype``).
        A bitsandbytes ``quantization_config`` applies to the language model alone.
        """
        llm_dtype = kwargs.pop("llm_dtype", None)
        hub = {k: kwargs.pop(k) for k in ("revision", "cache_dir", "token") if k in kwargs}
        folder = local_folder(folder, **hub)
        config = kwargs.get("config") or MicoChatConfig.from_pretrained(folder)
        quantization = kwargs.pop("quantization_config", None)
        if config.base_llm is None and quantization is not None:
            kwargs["quantization_config"] = _for_the_llm(quantization)
        model = super().from_pretrained(folder, *args, **kwargs)
        model.generation = generation_of(folder)
        if config.base_llm is not None:
            source = llm_source(folder, config)
            if config.base_llm == LLM:  # its weights stay here wherever the model is saved next
                model.config.base_llm = str(source)
            wanted = {k: kwargs[k] for k in ("dtype", "device_map") if kwargs.get(k) is not None}
            wanted |= {} if llm_dtype is None else {"dtype": llm_dtype}
            wanted |= {} if quantization is None else {"quantization_config": quantization}
            model.attach_llm(load_base_llm(folder, source, **wanted))
        return model.train(False)

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As in Hugging Face, without the frozen weights of a base LLM."""
        if self.generation is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.generation, indent=2) + "\n"
            (Path(folder) / GENERATION_CONFIG_NAME).write_text(text, encoding="utf-8")
        base_llm, llm = self.config.base_llm, self.llm
        if base_llm is not None:
            state: Mapping[str, Tensor] = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith("llm.")}
            self.llm = None
            if Path(base_llm).resolve() == (Path(folder) / LLM).resolve():
                self.config.base_llm = LLM
        try:
            super().save_pretrained(folder, *args, **kwargs)
        finally:
            self.llm, self.config.base_llm = llm, base_llm


def load_base_llm(folder: Path, source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The language model at ``source``, with the checkpoint's adapter (``folder/lora``) merged.

    An adapter on quantized weights stays apart.
    """
    llm: Any = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    if (folder / LORA).is_dir():
        from peft import PeftModel

        peft = PeftModel.from_pretrained(llm, str(folder / LORA))
        llm = peft if "quantization_config" in kwargs else peft.merge_and_unload()
    return cast(PreTrainedModel, llm)


def _for_the_llm(quantization: Any) -> Any:
    """A bitsandbytes config that leaves all but the language model at its precision."""
    if (
        not isinstance(quantization, BitsAndBytesConfig)
        or quantization.llm_int8_skip_modules is not None
    ):
        return quantization
    quantization = copy.deepcopy(quantization)
    quantization.llm_int8_skip_modules = ["encoder", "context", "concepts", "bridge", "lm_head"]
    return quantization


AutoModel.register(MicoChatConfig, MicoChatForConditionalGeneration)
AutoProcessor.register(MicoChatConfig, MicoChatProcessor)
