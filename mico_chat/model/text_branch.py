"""TextBranch: the language side of pretraining, a BERT that can look at media (paper 3.4).

It also writes captions and answers (eq. 6). It was trained to fill masks while it sees the words
before them: each new word is a mask after the words so far, and Hugging Face's beam search does the
rest. A question goes before the answer as a prefix (paper B.2), in the layout of the released
training code: ``[CLS] question [SEP]`` padded to a fixed length, then ``[CLS]`` and the answer.

Legend: B captions, S text length, N context tokens, d text width, V vocabulary, U units,
T tokens a unit, D encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from mico_chat.model.config import MicoConfig, MicoContextConfig, MicoTextConfig
from mico_chat.model.context import Units
from mico_chat.model.released import KindProjections, SubtitleProjection, of_fixed_length


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (True: look there) as numbers to add to attention scores: 0 or the lowest one.

    Plain attention adds a mask as it is, so a boolean mask would hide nothing. The number is not
    below bfloat16's lowest: autocast would make it -inf, and a token that sees nothing NaN.
    """
    lowest = max(torch.finfo(kind).min for kind in (dtype, torch.bfloat16))
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)


def attention_on(device: torch.device) -> str:
    """Hugging Face's attention for the text branch: fused, but plain on a CPU.

    On a CPU, small branches train faster with plain attention: in bfloat16, 192 captions of 16
    words over 100 tokens of media take 0.40 s instead of 0.56 s (two layers, width 128). At
    BERT-base's size both take the same time, but in bfloat16 plain attention keeps 7 GB of scores
    for the backward pass of 96 captions of 40 words over eight frames.
    """
    return "eager" if device.type == "cpu" else "sdpa"


def backwards(prefix_mask: Tensor, length: int) -> Tensor:
    """A mask (B, S, S), S the ``length``: each token looks at the prefix and at tokens before it.

    ``prefix_mask`` (B, P) is false where the prefix is padding; P may be 0.
    """
    p = prefix_mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=prefix_mask.device).tril()
    seen = seen.expand(len(prefix_mask), -1, -1).clone()
    seen[:, :, :p] = prefix_mask.bool().unsqueeze(1)
    return seen


class Corpora(NamedTuple):
    """Rows of E_Sam (eq. 3): of each text token (B, S) and of each context token (B, N).

    A medium and its caption have the row of the corpus that they were drawn from. Row 0 stands for
    none: padding, [CLS], and samples that are of one corpus as a whole.
    """

    text: Tensor
    context: Tensor


class TextBranch(nn.Module):
    """BERT with cross-attention: alone, over media, or causal over media (paper 3.4)."""

    def __init__(
        self, config: MicoTextConfig, context_dim: int, context: MicoContextConfig
    ) -> None:
        super().__init__()
        d = config.hidden_size
        self.bert = BertModel(config.bert(), add_pooling_layer=False)
        eps = config.head_norm_eps
        self.context_proj: nn.Sequential | KindProjections
        if config.frames is None:
            self.context_proj = nn.Sequential(nn.Linear(context_dim, d), nn.LayerNorm(d, eps=eps))
        else:
            self.context_proj = KindProjections(context, config, context_dim)
        self.subtitle = SubtitleProjection(d, eps) if config.subtitles else None
        self.attention: str | None = None
        """The attention of Hugging Face; None takes that of :func:`attention_on`."""
        self.use_sampling = context.sampling
        self.sampling = nn.Embedding(context.n_corpus_pairs, d, padding_idx=0)  # E_Sam, eq. (3)
        self.sampling.weight.data.mul_(0.02)
        self.head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d, eps=eps))
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    @property
    def table(self) -> nn.Embedding:
        """The word vectors, of the input and of the output."""
        return cast(nn.Embedding, self.bert.get_input_embeddings())

    def project(self, tokens: Tensor, units: Units) -> Tensor:
        """The encoder's tokens (U, T, D) in the text's width (U, T, d), for cross-attention."""
        if isinstance(self.context_proj, KindProjections):
            return cast(Tensor, self.context_proj(tokens, units))
        return cast(Tensor, self.context_proj(tokens))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        corpora: Corpora | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Captions (B, S), context (B, N, d) already projected -> hidden states (B, S, d).

        ``attention_mask`` is (B, S), true at the tokens that all look at, or (B, S, S), which
        tokens look at which (:func:`backwards`). ``corpora`` is for joint samples, eq. (3).
        ``positions`` (S,) are 0, 1, 2, ... by default.
        """
        attention = self.attention or attention_on(input_ids.device)
        if self.bert.config._attn_implementation != attention:
            self.bert.set_attn_implementation(attention)
        s = input_ids.shape[1]
        by_all = attention_mask[:, None, :] if attention_mask.dim() == 2 else attention_mask
        mask = by_all.unsqueeze(1).bool().expand(-1, 1, s, s)
        embeds = self.table(input_ids)
        cross = None
        sampled = corpora if self.use_sampling else None
        if sampled is not None:  # eq. (3)
            embeds = embeds + self.sampling(sampled.text)
        if context is not None and context_mask is not None:
            if sampled is not None:
                context = context + self.sampling(sampled.context)
            cross = additive_mask(context_mask[:, None, None, :].expand(-1, 1, s, -1), embeds.dtype)
        output = self.bert(
            inputs_embeds=embeds,
            attention_mask=additive_mask(mask, embeds.dtype),
            position_ids=None if positions is None else positions.unsqueeze(0),
            encoder_hidden_states=context,
            encoder_attention_mask=cross,
        )
        return cast(Tensor, output.last_hidden_state)

    def logits(self, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        """Logits of all words or of ``words`` (W,). The output table is the input table."""
        table: Tensor = self.table.weight
        bias: Tensor = self.head_bias
        if words is not None:
            table, bias = table[words], bias[words]
        return F.linear(self.head(hidden), table, bias)


# --- captions and answers -----------------------------------------------------------------------

QUESTION_LENGTH = 40
ANSWER_LENGTH = 10
"""Tokens of a question, with padding and marks, and of an answer at most, as in the release."""


class _NextWord(PreTrainedModel, GenerationMixin):
    """The text branch as a model of the next word."""

    main_input_name = "input_ids"
    _is_stateful = False
    _supports_sdpa = True

    def __init__(self, branch: TextBranch, mask_token_id: int) -> None:
        super().__init__(branch.bert.config)
        self.branch = branch
        self.mask_token_id = mask_token_id

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """All words anew: the mask changes its neighbours' keys, so that none can be kept."""
        return {"input_ids": input_ids, **kwargs}

    def forward(
        self,
        input_ids: Tensor,
        context: Tensor,
        context_mask: Tensor,
        prefix_mask: Tensor,
        **_: Any,
    ) -> CausalLMOutput:
        """Words (B, S) over contexts (B, N, d) to logits (B, 1, V) of the next one.

        The first tokens are a prefix where ``prefix_mask`` (B, P) is true, padding where not.
        """
        asked = torch.cat([input_ids, torch.full_like(input_ids[:, :1], self.mask_token_id)], 1)
        seen = backwards(prefix_mask, asked.shape[1])
        hidden = self.branch(asked, seen, context, context_mask)
        return CausalLMOutput(logits=cast(Any, self.branch.logits(hidden[:, -1:])))


