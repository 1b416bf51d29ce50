"""MicoChatForConditionalGeneration: media and text in, the language model's words out.

It reads and writes Hugging Face folders, and merges its adapter. Importing this module registers
the class with transformers' Auto classes.

Legend: B samples, S text length, L LLM width, V vocabulary; media as in
:mod:`mico_chat.model.media_path`.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from mico_chat.checkpoints.configs import chat_config, digest_of, named_folder
from mico_chat.checkpoints.folders import (
    LLM,
    LORA,
    PRETRAINING,
    built_once,
    generation_of,
    llm_source,
    local_folder,
    model_folder,
    whole_folder,
)
from mico_chat.errors import ModelError
from mico_chat.model.config import MicoChatConfig
from mico_chat.model.encoder import init_buffers
from mico_chat.model.media_path import MediaPath, TokenTable
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.model.splice import splice
from mico_chat.settings import cache_dir

MEDIA = ("media_kind", "media_units", "media_row", "pixel_values", "stem_features")
"""The tensors of a batch that describe its media; prompts need no ``media_row``."""

See = Callable[..., list[Tensor]]
"""Gives context tokens as :meth:`MediaPath.context_tokens` does, from the same arguments."""


class MicoChatForConditionalGeneration(MediaPath, PreTrainedModel):
    """Media through encoder, context and bridge into a causal language model.

    The language model may lie elsewhere (``config.base_llm``) and may have an adapter (``lora/``).
    """

    config: MicoChatConfig
    config_class = MicoChatConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is a mean: the Trainer divides by accumulation
    _supports_sdpa = True
    _no_split_modules = ["OmniEncoder", "PerceiverBridge", "LlamaDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: MicoChatConfig) -> None:
        super().__init__(config)
        self.build(config)
        if config.base_llm is None:
            self.llm = AutoModelForCausalLM.from_config(config.llm_config)
        PreTrainedModel.post_init(self)
        self.train()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        see: See | None = None,
        reduction: str = "mean",
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token loss over ``labels`` (-100: no loss), or logits (B, S, V) without labels.

        With labels the vocabulary head runs on the labelled positions only: most of its work is
        saved. In evaluation mode their logits (N, V) are given, too. With ``reduction`` "none" each
        of them has its loss, row after row. ``see`` stands in for ``context_tokens``. ``kwargs``
        has the batch's media (:data:`MEDIA`); the language model takes the others. Where
        ``position_ids`` (B, S) begin again, another prompt begins, which sees itself alone.
        """
        media = {name: kwargs.pop(name, None) for name in MEDIA}
        if inputs_embeds is None:
            inputs_embeds = self.embed_prompt(input_ids, media, see)
        llm = self._llm()
        prompt: dict[str, Any] = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        if position_ids is not None:  # transformers reads rows apart without mask and cache alone
            prompt |= {"attention_mask": None, "position_ids": position_ids, "use_cache": False}
        if labels is None:
            return cast(CausalLMOutputWithPast, llm(**prompt, **kwargs))
        hidden = llm.get_decoder()(**prompt | {"use_cache": False}).last_hidden_state  # (B, S, L)
        labelled = labels[:, 1:] != -100
        logits = word_scores(llm, hidden[:, :-1][labelled])
        said = labels[:, 1:][labelled]
        loss = F.cross_entropy(logits.float(), said, reduction=reduction)
        return CausalLMOutputWithPast(loss=loss, logits=None if self.training else logits)

    def embed_prompt(
        self,
        input_ids: Tensor | None,
        media: Mapping[str, Tensor | None],
        see: See | None = None,
    ) -> Tensor:
        """Token ids (B, S) with placeholders, and media, to embeddings (B, S, L)."""
        if input_ids is None:
            raise ModelError("a prompt needs input_ids or inputs_embeds")
        kind, units = media.get("media_kind"), media.get("media_units")
        context: list[Tensor] = []
        if kind is not None and units is not None and len(kind) > 0:
            pixels, features = media.get("pixel_values"), media.get("stem_features")
            context = (see or self.context_tokens)(kind, units, pixels, features)
        placeholder = self.config.context_token_id
        return splice(self.get_input_embeddings(), input_ids, context, placeholder)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The LLM's ``generate`` on the spliced prompt; returns the new tokens alone."""
        embeds = self.embed_prompt(input_ids, {name: kwargs.pop(name, None) for name in MEDIA})
        return self._llm().generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    def attach_llm(self, llm: PreTrainedModel | TokenTable) -> None:
        """Take a language model whose weights lie elsewhere (``config.base_llm``)."""
        super().attach_llm(llm)
        self.config.llm_config = llm.config

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.llm is None else cast(nn.Module, self.llm.get_output_embeddings())

    def _init_weights(self, module: nn.Module) -> None:
        init_buffers(module)

    # --- folders ----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """As in Hugging Face, with the base LLM and the ``lora`` adapter where the folder has one.

        ``llm_dtype`` is the precision of a base LLM where it differs from the rest (``dtype``).
        With ``tune_adapter`` the adapter stays apart, and can train.
        A bitsandbytes ``quantization_config`` applies to the language model alone.
        """
        llm_dtype, tunes = kwargs.pop("llm_dtype", None), kwargs.pop("tune_adapter", False)
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
            model.attach_llm(load_base_llm(folder, source, tunes, **wanted))
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


def word_scores(llm: Any, hidden: Tensor) -> Tensor:
    """Logits (.., V) of hidden states (.., L), scaled and capped as the model's own forward does.

    The own forward would compute those of all positions.
    """
    logits: Tensor = llm.get_output_embeddings()(hidden)
    config = vars(llm.config.get_text_config())
    if scale := config.get("logit_scale"):  # Cohere's
        logits = logits * scale
    if scale := config.get("logits_scaling"):  # Granite's
        logits = logits / scale
    if cap := config.get("final_logit_softcapping"):  # Gemma's
        logits = torch.tanh(logits / cap) * cap
    return logits


def load_llm(
    name_or_dir: str | Path = "mini", dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The language model of a chat model alone, its adapter merged, on the CPU.

    The default ``dtype`` is the one that the weights are stored in.
    """
    folder = local_folder(model_folder(name_or_dir))
    config = chat_config(folder)
    if config.base_llm is None:
        llm = MicoChatForConditionalGeneration.from_pretrained(folder, dtype=dtype).llm
    else:
        llm = load_base_llm(folder, llm_source(folder, config), dtype=dtype)
    return cast(PreTrainedModel, llm.eval())


