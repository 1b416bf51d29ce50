"""Configurations of MiCo: the encoder, the context, the bridge, the text branch, the two models.

Every part is a Hugging Face config, so that a folder of ``save_pretrained`` describes the whole
model. ``named_configs.yaml`` holds the configurations that are known by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from mico_chat.errors import ConfigError
from mico_chat.media.kinds import Kind

if TYPE_CHECKING:
    # Importing it takes a second, because all of transformers' models come with it.
    from transformers import BertConfig


@strict
class MicoEncoderConfig(PreTrainedConfig):
    """One timm ViT for all knowledge modalities.

    With ``stem`` (a timm CNN) the ViT is a hybrid: transformer blocks on the CNN's 7 x 7 grid,
    sized by ``embed_dim``, ``depth``, ``num_heads``. Without it ``architecture`` names a timm
    model that brings its own sizes; ``architecture_options`` replaces some of them.
    """

    model_type = "mico_encoder"
    base_config_key = "encoder_config"

    architecture: str = "eva_giant_patch14_clip_224"
    architecture_options: dict[str, Any] | None = None
    stem: str | None = None
    image_size: int = 224
    patch_size: int = 14
    embed_dim: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_ratio: float = 4.3637


@strict
class MicoContextConfig(PreTrainedConfig):
    """Table sizes of the multimodal context (paper 3.3)."""

    model_type = "mico_context"
    base_config_key = "context_config"

    max_units: int = 32
    """Rows of E_C: frames of a video or slices of a sound."""
    n_corpus_pairs: int = 16
    """Rows of E_Sam; 0 means a sample of one corpus."""


@strict
class MicoBridgeConfig(PreTrainedConfig):
    """Sizes of the perceiver between encoder and language model (paper 4.4)."""

    model_type = "mico_bridge"
    base_config_key = "bridge_config"

    hidden_size: int = 1024
    num_heads: int = 16
    depth: int = 4
    still_grid: int = 5
    """A still or a sound has still_grid² queries anchored to places, and the global ones."""
    still_global: int = 7
    place_tokens: int = 1
    """2: an anchored query gives two tokens, the name of a thing and then its properties. A
    language model binds words that stand after a name, and learns little from a sum of both."""
    frame_grid: int = 1
    """A video frame has frame_grid² queries."""

    @property
    def n_still(self) -> int:
        """Context tokens of a still or of a whole sound, without concept tokens."""
        return self.still_grid**2 * self.place_tokens + self.still_global


@strict
class MicoConceptConfig(PreTrainedConfig):
    """Named classes whose posterior is carried into the LLM's vocabulary space.

    The first ``n_pretrained`` of the ``visual_names`` are the stem's own classifier.
    """

    model_type = "mico_concept"
    base_config_key = "concept_config"

    visual_names: list[str] | None = None
    sound_names: list[str] | None = None
    n_pretrained: int = 1000
    tokens_per_name: int = 4
    sound_hidden: int = 512


@strict
class MicoTextConfig(PreTrainedConfig):
    """The text branch of pretraining: a BERT with cross-attention to the context.

    ``frames``, for a model with a projection for each kind (``KindProjections``), has the rows of
    their frame embeddings: ``{"vision": 8, "audio": 2, "depth": 1}``. ``matching_classes`` is 2
    where the matching head scores "no" and "yes", 1 where it scores "yes" alone.
    """

    model_type = "mico_text"
    base_config_key = "text_config"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    projection_dim: int = 512
    mask_token_id: int = 103
    pad_token_id: int = 0
    frames: dict[str, int] | None = None
    head_norm_eps: float = 1e-5
    matching_classes: int = 1

    def bert(self) -> BertConfig:
        from transformers import BertConfig

        same: tuple[str, ...] = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        same += ("intermediate_size", "max_position_embeddings", "pad_token_id")
        # Captions are short: plain attention trains faster than the fused kernel on a CPU.
        others: dict[str, Any] = {"attn_implementation": "eager", "use_cache": False}
        return BertConfig(
            **{name: vars(self)[name] for name in same},
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
            is_decoder=True,
            add_cross_attention=True,
            **others,
        )


@strict
class _ModelConfig(PreTrainedConfig):
    """Parts of both models. A part given as a dict, or not at all, becomes a config.

    transformers does so from 5.20 on, with a class that 5.19 lacks.
    """

    if TYPE_CHECKING:
        encoder_config: MicoEncoderConfig = MicoEncoderConfig()
        context_config: MicoContextConfig = MicoContextConfig()
        concept_config: MicoConceptConfig | None = None
    else:
        encoder_config: dict[str, Any] | PreTrainedConfig | None = None
        context_config: dict[str, Any] | PreTrainedConfig | None = None
        concept_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, kind in type(self).sub_configs.items():
            part = vars(self)[name]
            if not isinstance(part, PreTrainedConfig):
                values = dict(part or {})
                if kind is AutoConfig:
                    part = AutoConfig.for_model(values.pop("model_type", "llama"), **values)
                else:
                    part = kind(**values)
                setattr(self, name, part)
        if isinstance(self.concept_config, dict):
            self.concept_config = MicoConceptConfig(**self.concept_config)
        cast(Any, super()).__post_init__(**kwargs)


@strict
class MicoConfig(_ModelConfig):
    """Pretraining (stage 1): encoder, context and text branch."""

    model_type = "mico"
    sub_configs: ClassVar[dict[str, Any]] = {
        "encoder_config": MicoEncoderConfig,
        "context_config": MicoContextConfig,
        "text_config": MicoTextConfig,
    }

    if TYPE_CHECKING:
        text_config: MicoTextConfig = MicoTextConfig()
    else:
        text_config: dict[str, Any] | PreTrainedConfig | None = None
    mask_probability: float = 0.6
    temperature: float = 0.07

    @classmethod
    def tiny(cls, concepts: bool = True) -> MicoConfig:
        """A random model of a few thousand weights for tests."""
        return cls(**_named_values("tiny-pretraining", concepts))


@strict
class MicoChatConfig(_ModelConfig):
    """MiCo-Chat: omni-encoder, context, bridge and a causal language model.

    ``base_llm`` names a language model whose frozen weights are *not* part of the checkpoint: a
    packaged name, a hub name or a folder.
    """

    model_type = "mico_chat"
    sub_configs: ClassVar[dict[str, Any]] = {
        "encoder_config": MicoEncoderConfig,
        "context_config": MicoContextConfig,
        "bridge_config": MicoBridgeConfig,
        "llm_config": AutoConfig,
    }

    if TYPE_CHECKING:
        bridge_config: MicoBridgeConfig = MicoBridgeConfig()
        llm_config: PreTrainedConfig = PreTrainedConfig()
    else:
        bridge_config: dict[str, Any] | PreTrainedConfig | None = None
        llm_config: dict[str, Any] | PreTrainedConfig | None = None
    base_llm: str | None = None

    @property
    def llm_width(self) -> int:
        return int(self.llm_config.hidden_size)

    @property
    def context_token_id(self) -> int:
        """The placeholder's id: the first one beyond the LLM's vocabulary, so no text has it."""
        return int(self.llm_config.vocab_size)

    def context_length(self, kind: Kind, units: int) -> int:
        """Context tokens of a medium of ``units`` frames or slices, known before encoding."""
        if kind == "video":
            return units * self.bridge_config.frame_grid**2
        named = 0 if self.concept_config is None else self.concept_config.tokens_per_name
        return self.bridge_config.n_still + named

    @classmethod
    def named(cls, name: str) -> MicoChatConfig:
        """``"mini"`` or ``"mico-g-vicuna-7b"``; the mini's concept names are added by training."""
        names = ("mini", "mico-g-vicuna-7b", "tiny")
        if name not in names:
            known = ", ".join(names)
            raise ConfigError(f"{name!r} is neither a folder nor a configuration's name: {known}")
        return cls(**_named_values(name))

    @classmethod
    def tiny(cls, concepts: bool = True) -> MicoChatConfig:
        """A random model of a few thousand weights for tests."""
        return cls(**_named_values("tiny", concepts))


