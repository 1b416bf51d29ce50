"""The parts of the media path: encoder, context, bridge, concepts; each against its equation."""

from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS
from mico_chat.model.bridge import PerceiverBridge
from mico_chat.model.config import (
    KIND_ROWS,
    MicoBridgeConfig,
    MicoChatConfig,
    MicoConceptConfig,
    MicoConfig,
    MicoContextConfig,
    MicoEncoderConfig,
    MicoTextConfig,
)
from mico_chat.model.context import AlikeMedia, KindRows, MultimodalContext, Units
from mico_chat.model.encoder import OmniEncoder
from mico_chat.model.mini.concepts import LIKELY, ConceptAttention, build_concepts
from mico_chat.model.mini.stem import COLOUR_CELLS
from mico_chat.model.preprocessing import PART
from mico_chat.model.released import KindProjections
from tests.support.tiny import SIDE, chat_model


@pytest.fixture(scope="module")
def encoder() -> OmniEncoder:
    torch.manual_seed(0)
    return OmniEncoder(MicoConfig.tiny().encoder_config).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def test_tokens_are_a_prefix_and_a_grid(encoder: OmniEncoder, pixels: torch.Tensor) -> None:
    tokens = encoder(encoder.features(pixels))
    assert tokens.shape == (3, encoder.n_prefix + encoder.grid**2, encoder.embed_dim)
    assert (encoder.n_prefix, encoder.grid, encoder.embed_dim) == (1, 2, 32)


def test_cached_features_equal_pixels(encoder: OmniEncoder, pixels: torch.Tensor) -> None:
    kinds, units = torch.tensor([0, 2]), torch.tensor([1, 2])
    cached = encoder.features(pixels)
    torch.testing.assert_close(encoder.unit_features(kinds, units, pixels), cached)
    torch.testing.assert_close(encoder.unit_features(kinds, units, None, cached), cached)


