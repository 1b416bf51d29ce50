"""Configurations of MiCo: the encoder, the context, the bridge, the text branch, the two models.

Every part is a Hugging Face config, so that a folder written by ``save_pretrained`` says
everything needed to build the model again. Two configurations are known by name, ``mini`` and
``mico-g-vicuna-7b`` (:meth:`MicoChatConfig.named`); ``tiny`` is for tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from mico_chat.errors import ConfigError
from mico_chat.media.kinds import KINDS, Kind

if TYPE_CHECKING:
    # Their import takes a second, for all that transformers' models need.
    from transformers import BertConfig

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


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
    """2: an anchored query gives two tokens, what is there and then what is true of it. A language
    model binds by what stands after a name, and learns little from the sum of both."""
    frame_grid: int = 1
    """A video frame has frame_grid² queries."""

    @property
    def n_still(self) -> int:
        """Context tokens of a still or of a whole sound, without concept tokens."""
        return self.still_grid**2 * self.place_tokens + self.still_global


@strict
class MicoConceptConfig(PreTrainedConfig):
    """Named classes whose posterior is carried into the LLM's vocabulary space.

    ``visual_names`` are read from the stem's last grid (the first ``n_pretrained`` rows are the
    stem's own classifier), ``sound_names`` from its middle blocks.
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

    ``frames`` are the rows of the frame embeddings of a model with projections of each kind's own
    (``branches``), ``{"vision": 8, "audio": 2, "depth": 1}``; without it all kinds
    share one. ``head_norm_eps`` is that of the projections' and heads' norms, ``matching_classes``
    2 where the matching head tells "no" and "yes" apart, and not "yes" alone.
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
        """The Hugging Face config; the context is projected to ``hidden_size`` before it."""
        from transformers import BertConfig

        # Captions are short: plain attention trains faster than the fused kernel on a CPU.
        attention: dict[str, Any] = {"attn_implementation": "eager"}
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            pad_token_id=self.pad_token_id,
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
            is_decoder=True,
            add_cross_attention=True,
            use_cache=False,
            **attention,
        )


def _build_parts(config: MicoConfig | MicoChatConfig) -> None:
    """Make configs of the parts that a ``config.json`` has, or of their defaults.

    transformers does so from 5.20 on, where it is told by a class that 5.19 does not have.
    """
    for name, kind in type(config).sub_configs.items():
        part = getattr(config, name)
        if not isinstance(part, PreTrainedConfig):
            values = dict(part or {})
            if kind is AutoConfig:
                part = AutoConfig.for_model(values.pop("model_type", "llama"), **values)
            else:
                part = kind(**values)
            setattr(config, name, part)
    if isinstance(config.concept_config, dict):
        config.concept_config = MicoConceptConfig(**config.concept_config)


@strict
class MicoConfig(PreTrainedConfig):
    """Pretraining (stage 1): encoder, context and text branch."""

    model_type = "mico"
    sub_configs: ClassVar[dict[str, Any]] = {
        "encoder_config": MicoEncoderConfig,
        "context_config": MicoContextConfig,
        "text_config": MicoTextConfig,
    }

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    context_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    concept_config: dict[str, Any] | PreTrainedConfig | None = None
    mask_probability: float = 0.6
    temperature: float = 0.07

    def __post_init__(self, **kwargs: Any) -> None:
        _build_parts(self)
        cast(Any, super()).__post_init__(**kwargs)

    @classmethod
    def tiny(cls, concepts: bool = True) -> MicoConfig:
        """A random model of a few thousand weights for tests."""
        return cls(
            encoder_config=_TINY_ENCODER(),
            context_config=MicoContextConfig(max_units=8, n_corpus_pairs=4),
            text_config=MicoTextConfig(
                vocab_size=128,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
                projection_dim=16,
                mask_token_id=4,
            ),
            concept_config=_TINY_CONCEPTS() if concepts else None,
        )