def load_base_llm(
    folder: Path, source: str | Path, tune_adapter: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """The language model at ``source``, with the checkpoint's adapter (``folder/lora``) merged.

    An adapter that is to be tuned further, or on quantized weights, stays apart.
    """
    llm: Any = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    if (folder / LORA).is_dir():
        from peft import PeftModel

        peft = PeftModel.from_pretrained(llm, str(folder / LORA), is_trainable=tune_adapter)
        apart = tune_adapter or "quantization_config" in kwargs
        llm = peft if apart else peft.merge_and_unload()
    return cast(PreTrainedModel, llm)


def _for_the_llm(quantization: Any) -> Any:
    """A bitsandbytes config that leaves all but the language model at its precision."""
    ours = isinstance(quantization, BitsAndBytesConfig)
    if ours and quantization.llm_int8_skip_modules is None:
        quantization = copy.deepcopy(quantization)
        quantization.llm_int8_skip_modules = ["encoder", "context", "concepts", "bridge", "lm_head"]
    return quantization


# --- the language model as a plain Hugging Face folder ------------------------------------------


def merge(name_or_dir: str | Path, output: Path, dtype: torch.dtype | str = "auto") -> Path:
    """Write a chat model with its adapter merged and its language model inside, in ``llm/``.

    Encoder, bridge, processor and text branch stay as they are; ``dtype`` is of the language model.
    The output folder appears whole or not at all. Errors: ConfigError, ModelError.
    """
    with whole_folder(output) as written:
        folder = local_folder(model_folder(name_or_dir))
        config = chat_config(folder)
        if config.base_llm == LLM and not (folder / LORA).is_dir():
            said = f"nothing to merge: the folder has {LLM}/ but no {LORA}/"
            raise ModelError(f"{name_or_dir}: {said}")
        processor = MicoChatProcessor.from_pretrained(folder)
        if config.base_llm is None:
            model = MicoChatForConditionalGeneration.from_pretrained(folder, dtype=dtype)
            save_with_llm(model, processor, written)
        else:
            llm = load_base_llm(folder, llm_source(folder, config), dtype=dtype)
            _save_llm(llm, processor, written / LLM)
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    shutil.copyfile(path, written / path.name)
            file = written / "config.json"
            content = json.loads(file.read_text(encoding="utf-8")) | {"base_llm": LLM}
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if (folder / PRETRAINING).is_dir():
            shutil.copytree(folder / PRETRAINING, written / PRETRAINING)
    return output


def save_with_llm(
    model: MicoChatForConditionalGeneration, processor: MicoChatProcessor, folder: Path
) -> None:
    """Write a model with its language model in ``llm/``, which the config names from now on."""
    _save_llm(model.llm, processor, folder / LLM)
    model.config.base_llm = str(folder / LLM)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _save_llm(llm: PreTrainedModel, processor: MicoChatProcessor, folder: Path) -> None:
    generation = llm.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # Vicuna's has a temperature, but does not say that it samples
        generation.do_sample = True
    llm.save_pretrained(folder, max_shard_size="5GB")  # small ones need less memory to load
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)


def plain_llm(model: str | Path) -> str | Path:
    """The folder or hub name of a chat model's language model, its adapter merged.

    Where there is none yet, it is built at ``llm/<name>-<digest>`` in the cache folder.
    """
    name, folder = named_folder(model)
    config = chat_config(folder)
    if config.base_llm is not None:
        base = llm_source(folder, config)
        if not (folder / LORA).is_dir():
            return base
        if hasattr(AutoConfig.from_pretrained(base), "quantization_config"):
            raise ModelError(
                f"{folder}: its adapter cannot be merged into {base}, because {base} is "
                "quantized: merge the adapter into the language model before it is quantized, "
                "then quantize the result"
            )

    def build(path: Path) -> None:
        with whole_folder(path) as written:
            _save_llm(load_llm(folder), MicoChatProcessor.from_pretrained(folder), written)

    return built_once(cache_dir() / "llm" / f"{name}-{digest_of(folder)}", build)


AutoModel.register(MicoChatConfig, MicoChatForConditionalGeneration)
AutoProcessor.register(MicoChatConfig, MicoChatProcessor)