@pytest.mark.parametrize("inference", [True, False])
def test_many_units_are_encoded_in_parts(encoder: OmniEncoder, inference: bool) -> None:
    pixels = torch.randn(2 * PART + 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    assert encoder.stem is not None
    hook = encoder.stem.register_forward_hook(lambda *given: seen.append(len(given[2])))
    with torch.inference_mode(inference), hook:
        features = encoder.features(pixels)
        tokens = encoder(features)
    assert seen == ([PART, PART, 3] if inference else [len(pixels)])
    with torch.no_grad():
        for at in (0, PART - 1, PART, len(pixels) - 1):
            one = encoder.features(pixels[at : at + 1])
            torch.testing.assert_close(features[at : at + 1], one, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(tokens[at : at + 1], encoder(one), atol=1e-4, rtol=1e-4)


def test_the_stem_keeps_colours_of_a_cell(encoder: OmniEncoder, pixels: torch.Tensor) -> None:
    features = encoder.features(pixels)
    colours = F.pixel_shuffle(features[:, -3 * COLOUR_CELLS**2 :], COLOUR_CELLS)
    torch.testing.assert_close(colours, F.adaptive_avg_pool2d(pixels, encoder.grid * COLOUR_CELLS))
    assert encoder.stem is not None
    assert features.shape[1] == encoder.stem.out_dim


def test_wrong_units_are_refused(encoder: OmniEncoder, pixels: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="sum to 4 but there are 3 units"):
        encoder.unit_features(torch.tensor([0, 2]), torch.tensor([2, 2]), pixels)
    for given, cached in ((pixels, encoder.features(pixels)), (None, None)):
        with pytest.raises(ModelError, match="either"):
            encoder.unit_features(torch.tensor([2]), torch.tensor([3]), given, cached)


def test_a_plain_vit_has_no_stem() -> None:
    torch.manual_seed(0)
    config = MicoEncoderConfig(architecture="vit_tiny_patch16_224", image_size=SIDE)
    encoder = OmniEncoder(config).eval()
    pixels = torch.randn(1, 3, SIDE, SIDE)
    assert encoder.stem is None
    assert encoder.features(pixels) is pixels
    assert encoder(pixels).shape == (1, 1 + 16, 192)


# --- context --------------------------------------------------------------------------------------


@pytest.fixture
def context() -> MultimodalContext:
    torch.manual_seed(0)
    return MultimodalContext(MicoContextConfig(max_units=3), embed_dim=4)


def test_modality_and_unit_are_added_to_every_token(context: MultimodalContext) -> None:
    image, video = KINDS.index("image"), KINDS.index("video")
    tokens = torch.zeros(3, 5, 4)
    out = context(tokens, torch.tensor([image, video]), torch.tensor([1, 2]))
    for unit, (kind, number) in enumerate([(image, 0), (video, 0), (video, 1)]):
        row = context.modality.weight[kind] + context.context.weight[kind * 3 + number]
        torch.testing.assert_close(out[unit], row.expand(5, 4))  # eq. (1) and E_M


def test_a_switch_leaves_a_term_out(context: MultimodalContext) -> None:
    """Of the paper's tables and of the release's."""
    kind, units, tokens = torch.tensor([0, 2]), torch.tensor([1, 2]), torch.randn(3, 5, 4)
    text = MicoTextConfig(frames={"vision": 2, "audio": 1, "depth": 1}, hidden_size=4)
    released = KindProjections(context.config, text, context_dim=4)
    of = Units.of(kind, units)
    row = of.kind * 3 + of.place
    own, place = cast(Any, released["vision"]), torch.tensor([0, 0, 1])
    for on in ((True, True), (True, False), (False, True), (False, False)):
        context.config.modality, context.config.context = on
        e_m, e_c = context.modality.weight[of.kind] * on[0], context.context.weight[row] * on[1]
        expected = tokens + (e_m + e_c).unsqueeze(1)
        torch.testing.assert_close(context(tokens, kind, units), expected)
        added = own.modality * on[0] + own.frame[place].unsqueeze(1) * on[1]
        torch.testing.assert_close(released(tokens, of), own.proj(tokens) + added)


def test_units_beyond_the_table_share_its_last_row(context: MultimodalContext) -> None:
    out = context(torch.zeros(5, 1, 4), torch.tensor([2]), torch.tensor([5]))
    assert not torch.equal(out[1], out[2])
    torch.testing.assert_close(out[3], out[2])
    torch.testing.assert_close(out[4], out[2])


# --- bridge ---------------------------------------------------------------------------------------

GRID, PREFIX, WIDTH, LLM = 4, 1, 16, 12
TOKENS = PREFIX + GRID**2


@pytest.fixture
def bridge() -> PerceiverBridge:
    torch.manual_seed(0)
    config = MicoBridgeConfig(
        hidden_size=16, num_heads=2, depth=1, still_grid=3, still_global=2, frame_grid=2
    )
    return PerceiverBridge(config, KindRows(KIND_ROWS), WIDTH, GRID, PREFIX, LLM).eval()


def test_a_frames_queries_look_at_their_frame(bridge: PerceiverBridge) -> None:
    torch.nn.init.zeros_(bridge.change.weight)  # which tells how all frames differ from their mean
    tokens = torch.randn(1, 3, TOKENS, WIDTH)
    changed = tokens.clone()
    changed[:, 1] += 1.0 * torch.randn(TOKENS, WIDTH)
    kind = torch.tensor([2])
    before, after = (bridge(t, kind, "frames").unflatten(1, (3, 4))[0] for t in (tokens, changed))
    torch.testing.assert_close(before[0], after[0])
    torch.testing.assert_close(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


def test_change_is_of_what_moves(bridge: PerceiverBridge) -> None:
    still = torch.randn(1, 1, TOKENS, WIDTH).expand(-1, 3, -1, -1)
    moving, kind = torch.randn(1, 3, TOKENS, WIDTH), torch.tensor([2])
    before = [bridge(tokens, kind, "frames") for tokens in (still, moving)]
    with torch.no_grad():
        bridge.change.weight.mul_(-2.0)
    after = [bridge(tokens, kind, "frames") for tokens in (still, moving)]
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_frames_know_when_they_are(bridge: PerceiverBridge) -> None:
    still = torch.randn(1, 1, TOKENS, WIDTH).expand(-1, 2, -1, -1)  # one frame, shown twice
    first, second = bridge(still, torch.tensor([2]), "frames").unflatten(1, (2, 4))[0]
    assert not torch.allclose(first, second)


def test_queries_look_around_their_place(bridge: PerceiverBridge) -> None:
    """A value in one corner reaches the query anchored there most."""
    values = torch.zeros(1, 1, TOKENS, LLM)
    values[0, 0, PREFIX] = 1.0  # the upper left cell
    tokens = torch.zeros(1, 1, TOKENS, WIDTH)
    kind = torch.tensor([0])
    added = bridge(tokens, kind, "still", values) - bridge(tokens, kind, "still")
    reached = added[0, :9, 0]
    assert reached.argmax() == 0
    assert reached[0] > 10 * reached[8]  # lower right


def test_queries_start_apart() -> None:
    torch.manual_seed(0)
    config = MicoBridgeConfig(hidden_size=64, num_heads=2, depth=2, still_grid=3, still_global=2)
    bridge = PerceiverBridge(config, KindRows(KIND_ROWS), 48, grid=7, n_prefix=1, llm_dim=32)
    out = bridge(torch.randn(4, 1, 50, 48), torch.zeros(4, dtype=torch.long), "still")
    apart = out.std(dim=1).mean() / out.pow(2).mean().sqrt()
    assert float(apart.detach()) > 0.5  # 0.05 where all queries have become one


# --- concepts -------------------------------------------------------------------------------------

VISUAL = 3


@pytest.fixture
def concepts() -> ConceptAttention:
    found = chat_model().concepts
    assert found is not None
    with torch.no_grad():
        found.log_scale.copy_(torch.tensor([0.3, -0.2, 0.1]))
        found.gain.copy_(torch.tensor([1.5, 0.7]))
    return found


@pytest.fixture
def table() -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(256, 8)


def test_visual_tokens_are_the_posterior_mix(
    concepts: ConceptAttention, table: nn.Embedding
) -> None:
    cells = torch.randn(1, 4, VISUAL, generator=torch.Generator().manual_seed(2))
    # Names: (10), (11), (12, 13).
    p = (cells.mean(1) * torch.tensor(0.3).exp()).softmax(-1)[0]
    w = table.weight
    first = p[0] * w[10] + p[1] * w[11] + p[2] * w[12]
    assert p[2] < LIKELY, "what the likely names lack is not said, however faintly"
    expected = torch.stack([first, torch.zeros_like(first)]) * 1.5
    torch.testing.assert_close(concepts.visual_tokens(cells, table)[0], expected)
    cells[..., 2] += 5.0
    p = (cells.mean(1) * torch.tensor(0.3).exp()).softmax(-1)[0]
    assert 1 > p[2] > LIKELY
    torch.testing.assert_close(concepts.visual_tokens(cells, table)[0, 1], w[13] * 1.5)


def test_sound_tokens_use_the_sound_names(concepts: ConceptAttention, table: nn.Embedding) -> None:
    logits = torch.tensor([[1.0, -1.0]])
    p = (logits * torch.tensor(0.1).exp()).softmax(-1)[0]
    tokens = concepts.sound_tokens(logits, table)[0]
    torch.testing.assert_close(tokens[0], (p[0] * table.weight[14] + p[1] * table.weight[11]) * 1.5)
    torch.testing.assert_close(tokens[1], torch.zeros(8))  # no sound name has a second token


def test_cell_values_say_what_stands_in_each_cell(
    concepts: ConceptAttention, table: nn.Embedding
) -> None:
    cells = torch.randn(1, 4, VISUAL, generator=torch.Generator().manual_seed(3))
    p = (cells * torch.tensor(-0.2).exp()).softmax(-1)[0]
    names = torch.stack([table.weight[10], table.weight[11], table.weight[[12, 13]].mean(0)])
    torch.testing.assert_close(concepts.cell_values(cells, table)[0], p @ names * 0.7)


def test_finer_names_add_up_to_a_plain_one_and_looks_count_as_much_as_the_whole(
    encoder: OmniEncoder, pixels: torch.Tensor, table: nn.Embedding
) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"visual_names": ["duck", "drake", "dog"], "sound_names": ["bell"]}
    names["plain_names"] = ["duck", "duck", "dog", "bell"]
    config = MicoConceptConfig(**names, n_pretrained=2, tokens_per_name=1, sound_hidden=4)
    concepts = build_concepts(config, encoder)
    assert concepts is not None
    assert concepts.exact_ids is not None
    concepts.name_ids.copy_(torch.tensor([[10], [10], [11], [12]]))
    concepts.exact_ids.copy_(torch.tensor([[10], [13], [11]]))
    features = encoder.features(pixels)
    (media,) = AlikeMedia.groups(torch.zeros(len(pixels)).long(), torch.ones(len(pixels)).long())
    named, _ = concepts(features, media, table)
    p = concepts.cell_logits(features).mean(1).softmax(-1)
    w = table.weight
    plain = (p[:, :2].sum(1, keepdim=True) * w[10] + p[:, 2:] * w[11]).unsqueeze(1)
    torch.testing.assert_close(named[:, :1], plain)
    exact = p @ w[[10, 13, 11]]
    torch.testing.assert_close(named[:, 1:], exact.unsqueeze(1))
    looks = encoder.features(pixels.flip(3))
    seen, values = concepts(features, media, table, looks)
    both = (concepts.cell_logits(features).mean(1) + concepts.cell_logits(looks).mean(1)) / 2
    torch.testing.assert_close(seen[:, 1], both.softmax(-1) @ w[[10, 13, 11]])
    assert values.shape[1] == features.shape[2] * features.shape[3], "no value for a look's cell"


@pytest.mark.parametrize(("sure", "said"), [(0.9, True), (0.5, False)])
def test_an_unsure_medium_has_tokens_of_its_second_best_name(
    encoder: OmniEncoder, pixels: torch.Tensor, table: nn.Embedding, sure: float, said: bool
) -> None:
    """Finer names count together: the second best is another thing, not the other kind of duck."""
    names: dict[str, Any] = {"visual_names": ["duck", "drake", "dog"], "n_pretrained": 2}
    names |= {
        "sound_names": ["bell", "horn"],
        "plain_names": ["duck", "duck", "dog", "bell", "horn"],
    }
    options = MicoConceptConfig(**names, tokens_per_name=2, sound_hidden=4, sure_above=[sure, 0.7])
    concepts = build_concepts(options, encoder)
    assert concepts is not None
    concepts.name_ids.copy_(torch.tensor([[10, -1], [10, -1], [11, 9], [12, -1], [13, -1]]))
    cells = torch.tensor([0.35, 0.35, 0.3]).log().expand(1, 4, 3)
    features = encoder.features(pixels[:1])
    (media,) = AlikeMedia.groups(torch.zeros(1).long(), torch.ones(1).long())
    named, _ = concepts(features, media, table, change=lambda *_: cells)
    assert named.shape[1] == MicoChatConfig(concept_config=options).context_length("image", 1) - (
        MicoChatConfig().context_length("image", 1)
    )
    torch.testing.assert_close(named[0, -2:], table.weight[[11, 9]] * said)
    logits = torch.tensor([[0.2, 0.8], [0.4, 0.6]]).log()
    of_sounds = concepts.sound_names(logits, table)
    torch.testing.assert_close(of_sounds[0, 2:], torch.zeros(2, 8))
    torch.testing.assert_close(of_sounds[1, 2], table.weight[12])


def test_each_sound_of_a_batch_equals_itself_alone(concepts: ConceptAttention) -> None:
    torch.manual_seed(0)
    features = torch.randn(5, concepts.last_dim + concepts.mid_dim, 2, 2)
    units = torch.tensor([2, 3])
    sounds = zip(features.split(units.tolist()), units.split(1), strict=True)
    alone = torch.cat([concepts.sound_logits(*sound) for sound in sounds])
    torch.testing.assert_close(concepts.sound_logits(features, units), alone)


def test_concepts_need_a_stem() -> None:
    config = MicoEncoderConfig(architecture="vit_tiny_patch16_224", image_size=SIDE)
    with pytest.raises(ModelError, match="stem"):
        build_concepts(MicoChatConfig.tiny().concept_config, OmniEncoder(config))
    assert build_concepts(None, OmniEncoder(config)) is None


def test_a_small_context_embedding_counts_beside_an_encoder_in_half() -> None:
    """In bfloat16 it would vanish in the sum, and E_C could not learn by small steps."""
    model = chat_model()
    model.encoder.bfloat16()
    with torch.no_grad():
        model.context.context.weight.zero_()
        model.context.context.weight[KINDS.index("video") * 8 + 1] = 1e-4
    pixels = torch.ones(2, 3, SIDE, SIDE) / 2
    with torch.inference_mode():
        units = torch.tensor([2])
        first, second = model.encoded(torch.tensor([KINDS.index("video")]), units, pixels)[0]
    torch.testing.assert_close(second - first, torch.full_like(first, 1e-4), rtol=0.01, atol=1e-6)
