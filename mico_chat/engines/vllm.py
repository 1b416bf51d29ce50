"""vLLM: the fastest engine on GPUs, on one, on several or on several machines."""

from __future__ import annotations

from typing import Any

from mico_chat.checkpoints.folders import generation_of, local_folder, model_folder
from mico_chat.engines.base import EngineOptions, EngineRow, Loaded, ends
from mico_chat.engines.source import Source
from mico_chat.late import late
from mico_chat.media.kinds import Kind

with late():
    from mico_chat.adapters import processor as processors
    from mico_chat.adapters import vllm as adapters
    from mico_chat.checkpoints import load as checkpoint
    from mico_chat.checkpoints import pretrained
    from mico_chat.engine import vllm, vllm_start
    from mico_chat.engines import transformers_models as models

KINDS: tuple[Kind, ...] = ("image", "audio", "video")
"""The media that vLLM encodes itself, for another project's model."""


class Vllm(EngineRow):
    name = "vllm"
    module = "vllm"
    package = "vLLM"
    install = "pip install 'mico-chat[vllm]'"
    remark = "for GPUs"
    forms = ("chat", "open")
    some_quantizations = "awq, gptq, fp8, and its others"
    scores = False  # it gives no log-probabilities of a prompt of embeddings
    settings = {  # noqa: RUF012
        "tensor_parallel_size": "GPUs that share each layer of the language model",
        "pipeline_parallel_size": "GPUs or machines that share the layers",
        "data_parallel_size": "copies of the language model",
        "distributed_executor_backend": "mp, or ray for several machines",
        "gpu_memory_utilization": "its share of a GPU's memory [what the encoder leaves]",
        "max_model_len": "tokens of a prompt and its answer [the model's own]",
    }

    def suits(self, source: Source | None, options: EngineOptions, gpu: str | None) -> str | None:
        is_chat = source is None or source.form == "chat"
        return f"on {gpu}" if is_chat and gpu is not None else None

    def load(self, source: Source, options: EngineOptions) -> Loaded:
        if source.form == "open":
            return self._load_open(source, options)
        # The encoder is loaded first: vLLM takes its share of the memory that is then free.
        chat, processor = checkpoint.load_encoder(source.model, options.dtype, options.device)
        # With its adapter merged: where a batch mixes prompts with and without media, vLLM 0.32
        # looks up the adapter of its token table for another number of tokens than it embeds, which
        # ends the engine (``vllm/lora/layers/vocab_parallel_embedding.py``).
        llm = pretrained.plain_llm(source.model)
        tokenizer = processor.tokenizer
        ending = ends(tokenizer, chat.llm.config)  # vLLM itself reads the generation config

        def table(dtype: Any) -> Any:
            return checkpoint.read_token_table(llm, dtype).embed_tokens.weight

        arguments = vllm_start.engine_arguments(llm, options.arguments, **_named(options))
        engine = vllm.VllmEngine(arguments, tokenizer, ending, table=table)
        return Loaded.of_chat(chat, processor, engine)

    def _load_open(self, source: Source, options: EngineOptions) -> Loaded:
        """Another project's model; this process has its processor alone."""
        folder = local_folder(model_folder(source.model))
        config = models.read_config(source, options)
        processor = models.read_processor(source, options)
        kinds = processors.reads(processor)
        arguments = vllm_start.engine_arguments(
            folder,
            {"trust_remote_code": options.trust_remote_code, **options.arguments},
            media={kind: options.max_media if kind in kinds else 0 for kind in KINDS},
            **_named(options),
        )
        tokenizer = processor.tokenizer
        engine = vllm.VllmEngine(arguments, tokenizer, ends(tokenizer, config.get_text_config()))
        adapter = adapters.VllmAdapter(engine, processor, str(source.model))
        return Loaded(adapter, engine, generation_of(folder))


def _named(options: EngineOptions) -> dict[str, Any]:
    names = ("dtype", "quantization", "max_running")
    return {name: getattr(options, name) for name in names}
