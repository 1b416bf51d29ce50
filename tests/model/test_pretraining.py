"""Stage 1: the three objectives against what the paper's equations say."""

from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mico_chat.checkpoints.assemble import set_options
from mico_chat.errors import ConfigError
from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoChatConfig, MicoConfig
from mico_chat.model.losses import caption_key
from mico_chat.model.media_path import MediaModel
from mico_chat.model.mini.regions import tagging_loss
from mico_chat.model.pretraining import EncodedContexts, MicoForPretraining
from mico_chat.model.text_branch import Corpora
from tests.support.tiny import SIDE, captions, pretraining_model

MASK = 4
IMAGE, AUDIO, VIDEO = (KINDS.index(kind) for kind in ("image", "audio", "video"))


@pytest.fixture
def model() -> MicoForPretraining:
    return pretraining_model()


def batch(n: int = 3, length: int = 6) -> dict[str, Tensor]:
    """A still for each of ``n`` samples with random captions."""
    ids, mask = captions(n, length)
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "media_kind": torch.full((n,), IMAGE),
        "media_units": torch.ones(n, dtype=torch.long),
        "media_row": torch.arange(n),
        "pixel_values": torch.randn(n, 3, SIDE, SIDE, generator=generator),
    }


def encoded(model: MicoForPretraining, b: dict[str, Tensor]) -> EncodedContexts:
    media: dict[str, Any] = {k: v for k, v in b.items() if k.startswith(("media", "pixel"))}
    return model.encode(**media, n=len(b["input_ids"]))


