"""The concepts' names in the contrastive space: a medium is near what the stem recognises in it."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mico_chat.errors import ModelError
from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoConfig
from mico_chat.model.mini.names import ConceptNames
from mico_chat.model.pretraining import OBJECTIVES, EncodedContexts, MicoForPretraining
from tests.support.tiny import SIDE, captions, letters, pretraining_model

VISUAL, SOUND = ["cat", "dog", "red ball"], ["bell", "dog"]
IMAGE, AUDIO, VIDEO = (KINDS.index(kind) for kind in ("image", "audio", "video"))


def named_model() -> tuple[MicoForPretraining, ConceptNames]:
    """The tiny model with names. Its grid, like a photograph's to the mini, says nothing."""
    torch.manual_seed(0)
    config = MicoConfig.tiny()
    config.text_config.name_tokens = len("red ball")
    model = MicoForPretraining(config)
    assert model.names is not None
    model.names.start([*VISUAL, *SOUND], letters(), model.text.table)
    with torch.no_grad():
        for projection in (model.media_projection, model.text_projection):
            assert isinstance(projection, torch.nn.Linear)
            projection.weight.zero_()
    model.train(False)
    return model, model.names


def recognise(model: MicoForPretraining, name: str) -> None:
    """Make the stem see or hear a name in everything."""
    assert model.concepts is not None
    sound = model.concepts.sound[-1]
    assert isinstance(sound, torch.nn.Linear)
    heads = (model.concepts.classifier, model.concepts.learned, sound)
    biases = torch.tensor([50.0 * (known == name) for known in [*VISUAL, *SOUND]]).split([2, 1, 2])
    with torch.no_grad():
        for head, bias in zip(heads, biases, strict=True):
            head.weight.zero_()
            head.bias.copy_(bias)


def encode(
    model: MicoForPretraining, kinds: Sequence[int], units: Sequence[int]
) -> EncodedContexts:
    """Random media, each a sample of its own."""
    n = len(kinds)
    pixels = torch.randn(sum(units), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return model.encode(torch.tensor(kinds), torch.tensor(units), torch.arange(n), n, pixels)


def texts(model: MicoForPretraining, words: Sequence[str]) -> Tensor:
    batch = letters()(list(words), padding=True, return_tensors="pt")
    return model.encode_text(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize(
    ("kind", "units", "names"), [(IMAGE, 1, VISUAL), (VIDEO, 3, VISUAL), (AUDIO, 2, SOUND)]
)
def test_a_medium_is_nearest_to_the_name_that_the_stem_recognises(
    kind: int, units: int, names: list[str]
) -> None:
    model, _ = named_model()
    for number, name in enumerate(names):
        recognise(model, name)
        with torch.inference_mode():
            cosines = encode(model, [kind], [units]).pooled @ texts(model, names).T
        assert int(cosines.argmax()) == number
        assert float(cosines.max()) == pytest.approx(1, abs=1e-4)


def test_a_word_of_low_score_moves_a_text_little() -> None:
    model, names = named_model()
    plain, other = texts(model, ["dog", "xxxxdog"]).detach()
    with torch.no_grad():
        names.score.weight[letters()("x")["input_ids"][0]] = -20
    assert plain @ other < 0.9
    assert float(texts(model, ["xxxxdog"])[0].detach() @ plain) == pytest.approx(1, abs=1e-4)


def test_a_clip_is_the_mean_of_its_frames_and_slices_share_a_sound() -> None:
    model, names = named_model()
    encoded = encode(model, [VIDEO, AUDIO], [3, 2])
    assert encoded.tokens.shape[1] == model.unit_length
    assert model.concepts is not None
    kind, units = torch.tensor([VIDEO, AUDIO]), torch.tensor([3, 2])
    table = model.text.table
    tokens = names.tokens(model.concepts, encoded.features, kind, units, table)[:, 0]
    torch.testing.assert_close(tokens[3], tokens[4])
    assert not torch.allclose(tokens[0], tokens[1])
    mean = names.words(tokens[:3, : names.words.in_features].mean(0))
    torch.testing.assert_close(encoded.pooled[0], mean / mean.norm(), atol=1e-5, rtol=1e-4)


def test_the_gate_closes_the_names_of_a_kind_alone() -> None:
    model, names = named_model()
    open_ = encode(model, [IMAGE, VIDEO], [1, 2]).pooled
    with torch.no_grad():
        names.gate[VIDEO] = 0
    closed = encode(model, [IMAGE, VIDEO], [1, 2]).pooled
    torch.testing.assert_close(open_[0], closed[0])
    assert closed[1].abs().max() == 0


def test_contrast_and_matching_train_the_names() -> None:
    ids, mask = captions(3, 6)
    for objective in ("contrastive", "matching"):
        model, names = named_model()
        assert isinstance(model.media_projection, torch.nn.Linear)
        torch.nn.init.normal_(model.media_projection.weight)
        model.objective_weights = dict.fromkeys(OBJECTIVES, 0.0) | {objective: 1.0}
        pixels = torch.randn(3, 3, SIDE, SIDE)
        kind, units = torch.full((3,), IMAGE), torch.ones(3, dtype=torch.long)
        model(ids, mask, kind, units, torch.arange(3), pixel_values=pixels).loss.backward()
        table = model.text.table
        reached = [names.log_scale, names.score.weight, table.weight]
        if objective == "contrastive":
            reached += [names.gate, names.words.weight]
        for parameter in reached:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def test_without_names_a_model_is_as_it_was() -> None:
    plain, (model, names) = pretraining_model(), named_model()
    assert plain.names is None
    assert plain.unit_length == model.unit_length - 1
    weights = plain.state_dict()
    assert not [name for name in weights if name.startswith("names.")]
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        names.gate.zero_()
        names.words.weight.zero_()
        names.words.bias.zero_()
    before, after = (encode(one, [IMAGE, AUDIO], [1, 2]) for one in (plain, model))
    assert torch.equal(before.pooled, after.pooled)
    assert torch.equal(before.tokens, after.tokens[:, :-1])
    assert torch.equal(texts(plain, ["dog"]), texts(model, ["dog"]))


def test_a_model_that_has_no_place_for_names_is_refused() -> None:
    config = MicoConfig.tiny()
    config.text_config.name_tokens, config.text_config.hidden_size = 4, 64
    with pytest.raises(ModelError, match="set name_tokens to 0"):
        MicoForPretraining(config)
    config.concept_config = None
    with pytest.raises(ModelError, match="concept_config has no names"):
        MicoForPretraining(config)
