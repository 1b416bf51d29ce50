"""Configurations of MiCo: the encoder, the context, the bridge, the text branch, the two models.

Every part is a Hugging Face config, so that a folder of ``save_pretrained`` describes the whole
model. ``named_configs.yaml`` holds the configurations that are known by name.
"""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import yaml
from transformers import PreTrainedConfig

from mico_chat.errors import ConfigError
from mico_chat.media.kinds import MODALITIES, Kind
from mico_chat.model.auto import AutoConfig

if TYPE_CHECKING:
    # Importing it takes a second, because all of transformers' models come with it.
    from transformers import BertConfig


class MicoEncoderConfig(PreTrainedConfig):
    """One timm ViT for all knowledge modalities.

    With ``stem`` (a timm CNN) the ViT is a hybrid: transformer blocks on the CNN's 7 x 7 grid,
    sized by ``embed_dim``, ``depth``, ``num_heads``. Without it ``architecture`` names a timm
    model that brings its own sizes; ``architecture_options`` replaces some of them. With
    ``ear_blocks``, beside a stem, the sounds' names are heard by so many blocks of Whisper base.
    """

    model_type = "mico_encoder"
    base_config_key = "encoder_config"

    architecture: str = "eva_giant_patch14_clip_224"
    architecture_options: dict[str, Any] | None = None
    stem: str | None = None
    ear_blocks: int = 0
    image_size: int = 224
    patch_size: int = 14
    embed_dim: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_ratio: float = 4.3637


KIND_ROWS = {"image": 0, "audio": 1, "video": 2, "depth": 3, "normal": 4}
"""The rows of kinds in checkpoints whose configuration does not say them."""


class MicoContextConfig(PreTrainedConfig):
    """The multimodal context (paper 3.3): sizes of its tables, and switches of its terms."""

    model_type = "mico_context"
    base_config_key = "context_config"

    kind_rows: dict[str, int] = field(default_factory=lambda: dict(KIND_ROWS))
    """The row of each kind of medium in all tables that have one for each kind."""
    max_units: int = 32
    """E_C has so many rows for a kind: frames of a video or slices of a sound."""
    n_corpus_pairs: int = 16
    """E_Sam has so many rows. Row 0 is no corpus's; 1 + a kind's row is that of the corpus with
    texts and media of this kind."""
    modality: bool = True
    """Whether E_M is added."""
    context: bool = True
    """Whether E_C is added."""
    sampling: bool = True
    """Whether E_Sam is added."""
    contrastive_sampling: bool = False
    """Whether E_Sam is in the contrast too (equation 3 feeds 4), not in matching and captions
    alone."""
    position: bool = True
    """Whether E_Pos, the encoder's own table, is added."""


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
    frame_grid: int = 1
    """A video frame has frame_grid² queries."""
    things: int = 0
    """At most so many things are told apart in a picture or clip
    (:mod:`mico_chat.model.mini.things`); with 0 there are no queries for things. They need
    concepts, for the things' names."""

    @property
    def n_still(self) -> int:
        """Context tokens of a still or of a whole sound, without concept and thing tokens."""
        return self.still_grid**2 + self.still_global


class MicoConceptConfig(PreTrainedConfig):
    """Named classes whose posterior is carried into the LLM's vocabulary space.

    The first ``n_pretrained`` of the ``visual_names`` are the stem's own classifier.
    ``plain_names`` has the everyday name of each visual name, then of each sound name: "cat" for
    "Egyptian Mau". With them a picture has tokens of its plain name and as many of its exact one.
    ``sure_above``, for pictures and for sounds: a medium whose best plain name is less likely has
    tokens of its second best one too, from which the language model tells that it is unsure.
    """

    model_type = "mico_concept"
    base_config_key = "concept_config"

    visual_names: list[str] | None = None
    sound_names: list[str] | None = None
    plain_names: list[str] | None = None
    n_pretrained: int = 1000
    tokens_per_name: int = 4
    sound_hidden: int = 512
    colours: bool = False
    """Whether there is a head for the colour of a picture's thing."""
    sure_above: list[float] | None = None


