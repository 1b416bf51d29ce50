"""Answers by the generation head: the layout of question and answer, and batches of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mico_chat.evaluation.pretrained import PretrainedModel
from mico_chat.model.contrastive import MediaContext
from mico_chat.model.text_branch import ANSWER_LENGTH, QUESTION_LENGTH, _NextWord, answers

QUESTIONS = ("what is it?", "a red square, a blue square, a green square?", "it")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> PretrainedModel:
    """A model with large random weights: with small weights, attention is the same everywhere."""
    found = PretrainedModel(str(model_folder), device="cpu")
    with torch.no_grad():
        for name, weight in found.model.text.bert.encoder.named_parameters():
            if weight.dim() == 2 and "LayerNorm" not in name:
                weight.mul_(8)
    return found


@pytest.fixture(scope="module")
def contexts(model: PretrainedModel) -> list[MediaContext]:
    generator = torch.Generator().manual_seed(1)
    d = model.model.text.bert.config.hidden_size
    items = [torch.randn(n, d, generator=generator) * 3 for n in (4, 9, 6)]
    return [MediaContext(item, item[0]) for item in items]


def asked(model: PretrainedModel, question: str, said: Sequence[int] = ()) -> Tensor:
    """The ids of [CLS] question [SEP] padding [CLS] and the words of the answer so far."""
    ids = model.tokenizer(question, split_special_tokens=True)["input_ids"]
    padding = [model.tokenizer.pad_token_id] * (QUESTION_LENGTH - len(ids))
    return torch.tensor([[*ids, *padding, model.tokenizer.cls_token_id, *said]])


def next_word(model: PretrainedModel, ids: Tensor, context: Tensor, question: Tensor) -> Tensor:
    mask_id = model.tokenizer.mask_token_id
    seen = torch.ones(1, len(context), dtype=torch.bool)
    words = _NextWord(model.model.text, mask_id).train(False)
    with torch.inference_mode():
        logits = words(ids, context[None], seen, question).logits
    assert isinstance(logits, Tensor)
    return logits[0, 0]


@pytest.mark.parametrize("said", [[], [7], [7, 9, 8]])
def test_the_layout_of_a_question_and_its_answer(
    model: PretrainedModel, contexts: list[MediaContext], said: list[int]
) -> None:
    ids = asked(model, QUESTIONS[0], said)
    n_question = len(model.tokenizer(QUESTIONS[0])["input_ids"])
    question = torch.arange(QUESTION_LENGTH)[None] < n_question
    found = next_word(model, ids, contexts[1].context, question)
    # The same by hand: for each token, the tokens that it attends to.
    full = torch.cat([ids, torch.tensor([[model.tokenizer.mask_token_id]])], 1)
    length = full.shape[1]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for place in range(length):
        for other in range(length):
            answer_back = QUESTION_LENGTH <= other <= place
            allowed[place, other] = other < n_question or answer_back
    branch = model.model.text
    embeds = branch.bert.get_input_embeddings()(full)
    minus = torch.finfo(torch.float32).min
    with torch.inference_mode():
        hidden = branch.bert(
            inputs_embeds=embeds,
            attention_mask=torch.zeros(1, 1, length, length).masked_fill(~allowed, minus),
            encoder_hidden_states=contexts[1].context[None],
        ).last_hidden_state
        wanted = branch.logits(hidden[0, -1])
    assert torch.allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_answers_as_one_by_one(
    model: PretrainedModel, contexts: list[MediaContext], beams: int
) -> None:
    longest = max(len(item.context) for item in contexts)
    d = contexts[0].context.shape[1]
    context = torch.full((3, longest, d), 50.0)  # no token may attend to this padding
    seen = torch.zeros(3, longest, dtype=torch.bool)
    for row, item in enumerate(contexts):
        context[row, : len(item.context)] = item.context
        seen[row, : len(item.context)] = True
    tokenizer = model.tokenizer
    together = answers(model.model, context, seen, QUESTIONS, tokenizer, num_beams=beams)
    alone = []
    for item, question in zip(contexts, QUESTIONS, strict=True):
        all_seen = torch.ones(1, len(item.context), dtype=torch.bool)
        alone += answers(
            model.model, item.context[None], all_seen, [question], tokenizer, num_beams=beams
        )
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("question", ["[SEP] [CLS] [MASK] what", "it " * 500, "猫", "?"])
def test_odd_questions_are_answered(
    model: PretrainedModel, contexts: list[MediaContext], question: str
) -> None:
    (said,) = model.answer(contexts[:1], [question])
    words = model.tokenizer(said, add_special_tokens=False)["input_ids"]
    assert len(words) <= 2 * ANSWER_LENGTH
    ids = asked(model, question[:60])[0].tolist()
    assert ids.count(model.tokenizer.sep_token_id) == 1