class Writes(Protocol):
    """What captions and answers need of a model: its text branch, and its configuration."""

    text: TextBranch
    config: MicoConfig


@torch.inference_mode()
def captions(
    model: Writes,
    context: Tensor,
    context_mask: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    **options: Any,
) -> list[str]:
    """Captions of B contexts (B, N, d), which are valid where ``context_mask`` (B, N) is true.

    ``options`` are those of :func:`written`.
    """
    ids = written(model, context, context_mask, tokenizer, **options)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def written(
    model: Writes,
    context: Tensor,
    context_mask: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    opening: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    max_new_tokens: int = 40,
    num_beams: int = 3,
    length_penalty: float = 0.6,
    sample: bool = False,
) -> Tensor:
    """The ids (B, S) of :func:`captions` behind the opening, [SEP] and padding included.

    ``opening`` (B, S) is [CLS] by default; its first tokens may be a prefix with a mask (B, P).
    The beams are those of the released model (appendix B). ``sample`` draws each word at random, as
    likely as the model finds it.
    """
    if opening is None:
        opening = torch.full((len(context), 1), tokenizer.cls_token_id, device=context.device)
    if prefix_mask is None:
        prefix_mask = torch.ones(len(context), 0, dtype=torch.bool, device=context.device)
    words = _NextWord(model.text, model.config.text_config.mask_token_id)
    words.train(False)
    found = cast(Any, words).generate(
        opening,
        context=context,
        context_mask=context_mask,
        prefix_mask=prefix_mask,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        **({"do_sample": True, "top_k": 0} if sample else {"do_sample": False}),
        **({"length_penalty": length_penalty} if num_beams > 1 else {}),
        use_cache=False,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cast(Tensor, found[:, opening.shape[1] :])


def log_likelihood(
    model: Writes, ids: Tensor, mask: Tensor, context: Tensor, context_mask: Tensor
) -> Tensor:
    """Log-probabilities (B, S - 1) of the words behind the first of captions (B, S), 0 at padding.

    They are those with which :func:`written` writes, in one pass: behind the words stand as many
    masks, and the mask of a place sees itself and the words before that place.
    """
    n = ids.shape[1] - 1
    words = ids[:, :-1]
    given = torch.cat([words, torch.full_like(words, model.config.text_config.mask_token_id)], 1)
    place = torch.arange(n, device=ids.device)
    before = torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=ids.device)
    seen = torch.cat(
        [torch.cat([before, torch.zeros_like(before)], 1), torch.cat([before, itself], 1)]
    )
    over = (context, context_mask, None, torch.cat([place, place + 1]))
    hidden = model.text(given, seen.expand(len(ids), -1, -1), *over)[:, n:]
    words_wanted = ids[:, 1:].unsqueeze(-1)
    found = model.text.logits(hidden).float().log_softmax(-1).gather(-1, words_wanted).squeeze(-1)
    return found * mask[:, 1:]


def question_prefix(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, positions: int
) -> tuple[Tensor, Tensor]:
    """B questions as ids (B, P) and their mask: [CLS] question [SEP], padded to a fixed length.

    ``positions`` of the text branch hold question and answer.
    """
    room = positions - ANSWER_LENGTH - 2  # [CLS] and the mask, or [SEP]
    return of_fixed_length(questions, tokenizer, min(QUESTION_LENGTH, room))


def answers(
    model: Writes,
    context: Tensor,
    context_mask: Tensor,
    questions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_beams: int = 3,
) -> list[str]:
    """Answers of the text branch to B questions, one about each of B contexts.

    A question of more than 40 tokens loses its end, as in training. A model that was only
    pretrained has never seen a question, and continues it like a caption.
    """
    positions = model.config.text_config.max_position_embeddings
    prefix = question_prefix(questions, tokenizer, positions)
    ids, mask = (x.to(context.device) for x in prefix)
    opening = torch.cat([ids, torch.full_like(ids[:, :1], tokenizer.cls_token_id)], 1)
    options: dict[str, Any] = {"opening": opening, "prefix_mask": mask.bool()}
    options |= {"max_new_tokens": ANSWER_LENGTH, "num_beams": num_beams, "length_penalty": 1.0}
    return captions(model, context, context_mask, tokenizer, **options)