class MicoTextConfig(PreTrainedConfig):
    """The text branch of pretraining: a BERT with cross-attention to the context.

    ``name_tokens`` is the most tokens of a concept's name, with [CLS] and [SEP]; 0: the concepts'
    names have no part in the contrastive space. ``frames``, for a model with a projection for each
    kind (``KindProjections``), has the rows of their frame embeddings: ``{"vision": 8, "audio": 2,
    "depth": 1}``. ``matching_classes`` is 2 where the matching head scores "no" and "yes", 1 where
    it scores "yes" alone. With ``subtitles`` the context can hold the subtitles of a sample.
    ``projection`` to the contrastive space: ``linear``, one layer, or ``mlp``, the paper's (3.4).
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
    name_tokens: int = 0
    frames: dict[str, int] | None = None
    head_norm_eps: float = 1e-5
    matching_classes: int = 1
    subtitles: bool = False
    projection: str = "linear"

    def bert(self) -> BertConfig:
        from transformers import BertConfig

        names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
        names += ["intermediate_size", "max_position_embeddings", "pad_token_id"]
        options: dict[str, Any] = {name: vars(self)[name] for name in names}
        options |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
        options |= {"attn_implementation": "sdpa", "use_cache": False}
        return BertConfig(is_decoder=True, add_cross_attention=True, **options)


class _ModelConfig(PreTrainedConfig):
    """The parts of both models; :meth:`from_dict` makes their configs from a folder's JSON.

    transformers does so from 5.20 on, with a class that 5.19 lacks.

    ``trained_on`` has an entry for each stage of training, with its ``stage`` and its ``data``: the
    paths of its data sets, or None where they are unknown. A folder without it is unknown.
    """

    encoder_config: MicoEncoderConfig = field(default_factory=MicoEncoderConfig)
    context_config: MicoContextConfig = field(default_factory=MicoContextConfig)
    concept_config: MicoConceptConfig | None = None
    trained_on: list[dict[str, Any]] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kinds = {**cls.sub_configs, "concept_config": MicoConceptConfig}
        parts = {
            name: AutoConfig.for_model(**part) if kinds[name] is AutoConfig else kinds[name](**part)
            for name, part in config_dict.items()
            if name in kinds and isinstance(part, dict)
        }
        own = {name: value for name, value in config_dict.items() if name != "auto_map"}
        return cast(Any, super()).from_dict({**own, **parts}, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """A folder that is saved needs no copy of this code, wherever the model came from."""

    @classmethod
    def known(cls) -> dict[str, dict[str, Any]]:
        """The fields of the configurations that are known by name."""
        file = Path(__file__).with_name("named_configs.yaml")
        found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
        return found[cls.model_type]

    @classmethod
    def named(cls, name: str) -> Self:
        """Such as ``"mini-scratch"``, whose concept names training adds. Each kind has a row."""
        known = cls.known()
        if name not in known:
            names = ", ".join(known)
            raise ConfigError(f"{name!r} is neither a folder nor a configuration's name: {names}")
        config = cast(Self, cls.from_dict(known[name]))
        config.context_config.kind_rows = {kind: row for row, kind in enumerate(MODALITIES)}
        return config

    @classmethod
    def tiny(cls, concepts: bool = True) -> Self:
        """A random model of a few thousand weights for tests."""
        config = cls.named("tiny")
        if not concepts:
            config.concept_config = None
        return config

    @property
    def concept_names(self) -> tuple[list[str], list[str]]:
        """Visual and sound names of the concepts; empty where the model has none."""
        concept = self.concept_config or MicoConceptConfig()
        return list(concept.visual_names or []), list(concept.sound_names or [])


class MicoConfig(_ModelConfig):
    """Pretraining (stage 1): encoder, context and text branch."""

    model_type = "mico"
    sub_configs: ClassVar[dict[str, Any]] = {
        "encoder_config": MicoEncoderConfig,
        "context_config": MicoContextConfig,
        "text_config": MicoTextConfig,
    }

    text_config: MicoTextConfig = field(default_factory=MicoTextConfig)
    mask_probability: float = 0.6
    temperature: float = 0.07


class MicoChatConfig(_ModelConfig):
    """MiCo-Chat: omni-encoder, context, bridge and a causal language model.

    ``base_llm`` names a language model whose frozen weights are *not* part of the checkpoint: a
    packaged name, a hub name or a folder. ``gguf_quantization`` is the one that it was trained for.
    """

    model_type = "mico_chat"
    sub_configs: ClassVar[dict[str, Any]] = {
        "encoder_config": MicoEncoderConfig,
        "context_config": MicoContextConfig,
        "bridge_config": MicoBridgeConfig,
        "llm_config": AutoConfig,
    }

    bridge_config: MicoBridgeConfig = field(default_factory=MicoBridgeConfig)
    llm_config: PreTrainedConfig = field(default_factory=lambda: AutoConfig.for_model("llama"))
    base_llm: str | None = None
    gguf_quantization: str | None = None

    @property
    def llm_width(self) -> int:
        llm = self.llm_config.get_text_config()
        return int(vars(llm).get("word_embed_proj_dim") or llm.hidden_size)  # the former: OPT's

    @property
    def context_token_id(self) -> int:
        """The placeholder's id: the first one beyond the LLM's vocabulary, so no text has it."""
        return int(self.llm_config.vocab_size)

    def context_length(self, kind: Kind, units: int) -> int:
        """Context tokens of a medium of ``units`` frames or slices, known before encoding."""
        concept, bridge = self.concept_config, self.bridge_config
        named = 0 if concept is None else concept.tokens_per_name
        things = bridge.things * (named + THING_WORDS)
        second = 0 if concept is None or concept.sure_above is None else named
        if kind == "audio":
            return bridge.n_still + named + second
        if concept is not None and concept.plain_names is not None:
            named *= 2
        named += second
        if kind == "video":
            return units * bridge.frame_grid**2 + things + (named if bridge.things else 0)
        return bridge.n_still + named + things

    @classmethod
    def without_llm(cls, folder: Path) -> Self | None:
        """A folder's config whose ``llm_config`` holds the values but has no class of its own.

        That class needs transformers' models, whose import takes a second. None where only
        transformers can read the config.
        """
        try:
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            llm = PreTrainedConfig(**found["llm_config"])
            if found["model_type"] != cls.model_type or not hasattr(llm, "hidden_size"):
                return None
            return cast(Self, cls.from_dict({**found, "llm_config": llm}))
        except (OSError, ValueError, TypeError, KeyError):
            return None


THING_WORDS = 6
"""Context tokens of a thing behind its name: how many have it, colour (or metres), side, height,
distance (or way), how many things there are."""


AutoConfig.register("mico", MicoConfig)
AutoConfig.register("mico_chat", MicoChatConfig)
