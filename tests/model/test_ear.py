"""The ear, with random weights in CTranslate2's format: Whisper's own weights are not needed."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mico_chat.errors import ModelError
from mico_chat.media import Audio
from mico_chat.media.kinds import KINDS
from mico_chat.media.medium import MediaReport
from mico_chat.model.config import MicoConceptConfig, MicoEncoderConfig
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.mini import ear as ears
from mico_chat.model.mini.concepts import ConceptAttention
from mico_chat.model.mini.ear import WIDTH, ear, read_ctranslate2, whisper_mel
from mico_chat.model.preprocessing import SAMPLE_RATE, Preprocessing

CPU = torch.device("cpu")
IMAGE, AUDIO = KINDS.index("image"), KINDS.index("audio")
SIDE = 64


def write_ctranslate2(file: Path, tensors: dict[str, Tensor], version: int = 6) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        values = tensor.numpy().astype(np.float16).tobytes()
        shape = struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
        data += text(name) + shape + struct.pack("<BI", 4, len(values)) + values
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data + struct.pack("<I", 0))


def whisper() -> WhisperEncoder:
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=WIDTH, encoder_layers=2, encoder_attention_heads=8, encoder_ffn_dim=4 * WIDTH
    )
    encoder = WhisperEncoder(config)
    encoder.eval()
    for value in encoder.parameters():
        value.data = value.data.half().float()  # as in the file
    return encoder


def in_their_names(encoder: WhisperEncoder) -> dict[str, Tensor]:
    ours = encoder.state_dict()
    found = {"encoder/position_encodings/encodings": ours["embed_positions.weight"]}
    for conv in ("conv1", "conv2"):
        found |= {f"encoder/{conv}/{p}": ours[f"{conv}.{p}"] for p in ("weight", "bias")}
    for i in range(len(encoder.layers)):
        theirs, own = f"encoder/layer_{i}", f"layers.{i}"
        key = torch.zeros(WIDTH)  # Whisper's keys have no bias
        found[f"{theirs}/self_attention/linear_0/weight"] = torch.cat(
            [ours[f"{own}.self_attn.{x}_proj.weight"] for x in "qkv"]
        )
        q, v = (ours[f"{own}.self_attn.{x}_proj.bias"] for x in "qv")
        found[f"{theirs}/self_attention/linear_0/bias"] = torch.cat([q, key, v])
        for mine, part in (
            ("self_attn.out_proj", "self_attention/linear_1"),
            ("fc1", "ffn/linear_0"),
            ("fc2", "ffn/linear_1"),
        ):
            found |= {f"{theirs}/{part}/{p}": ours[f"{own}.{mine}.{p}"] for p in ("weight", "bias")}
        for mine, part in (("self_attn_layer_norm", "self_attention"), ("final_layer_norm", "ffn")):
            found[f"{theirs}/{part}/layer_norm/gamma"] = ours[f"{own}.{mine}.weight"]
            found[f"{theirs}/{part}/layer_norm/beta"] = ours[f"{own}.{mine}.bias"]
    return found


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ears, "weights_file", lambda: tmp_path / "model.bin")
    ear.cache_clear()
    write_ctranslate2(tmp_path / "model.bin", in_their_names(whisper()))
    return tmp_path / "model.bin"


def slices(side: int = SIDE) -> Tensor:
    rng = np.random.default_rng(0)
    seconds = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * 600 * seconds) * (seconds % 0.5 < 0.3)
    samples = (tone + 0.01 * rng.standard_normal(len(tone))).astype(np.float32)
    report = MediaReport(name="tone", kind="audio", format="WAV")
    return Preprocessing(image_size=side).units(Audio(samples, report=report))


def test_mel_energies_become_whispers() -> None:
    """Within a tenth of Whisper's range of 2, though windows and filters differ."""
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(224 * 160 + 400).astype(np.float32)
    samples = noise * np.hanning(len(noise)).astype(np.float32) * 0.3
    report = MediaReport(name="noise", kind="audio", format="WAV")
    unit = Preprocessing().units(Audio(samples[: 223 * 160 + 400], report=report))[:1, 0]
    expected = WhisperFeatureExtractor()(samples, sampling_rate=SAMPLE_RATE)["input_features"][0]
    got = whisper_mel(unit)[0].numpy()
    # A frame of ours starts where the middle of theirs is.
    assert np.abs(got[:, 20:200] - expected[:, 21:201]).mean() < 0.1


