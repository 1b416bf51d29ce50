"""MicoChatForConditionalGeneration: a chat model that reads and writes Hugging Face folders.

A checkpoint's language model may lie elsewhere, and may have an adapter (``lora/``): this class
puts the parts together. Importing this module registers it with transformers' Auto classes.
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

from mico_chat.checkpoints.folders import LLM, LORA, generation_of, llm_source, part_of
from mico_chat.model.chat import MicoChat
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.processing import MicoChatProcessor


class MicoChatForConditionalGeneration(MicoChat):
    """:class:`~mico_chat.model.chat.MicoChat` with a folder to read and write."""

    config_class = MicoChatConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """As in Hugging Face, with the base LLM and the ``lora`` adapter where the folder has one.

        Two arguments are this method's own. ``llm_dtype`` is the precision of a base LLM where it
        differs from the rest (``dtype``). ``without_base_llm`` leaves the base LLM out. A
        bitsandbytes ``quantization_config`` applies to the language model alone.
        """
        llm_dtype = kwargs.pop("llm_dtype", None)
        without_base_llm = kwargs.pop("without_base_llm", False)
        hub: dict[str, Any] = {
            k: kwargs[k] for k in ("revision", "cache_dir", "token") if k in kwargs
        }
        config = kwargs.get("config") or MicoChatConfig.from_pretrained(folder, **hub)
        quantization = kwargs.pop("quantization_config", None)
        if config.base_llm is None and quantization is not None:
            kwargs["quantization_config"] = _for_the_llm(quantization)
        model = super().from_pretrained(folder, *args, **kwargs)
        model.generation = generation_of(folder, hub)
        if config.base_llm is not None and not without_base_llm:
            source = llm_source(folder, config, **hub)
            if config.base_llm == LLM:  # its weights stay here wherever the model is saved next
                model.config.base_llm = str(source)
            wanted = {k: kwargs[k] for k in ("dtype", "device_map") if kwargs.get(k) is not None}
            wanted |= {} if llm_dtype is None else {"dtype": llm_dtype}
            wanted |= {} if quantization is None else {"quantization_config": quantization}
            model.attach_llm(load_base_llm(folder, source, hub, **wanted))
        return model.train(False)

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As in Hugging Face, without the frozen weights of a base LLM.

        A base LLM in ``llm/`` of this very folder is named so that the folder can be moved.
        """
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


def load_base_llm(
    folder: str | Path,
    source: str | Path,
    hub: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A checkpoint's language model, with the checkpoint's ``lora`` adapter.

    The adapter is merged into the weights, but kept apart from quantized weights.

    ``source`` is the place of the language model (:func:`~.folders.llm_source`), ``hub`` holds the
    checkpoint's ``revision``, ``cache_dir``, ``token``.

    Raises:
        ModelError: for an adapter that the hub does not give.
    """
    llm: Any = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    adapter = part_of(folder, LORA, **(hub or {}))
    if adapter is not None:
        from peft import PeftModel

        peft = PeftModel.from_pretrained(llm, str(adapter))
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