def _named_values(name: str, concepts: bool = True) -> dict[str, Any]:
    import yaml

    file = Path(__file__).with_name("named_configs.yaml")
    values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))[name]
    if not concepts:
        del values["concept_config"]
    return values


@dataclass(frozen=True)
class ChatParts:
    """A chat model's config without its language model's; the fields are :class:`MicoChatConfig`'s.

    Reading a language model's config needs transformers' models, whose import takes a second.
    """

    encoder_config: MicoEncoderConfig
    context_config: MicoContextConfig
    bridge_config: MicoBridgeConfig
    concept_config: MicoConceptConfig | None
    llm_width: int
    base_llm: str | None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The parts of a folder's ``config.json``; None where only transformers can read it."""
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if found["model_type"] != MicoChatConfig.model_type:
                return None
            concepts = found.get("concept_config")
            return cls(
                MicoEncoderConfig(**found["encoder_config"]),
                MicoContextConfig(**found["context_config"]),
                MicoBridgeConfig(**found["bridge_config"]),
                None if concepts is None else MicoConceptConfig(**concepts),
                found["llm_config"]["hidden_size"],
                found["base_llm"],
            )
        except (OSError, ValueError, TypeError, KeyError):
            return None


MediaLayout = Literal["still", "frames", "slices"]


def layout_of(kind: Kind) -> MediaLayout:
    """The arrangement of a kind's units: one still, frames of a video, slices of a sound."""
    return "frames" if kind == "video" else "slices" if kind == "audio" else "still"


AutoConfig.register("mico", MicoConfig)
AutoConfig.register("mico_chat", MicoChatConfig)