@strict
class MicoChatConfig(PreTrainedConfig):
    """MiCo-Chat: omni-encoder, context, bridge and a causal language model.

    ``base_llm`` names the language model whose frozen weights are *not* part of the checkpoint
    (a name known to ``checkpoints.base_llm``, a hub name or a folder); ``None`` means that the
    folder holds them.
    """

    model_type = "mico_chat"
    sub_configs: ClassVar[dict[str, Any]] = {
        "encoder_config": MicoEncoderConfig,
        "context_config": MicoContextConfig,
        "bridge_config": MicoBridgeConfig,
        "llm_config": AutoConfig,
    }

    encoder_config: dict[str, Any] | PreTrainedConfig | None = None
    context_config: dict[str, Any] | PreTrainedConfig | None = None
    bridge_config: dict[str, Any] | PreTrainedConfig | None = None
    llm_config: dict[str, Any] | PreTrainedConfig | None = None
    concept_config: dict[str, Any] | PreTrainedConfig | None = None
    base_llm: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _build_parts(self)
        cast(Any, super()).__post_init__(**kwargs)

    @property
    def context_token_id(self) -> int:
        """The placeholder's id: the first one beyond the LLM's vocabulary, so no text has it."""
        llm = self.llm_config
        assert isinstance(llm, PreTrainedConfig)
        return int(llm.vocab_size)

    def context_length(self, kind: Kind, units: int) -> int:
        """Context tokens of a medium of ``units`` frames or slices, known before encoding."""
        bridge, concept = self.bridge_config, self.concept_config
        assert isinstance(bridge, MicoBridgeConfig)
        if kind == "video":
            return units * bridge.frame_grid**2
        extra = concept.tokens_per_name if isinstance(concept, MicoConceptConfig) else 0
        return bridge.n_still + extra

    @classmethod
    def named(cls, name: str) -> MicoChatConfig:
        """``"mini"`` or ``"mico-g-vicuna-7b"``; the mini's concept names are added by training.

        Raises:
            ConfigError: for any other name.
        """
        builders = {"mini": _mini, "mico-g-vicuna-7b": _vicuna_7b, "tiny": cls.tiny}
        if name not in builders:
            raise ConfigError(
                f"{name!r} is neither a folder nor the name of a configuration; the names are "
                f"{', '.join(builders)}"
            )
        return builders[name]()

    @classmethod
    def tiny(cls, concepts: bool = True) -> MicoChatConfig:
        """A random model of a few thousand weights for tests."""
        from transformers import LlamaConfig

        return cls(
            encoder_config=_TINY_ENCODER(),
            context_config=MicoContextConfig(max_units=8, n_corpus_pairs=4),
            bridge_config=MicoBridgeConfig(
                hidden_size=32, num_heads=2, depth=1, still_grid=2, still_global=1, frame_grid=1
            ),
            llm_config=LlamaConfig(
                vocab_size=256,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=512,
                tie_word_embeddings=True,
            ),
            concept_config=_TINY_CONCEPTS() if concepts else None,
        )


@dataclass(frozen=True)
class ChatParts:
    """A chat model's config without its language model's; ``llm_width`` is that one's L.

    To read a language model's config takes transformers' models, and a second of import.
    """

    encoder: MicoEncoderConfig
    context: MicoContextConfig
    bridge: MicoBridgeConfig
    concepts: MicoConceptConfig | None
    llm_width: int
    base_llm: str | None

    @classmethod
    def of(cls, config: MicoChatConfig) -> Self:
        """The parts of a whole config."""
        assert isinstance(config.encoder_config, MicoEncoderConfig)
        assert isinstance(config.context_config, MicoContextConfig)
        assert isinstance(config.bridge_config, MicoBridgeConfig)
        assert isinstance(config.concept_config, MicoConceptConfig | None)
        assert isinstance(config.llm_config, PreTrainedConfig)
        return cls(
            config.encoder_config,
            config.context_config,
            config.bridge_config,
            config.concept_config,
            config.llm_config.hidden_size,
            config.base_llm,
        )

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The parts of a folder's ``config.json``; None where it has to be read as a whole."""
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


MINI_ENCODER: dict[str, Any] = {
    "architecture": "vit_hybrid",
    "stem": "tf_efficientnet_lite0",
    "embed_dim": 384,
    "depth": 6,
    "num_heads": 6,
    "mlp_ratio": 4.0,
}


def _TINY_ENCODER() -> MicoEncoderConfig:
    return MicoEncoderConfig(
        architecture="vit_hybrid",
        stem="test_efficientnet",
        image_size=64,
        embed_dim=32,
        depth=1,
        num_heads=2,
        mlp_ratio=2.0,
    )


def _TINY_CONCEPTS() -> MicoConceptConfig:
    return MicoConceptConfig(
        visual_names=["cat", "dog", "red ball"],
        sound_names=["bell", "dog"],
        n_pretrained=2,
        tokens_per_name=2,
        sound_hidden=8,
    )


def _mini() -> MicoChatConfig:
    from transformers import LlamaConfig

    return MicoChatConfig(
        encoder_config=MicoEncoderConfig(**MINI_ENCODER),
        context_config=MicoContextConfig(),
        bridge_config=MicoBridgeConfig(
            hidden_size=384,
            num_heads=6,
            depth=2,
            still_grid=4,
            still_global=3,
            place_tokens=2,
            frame_grid=2,
        ),
        llm_config=LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            tie_word_embeddings=True,
        ),
        concept_config=MicoConceptConfig(),
        base_llm="smollm2-135m-instruct",
    )


def _vicuna_7b() -> MicoChatConfig:
    from transformers import LlamaConfig

    return MicoChatConfig(
        encoder_config=MicoEncoderConfig(),
        context_config=MicoContextConfig(),
        bridge_config=MicoBridgeConfig(),
        llm_config=LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        ),
        base_llm="lmsys/vicuna-7b-v1.5",
    )


MediaLayout = Literal["still", "frames", "slices"]

_LAYOUTS: dict[Kind, MediaLayout] = {"video": "frames", "audio": "slices"}


def layout_of(kind: Kind) -> MediaLayout:
    """How a kind's units lie: one still, the frames of a video, the slices of a sound."""
    return _LAYOUTS.get(kind, "still")


assert KINDS == ("image", "audio", "video", "depth", "normal")

AutoConfig.register("mico", MicoConfig)
AutoConfig.register("mico_chat", MicoChatConfig)
