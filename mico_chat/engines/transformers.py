"""Hugging Face's transformers: the reference, on every device, for chat models and others."""

from __future__ import annotations

from mico_chat.engines.base import EngineOptions, EngineRow, Loaded
from mico_chat.engines.source import Source
from mico_chat.late import late

with late():
    from mico_chat.checkpoints import load as checkpoint
    from mico_chat.engines import transformers_models as models


class Transformers(EngineRow):
    name = "transformers"
    module = "transformers"
    package = "transformers"
    install = "pip install --force-reinstall mico-chat"
    forms = ("chat", "open")
    quantizations = ("int8", "nf4")
    some_quantizations = "int8, nf4"
    quantized_by = "bitsandbytes"
    smaller = ("int8", "nf4")
    sizes = ("max_bytes", "max_position", "n_slots")
    in_torch = True

    def suits(self, source: Source | None, options: EngineOptions, gpu: str | None) -> str:
        if source is not None and source.form == "open":
            return "another project's model"
        if options.quantization in self.quantizations:
            return f"{options.quantization} is bitsandbytes'"
        return f"on {gpu or options.device or 'the processor'}"

    def load(self, source: Source, options: EngineOptions) -> Loaded:
        if source.form == "open":
            return models.load_open(source, options)
        chat, processor = checkpoint.load_chat(
            source.model,
            options.dtype,
            options.device,
            quantization_config=models.bitsandbytes(options.quantization),
        )
        engine = models.torch_engine(chat.llm, processor.tokenizer, options)
        return Loaded.of_chat(chat, processor, engine)
