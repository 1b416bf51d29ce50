"""llama.cpp: the fastest engine on a CPU. It reads a converted copy of a chat model, or GGUF."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mico_chat.checkpoints.folders import model_folder
from mico_chat.checkpoints.gguf_files import DEFAULT_QUANTIZATION, QUANTIZATIONS
from mico_chat.engine import llamacpp_library as llama_cpp
from mico_chat.engines.base import EngineOptions, EngineRow, Loaded, batching_engine
from mico_chat.engines.source import Source
from mico_chat.errors import ConfigError, ModelError
from mico_chat.late import late

with late():
    from mico_chat.adapters import gguf, mtmd, vocabulary
    from mico_chat.checkpoints import configs, footprint
    from mico_chat.checkpoints import load as checkpoint
    from mico_chat.engine import llamacpp, llamacpp_export


OF_PICTURES = ("image_min_tokens", "image_max_tokens")
"""Arguments of the projector: the least and most tokens of a picture of any size."""


class LlamaCpp(EngineRow):
    name = "llamacpp"
    module = llama_cpp.PACKAGE
    package = "llama.cpp"
    install = "pip install 'mico-chat[llamacpp]'"
    repair = (
        "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
        "'mico-chat[compiled]'"
    )  # compiles llama.cpp for this machine's processor
    remark = "transformers is slower"
    forms = ("chat", "gguf")
    quantizations = QUANTIZATIONS
    some_quantizations = "Q8_0, Q4_K_M, Q4_0, F16"
    quantized_by = "GGUF"
    smaller = ("Q8_0", "Q4_0")
    sizes = ("n_cells", "n_slots", "threads", *OF_PICTURES)
    uses_gpu = False
    may_refuse = True  # not every tokenizer can be converted

    def suits(self, source: Source | None, options: EngineOptions, gpu: str | None) -> str | None:
        if source is not None and source.form == "gguf":
            return f"a GGUF file that reads {', '.join(source.input_modalities) or 'text alone'}"
        if options.quantization is not None:
            of_gguf = options.quantization in QUANTIZATIONS
            return f"{options.quantization} is GGUF's" if of_gguf else "no other engine has it"
        if gpu is None and options.device is None:
            return f"the fastest on {os.cpu_count()} cores without a GPU"
        on_cpu = options.device is not None and options.device.split(":")[0] == "cpu"
        return "the fastest on a CPU" if on_cpu else None

    def why_not(self, source: Source, options: EngineOptions) -> str | None:
        if (reason := llama_cpp.unfit()) is not None:
            return reason
        if source.form != "chat":
            return None
        is_local = Path(model_folder(source.model)).is_dir()
        if is_local and llamacpp_export.gguf_path(source.model, options.quantization).is_file():
            return None  # asking the config would import transformers' models
        try:
            llamacpp_export.check_llama(configs.chat_config(source.folder).llm_config)
        except ModelError as error:
            return str(error)
        return None

    def usual_quantization(self, trained: str | None) -> str | None:
        return trained or DEFAULT_QUANTIZATION

    def total(self, needs: footprint.Serving, precision: str) -> int:
        fixed = footprint.PROGRAM + needs.beside + needs.llm[precision]
        vocabulary, width = needs.table  # the token table is there a second time
        second, logits = vocabulary * width * needs.dtype.itemsize, footprint.BATCH * vocabulary * 4
        context = needs.context * needs.kv_per_token
        halves = context * 2 // needs.dtype.itemsize  # its keys and values are float16
        return fixed + second + logits + max(halves, llamacpp_export.DEFAULT_CACHE_BYTES)

    def converted(self, model: str | Path, quantization: str) -> Path | None:
        return llamacpp_export.gguf_path(model, quantization)

    def load(self, source: Source, options: EngineOptions) -> Loaded:
        if source.files is not None:
            return self._load_gguf(source, options)
        if named := [name for name in OF_PICTURES if name in options.arguments]:
            raise ConfigError(f"{named[0]}: a model of this project has one size of picture")
        model = source.model
        file = llamacpp_export.gguf_of(model, options.quantization)
        # llama.cpp reads its file without holding Python's lock, while Python loads the encoder.
        with ThreadPoolExecutor(1) as pool:
            batch = options.max_batch
            loading = pool.submit(
                lambda: llamacpp.LlamaCppModel(file, max_batch=batch, **options.arguments)
            )
            try:
                chat, processor = checkpoint.load_encoder(model, options.dtype, options.device)
            except BaseException:
                if loading.exception() is None:
                    loading.result().close()
                raise
            llm = loading.result()
        ends = llm.ends | {processor.tokenizer.eos_token_id}
        engine = batching_engine(self.name, llm, processor.tokenizer, ends, options)
        return Loaded.of_chat(chat, processor, engine)

    def _load_gguf(self, source: Source, options: EngineOptions) -> Loaded:
        """A GGUF model; without an ``mmproj`` it reads text alone."""
        assert source.files is not None
        file, mmproj = source.files.model, source.files.mmproj
        if options.quantization is not None:
            reason = "the file has a quantization, so --quantization has no meaning"
            raise ConfigError(f"{file}: {reason}")
        batch = options.max_batch
        own = {name: v for name, v in options.arguments.items() if name not in OF_PICTURES}
        llm = llamacpp.LlamaCppModel(file, max_batch=batch, mixed=False, **own)
        try:
            words = vocabulary.Vocabulary(llm.weights)
            threads = options.arguments.get("threads")
            bounds = {name: v for name, v in options.arguments.items() if name in OF_PICTURES}
            given = (llm.weights, threads)
            projector = None if mmproj is None else mtmd.Projector(mmproj, *given, **bounds)
            adapter = gguf.GgufAdapter(words, projector)
        except BaseException:
            llm.close()
            raise
        return Loaded(adapter, batching_engine(self.name, llm, words, llm.ends, options))

    def probe(self) -> str:
        llama_cpp.llama_backend_init()
        return f"{llama_cpp.RELEASES[self.module]} starts on this processor"
