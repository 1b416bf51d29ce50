"""Vectors and scores equal those of stage 1's model, alone and among other requests."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mico_chat.checkpoints.pretrained import MicoChatForConditionalGeneration
from mico_chat.errors import MediaError, RequestError
from mico_chat.media import MediaFile, Medium, Video
from mico_chat.media.kinds import KINDS
from mico_chat.model.config import MicoConfig
from mico_chat.model.pretraining import MicoForPretraining
from mico_chat.model.processing import MicoChatProcessor
from mico_chat.similarity import Item, Similarity
from tests.support.fakes import FakeDecoder
from tests.support.tiny import clip, letters, one_of_each, picture, run, sound

TEXTS = ["a cat", "a red ball", "x"]


@pytest.fixture(scope="module", params=[0, 8])
def model(
    chat: MicoChatForConditionalGeneration, request: pytest.FixtureRequest
) -> MicoForPretraining:
    """Without the concepts' names, and with them."""
    torch.manual_seed(3)
    config = MicoConfig.tiny()
    config.text_config.name_tokens = request.param
    model = MicoForPretraining(config, chat)
    if model.names is not None:
        names = ["cat", "dog", "red ball", "bell", "dog"]
        model.names.start(names, letters(), model.text.table)
    with torch.no_grad():  # matching must not be the same for all
        for weight in model.text.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model.train(False)
    return model


@pytest.fixture
def decoder() -> FakeDecoder:
    return FakeDecoder()


@pytest.fixture
def similarity(
    model: MicoForPretraining, processor: MicoChatProcessor, decoder: FakeDecoder
) -> Iterator[Similarity]:
    similarity = Similarity(lambda: (model, letters()), processor, decoder)
    yield similarity
    similarity.close()


def vectors(similarity: Similarity, items: Sequence[Item]) -> Tensor:
    return torch.from_numpy(run(similarity.embed(items)).vectors)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def encoded(
    model: MicoForPretraining, processor: MicoChatProcessor, *media: Medium
) -> tuple[Tensor, Tensor, Tensor]:
    """Context, mask and vector of a sample by stage 1's model, where sound tracks are sounds."""
    parts: list[Medium] = []
    for medium in media:
        parts += [medium]
        if isinstance(medium, Video) and medium.audio is not None:
            parts += [medium.audio]
    units = [processor.units(medium) for medium in parts]
    with torch.inference_mode():
        context, mask, pooled, _, _ = model.encode(
            torch.tensor([KINDS.index(medium.kind) for medium in parts]),
            torch.tensor([len(unit) for unit in units]),
            torch.zeros(len(parts), dtype=torch.long),
            1,
            torch.cat(units),
        )
    return context, mask, pooled[0]


def ids_of(text: str) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([letters()(text)["input_ids"]])
    return ids, torch.ones_like(ids)


def test_media_are_where_stage_1_puts_them(
    similarity: Similarity, model: MicoForPretraining, processor: MicoChatProcessor
) -> None:
    media = one_of_each()
    found = run(similarity.embed(media))
    assert found.vectors.dtype == np.float32
    assert found.vectors.shape == (len(media), similarity.dim)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    for vector, tokens, medium in zip(found.vectors, found.tokens, media, strict=True):
        context, mask, pooled = encoded(model, processor, medium)
        close(torch.from_numpy(vector), pooled)
        assert tokens == context.shape[1] == int(mask.sum())
    assert [report.kind for report in found.media] == [medium.kind for medium in media]
    assert [report.tokens for report in found.media] == list(found.tokens)


def test_media_taken_together(
    similarity: Similarity, model: MicoForPretraining, processor: MicoChatProcessor
) -> None:
    media: list[Medium] = [picture(), sound(3.0), clip(2, track=True)]
    found = run(similarity.embed([media, media[0]]))
    context, _, pooled = encoded(model, processor, *media)
    close(torch.from_numpy(found.vectors[0]), pooled)
    assert found.tokens[0] == context.shape[1]
    assert len(found.media) == 4
    assert not np.allclose(found.vectors[0], found.vectors[1], atol=1e-3)


def test_texts_are_where_stage_1_puts_them(
    similarity: Similarity, model: MicoForPretraining
) -> None:
    found = run(similarity.embed(TEXTS))
    assert (found.tokens, found.media) == (tuple(map(len, TEXTS)), ())
    assert run(similarity.embed(["x" * similarity.max_tokens])).tokens == (64,)
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        with torch.inference_mode():
            close(torch.from_numpy(vector), model.encode_text(*ids_of(text))[0])


def test_together_equals_alone_in_any_order(similarity: Similarity) -> None:
    items: list[Item] = [*one_of_each()]
    items += ["word " * (n % 7 + 1) for n in range(40)]
    items = [items[place] for place in np.random.default_rng(0).permutation(len(items))]
    together = vectors(similarity, items)
    for item, vector in zip(items, together, strict=True):
        close(vectors(similarity, [item])[0], vector)


def test_typed_text_is_never_markup(similarity: Similarity) -> None:
    assert run(similarity.embed(["<|im_end|>"])).tokens == (len("<|im_end|>"),)


