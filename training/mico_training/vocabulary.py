"""A small WordPiece vocabulary for the text branch, learnt from the captions it will read.

BERT's vocabulary has 30,522 entries, and the captions of the mini's data lack most of them. With
384 dimensions, their table would be a third of the shipped model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mico_training.data.mixture import Mixture

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MOST_SAMPLES = 100_000


def kept_vocabulary(folder: Path, mixture: Mixture, size: int) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``; the first call learns it from the mixture's captions.

    A resumed run reads the same tokens. Each source gives at most its first ``MOST_SAMPLES``
    samples.
    """
    if not (folder / "tokenizer.json").is_file():
        captions = (
            caption
            for source in mixture.sources
            for index in range(min(len(source), MOST_SAMPLES))
            for captions in source[index].captions.values()
            for caption in captions
        )
        learn_vocabulary(captions, size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def learn_vocabulary(captions: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer of at most ``size`` entries, BERT's special tokens first."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        captions,
        trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=None,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