def test_a_block_equals_transformers(weights: Path) -> None:
    units = slices()[:, 0]
    theirs = whisper()
    x = whisper_mel(units)
    theirs.config.max_source_positions = x.shape[2] // 2
    theirs.embed_positions = nn.Embedding.from_pretrained(
        theirs.embed_positions.weight[: x.shape[2] // 2]
    )
    with torch.inference_mode():
        hidden = theirs(x, output_hidden_states=True).hidden_states[1]
        got = ear(1, CPU)(units)
    expected = torch.cat([hidden.mean(1), hidden.std(1)], 1)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


def encoder(ear_blocks: int) -> OmniEncoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": SIDE, "embed_dim": 32, "depth": 1, "num_heads": 2}
    stem = "tf_efficientnet_lite0"
    return OmniEncoder(MicoEncoderConfig(stem=stem, ear_blocks=ear_blocks, **sizes)).eval()


def test_the_ear_hears_sounds_and_changes_nothing_else(weights: Path) -> None:
    deaf, hearing = encoder(0), encoder(1)
    assert deaf.state_dict().keys() == hearing.state_dict().keys()  # no weight of the ear is saved
    sound, grey = slices(), torch.randn(2, 1, SIDE, SIDE).expand(-1, 3, -1, -1)
    units, kind = torch.cat([grey, sound]), torch.tensor([IMAGE] * 2 + [AUDIO] * len(sound))
    with torch.inference_mode():
        features = hearing.features(units, kind)
        torch.testing.assert_close(hearing(features), deaf(deaf.features(units, kind)))
        expected = ear(1, CPU)(sound[:, 0])
        unknown = hearing.features(units)
    assert hearing.stem is not None
    heard = features[:, hearing.stem.seen_dim :].flatten(1)
    assert not heard[:2].any(), "a grey picture has three equal channels, but it is no sound"
    torch.testing.assert_close(heard[2:, : 2 * WIDTH], expected)
    assert not unknown[:, hearing.stem.seen_dim :].any()


def test_a_grey_picture_needs_no_ear(weights: Path) -> None:
    weights.unlink()
    media = torch.tensor([IMAGE]), torch.tensor([1])
    assert encoder(1).unit_features(*media, torch.ones(1, 3, SIDE, SIDE)).any()


def test_the_sounds_names_read_the_mean_of_what_is_heard(weights: Path) -> None:
    hearing = encoder(1)
    assert hearing.stem is not None
    config = MicoConceptConfig(
        visual_names=["cat", "dog"], sound_names=["bark", "bell"], n_pretrained=1
    )
    concepts = ConceptAttention(config, hearing.stem).eval()
    sound = slices()
    assert len(sound) > 1
    with torch.inference_mode():
        kind = torch.tensor([AUDIO] * (len(sound) + 1))
        features = hearing.features(torch.cat([sound, sound[:1]]), kind)
        got = concepts.sound_features(features, torch.tensor([len(sound), 1]))
        expected = ear(1, CPU)(sound[:, 0])
        assert concepts.sound_logits(features, torch.tensor([len(sound), 1])).shape == (2, 2)
    torch.testing.assert_close(got, torch.stack([expected.mean(0), expected[0]]))


def test_missing_and_wrong_weights_are_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"model.bin: it has no encoder/layer_2/"):
        ear(3, CPU)
    broken = tmp_path / "broken.bin"
    broken.write_bytes(weights.read_bytes()[:-2000])
    with pytest.raises(ModelError, match=r"broken.bin: damaged"):
        read_ctranslate2(broken)
    write_ctranslate2(broken, {}, version=7)
    with pytest.raises(ModelError, match="format 7 is not known"):
        read_ctranslate2(broken)
    weights.unlink()
    ear.cache_clear()
    with pytest.raises(ModelError, match="mico-chat setup"):
        ear(1, CPU)