def features(model: MicoForPretraining, b: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pooled media and text features of a batch."""
    return encoded(model, b).pooled, model.encode_text(b["input_ids"], b["attention_mask"])


def matches(model: MicoForPretraining, b: dict[str, Tensor], seeds: int) -> list[tuple[Any, ...]]:
    """The arguments of each call of ``match`` for a batch, with so many seeds."""
    with patch.object(model, "match", wraps=model.match) as match:
        for seed in range(seeds):
            torch.manual_seed(seed)
            model(**b)
    return [call.args for call in match.call_args_list]


# --- eq. (4) -----------------------------------------------------------------------------------


def test_equal_captions_are_no_negatives(model: MicoForPretraining) -> None:
    b = batch(3)
    b["input_ids"][2] = b["input_ids"][0]
    media, text = features(model, b)
    similarity = media @ text.T / 0.07
    similarity[0, 2] = similarity[2, 0] = float("-inf")
    rows = torch.arange(3)
    by_hand = (F.cross_entropy(similarity, rows) + F.cross_entropy(similarity.T, rows)) / 2
    torch.testing.assert_close(model(**b).contrastive_loss, by_hand)


def test_the_key_of_a_caption_ignores_its_padding() -> None:
    short, long = torch.tensor([[7, 8, 9]]), torch.tensor([[7, 8, 9, 0, 0]])
    key = caption_key(short, torch.ones_like(short))
    assert key == caption_key(long, torch.tensor([[1, 1, 1, 0, 0]]))
    assert key != caption_key(torch.tensor([[8, 7, 9]]), torch.ones_like(short))


def test_contrastive_gradient_reaches_both_sides(model: MicoForPretraining) -> None:
    model(**batch(3)).contrastive_loss.backward()
    first = (
        next(m.parameters()) for m in (model.media_projection, model.encoder.vit, model.text.bert)
    )
    last = next(model.text_projection.parameters())
    for parameter in (*first, last, model.temperature):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_padding_changes_no_feature(model: MicoForPretraining) -> None:
    b = batch(2)
    _, text = features(model, b)
    b["input_ids"] = F.pad(b["input_ids"], (0, 4), value=9)
    b["attention_mask"] = F.pad(b["attention_mask"], (0, 4))
    torch.testing.assert_close(features(model, b)[1], text)


# --- eq. (5) -----------------------------------------------------------------------------------


def test_matching_draws_no_positives(model: MicoForPretraining) -> None:
    n = 4
    b = batch(n)
    b["input_ids"][2] = b["input_ids"][0]  # either is right for either's picture
    calls = matches(model, b, 20)
    assert len(calls) == 20
    seen: set[tuple[int, int]] = set()
    for ids, _, context, _, _ in calls:
        pictures = context[:n]
        for row in range(n, 3 * n):
            shown = next(i for i in range(n) if torch.equal(context[row], pictures[i]))
            assert not torch.equal(ids[row], b["input_ids"][shown])
            seen.add((row, shown))
        assert torch.equal(ids[:n], b["input_ids"])
    assert len(seen) > 2 * n, "negatives vary"


@pytest.mark.parametrize(("hardness", "nearest"), [(1.0, 0.9), (1e-3, 1 / 3)])
def test_hardness_decides_how_alike_a_negative_is(
    model: MicoForPretraining, hardness: float, nearest: float
) -> None:
    """The share of negatives that are the text nearest to the picture but its own, of three."""
    n = 4
    b = batch(n)
    model.hardness = hardness
    with torch.no_grad():
        model.temperature.fill_(0.01)
        media, text = features(model, b)
    logits = (media @ text.T / 0.01).fill_diagonal_(float("-inf"))
    calls = matches(model, b, 25)
    best = b["input_ids"][logits.argmax(1)]
    share = sum(int((ids[n : 2 * n] == best).all(1).sum()) for ids, *_ in calls) / (25 * n)
    assert share == pytest.approx(nearest, abs=0.12)


def test_matching_has_no_negatives_where_all_captions_agree(model: MicoForPretraining) -> None:
    b = batch(3)
    b["input_ids"][1:] = b["input_ids"][0]
    shown = encoded(model, b)
    logits = model.match(b["input_ids"], b["attention_mask"], shown.context, shown.mask)
    expected = F.binary_cross_entropy_with_logits(logits, torch.ones(3))
    torch.testing.assert_close(model(**b).matching_loss, expected)


# --- eq. (6) -----------------------------------------------------------------------------------


def test_sixty_percent_of_the_words_are_masked(model: MicoForPretraining) -> None:
    seen = []

    def record(_: Any, args: tuple[Any, ...]) -> None:
        if args[1].dim() == 3:  # the caption objective says by which tokens each is seen
            seen.append(args[0])

    b = batch(32, length=60)
    b["attention_mask"][:, 50:] = 0
    torch.manual_seed(0)
    with model.text.register_forward_pre_hook(record):
        model(**b)
    hidden = seen[0] == MASK
    assert not hidden[:, 0].any(), "[CLS] stays"
    assert not hidden[:, 50:].any(), "padding stays"
    assert float(hidden[:, 1:50].float().mean()) == pytest.approx(0.6, abs=0.04)


# --- several media, several units --------------------------------------------------------------


def joint() -> dict[str, Tensor]:
    """A picture with a sound of two slices, and a clip of three frames."""
    generator = torch.Generator().manual_seed(2)
    return {
        **batch(2),
        "media_kind": torch.tensor([IMAGE, AUDIO, VIDEO]),
        "media_units": torch.tensor([1, 2, 3]),
        "media_row": torch.tensor([0, 0, 1]),
        "pixel_values": torch.randn(6, 3, SIDE, SIDE, generator=generator),
    }


def test_a_joint_context_equals_its_samples_alone(model: MicoForPretraining) -> None:
    b = joint()
    media, _ = features(model, b)
    of_first = {"input_ids": 1, "attention_mask": 1, "media_kind": 2, "media_units": 2}
    of_first |= {"media_row": 2, "pixel_values": 3}
    first = {name: tensor[: of_first[name]] for name, tensor in b.items()}
    torch.testing.assert_close(features(model, first)[0], media[:1])


# --- eq. (3) -----------------------------------------------------------------------------------


def across() -> dict[str, Tensor]:
    """Six samples: two of pictures and sounds, one of pictures, sounds and clips, one of pictures
    and clips, two of one corpus. A clip's second medium is its sound track."""
    media = [[IMAGE, AUDIO], [AUDIO, IMAGE], [IMAGE, AUDIO, VIDEO], [VIDEO, IMAGE]]
    media += [[IMAGE], [AUDIO]]
    kinds = [kind for row in media for kind in row]
    joint = [len(row) > 1 for row in media for _ in row]
    kind, units = torch.tensor(kinds), torch.tensor([1 + (kind == VIDEO) for kind in kinds])
    generator = torch.Generator().manual_seed(2)
    captions = [[0, *(kind + 1 for kind in row for _ in range(2)), 0] for row in media[:4]]
    length = max(map(len, captions))
    captions = [row + [0] * (length - len(row)) for row in [*captions, [], []]]
    return {
        **batch(len(media), length),
        "media_kind": kind,
        "media_units": units,
        "media_row": torch.tensor([n for n, row in enumerate(media) for _ in row]),
        "pixel_values": torch.randn(int(units.sum()), 3, SIDE, SIDE, generator=generator),
        "caption_corpus": torch.tensor(captions),
        "media_corpus": (kind + 1) * torch.tensor(joint),
    }


def test_a_caption_and_its_medium_have_one_row_of_e_sam(model: MicoForPretraining) -> None:
    ids, mask = captions(1, 3)
    context = torch.randn(1, 2, model.config.text_config.hidden_size)
    seen, none = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.long)
    plain = model.text(ids, mask, context, seen)
    for corpora in (
        Corpora(torch.tensor([[0, 0, 2]]), none[:, :2]),
        Corpora(none, torch.tensor([[2, 0]])),
    ):
        model.zero_grad()
        named = model.text(ids, mask, context, seen, corpora)
        assert not torch.allclose(named, plain)
        named[..., 0].sum().backward()
        reached = model.text.sampling.weight.grad
        assert reached is not None
        assert reached.any(1).nonzero().flatten().tolist() == [2]
    assert not model.text.sampling.weight[0].any(), "a sample of one corpus has none"