def test_scores_are_cosines_and_matches(
    similarity: Similarity, model: MicoForPretraining, processor: MicoChatProcessor
) -> None:
    media: list[Medium] = [picture(1), clip(3, track=True)]
    items: list[Item] = [*TEXTS, *media]
    scored = run(similarity.score(items, items))
    cosines = vectors(similarity, items) @ vectors(similarity, items).T
    matches = set()
    for q, row in enumerate(scored.scores):
        for d, score in enumerate(row):
            assert score.similarity == pytest.approx(float(cosines[q, d]), abs=1e-5)
            assert -1 <= score.similarity <= 1
            if (q < len(TEXTS)) == (d < len(TEXTS)):
                assert score.match is None
                continue
            text, medium = TEXTS[min(q, d)], media[max(q, d) - len(TEXTS)]
            context, mask, _ = encoded(model, processor, medium)
            ids, seen = ids_of(text)
            with torch.inference_mode():
                logit = model.match(ids, seen, context, mask)
            assert score.match == pytest.approx(float(logit.sigmoid()), abs=1e-5)
            matches.add(round(score.match or 0.0, 4))
    assert len(matches) == len(TEXTS) * len(media)
    turned = [[row[q].match for row in scored.scores] for q in range(len(items))]
    assert turned == [[score.match for score in row] for row in scored.scores]
    assert len(scored.tokens) == 2 * len(items)


def test_many_texts_are_matched_in_several_steps(
    similarity: Similarity, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["word " * (n % 5 + 1) for n in range(20)]
    documents: list[Item] = [picture(), clip(3)]
    whole = run(similarity.score(texts, documents))
    monkeypatch.setattr("mico_chat.similarity.CONTEXT_AT_ONCE", 20)
    monkeypatch.setattr("mico_chat.similarity.TEXTS_AT_ONCE", 3)
    for row, again in zip(
        whole.scores, run(similarity.score(texts, documents)).scores, strict=True
    ):
        for one, other in zip(row, again, strict=True):
            assert one.similarity == pytest.approx(other.similarity, abs=1e-5)
            assert one.match == pytest.approx(other.match, abs=1e-5)


def test_a_medium_is_encoded_once_for_vectors_and_scores(
    similarity: Similarity, decoder: FakeDecoder
) -> None:
    one = MediaFile("image", b"one", name="one.png")
    first = run(similarity.embed([one]))
    scored = run(similarity.score([one, "a"], ["b", one]))
    assert len(decoder.decoded) == 1
    assert first.media[0].cached is False
    assert [(r.name, r.cached, r.decode_ms) for r in scored.media] == [("one.png", True, None)] * 2
    stats = similarity._encoder.cache.stats()
    assert (stats.entries, stats.misses) == (1, 1)
    assert 0 < stats.bytes <= stats.max_bytes


def test_tenants_share_nothing(similarity: Similarity, decoder: FakeDecoder) -> None:
    one = MediaFile("image", b"one")
    for tenant in ("", "a", "b"):
        assert run(similarity.embed([one], tenant=tenant)).media[0].cached is False
        assert run(similarity.score([one], ["x"], tenant=tenant)).media[0].cached is True
    assert len(decoder.decoded) == 3


SHOWN = MediaFile("image", b"one")


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "input: expected at least one"),
        (["a", ""], r"input\[1\]: the text is empty"),
        (["a", []], r"input\[1\]: .*got an empty list"),
        ([["a", SHOWN]], r"input\[0\]: an item holds both text and media, but one encoder"),
        ([["a", "b"]], r"input\[0\]: .* give each text as an item"),
        (["\ud800"], r"input\[0\]: character 0 is half of a surrogate"),
        (["a", "x" * 65], r"input\[1\]: the text has 65 tokens, more than the text branch's 64"),
    ],
)
def test_bad_items_are_named_before_anything_is_decoded(
    similarity: Similarity, decoder: FakeDecoder, items: list[Any], said: str
) -> None:
    with pytest.raises(RequestError, match=f"^{said}") as caught:
        run(similarity.embed([*items, SHOWN] if items else [], name="input"))
    assert str(caught.value).startswith(f"{caught.value.param}: ")
    names = ("queries", "documents")
    with pytest.raises(RequestError, match=r"^documents"):
        run(similarity.score([SHOWN], items, names=names))
    assert decoder.decoded == []


def test_a_broken_medium_is_named(similarity: Similarity) -> None:
    for kind in KINDS:
        broken = MediaFile(kind, b"broken", name="b.dat")
        with pytest.raises(MediaError, match=r"^b\.dat: not a"):
            run(similarity.score(["a"], [SHOWN, broken]))
    assert run(similarity.score(["a"], [SHOWN])).scores[0][0].match is not None


def test_requests_at_once_do_not_mix(similarity: Similarity) -> None:
    groups: list[list[Item]] = [[picture(n), "x" * (n + 1)] for n in range(6)]
    groups += [[MediaFile("image", b"broken"), "a"], [""]]

    async def together() -> list[Any]:
        requests = (similarity.embed(group) for group in groups)
        return await asyncio.gather(*requests, return_exceptions=True)

    *found, broken, refused = run(together())
    for group, embedded in zip(groups, found, strict=False):
        close(torch.from_numpy(embedded.vectors), vectors(similarity, group))
    assert isinstance(broken, MediaError)
    assert isinstance(refused, RequestError)
