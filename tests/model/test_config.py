"""Configurations: sizes of the named ones, context lengths, and the JSON that a folder holds."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from mico_chat.checkpoints.footprint import meta_chat, meta_llm, parameter_count
from mico_chat.errors import ConfigError
from mico_chat.media.kinds import Kind
from mico_chat.model.config import MicoChatConfig, MicoConceptConfig, MicoConfig


def test_vicuna_7b_has_the_papers_sizes() -> None:
    model = meta_chat(MicoChatConfig.named("mico-g-vicuna-7b"))
    assert parameter_count(model.encoder) == 1_011_146_112  # EVA-CLIP's giant, without its head
    assert model.encoder.embed_dim == 1408
    assert model.encoder.grid == 16
    assert model.concepts is None
    assert model.bridge.proj_out.out_features == 4096


def test_mini_fits_a_laptop() -> None:
    config = MicoChatConfig.named("mini-scratch")
    visual, sound = ([str(n) for n in range(number)] for number in (1200, 150))
    config.concept_config = MicoConceptConfig(visual_names=visual, sound_names=sound, colours=True)
    model = meta_chat(config)
    assert parameter_count(meta_llm(config.llm_config)) == 134_515_008
    assert 13e6 < parameter_count(model.encoder) < 15e6
    assert parameter_count(model) * 2 < 50e6, "bytes in bfloat16"
    assert model.encoder.grid == 7
    assert config.base_llm == "smollm2-135m-instruct"


def test_an_unknown_name_says_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'mega'.*mini-scratch, mico-g-vicuna-7b"):
        MicoChatConfig.named("mega")


def test_context_length_follows_the_bridge() -> None:
    config = MicoChatConfig.named("mini-scratch")
    name, soft, things = 4, 3, 6 * (4 + 6)  # the tokens of the picture's name, and of six things
    stills: tuple[Kind, ...] = ("image", "depth", "normal")
    assert {config.context_length(kind, 1) for kind in stills} == {name + soft + things}
    assert config.context_length("audio", 3) == name + soft
    assert config.context_length("video", 8) == 8 + name + things
    assert MicoChatConfig.named("mico-g-vicuna-7b").context_length("video", 8) == 8
    assert MicoChatConfig.tiny(concepts=False).context_length("image", 1) == 5


@pytest.mark.parametrize("concepts", [True, False])
@pytest.mark.parametrize("kind", [MicoChatConfig, MicoConfig])
def test_a_folder_brings_the_config_back(
    kind: type[MicoChatConfig | MicoConfig], concepts: bool, tmp_path: Path
) -> None:
    config = kind.tiny(concepts)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert isinstance(again.concept_config, MicoConceptConfig) == concepts
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