def test_each_token_has_the_row_of_its_own_corpus(model: MicoForPretraining) -> None:
    b = across()
    model.objective_weights = {"caption": 1.0}
    seen: list[Corpora] = []
    with model.text.register_forward_pre_hook(lambda _, args: seen.extend(args[4:])):
        model(**b)
    tokens = model.encoder.n_prefix + model.encoder.grid**2
    assert torch.equal(seen[0].text, b["caption_corpus"])
    rows = [[1, 2], [2, 1], [1, 2, 3, 3], [3, 3, 1], [0], [0]]
    for row, units in zip(seen[0].context, rows, strict=True):
        given = row.unflatten(0, (-1, tokens))
        assert given.tolist() == [[unit] * tokens for unit in units + [0] * (4 - len(units))]


def test_contrast_cannot_tell_corpora_by_e_sam(model: MicoForPretraining) -> None:
    b = across()
    model.objective_weights = {"contrastive": 1.0}
    unnamed = {k: v for k, v in b.items() if not k.endswith("corpus")}
    with torch.no_grad():
        model.text.sampling.weight[1:].mul_(1000)
    named = model(**b)
    torch.testing.assert_close(named.loss, model(**unnamed).loss, rtol=0, atol=0)
    named.loss.backward()
    assert model.text.sampling.weight.grad is None


def test_e_sam_is_in_the_contrast_of_the_papers_models() -> None:
    """z_I = f(x_I) + E_Sam and z_T^I = f'(x_T^I) + E_Sam, eq. (3), are what eq. (4) compares."""
    b, config = across(), MicoConfig.tiny()
    set_options(config, {"context_config.contrastive_sampling": True})
    model = pretraining_model(config=config)
    model.objective_weights = {"contrastive": 1.0}
    assert model.media_sampling is not None
    loss = model(**b).loss
    loss.backward()
    for table in (model.media_sampling, model.text.sampling):
        assert table.weight.grad is not None
        assert table.weight.grad.any(1).nonzero().flatten().tolist() == [1, 2, 3]
    unnamed = {k: v for k, v in b.items() if not k.endswith("corpus")}
    plain = encoded(model, unnamed)
    with torch.no_grad():
        tokens, _ = model.seen(b["media_kind"], b["media_units"], b["pixel_values"])
        cls = tokens[:2, 0] + model.media_sampling.weight[[1, 2]]  # a picture and a sound
        by_hand = F.normalize(model.media_projection(cls.mean(0)), dim=-1)
    named = model.encode(
        **{k: v for k, v in b.items() if k.startswith(("media", "pixel"))},  # type: ignore[arg-type]
        n=len(b["input_ids"]),
    )
    torch.testing.assert_close(named.pooled[0], by_hand)
    torch.testing.assert_close(named.pooled[4:], plain.pooled[4:])  # of one corpus, as in a search
    with torch.no_grad():
        for table in (model.media_sampling, model.text.sampling):
            table.weight.mul_(50)
    assert model(**b).loss < loss < model(**unnamed).loss + 1, "E_Sam tells corpora apart"
    with torch.no_grad():
        model.text.sampling.weight.zero_()
        model.media_sampling.weight.zero_()
    torch.testing.assert_close(model(**b).loss, model(**unnamed).loss, rtol=0, atol=0)
    set_options(config, {"context_config.sampling": False})
    assert pretraining_model(config=config).media_sampling is None


def test_the_papers_projections_are_mlps(tmp_path: Path) -> None:
    config = MicoConfig.tiny()
    set_options(config, {"text_config.projection": "mlp", "text_config.subtitles": True})
    model = pretraining_model(config=config)
    for part in (model.media_projection, model.text_projection, model.subtitle_projection):
        assert [type(layer).__name__ for layer in cast(Any, part)] == ["Linear", "GELU", "Linear"]
    model(**batch(3)).contrastive_loss.backward()
    for part in (model.media_projection, model.text_projection):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())
    model.save_pretrained(tmp_path)
    again = MicoForPretraining.from_pretrained(tmp_path).train(False)
    for one, same in zip(features(model, batch(3)), features(again, batch(3)), strict=True):
        torch.testing.assert_close(one, same)
    old = MicoConfig.from_dict({"text_config": {"hidden_size": 32}})
    assert (old.text_config.projection, old.context_config.position) == ("linear", True)
    for options, said in (
        ({"text_config.projection": "deep"}, "'deep': it is linear or mlp"),
        ({"text_config.frames": dict.fromkeys(("vision", "audio", "depth"), 1)}, "set it to lin"),
    ):
        set_options(config, options)
        with pytest.raises(ConfigError, match=said):
            MicoForPretraining(config)
        config.text_config.projection = "mlp"


@pytest.mark.parametrize("on", [True, False])
def test_a_switch_leaves_e_pos_out(on: bool, tmp_path: Path) -> None:
    """Without it a picture is a bag of cells, in pretraining and in the chat model after it."""
    config, chat = MicoConfig.tiny(concepts=False), MicoChatConfig.tiny(concepts=False)
    for one in (config, chat):
        set_options(one, {"context_config.position": on})
        assert one.encoder_config.depth > 0
    model = pretraining_model(config=config)
    model.save_pretrained(tmp_path)
    again = MicoForPretraining.from_pretrained(tmp_path).train(False)
    cells = torch.randn(1, model.encoder.stem.seen_dim, 2, 2)  # type: ignore[union-attr]
    mixed, order = cells.flatten(2)[:, :, [2, 0, 3, 1]].view_as(cells), [0, 3, 1, 4, 2]
    for encoder in (again.encoder, model.encoder, MediaModel(chat).train(False).encoder):
        whole, bag = encoder(cells), encoder(mixed)
        assert torch.allclose(whole[:, order], bag, atol=1e-5) != on
    torch.testing.assert_close(again.encoder(cells), model.encoder(cells))


def test_matching_cannot_tell_a_negative_by_e_sam(model: MicoForPretraining) -> None:
    b = across()
    n, negatives = 6, set()
    for ids, _, _, _, corpora in matches(model, b, 10):
        there = [[set(row.tolist()) - {0} for row in rows] for rows in corpora]
        assert there[0] == there[1]
        assert there[0][:n] == [{1, 2}, {1, 2}, set(), set(), set(), set()], "two are alone"
        of = [next(i for i in range(n) if torch.equal(row, b["input_ids"][i])) for row in ids]
        negatives |= {(row, of[n + row]) for row in range(n)}
    one = {(0, 1), (1, 0)}
    assert negatives - one <= {(i, j) for i in range(2, 6) for j in range(2, 6) if i != j}
    assert one <= negatives


@pytest.mark.parametrize("objective", ["matching", "caption"])
def test_a_switch_leaves_e_sam_out(objective: str) -> None:
    b = across()
    unnamed = b | {"media_corpus": b["media_corpus"] * 0, "caption_corpus": b["caption_corpus"] * 0}
    for on in (True, False):
        config = MicoConfig.tiny()
        set_options(config, {"context_config.sampling": on})  # as a recipe's model.options
        model = pretraining_model(config=config)
        model.objective_weights = {"contrastive": 0.0, objective: 1.0}
        losses = []
        for given in (b, unnamed):
            if objective == "matching":  # of corpora alike, so that negatives are the same
                given = {
                    k: v[: 4 if k.startswith(("media", "pixel")) else 2] for k, v in given.items()
                }
            torch.manual_seed(0)
            losses.append(model(**given).loss)
        assert torch.equal(*losses) == (not on)


def test_concepts_learn_from_named_media_alone(model: MicoForPretraining) -> None:
    b = joint()
    none = model(**b, concept_labels=torch.tensor([-100, -100, -100])).concept_loss
    assert none == 0
    b["concept_labels"] = torch.tensor([2, 3, -100])  # the sounds' names follow the visual ones
    output = model(**b)
    output.concept_loss.backward()
    assert model.concepts is not None
    assert model.concepts.learned.weight.grad is not None
    assert model.concepts.learned.weight.grad.abs().sum() > 0


def test_tagging_asks_for_the_words_of_a_caption_in_any_order(model: MicoForPretraining) -> None:
    b = joint()
    ids, mask = b["input_ids"], b["attention_mask"]
    context = torch.randn(len(ids), 5, model.config.text_config.hidden_size)
    seen = torch.ones(len(ids), 5, dtype=torch.bool)

    def tagging(ids: Tensor, mask: Tensor) -> Tensor:
        return tagging_loss(model.text, ids, mask, context, seen)

    padded = F.pad(ids, (0, 3)), F.pad(mask, (0, 3))
    torch.testing.assert_close(tagging(*padded), tagging(ids, mask))
    full = torch.ones_like(mask)
    turned = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1)
    torch.testing.assert_close(tagging(turned, full), tagging(ids, full))
    # Words that the context speaks for cost less than words it speaks against.
    best = model.text.logits(context.mean(1)).argsort(-1, descending=True)
    likely, unlikely = (torch.cat([ids[:, :1], best[:, at]], 1) for at in ([0, 1], [-1, -2]))
    assert tagging(likely, full[:, :3]) < tagging(unlikely, full[:, :3])


def test_the_loss_is_the_sum_of_the_objectives(model: MicoForPretraining) -> None:
    out = model(**joint(), concept_labels=torch.tensor([0, 4, 1]))
    parts = [value for name, value in out.items() if name.endswith("_loss")]
    assert len(parts) == 5
    torch.testing.assert_close(out.loss, torch.stack(parts).sum())
    assert model(**joint()).concept_loss is None
    without = pretraining_model(concepts=False)
    assert without.concepts is None
    assert without(**joint(), concept_labels=torch.tensor([0, 3, 1])).concept_loss is None
